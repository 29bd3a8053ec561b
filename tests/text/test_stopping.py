"""Stop strings: the automaton against the definition, string by string; limits; time."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stateful_kv.choosing.params import MAX_STOP_CHARACTERS, MAX_STOPS, SamplingParams
from stateful_kv.text.stopping import StopStringFinder


class NaiveFinder:
    """The definition: every string is looked for in all of the text that is not shown yet."""

    def __init__(self, stops: list[str]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        keep = max((self._longest_started(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        text, self._held = self._held, ""
        return text

    @staticmethod
    def _longest_started(text: str, stop: str) -> int:
        lengths = range(min(len(text), len(stop) - 1), 0, -1)
        return next((length for length in lengths if text.endswith(stop[:length])), 0)


@given(
    stops=st.lists(st.text("abü", min_size=1, max_size=6), max_size=8),
    pieces=st.lists(st.none() | st.text("abüx", max_size=7), max_size=12),
)
def test_equals_the_definition(stops: list[str], pieces: list[str | None]) -> None:
    """Pieces after a stop string too: then a new text begins. None ends a text."""
    ours, naive = StopStringFinder(stops), NaiveFinder(stops)
    for piece in pieces:
        if piece is None:
            assert ours.flush() == naive.flush()
        else:
            assert ours.push(piece) == naive.push(piece)
    assert ours.flush() == naive.flush()


def test_two_finders_of_the_same_strings_do_not_meet() -> None:
    first, second = StopStringFinder(["abc"]), StopStringFinder(["abc"])
    assert first.push("ab") == ("", False)
    assert second.push("c") == ("c", False)
    assert first.push("c") == ("", True)


def test_time_does_not_grow_with_the_number_of_strings() -> None:
    """A loop over 1000 strings takes about half a millisecond a piece, 5 s in all."""
    finder = StopStringFinder([f"stop {number:03}" for number in range(1000)])
    began_at = time.process_time()
    for _ in range(10_000):
        assert not finder.push("top sto 99")[1]
    assert time.process_time() - began_at < 2


def test_limits() -> None:
    most = SamplingParams(stop=["x" * 32] * MAX_STOPS)
    assert sum(map(len, most.stop)) == MAX_STOP_CHARACTERS
    with pytest.raises(ValueError, match="stop: expected at most 1024 strings, got 1025"):
        SamplingParams(stop=["x"] * (MAX_STOPS + 1))
    with pytest.raises(ValueError, match=r"stop: expected at most 32768 characters .* got 32769"):
        SamplingParams(stop="x" * (MAX_STOP_CHARACTERS + 1))
