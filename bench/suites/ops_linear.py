"""quantized_linear: all linear layers of SmolLM2 in order, as a step of the engine reads them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial

import torch
from torch import Tensor

from bench import harness
from bench.harness import Case, Settings, Trial, Work
from bench.peers.torch_linear import TorchLinear
from bench.suites import shapes
from stateful_kv import ops, quantize

# Up to this many rows every row needs logits (decode, verify); above, only the last (prefill).
MAX_HEAD_ROWS = 8


class _Walk:
    """Packed weights of the whole model, and the same weights for the peers."""

    def __init__(self, weight_format: str, num_layers: int) -> None:
        generator = torch.Generator().manual_seed(7)
        sizes = [*shapes.LAYER_SHAPES * num_layers, shapes.HEAD_SHAPE]
        self.packed, self.plain = [], []
        for out_features, in_features in sizes:
            weight = torch.randn(out_features, in_features, generator=generator)
            weight *= in_features**-0.5
            if weight_format == "int8":
                packed = quantize.pack_int8(*quantize.quantize_int8(weight))
            else:
                packed = quantize.pack_int4(*quantize.quantize_int4(weight))
            self.packed.append(packed)
            self.plain.append(quantize.unpack(packed))
        self.num_bytes = sum(packed.nbytes for packed in self.packed)

    def inputs(self, num_rows: int, head_rows: int) -> list[Tensor]:
        rows = [num_rows] * (len(self.packed) - 1) + [head_rows]
        by_shape = {
            key: torch.randn(key)
            for key in {(n, p.in_features) for n, p in zip(rows, self.packed, strict=True)}
        }
        return [by_shape[n, p.in_features] for n, p in zip(rows, self.packed, strict=True)]

    def ours(self, index: int, x: Tensor) -> Tensor:
        packed = self.packed[index]
        return ops.quantized_linear(
            x, packed.weight, packed.scales, packed.minimums, None, packed.out_features
        )


@lru_cache(maxsize=1)
def _walk(weight_format: str, num_layers: int) -> _Walk:
    return _Walk(weight_format, num_layers)


def _setup(weight_format: str, num_rows: int, num_layers: int, settings: Settings) -> Trial:
    walk = _walk(weight_format, num_layers)
    head_rows = num_rows if num_rows <= MAX_HEAD_ROWS else 1
    inputs = walk.inputs(num_rows, head_rows)
    peers = {"torch_fp32": TorchLinear(walk.plain, torch.float32)}
    if settings.peer in ("all", "torch_bf16"):
        peers["torch_bf16"] = TorchLinear(walk.plain, torch.bfloat16)

    def run_all(multiply, _rotation: int) -> None:
        for index, x in enumerate(inputs):
            multiply(index, x)

    def check(peer: str) -> harness.Check:
        tolerance = 1e-4 if peer == "torch_fp32" else 3e-2
        outcomes = []
        for index in [*range(len(shapes.LAYER_SHAPES)), len(inputs) - 1]:
            x = inputs[index]
            together = walk.ours(index, x)
            alone = [walk.ours(index, x[row : row + 1]) for row in (0, len(x) // 2, len(x) - 1)]
            rows = together[[0, len(x) // 2, len(x) - 1]]
            bits = torch.equal(rows, torch.cat(alone))
            outcomes.append(harness.compare(together, peers[peer](index, x), tolerance, bits))
        return max(outcomes, key=lambda check: (not check.ok, check.max_error))

    multiplies = sum(
        len(x) * p.out_features * p.in_features for x, p in zip(inputs, walk.packed, strict=True)
    )
    return Trial(
        ours=partial(run_all, walk.ours),
        peers={name: partial(run_all, peer) for name, peer in peers.items()},
        check=check,
        work=Work(walk.num_bytes, 2 * multiplies),
        rotation_bytes=walk.num_bytes,
        units=num_rows,
        unit="row",
    )


def cases(settings: Settings) -> Iterator[Case]:
    """Formats by number of rows; the head runs on one row only from 32 rows on."""
    num_layers = 1 if settings.smoke else shapes.NUM_LAYERS
    row_counts = (1, 4) if settings.smoke else (1, 2, 4, 8, 32, 128, 512)
    for weight_format in ("int8", "int4"):
        for num_rows in row_counts:
            yield Case(
                "quantized_linear",
                {"format": weight_format, "M": num_rows, "layers": num_layers},
                partial(_setup, weight_format, num_rows, num_layers),
            )
    _walk.cache_clear()
