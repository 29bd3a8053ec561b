"""Markers and fixtures of all Python tests.

`SKV_REQUIRE_CUDA=1` turns the skip of a test marked `cuda` into a failure, so a GPU machine
cannot pass by skipping. `SKV_TEST_SEED` changes the random inputs.
"""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

BASE_SEED = int(os.environ.get("SKV_TEST_SEED", "20240917"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: needs a CUDA device and a CUDA build")
    config.addinivalue_line("markers", "slow: takes more than a few seconds")
    config.addinivalue_line("markers", "isa: repeated in a child process for each instruction set")
    config.addinivalue_line("markers", "cpu_only(reason): what CUDA kernels do not promise or have")
    config.addinivalue_line("markers", "emulated: also for emulated CUDA, without fixture `device`")
    config.addinivalue_line("markers", "slow_emulated: not in the suite's run of emulated CUDA")


def pytest_report_header() -> str:
    return f"base seed {BASE_SEED} (SKV_TEST_SEED), torch {torch.__version__}"


def cuda_missing() -> str | None:
    """Why CUDA tests cannot run here, or None."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    import stateful_kv

    if not stateful_kv.build_info()["cuda"]:
        return "stateful_kv was built without CUDA"
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") is None:
        return
    reason = cuda_missing()
    if reason is None:
        return
    if os.environ.get("SKV_REQUIRE_CUDA") == "1":
        pytest.fail(f"SKV_REQUIRE_CUDA=1, but {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tests, and the processes they start, leave the user's cache folder alone."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STATEFUL_KV_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> Iterator[int]:
    """Seeds every generator from the test's name and restores all of them afterwards."""
    value = (BASE_SEED + zlib.crc32(request.node.nodeid.encode())) % 2**32
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    print(f"seed {value}")  # pytest shows it when the test fails
    yield value
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if cuda_states is not None:
        torch.cuda.set_rng_state_all(cuda_states)


@pytest.fixture
def set_num_threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's thread count; the old count returns after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
