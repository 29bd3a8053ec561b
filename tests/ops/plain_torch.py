"""What a torch user would write: the yardstick of the tolerances."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
) -> Tensor:
    """Attention of the last rows of one sequence in the dtype of the query.

    query [rows, H, D]; keys and values [L, Hk, D] in any dtype.
    """
    rows, num_heads, _ = query.shape
    length, num_kv_heads, _ = keys.shape
    group = num_heads // num_kv_heads
    keys = keys.to(query.dtype).repeat_interleave(group, dim=1).transpose(0, 1)
    values = values.to(query.dtype).repeat_interleave(group, dim=1).transpose(0, 1)
    scores = query.transpose(0, 1) @ keys.transpose(1, 2) * scale
    if soft_cap > 0:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    positions = torch.arange(length - rows, length, device=query.device)[:, None]
    key_positions = torch.arange(length, device=query.device)[None, :]
    mask = key_positions <= positions
    if sliding_window > 0:
        mask &= key_positions > positions - sliding_window
    scores = scores.masked_fill(~mask, float("-inf"))
    return (torch.softmax(scores, dim=-1) @ values).transpose(0, 1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The usual three-line norm."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu of the first half times the second half."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def rotate(x: Tensor, positions: Tensor, cos_sin: Tensor) -> Tensor:
    """Half-split rotary embedding of x [N, heads, D]."""
    cos, sin = cos_sin[positions.long()].chunk(2, dim=-1)
    low, high = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)
