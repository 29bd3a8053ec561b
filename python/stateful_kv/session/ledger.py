"""The token ledger: the exact token ids of a session and the turns they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stateful_kv.types import TokenArray

_INITIAL_CAPACITY = 256


@dataclass(frozen=True)
class TurnRecord:
    """Where a finished turn lies in the ledger: message [start, reply_start), reply up to end."""

    start: int
    reply_start: int
    end: int


class Ledger:
    """A growing int32 array of token ids with turn borders; the authority on a session's text.

    KV may be dropped at any time because it can be recomputed from here. Tokens past the
    committed length of the session's sequence (usually one: the last sampled token) have no KV
    yet and are the first to be fed by the next step.

    Appending is O(tokens appended), amortised; `tokens` is O(1).
    """

    def __init__(self, tokens: Sequence[int] | TokenArray = ()) -> None:
        self._buffer = np.empty(max(_INITIAL_CAPACITY, len(tokens)), dtype=np.int32)
        self._length = 0
        self._records: list[TurnRecord] = []
        self._revision = 0
        self.append(tokens)

    def __len__(self) -> int:
        return self._length

    @property
    def tokens(self) -> TokenArray:
        """A contiguous view of all tokens, no copy; later appends or truncates may change it."""
        length = self._length  # before the buffer, which another thread may be making longer
        return self._buffer[:length]

    @property
    def records(self) -> tuple[TurnRecord, ...]:
        """The finished turns, oldest first."""
        return tuple(self._records)

    @property
    def revision(self) -> int:
        """Changes whenever tokens are dropped: a copy made before may hold other ones."""
        return self._revision

    @property
    def num_turns(self) -> int:
        """Finished turns."""
        return len(self._records)

    @property
    def last_token(self) -> int | None:
        """The last token, or None of an empty ledger."""
        return int(self._buffer[self._length - 1]) if self._length else None

    def append(self, tokens: Sequence[int] | TokenArray) -> None:
        """Adds tokens at the end."""
        new_length = self._length + len(tokens)
        if new_length > len(self._buffer):
            grown = np.empty(max(new_length, 2 * len(self._buffer)), dtype=np.int32)
            grown[: self._length] = self._buffer[: self._length]
            self._buffer = grown
        self._buffer[self._length : new_length] = tokens
        self._length = new_length

    def end_turn(self, start: int, reply_start: int) -> None:
        """Records that the tokens [start, len) are one finished turn.

        A record of the same turn is replaced: whoever is interrupted may record it again.
        """
        while self._records and self._records[-1].end > start:
            self._records.pop()
        self._records.append(TurnRecord(start, reply_start, self._length))

    def turn_end(self, turn: int) -> int:
        """Length of the ledger at the end of turn number `turn` (0: before the first one)."""
        return self._records[turn - 1].end if turn else 0

    def truncate(self, length: int) -> None:
        """Drops the tokens from `length` on, and the records of turns that lose tokens.

        Raises:
            ValueError: `length` is negative or beyond the end.
        """
        if not 0 <= length <= self._length:
            raise ValueError(f"length: expected 0..{self._length}, got {length}")
        is_cut = length < self._length
        self._length = length
        self._revision += is_cut
        while self._records and self._records[-1].end > length:
            self._records.pop()

    def copy(self) -> Ledger:
        """Returns an independent ledger with the same tokens and records; O(tokens) memcpy."""
        other = Ledger(self.tokens)
        other._records = list(self._records)
        return other

    def check_integrity(self) -> str | None:
        """Describes the first record out of order or outside the ledger, or returns None."""
        end = 0
        for number, record in enumerate(self._records, start=1):
            if not end <= record.start <= record.reply_start <= record.end <= self._length:
                return f"turn {number}: {record} behind {end} in a ledger of {self._length} tokens"
            end = record.end
        return None
