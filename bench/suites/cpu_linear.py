"""Suite `cpu_linear`: all linear layers of SmolLM2 on rows of a decode, a verify, a delta.

Weights are those of the model's file as the loader packs them. The peer is torch with whichever
weights are quickest: float32, bfloat16, int8 or int4 of torch's own (int4 where the file has it);
each can be asked for. llama.cpp has no call for the linear layers alone: its rows are compared in
suite `cpu_model`, where a whole forward pass on an empty context is little else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import harness
from bench.harness import Case, Settings, Trial, Work
from bench.peers.torch_linear import TOLERANCE, TorchInt4Linear, TorchInt8Linear, TorchLinear
from bench.selection import Row
from bench.suites import linear_walk, peer_ways, shapes

Multiply = Callable[[int, Tensor], Tensor]
# Up to this many rows every row needs logits (decode, verify); above, only the last (prefill).
MAX_HEAD_ROWS = 16
ROWS = (1, 2, 4, 8, 16, 32, 128, 512)
FORMATS = ("int8", "auto")
BEST = "torch"  # the quickest of the others
EXACT = "torch_fp32"
PEERS: dict[str, Callable[[list[Tensor]], Multiply]] = {
    EXACT: lambda weights: TorchLinear(weights, torch.float32),
    "torch_bf16": lambda weights: TorchLinear(weights, torch.bfloat16),
    "torch_int8": TorchInt8Linear,
    "torch_int4": TorchInt4Linear,
}


def _setup(weight_format: str, num_rows: int, num_layers: int, settings: Settings) -> Trial:
    walk, source = linear_walk.load(weight_format, num_layers)
    head_rows = num_rows if num_rows <= MAX_HEAD_ROWS else 1
    inputs = walk.inputs(num_rows, head_rows)
    is_best = settings.peer is None or settings.asks_for(BEST)
    multiplies = {
        name: make(walk.plain)
        for name, make in PEERS.items()
        if (is_best or name == EXACT or settings.asks_for(name))
        and (name != "torch_int4" or weight_format == "auto")
    }
    checked = [*range(linear_walk.PER_LAYER), len(inputs) - 1]

    def run_all(multiply: Multiply, _rotation: int) -> None:
        for index, x in enumerate(inputs):
            multiply(index, x)

    def result(multiply: Multiply) -> tuple[Tensor, ...]:
        return tuple(multiply(index, inputs[index]).float() for index in checked)

    def check(peer: str) -> harness.Check:
        tolerance = 1e-4 if peer in (EXACT, BEST) else TOLERANCE
        multiply = multiplies[EXACT if peer == BEST else peer]
        outcomes = []
        for index in checked:
            x = inputs[index]
            together = walk.ours(index, x)
            alone = [walk.ours(index, x[row : row + 1]) for row in (0, len(x) // 2, len(x) - 1)]
            rows = together[[0, len(x) // 2, len(x) - 1]]
            bits = torch.equal(rows, torch.cat(alone))
            outcomes.append(harness.compare(together, multiply(index, x), tolerance, bits))
        return max(outcomes, key=lambda check: (not check.ok, check.max_error))

    def bind(multiply: Multiply) -> Callable[[int], None]:
        return partial(run_all, multiply)

    num_multiplies = sum(
        len(x) * linear.out_features * x.shape[1]
        for x, linear in zip(inputs, walk.linears, strict=True)
    )
    return Trial(
        ours=partial(run_all, walk.ours),
        peers={
            **({BEST: peer_ways.ways(multiplies, bind, result, TOLERANCE)} if is_best else {}),
            **{name: partial(run_all, multiply) for name, multiply in multiplies.items()},
        },
        check=check,
        work=Work(walk.num_bytes, 2 * num_multiplies),
        rotation_bytes=walk.num_bytes,
        units=num_rows,
        unit="row",
        details=lambda _peer: {"weights": source, "head_rows": head_rows},
    )


def cases(settings: Settings) -> Iterator[Case]:
    """Formats by number of rows; the head runs on the last row only above 16 rows."""
    num_layers = 1 if settings.smoke else shapes.NUM_LAYERS
    for weight_format in FORMATS:
        for num_rows in (1, 4) if settings.smoke else ROWS:
            yield Case(
                "quantized_linear",
                {"format": weight_format, "M": num_rows, "layers": num_layers},
                partial(_setup, weight_format, num_rows, num_layers),
            )
    linear_walk.load.cache_clear()


def rows(settings: Settings) -> list[Row]:
    """Names and axes of all cases."""
    return harness.rows_of(cases(settings))


def run(settings: Settings, roofs: dict[str, Any], emit: Callable[[dict[str, Any]], None]) -> None:
    """Run the suite."""
    torch.manual_seed(0)
    with torch.inference_mode():
        harness.run_cases("cpu_linear", cases(settings), settings, roofs, emit)
