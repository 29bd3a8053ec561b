"""Suite `cpu_linear`: all linear layers of SmolLM2 on rows of a decode, a verify, a delta.

Weights are those of the model's file as the loader packs them. The peer is torch. llama.cpp has no
call for the linear layers alone: its rows are compared in suite `cpu_model`, where a whole forward
pass on an empty context is little else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import harness
from bench.harness import Case, Settings, Trial, Work
from bench.peers.torch_linear import TorchLinear
from bench.suites import linear_walk, shapes

# Up to this many rows every row needs logits (decode, verify); above, only the last (prefill).
MAX_HEAD_ROWS = 16
ROWS = (1, 2, 4, 8, 16, 32, 128, 512)
FORMATS = ("int8", "auto")
DTYPES = {"torch_fp32": torch.float32, "torch_bf16": torch.bfloat16}


def _setup(weight_format: str, num_rows: int, num_layers: int, settings: Settings) -> Trial:
    walk, source = linear_walk.load(weight_format, num_layers)
    head_rows = num_rows if num_rows <= MAX_HEAD_ROWS else 1
    inputs = walk.inputs(num_rows, head_rows)
    multiplies = {
        name: TorchLinear(walk.plain, dtype)
        for name, dtype in DTYPES.items()
        if name == "torch_fp32" or settings.asks_for(name)
    }

    def run_all(multiply: Callable[[int, Tensor], Tensor], _rotation: int) -> None:
        for index, x in enumerate(inputs):
            multiply(index, x)

    def check(peer: str) -> harness.Check:
        tolerance = 1e-4 if peer == "torch_fp32" else 3e-2
        outcomes = []
        for index in [*range(linear_walk.PER_LAYER), len(inputs) - 1]:
            x = inputs[index]
            together = walk.ours(index, x)
            alone = [walk.ours(index, x[row : row + 1]) for row in (0, len(x) // 2, len(x) - 1)]
            rows = together[[0, len(x) // 2, len(x) - 1]]
            bits = torch.equal(rows, torch.cat(alone))
            outcomes.append(harness.compare(together, multiplies[peer](index, x), tolerance, bits))
        return max(outcomes, key=lambda check: (not check.ok, check.max_error))

    num_multiplies = sum(
        len(x) * linear.out_features * x.shape[1]
        for x, linear in zip(inputs, walk.linears, strict=True)
    )
    return Trial(
        ours=partial(run_all, walk.ours),
        peers={name: partial(run_all, multiply) for name, multiply in multiplies.items()},
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


def run(settings: Settings, roofs: dict[str, Any], emit: Callable[[dict[str, Any]], None]) -> None:
    """Run the suite."""
    torch.manual_seed(0)
    with torch.inference_mode():
        harness.run_cases("cpu_linear", cases(settings), settings, roofs, emit)
