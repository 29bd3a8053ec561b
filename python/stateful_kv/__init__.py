"""Stateful inference engine for agents: every turn costs only its delta.

`Engine` and `Session` run models. For engine builders `ops` holds the torch custom ops, and `state`
the page pool, sequence table, prefix tree and n-gram index; `adapters.hf` is for `transformers`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stateful_kv import ops, state
from stateful_kv._native import build_info
from stateful_kv._version import __version__
from stateful_kv.choosing.params import SamplingParams
from stateful_kv.engine.config import EngineConfig
from stateful_kv.errors import (
    BadLogitsError,
    BuildMismatchError,
    ContextLengthError,
    DeviceUnavailableError,
    InvalidRequestError,
    InvariantError,
    ModelLoadError,
    ModelNotFoundError,
    OutOfPagesError,
    SessionBusyError,
    SessionClosedError,
    StateBusyError,
    StatefulKVError,
    WorkflowError,
)
from stateful_kv.models.config import ModelConfig

if TYPE_CHECKING:
    from stateful_kv.engine.engine import Engine
    from stateful_kv.session.receipts import Receipt, Reply
    from stateful_kv.session.session import Session

# The engine brings tokenizers and templates; who only wants the ops does not wait for them.
_LAZY = {
    "Engine": "stateful_kv.engine.engine",
    "Receipt": "stateful_kv.session.receipts",
    "Reply": "stateful_kv.session.receipts",
    "Session": "stateful_kv.session.session",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'stateful_kv' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "BadLogitsError",
    "BuildMismatchError",
    "ContextLengthError",
    "DeviceUnavailableError",
    "Engine",
    "EngineConfig",
    "InvalidRequestError",
    "InvariantError",
    "ModelConfig",
    "ModelLoadError",
    "ModelNotFoundError",
    "OutOfPagesError",
    "Receipt",
    "Reply",
    "SamplingParams",
    "Session",
    "SessionBusyError",
    "SessionClosedError",
    "StateBusyError",
    "StatefulKVError",
    "WorkflowError",
    "__version__",
    "build_info",
    "ops",
    "state",
]
