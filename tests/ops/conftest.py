"""Fixtures of the op tests.

`SKV_EMULATED_CUDA`: path of build/emulation/libskv_emulated.so. Then every op with a CUDA kernel
runs that kernel, on the emulator of tests/emulation, for tensors on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import stateful_kv.ops  # noqa: F401  defines the ops before their kernels are replaced

if EMULATED_CUDA := os.environ.get("SKV_EMULATED_CUDA"):
    torch.ops.load_library(EMULATED_CUDA)


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
