"""All linear layers of a model in order, as a step of the engine reads them."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from bench.suites import real_model, shapes
from stateful_kv.models import packing
from stateful_kv.models.llama import Linear
from stateful_kv.models.packing import PackedWeight

# Linear layers of one transformer layer: fused qkv, o, fused gate-up, down.
PER_LAYER = len(shapes.LAYER_SHAPES)


class Walk:
    """The linear layers of a model, head last.

    Attributes:
        linears: as the loader makes them.
        num_bytes: bytes that one walk reads.
    """

    def __init__(self, linears: list[Linear]) -> None:
        self.linears = linears
        self.num_bytes = sum(part.nbytes for linear in linears for part in linear.parts)

    def inputs(self, num_rows: int, head_rows: int) -> list[Tensor]:
        """float32[rows, K] of each layer; layers of one shape share theirs."""
        rows = [num_rows] * (len(self.linears) - 1) + [head_rows]
        widths = [linear.parts[0].in_features for linear in self.linears]
        by_shape = {key: torch.randn(key) for key in sorted(set(zip(rows, widths, strict=True)))}
        return [by_shape[key] for key in zip(rows, widths, strict=True)]

    def ours(self, index: int, x: Tensor) -> Tensor:
        """Product of x float32[N, K] with layer `index`."""
        return self.linears[index](x)

    @cached_property
    def plain(self) -> list[Tensor]:
        """The same weights for a peer: float32[out, in]."""
        return [
            torch.cat([packing.unpack(part) for part in linear.parts]) for linear in self.linears
        ]


def _random_weight(out_features: int, in_features: int, weight_format: str) -> PackedWeight:
    weight = torch.randn(out_features, in_features) * in_features**-0.5
    if weight_format == "int8":
        return packing.pack_int8(*packing.quantize_int8(weight))
    return packing.pack_int4(*packing.quantize_int4(weight))


def _random(weight_format: str, num_layers: int) -> list[Linear]:
    """Shapes and formats of the default model's file, for where it is not installed."""
    layer_format = "int8" if weight_format == "int8" else "int4"
    weights = [_random_weight(*shape, layer_format) for shape in shapes.LAYER_SHAPES * num_layers]
    return [Linear((weight,)) for weight in (*weights, _random_weight(*shapes.HEAD_SHAPE, "int8"))]


@lru_cache(maxsize=1)
def load(weight_format: str, num_layers: int) -> tuple[Walk, str]:
    """The first layers and the head of the default model, and where the weights come from.

    Args:
        weight_format: "auto" (4-bit layers and an 8-bit head, as in the file) or "int8".
        num_layers: transformer layers to keep.
    """
    if not real_model.is_installed():
        return Walk(_random(weight_format, num_layers)), "random"
    weights = real_model.load(weight_format).model.weights
    linears = [
        linear
        for layer in weights.layers[:num_layers]
        # The product alone, without the activation: that is what the peers compute too.
        for linear in (layer.qkv, layer.o, replace(layer.gate_up, has_silu_mul=False), layer.down)
    ]
    return Walk([*linears, weights.head]), real_model.MODEL
