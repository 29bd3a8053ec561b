"""Arguments of the wrong type or size: one line that names the argument, nothing changed."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from stateful_kv.choosing.params import SamplingParams
from stateful_kv.engine.config import EngineConfig
from stateful_kv.engine.engine import Engine
from stateful_kv.errors import InvalidRequestError
from stateful_kv.kv import pools
from stateful_kv.kv.cache import KVCache
from tests.e2e.conftest import MakeEngine
from tests.e2e.tiny import COSTS, ByteTokenizer, CountingUp


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"sampling": {"temperature": 1.0}}, "sampling: expected SamplingParams, got {'temp"),
        ({"sampling": SamplingParams}, "sampling: expected SamplingParams, got <class"),
        ({"tools": 5}, "tools: expected a list of dicts, got 5"),
        ({"tools": "abc"}, "tools: expected a list of dicts, got 'abc'"),
        ({"tools": {"name": "f"}}, "tools: expected a list of dicts, got {"),
        ({"tools": [5]}, "tools[0]: expected a dict, got 5"),
        ({"tools": [{}, "f"]}, "tools[1]: expected a dict, got 'f'"),
        ({"name": 5}, "name: expected text, got 5"),
        ({"system": 5}, "system: expected text, got 5"),
        ({"draft": "no"}, "draft: expected a bool, got 'no'"),
        ({"draft": 0}, "draft: expected a bool, got 0"),
    ],
)
def test_session(make_engine: MakeEngine, settings: dict[str, Any], text: str) -> None:
    engine = make_engine(CountingUp())
    with pytest.raises(InvalidRequestError) as caught:
        engine.session(**settings)
    assert str(caught.value).startswith(text)
    assert engine.session().name == "session-1"


def test_fork(make_engine: MakeEngine) -> None:
    session = make_engine(CountingUp()).session()
    with pytest.raises(InvalidRequestError, match="name: expected text, got 5"):
        session.fork(name=5)  # type: ignore[arg-type]


def test_gather(make_engine: MakeEngine) -> None:
    engine = make_engine(CountingUp())
    session = engine.session()
    pair = "expected a (session, message) pair, got "
    rows: list[tuple[Any, str]] = [
        (None, "items: expected a list of (session, message) pairs, got None"),
        (session, "items: expected a list of (session, message) pairs, got <Session"),
        ([session], f"items[0]: {pair}<Session"),
        ([(session,)], f"items[0]: {pair}(<Session"),
        ([(session, "x", 5)], f"items[0]: {pair}(<Session"),
        ([("x", "y")], f"items[0]: {pair}('x', 'y')"),
        ([(session, "x"), ("ab")], f"items[1]: {pair}'ab'"),
    ]
    for items, text in rows:
        with pytest.raises(InvalidRequestError) as caught:
            engine.gather(items)
        assert str(caught.value).startswith(text)
    assert (session.num_tokens, session.is_busy) == (0, False)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"stop": 5}, "stop: expected a list of strings, got 5"),
        ({"stop": None}, "stop: expected a list of strings, got None"),
        ({"stop": b"ab"}, "stop: expected a list of strings, got b'ab'"),
        ({"stop": [5]}, "stop: expected non-empty strings, got 5"),
        ({"stop_token_ids": 5}, "stop_token_ids: expected a list of integers, got 5"),
        ({"stop_token_ids": "5"}, "stop_token_ids: expected a list of integers, got '5'"),
        ({"stop_token_ids": ["5"]}, "stop_token_ids: expected an integer >= 0, got '5'"),
    ],
)
def test_sampling(make_engine: MakeEngine, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        SamplingParams(**settings)
    assert str(caught.value) == text
    with pytest.raises(InvalidRequestError) as refused:
        make_engine(CountingUp()).session().turn("x", **settings)
    assert str(refused.value) == f"sampling: {text}"


@pytest.mark.parametrize("size", [{"kv_tokens": 10**13}, {"kv_tokens": 1, "page_size": 10**30}])
def test_a_pool_beyond_memory(make_engine: MakeEngine, size: dict[str, int]) -> None:
    with pytest.raises(InvalidRequestError, match=r"kv_tokens: .* memory") as caught:
        make_engine(CountingUp(), **size)
    # One layer, one head of two halves of 16 bits, keys and values; whole pages.
    page_size = size.get("page_size", 16)
    num_tokens = -(-size["kv_tokens"] // page_size) * page_size
    assert f"({8 * num_tokens} bytes)" in str(caught.value)


def test_a_pool_that_cannot_be_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stateful_kv.kv.pools._physical_memory", lambda: None)
    with pytest.raises(InvalidRequestError, match=r"kv_tokens: .*\(\d+ bytes\): "):
        KVCache(30, 3, 64, 10**13, 64)


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, OSError])
def test_scales_that_cannot_be_allocated(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    zeros = pools._zeros

    def full(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if dtype == torch.float32:
            raise error("no memory")
        return zeros(shape, dtype, device)

    monkeypatch.setattr(pools, "_zeros", full)
    KVCache(1, 1, 32, 2, 16)
    with pytest.raises(InvalidRequestError, match=r"kv_tokens: .*\(2304 bytes\): no memory"):
        KVCache(1, 1, 32, 2, 16, torch.int8)


def test_a_closed_engine_gives_its_memory_back() -> None:
    """At once, without a collection: pools are large, and the collector cannot see their size."""
    config = EngineConfig(kv_tokens=256, page_size=16)
    engine = Engine(CountingUp(), ByteTokenizer(), config, cost_curve=COSTS)
    session = engine.session()
    session.turn("hello", max_tokens=2)
    pool = weakref.ref(engine.cache)
    gc.collect()
    gc.disable()
    try:
        engine.close()
        del session, engine
        assert pool() is None
    finally:
        gc.enable()
