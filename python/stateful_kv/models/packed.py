"""A linear layer with packed weights, multiplied by our own kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stateful_kv import ops
from stateful_kv.models.packing import PANEL, PackedWeight
from stateful_kv.system.memory import HugePageArena


@dataclass(frozen=True)
class Linear:
    """y = x @ w.T + bias over packed weights, or silu(gate) * up of such a product.

    Attributes:
        parts: weights whose outputs follow each other; more than one only where a file stores
            projections that belong together in different formats.
        bias: float32[out] of all parts together, or None.
        has_silu_mul: the product is a gate and what it opens; the result is half as wide. With
            one part their panels alternate, with several the gate comes first.
    """

    parts: tuple[PackedWeight, ...]
    bias: Tensor | None = None
    has_silu_mul: bool = False

    @staticmethod
    def fuse(weights: Sequence[PackedWeight], biases: Sequence[Tensor | None]) -> Linear:
        """Joins projections of one input; neighbours of one format become one product.

        Args:
            weights: in the order of their outputs.
            biases: float32[out] or None for each weight.
        """
        runs: list[list[PackedWeight]] = []
        for weight in weights:
            if runs and runs[-1][-1].can_precede(weight):
                runs[-1].append(weight)
            else:
                runs.append([weight])
        parts = tuple(PackedWeight.concat(run) for run in runs)
        return Linear(parts, _join_biases(weights, biases))

    @staticmethod
    def gate_up(
        gate: PackedWeight, up: PackedWeight, biases: Sequence[Tensor | None] = (None, None)
    ) -> Linear:
        """Joins the two projections of a gated feed-forward layer.

        Args:
            gate: E -> F.
            up: E -> F.
            biases: float32[F] or None for each.
        """
        bias = _join_biases((gate, up), biases)
        if not gate.can_precede(up) or gate.out_features != up.out_features:
            return Linear((gate, up), bias, has_silu_mul=True)
        if bias is not None:
            bias = bias.view(2, -1, PANEL).transpose(0, 1).flatten()
        return Linear((PackedWeight.interleave(gate, up),), bias, has_silu_mul=True)

    @property
    def out_features(self) -> int:
        """Width of the result."""
        width = sum(part.out_features for part in self.parts)
        return width // 2 if self.has_silu_mul else width

    def placed_in(self, arena: HugePageArena) -> Linear:
        """Returns the same with its weights copied into `arena`."""
        return replace(self, parts=tuple(part.placed_in(arena) for part in self.parts))

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        norm_weight: Tensor | None = None,
        norm_eps: float = 0.0,
    ) -> Tensor:
        """Computes float32[N, out] from float32[N, K].

        Args:
            x: the input.
            residual: float32[N, out] to add, or None.
            norm_weight: float32[K] where x is to be normalised first, or None.
            norm_eps: for that norm.
        """
        if len(self.parts) == 1:
            w = self.parts[0]
            return ops.quantized_linear(
                x,
                w.weight,
                w.scales,
                w.minimums,
                self.bias,
                w.out_features,
                residual,
                norm_weight,
                norm_eps,
                self.has_silu_mul,
            )
        if norm_weight is not None:
            x = ops.rms_norm(x, norm_weight, norm_eps)
        biases: Sequence[Tensor | None] = (None,) * len(self.parts)
        if self.bias is not None:
            biases = torch.split(self.bias, [part.out_features for part in self.parts])
        results = [
            ops.quantized_linear(x, w.weight, w.scales, w.minimums, bias, w.out_features)
            for w, bias in zip(self.parts, biases, strict=True)
        ]
        joined = torch.cat(results, dim=1)
        if self.has_silu_mul:
            joined = ops.silu_mul(joined)
        return joined if residual is None else joined.add_(residual)

    def top_k(
        self, x: Tensor, k: int, norm_weight: Tensor, norm_eps: float
    ) -> tuple[Tensor, Tensor]:
        """The k largest of each row that a call would give; for a product of one part.

        Args:
            x: float32[N, K], the input.
            k: from 1 to 64, at most out.
            norm_weight: float32[K], x is normalised first.
            norm_eps: for that norm.

        Returns:
            ids: int64[N, k], largest first, of equals the lowest first.
            values: float32[N, k].
        """
        (w,) = self.parts
        return ops.linear_top_k(
            x, w.weight, w.scales, w.minimums, self.bias, w.out_features, k, norm_weight, norm_eps
        )


def _join_biases(weights: Sequence[PackedWeight], biases: Sequence[Tensor | None]) -> Tensor | None:
    """float32[out of all], zeros where a weight has none; None if no weight has one."""
    if all(bias is None for bias in biases):
        return None
    pairs = zip(weights, biases, strict=True)
    return torch.cat([torch.zeros(w.out_features) if b is None else b for w, b in pairs])
