"""Fixtures of the end-to-end tests.

`SKV_EMULATED_CUDA`: path of build/emulation/libskv_emulated.so. Then the ops with a CUDA kernel run
that kernel, on the emulator of tests/emulation, and the tests marked with `on_devices` also run on
a model as it is on CUDA, in bfloat16.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from stateful_kv.drafts import cost_file
from stateful_kv.drafts.calibrate import CostChoice
from stateful_kv.engine.config import EngineConfig
from stateful_kv.engine.engine import Engine
from stateful_kv.models.llama import LlamaModel
from tests.e2e.tiny import COSTS, ByteTokenizer, DenseForm, Recorder, tiny_llama

MakeEngine = Callable[..., Engine]
if EMULATED_CUDA := os.environ.get("SKV_EMULATED_CUDA"):
    torch.ops.load_library(EMULATED_CUDA)

# Dense weights: float32 on the CPU, bfloat16 on CUDA and its emulator.
CUDA = (
    pytest.param("cuda", marks=pytest.mark.cuda),
    pytest.param(
        "emulated", marks=pytest.mark.skipif(not EMULATED_CUDA, reason="no SKV_EMULATED_CUDA")
    ),
)
DENSE = ("cpu", *CUDA)
on_devices = pytest.mark.parametrize("llama", ["packed", *DENSE], indirect=True)


@cache
def model_in(form: str) -> LlamaModel:
    """A tiny random model; it has no state, so all tests may share it."""
    if form == "packed":
        return tiny_llama()
    if form == "cpu":
        return tiny_llama(form=DenseForm())
    device = "cuda" if form == "cuda" else "cpu"
    # The smallest heads that the CUDA kernels are built for.
    return tiny_llama(form=DenseForm(device, torch.bfloat16), head_dim=64)


@pytest.fixture
def llama(request: pytest.FixtureRequest) -> LlamaModel:
    """The tiny model with packed weights; a test marked with `on_devices` also gets dense ones."""
    return model_in(getattr(request, "param", "packed"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only cost time in models as small as these; tests of threads set their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_engine(llama: LlamaModel) -> Iterator[MakeEngine]:
    """Makes engines; after the test each must be consistent, and empty once all is closed."""
    engines: list[Engine] = []

    def make(
        model: Any = None,
        tokenizer: Any = None,
        cost_curve: CostChoice = COSTS,
        is_recorded: bool = True,
        **config: Any,
    ) -> Engine:
        # Steps are single unless a test says otherwise, also on CUDA.
        config = {"kv_tokens": 4096, "page_size": 16, "num_steps_per_sync": 1, **config}
        if model is None:
            config["device"] = str(llama.device)
            # What tests mean by float16, and what the CPU takes, is KV in 16 bits.
            if llama.dtype == torch.bfloat16 and config.get("kv_dtype", "float16") == "float16":
                config["kv_dtype"] = "bfloat16"
        model = llama if model is None else model
        if is_recorded:  # which looks at the logits: a step with it cannot be a CUDA graph
            model = Recorder(model)
        tokenizer = tokenizer or ByteTokenizer()
        engine = Engine(model, tokenizer, EngineConfig(**config), cost_curve=cost_curve)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        if not engine.is_closed:
            assert engine.check_integrity() is None
            engine.close()
        assert engine.cache.check_integrity() is None
        assert engine.cache.num_free_pages == engine.cache.num_pages


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, which does not exist yet."""
    path = tmp_path / "new" / "cache"
    monkeypatch.setenv(cost_file.FOLDER_VARIABLE, str(path))
    return path


@pytest.fixture(autouse=True)
def no_silent_fall_back() -> Iterator[None]:
    """A multi-step that fails warns; where a test does not expect that, it fails."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "several steps at once failed")
        yield
