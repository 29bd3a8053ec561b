"""Plain torch: `F.linear` on unpacked weights, in float32 or bfloat16."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class TorchLinear:
    """Weights of one walk, [out, in] each, in one dtype."""

    def __init__(self, weights: Sequence[Tensor], dtype: torch.dtype) -> None:
        self._weights = [weight.to(dtype) for weight in weights]
        self._dtype = dtype

    def __call__(self, index: int, x: Tensor) -> Tensor:
        """Product of x float32[N, K] with weight `index`, in the dtype of the weights."""
        return torch.nn.functional.linear(x.to(self._dtype), self._weights[index])
