"""Plain torch: `F.linear` on unpacked weights, and torch's own product with int8 weights.

float32 is exact. bfloat16 reads half the bytes and may use the matrix units of the CPU. The int8
product (`torch._weight_int8pack_mm`, which torch's quantised models run on a CPU) reads a quarter
and takes activations in bfloat16; its weights have one scale for each output. The last two round,
so they are compared with a tolerance for that. torch's 4-bit product for CPUs was not tried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TOLERANCE = 3e-2  # of bfloat16 and int8 beside float32, relative to the largest value


class TorchLinear:
    """Weights of one walk, [out, in] each, in one dtype."""

    def __init__(self, weights: Sequence[Tensor], dtype: torch.dtype) -> None:
        self._weights = [weight.to(dtype) for weight in weights]
        self._dtype = dtype

    def __call__(self, index: int, x: Tensor) -> Tensor:
        """Product of x float32[N, K] with weight `index`, in the dtype of the weights."""
        return torch.nn.functional.linear(x.to(self._dtype), self._weights[index])


class TorchInt8Linear:
    """Weights of one walk in int8, a scale for each output."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._parts = [_to_int8(weight) for weight in weights]

    def __call__(self, index: int, x: Tensor) -> Tensor:
        """Product of x float32[N, K] with weight `index`, in bfloat16."""
        return torch._weight_int8pack_mm(x.to(torch.bfloat16), *self._parts[index])


def _to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = weight.abs().amax(dim=1).clamp_(min=1e-12) / 127
    quantised = torch.round(weight / scales[:, None]).to(torch.int8)
    return quantised, scales.to(torch.bfloat16)


def head_ways(weight: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Products of x float32[N, K] with one weight, by name; results in float32."""
    sides = {
        "float32": TorchLinear([weight], torch.float32),
        "bfloat16": TorchLinear([weight], torch.bfloat16),
        "int8": TorchInt8Linear([weight]),
    }
    return {
        name: lambda x, side=side: side(0, x).float()  # type: ignore[misc]
        for name, side in sides.items()
    }
