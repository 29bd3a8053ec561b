"""Plain torch: `F.linear` on unpacked weights, and torch's own products with quantised weights.

float32 is exact. bfloat16 reads half the bytes and may use the matrix units of the CPU. The int8
product (`torch._weight_int8pack_mm`) reads a quarter and has one scale for each output; the int4
product (`torch._weight_int4pack_mm_for_cpu`) reads an eighth and has a scale and an offset for each
32 inputs, as blocks of Q4_1 have. torch's quantised models run these two on a CPU; both take
activations in bfloat16. All but the first round, so they are compared with a tolerance for that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

# Of the largest value, beside float32: bfloat16 is off by 0.7 % on the default model, int4 by 1 %,
# int8 by 4.3 %, for want of scales within an output.
TOLERANCE = 6e-2
INT4_GROUP = 32


class TorchLinear:
    """Weights of one walk, [out, in] each, in one dtype."""

    def __init__(self, weights: Sequence[Tensor], dtype: torch.dtype) -> None:
        self._weights = [weight.to(dtype) for weight in weights]
        self._dtype = dtype

    def __call__(self, index: int, x: Tensor) -> Tensor:
        """Product of x float32[N, K] with weight `index`, in the dtype of the weights."""
        return torch.nn.functional.linear(x.to(self._dtype), self._weights[index])


class TorchInt8Linear:
    """Weights of one walk in int8, a scale for each output; rounded at the first call."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._plain = weights

    @cached_property
    def _parts(self) -> list[tuple[Tensor, Tensor]]:
        return [_to_int8(weight) for weight in self._plain]

    def __call__(self, index: int, x: Tensor) -> Tensor:
        """Product of x float32[N, K] with weight `index`, in bfloat16."""
        return torch._weight_int8pack_mm(x.to(torch.bfloat16), *self._parts[index])


class TorchInt4Linear:
    """Weights of one walk in int4, the last one (the head) in int8; rounded at the first call."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._plain = weights
        self._head = TorchInt8Linear(weights[-1:])

    @cached_property
    def _parts(self) -> list[tuple[Tensor, Tensor]]:
        return [_to_int4(weight) for weight in self._plain[:-1]]

    def __call__(self, index: int, x: Tensor) -> Tensor:
        """Product of x float32[N, K] with weight `index`, in bfloat16."""
        if index == len(self._plain) - 1:
            return self._head(0, x)
        packed, scales = self._parts[index]
        return torch._weight_int4pack_mm_for_cpu(x.to(torch.bfloat16), packed, INT4_GROUP, scales)


def _to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = weight.abs().amax(dim=1).clamp_(min=1e-12) / 127
    quantised = torch.round(weight / scales[:, None]).to(torch.int8)
    return quantised, scales.to(torch.bfloat16)


def _to_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Packed weight, and scale and offset bfloat16[K / 32, N, 2]: w = (q - 8) * scale + offset."""
    num_out, num_in = weight.shape
    groups = weight.view(num_out, num_in // INT4_GROUP, INT4_GROUP)
    least, most = groups.amin(-1), groups.amax(-1)
    scales = ((most - least) / 15).clamp_(min=1e-12)
    quantised = ((groups - least[..., None]) / scales[..., None]).round_().clamp_(0, 15)
    packed = torch._convert_weight_to_int4pack_for_cpu(
        quantised.to(torch.int32).view(num_out, num_in), 1
    )
    both = torch.stack([scales, least + 8 * scales], dim=-1).transpose(0, 1)
    return packed, both.contiguous().to(torch.bfloat16)


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
