"""Ops on each row of activations alone: norm and gate."""

from __future__ import annotations

import torch
from torch import Tensor

_ops = torch.ops.stateful_kv


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of the last dimension: x / sqrt(mean(x^2) + eps) * weight.

    Args:
        x: float32|float16|bfloat16[..., E], E contiguous, the leading dimensions folding into at
            most two strides - so the heads of a fused projection are read in place.
        weight: float32|float16|bfloat16[E], contiguous - also in another dtype than x.
        eps: a number >= 0 that float32 can hold.

    Returns:
        Dtype and shape of x, contiguous; computed in float32 and rounded once.
    """
    result: Tensor = _ops.rms_norm.default(x, weight, eps)
    return result


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm` of the sum of an input and the residual it is added to, in one pass.

    Args:
        x: as in `rms_norm`.
        residual: dtype and shape of x, contiguous.
        weight: as in `rms_norm`.
        eps: as in `rms_norm`.

    Returns:
        normalised: `rms_norm(sum, weight, eps)`, bit for bit; dtype and shape of x, contiguous.
        sum: residual + x, rounded once to their dtype, contiguous - the next residual.
    """
    result: tuple[Tensor, Tensor] = _ops.add_rms_norm.default(x, residual, weight, eps)
    return result


def silu_mul(gate_up: Tensor) -> Tensor:
    """Gate of a feed-forward layer: silu(first F) * last F, silu(x) = x / (1 + e^-x).

    Args:
        gate_up: float32|float16|bfloat16[N, 2F], last dimension contiguous.

    Returns:
        [N, F] in the dtype of gate_up; computed in float32 and rounded once.
    """
    result: Tensor = _ops.silu_mul.default(gate_up)
    return result
