"""The default model and an engine for it on the device of a run: the one place that knows how."""

from __future__ import annotations

from functools import lru_cache

from stateful_kv.engine.config import EngineConfig
from stateful_kv.engine.engine import Engine
from stateful_kv.models.files.loading import LoadedModel, load_model

MODEL = "smollm2"


@lru_cache(maxsize=1)
def load(device: str) -> LoadedModel:
    """The default model; on a CUDA device in bf16."""
    return load_model(MODEL, device=device)


def make_engine(loaded: LoadedModel, kv_tokens: int, device: str) -> Engine:
    """An engine for it; KV in fp16 on the CPU, in bf16 on a CUDA device."""
    config = EngineConfig(kv_tokens=kv_tokens, device=device)
    return Engine(loaded.model, loaded.tokenizer, config)
