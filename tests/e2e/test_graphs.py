"""How steps are recorded, with stand-ins for torch's graphs: what is kept from one to the next."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from stateful_kv.engine.loop.graphs import NUM_WARM_UPS, GraphRecorder


class Stream:
    """A stream that has nothing to do."""

    def wait_stream(self, other: object) -> None:
        """Waits for nothing."""


class Graph:
    """A graph whose pool is a number of its own, unless it is recorded into another one."""

    def __init__(self) -> None:
        self.memory: object = self

    def pool(self) -> object:
        """Where its memory is."""
        return self.memory

    def replay(self) -> None:
        """Nothing."""


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """Stream and pool of every recording that was begun."""
    begun: list[tuple[Any, Any]] = []

    def graph(one: Graph, pool: Any, stream: Any, capture_error_mode: str) -> Any:
        begun.append((stream, pool))
        one.memory = one if pool is None else pool
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return begun


def test_graphs_share_a_stream_and_the_pool_of_the_first(captures: list[tuple[Any, Any]]) -> None:
    recorder, calls = GraphRecorder(torch.device("cuda")), []
    for _ in range(3):
        recorder.record(lambda: calls.append(None))
    assert len(calls) == 3 * (NUM_WARM_UPS + 1)
    (stream, pool), *others = captures
    assert pool is None
    assert others[0] == others[1]
    assert others[0][0] is stream
    assert isinstance(others[0][1], Graph)


def test_a_recording_that_fails_leaves_no_pool_behind(captures: list[tuple[Any, Any]]) -> None:
    """Torch refuses a pool whose only graph was never finished."""
    recorder, calls = GraphRecorder(torch.device("cuda")), []

    def fail_when_recorded() -> None:
        calls.append(None)
        if len(calls) > NUM_WARM_UPS:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        recorder.record(fail_when_recorded)
    recorder.record(lambda: None)
    assert [pool for _, pool in captures] == [None, None]
