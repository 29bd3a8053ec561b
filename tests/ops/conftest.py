"""Fixtures of the op tests, and which of them run on which device.

`SKV_EMULATED_CUDA` names build/emulation/libskv_emulated.so. Then every op with a CUDA kernel runs
that kernel, on the emulator of tests/emulation, for tensors on the CPU, and only the tests that
would run on a GPU are left: those with the fixture `device`, and those marked `emulated`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import stateful_kv.ops  # noqa: F401  defines the ops before their kernels are replaced

EMULATED_CUDA = os.environ.get("SKV_EMULATED_CUDA")
if EMULATED_CUDA:
    try:
        torch.ops.load_library(EMULATED_CUDA)
    except OSError as error:
        raise pytest.UsageError(
            f"SKV_EMULATED_CUDA: expected the library that `make emulation` builds, "
            f"got {EMULATED_CUDA!r}: {error}"
        ) from error


def is_left_out(item: pytest.Item) -> bool:
    """True for what only the CPU kernels promise, where CUDA kernels run."""
    on_cuda = item.get_closest_marker("cuda") is not None
    if item.get_closest_marker("cpu_only") is not None:
        return on_cuda or bool(EMULATED_CUDA)
    if not EMULATED_CUDA:
        return False
    runs_kernels = "device" in getattr(item, "fixturenames", ())
    return on_cuda or not (runs_kernels or item.get_closest_marker("emulated"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if is_left_out(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device with kernels; CUDA is skipped where there is none."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """Makes torch.empty return NaN (or the largest integer), so an output left unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    fill_before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill_before
    torch.use_deterministic_algorithms(before)
