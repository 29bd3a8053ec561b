"""Spans: what they cost when nobody records them, and where the engine has them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest

from stateful_kv.system import tracing
from tests.e2e.conftest import MakeEngine


class Notes:
    """A recorder that keeps names and labels in the order the spans begin."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def open(self, name: str, label: str) -> AbstractContextManager[object]:
        self.seen.append((name, label))
        return nullcontext()


def _best_us(act: Callable[[], object], count: int = 2000, attempts: int = 15) -> float:
    """Microseconds of a call; the best attempt, since whatever else runs only adds time."""
    times = []
    for _ in range(attempts):
        began_at = time.thread_time()
        for _ in range(count):
            act()
        times.append((time.thread_time() - began_at) / count * 1e6)
    return min(times)


def test_spans_are_next_to_free_unless_recorded() -> None:
    def enter() -> None:
        with tracing.span("forward", lambda: pytest.fail("a label that nobody reads")):
            pass

    def nothing() -> None:
        pass

    assert _best_us(enter) < 1.0
    assert _best_us(tracing.traced("plan")(nothing)) - _best_us(nothing) < 1.0


def test_recording_ends_with_its_block() -> None:
    first, second = Notes(), Notes()
    with tracing.recording(first):
        with pytest.raises(KeyError), tracing.recording(second), tracing.span("inner"):
            raise KeyError
        with tracing.span("outer", lambda: "label"):
            pass
    with tracing.span("nobody"):
        pass
    assert first.seen == [("outer", "label")]
    assert second.seen == [("inner", "")]


def test_spans_of_other_threads_are_not_recorded() -> None:
    notes = Notes()

    @tracing.traced("call")
    def call() -> None:
        with tracing.span("span"):
            pass

    with tracing.recording(notes):
        other = threading.Thread(target=call)
        other.start()
        other.join()
        assert notes.seen == []
        call()
    assert notes.seen == [("call", ""), ("span", "")]


def test_a_traced_function_is_the_function() -> None:
    @tracing.traced("add")
    def add(a: int, *, b: int) -> int:
        """Adds."""
        return a + b

    notes = Notes()
    assert add(1, b=2) == 3
    with tracing.recording(notes):
        assert add(1, b=2) == 3
    assert notes.seen == [("add", "")]
    assert (add.__name__, add.__doc__) == ("add", "Adds.")


def test_phases_of_a_step_in_order(make_engine: MakeEngine) -> None:
    notes = Notes()
    session = make_engine().session()
    with tracing.recording(notes):
        session.turn("hello", max_tokens=2, ignore_eos=True)
    before = ["plan", "reserve", "build_batch", "forward", "verify", "commit", "detokenise"]
    assert [name for name, _ in notes.seen] == [
        *("turn", "render", "step", "admit", *before, "end_steps"),
        *("step", "plan", "draft", *before[1:], "end_steps"),
    ]
    assert [label for name, label in notes.seen if name == "forward"] == [
        "prefill 8 rows",
        "decode 1 row",
    ]
