"""Ops on each row of activations alone: norm and gate."""

from __future__ import annotations

import torch
from torch import Tensor

from stateful_kv.ops._fake import check_devices, fake

_ops = torch.ops.stateful_kv


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """Root-mean-square norm of the last dimension: x / sqrt(mean(x^2) + eps) * weight.

    With a residual, x is added to it first, rounded once to its dtype, and the sum is what is
    normalised: `residual += x; return rms_norm(residual, weight, eps)` in one pass. It is the one
    op that writes an argument and returns a result.

    Args:
        x: float32|float16|bfloat16[..., E], E contiguous, the leading dimensions folding into at
            most two strides - so the heads of a fused projection are read in place.
        weight: float32|float16|bfloat16[E], contiguous - also in another dtype than x.
        eps: a number >= 0 that float32 can hold.
        residual: dtype and shape of x, contiguous, memory of its own, or None - written in place.

    Returns:
        Dtype and shape of x, contiguous; computed in float32 and rounded once.
    """
    result: Tensor = _ops.rms_norm.default(x, weight, eps, residual)
    return result


@fake("rms_norm")
def _(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    check_devices("rms_norm", x.device, weight=weight, residual=residual)
    return x.new_empty(x.shape)


def silu_mul(gate_up: Tensor) -> Tensor:
    """Gate of a feed-forward layer: silu(first F) * last F, silu(x) = x / (1 + e^-x).

    Args:
        gate_up: float32|float16|bfloat16[N, 2F], last dimension contiguous.

    Returns:
        [N, F] in the dtype of gate_up; computed in float32 and rounded once.
    """
    result: Tensor = _ops.silu_mul.default(gate_up)
    return result


@fake("silu_mul")
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
