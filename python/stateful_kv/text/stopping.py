"""When a reply ends, and the text it shows until then."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from functools import lru_cache

from stateful_kv.system.tracing import traced
from stateful_kv.text.decoding import StreamDecoder


class StopStringFinder:
    """Finds the first of several strings in a text that arrives in pieces.

    "First" goes character by character: the occurrence that is complete earliest wins, of
    several complete at the same place the longest. The result does not depend on how the text
    is cut into pieces. The time for a character does not grow with the number of strings.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        """Starts an empty text.

        Args:
            stops: non-empty strings.
        """
        stops = tuple(stops)
        self._automaton = _automaton(stops) if stops else None
        self._state = _ROOT
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Takes a piece of text.

        Returns:
            The text that is safe to show (it cannot become part of a stop string any more), and
            whether a stop string was found; then the text ends before it.
        """
        automaton = self._automaton
        if automaton is None:
            return piece, False
        text = self._held + piece
        state, stop_len, num_read = automaton.run(self._state, piece)
        if stop_len:
            end = len(self._held) + num_read
            self._state, self._held = _ROOT, ""
            return text[: end - stop_len], True
        self._state = state
        # The longest end of the text that begins a stop string: the state of the automaton.
        shown = len(text) - automaton.depths[state]
        self._held = text[shown:]
        return text[:shown], False

    def flush(self) -> str:
        """Returns the held-back text; no stop string can be completed any more."""
        text, self._held, self._state = self._held, "", _ROOT
        return text


_ROOT = 0


class _Automaton:
    """Aho-Corasick over a set of strings; never changed once it is built.

    A state stands for a beginning of a stop string: the longest one that the text read so far
    ends with. State 0 is the empty one.

    Attributes:
        depths: characters of the beginning that each state stands for.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        # The state of the longest shorter beginning that the text ends with as well.
        self._fallback = [_ROOT]
        # Length of the longest stop string that is complete in this state, 0 if none is.
        self._complete = [0]
        self.depths = [0]
        for string in strings:
            self._add(string)
        self._link()

    def run(self, state: int, text: str) -> tuple[int, int, int]:
        """Reads text until a stop string is complete.

        Returns:
            The state behind the text, the length of the completed stop string (0 for none), and
            the characters read.
        """
        moves, fallback, complete = self._next, self._fallback, self._complete
        for index, character in enumerate(text):
            while (following := moves[state].get(character)) is None and state != _ROOT:
                state = fallback[state]
            state = _ROOT if following is None else following
            if complete[state]:
                return state, complete[state], index + 1
        return state, 0, len(text)

    def _add(self, string: str) -> None:
        state = _ROOT
        for character in string:
            following = self._next[state].get(character)
            if following is None:
                following = len(self._next)
                self._next[state][character] = following
                self._next.append({})
                self._fallback.append(_ROOT)
                self._complete.append(0)
                self.depths.append(self.depths[state] + 1)
            state = following
        self._complete[state] = len(string)

    def _link(self) -> None:
        """Sets the fallbacks, the shorter beginnings first."""
        waiting = deque(self._next[_ROOT].values())
        while waiting:
            state = waiting.popleft()
            for character, following in self._next[state].items():
                shorter = self._fallback[state]
                while character not in self._next[shorter] and shorter != _ROOT:
                    shorter = self._fallback[shorter]
                shorter = self._next[shorter].get(character, _ROOT)
                self._fallback[following] = shorter
                self._complete[following] = self._complete[following] or self._complete[shorter]
                waiting.append(following)


@lru_cache(maxsize=16)
def _automaton(stops: tuple[str, ...]) -> _Automaton:
    """Kept from turn to turn: the strings of a session rarely change.

    At most 16 are kept: at the limits of `SamplingParams` each takes about 8 MB.
    """
    return _Automaton(stops)


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
