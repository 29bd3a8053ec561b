"""Suite `ops`: each op against plain torch and against the floor counted from its shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench import harness
from bench.harness import Case, Settings
from bench.selection import Row
from bench.suites import cpu_attention, cpu_linear, ops_head, ops_loop, ops_small


def cases(settings: Settings) -> Iterator[Case]:
    """All cases, the large ones first."""
    yield from cpu_linear.cases(settings)
    yield from cpu_attention.cases(settings, (1, 4, 64), (1024, 8192), ("float16",))
    yield from ops_small.cases(settings)
    yield from ops_head.cases(settings)
    yield from ops_loop.cases(settings)


def rows(settings: Settings) -> list[Row]:
    """Names and axes of all cases."""
    return harness.rows_of(cases(settings))


def run(settings: Settings, roofs: dict[str, Any], emit: Callable[[dict[str, Any]], None]) -> None:
    """Run the suite."""
    torch.manual_seed(0)
    with torch.inference_mode():
        harness.run_cases("ops", cases(settings), settings, roofs, emit)
