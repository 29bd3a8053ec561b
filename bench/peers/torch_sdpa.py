"""Plain torch: scaled dot product attention over contiguous K and V of one sequence.

The peer is spared the paging: K and V lie contiguous, and the mask of a causal extend is built
beforehand.
"""

from __future__ import annotations

import torch
from torch import Tensor


def causal_mask(num_rows: int, seq_len: int) -> Tensor | None:
    """bool[num_rows, seq_len] of the last rows of a sequence; None when every key is seen."""
    if num_rows == 1:
        return None
    positions = torch.arange(seq_len - num_rows, seq_len)
    return torch.arange(seq_len)[None, :] <= positions[:, None]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """q [1, H, N, D], k and v [1, Hk, L, D] -> [1, H, N, D]."""
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, enable_gqa=True
    )
