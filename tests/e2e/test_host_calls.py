"""How often a step calls the extension: per batch, not per session."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from stateful_kv._native import _C
from tests.e2e.conftest import MakeEngine
from tests.e2e.tiny import Provenance

STATE_CLASSES = ("PagePool", "SequenceTable", "RadixTree", "NgramIndex")


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts calls of the methods of state objects, and of functions that work on them."""
    calls: Counter[str] = Counter()

    def watch(owner: Any, name: str, label: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[label] += 1
            return original(*args, **kwargs)

        patch.setattr(owner, name, call)

    with monkeypatch.context() as patch:
        for class_name in STATE_CLASSES:
            owner = getattr(_C, class_name)
            for name, value in list(vars(owner).items()):
                if callable(value) and not name.startswith("_"):
                    watch(owner, name, f"{class_name}.{name}")
        watch(_C, "propose_drafts", "propose_drafts")
        yield calls


@pytest.mark.parametrize("num_sessions", [1, 8])
@pytest.mark.parametrize("draft", [False, True])
def test_a_decode_step_calls_per_batch(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, num_sessions: int, draft: bool
) -> None:
    engine = make_engine(Provenance(), kv_dtype="float32", draft=draft, page_size=64)
    sessions = [engine.session() for _ in range(num_sessions)]
    streams = [s.stream(f"{i} of many, of many, of many", 40) for i, s in enumerate(sessions)]
    for stream in streams:
        next(stream)
    engine.step()
    for _ in range(8):
        with counted(monkeypatch) as calls:
            assert engine.step()
        assert calls.pop("propose_drafts", 0) == int(draft)
        assert sum(calls.values()) <= 3, calls
    for stream in streams:
        stream.close()
