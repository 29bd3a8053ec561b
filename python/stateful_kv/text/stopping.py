"""When a reply ends, and the text it shows until then."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from stateful_kv.system.tracing import traced


class StreamDecoder(Protocol):
    """Turns tokens into text one by one; never gives half a character."""

    def push(self, token_id: int) -> str:
        """Takes one token; returns the text that became complete with it."""
        ...

    def flush(self) -> str:
        """Returns what is left (bytes that never became a character, if any)."""
        ...


class StopStringFinder:
    """Finds the first of several strings in a text that arrives in pieces.

    "First" goes character by character: the occurrence that is complete earliest wins, of
    several complete at the same place the longest. The result does not depend on how the text
    is cut into pieces.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Takes a piece of text.

        Returns:
            The text that is safe to show (it cannot become part of a stop string any more), and
            whether a stop string was found; then the text ends before it.
        """
        text = self._held + piece
        if not self._stops:
            return text, False
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        keep = max(_longest_started(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """Returns the held-back text; no stop string can be completed any more."""
        text, self._held = self._held, ""
        return text


def _longest_started(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without completing it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class StopRules:
    """Takes the tokens of one reply in order; says what text they show and when to stop.

    End-of-turn and stop tokens end the reply without adding text. A stop string is searched in
    the decoded text, across tokens and characters; the text is cut before it.
    """

    def __init__(
        self, decoder: StreamDecoder, stop_token_ids: frozenset[int], stops: Iterable[str]
    ) -> None:
        self._decoder = decoder
        self._stop_token_ids = stop_token_ids
        self._finder = StopStringFinder(stops)

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """Tokens that end the reply."""
        return self._stop_token_ids

    @traced("detokenise")
    def push(self, token_id: int) -> tuple[str, bool]:
        """Takes the next token; returns the text to show now and whether the reply ends here."""
        if token_id in self._stop_token_ids:
            return self._finish()[0], True
        return self._finder.push(self._decoder.push(token_id))

    def flush(self) -> tuple[str, bool]:
        """Ends the reply for another reason; returns the last text and whether it hit a stop."""
        return self._finish()

    def _finish(self) -> tuple[str, bool]:
        text, found = self._finder.push(self._decoder.flush())
        return (text, True) if found else (text + self._finder.flush(), False)
