"""Tokens of sessions in device memory, so that a multi-step need not send them all each time.

The ledger stays the authority. A row of the store holds the first tokens of a ledger; the others
are added when the session's next steps are taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
import torch

from stateful_kv.session.ledger import Ledger
from stateful_kv.types import TokenArray

_NOTHING: TokenArray = np.empty(0, dtype=np.int32)


@dataclass(eq=False)
class StoredTokens:
    """Where the tokens of a ledger are in the store.

    Attributes:
        row: of the store; -1 if the tokens are not there.
        length: how many tokens of the ledger are there.
        revision: of the ledger when they were sent; see `Ledger.revision`.
        chosen: int32[T], tokens that the device added behind them; the ledger may have kept fewer.
    """

    row: int = -1
    length: int = 0
    revision: int = 0
    chosen: TokenArray = field(default_factory=lambda: _NOTHING)

    def take(self, row: int) -> None:
        """Gets a row of the store, with nothing in it; -1 for none."""
        self.row, self.length, self.chosen = row, 0, _NOTHING

    def compare(self, ledger: Ledger) -> None:
        """Finds out how much of what is there still belongs to the ledger."""
        if self.revision != ledger.revision:
            self.length, self.revision, self.chosen = 0, ledger.revision, _NOTHING
        kept = ledger.tokens[self.length : self.length + len(self.chosen)]
        differs = kept != self.chosen[: len(kept)]
        self.length += int(differs.argmax()) if differs.any() else len(kept)
        self.chosen = _NOTHING


class TokenStore:
    """Rows of tokens on a device, given to the sessions that used them last.

    Attributes:
        tokens: int32[num_rows + 1, capacity]; the last row belongs to nobody.
    """

    NUM_ROWS = 64

    def __init__(self, capacity: int, device: torch.device) -> None:
        """Begins without memory; the first `place` allocates it.

        Args:
            capacity: most tokens of a session.
            device: where they lie.
        """
        self._capacity = capacity
        self._device = device
        self._stored: WeakKeyDictionary[Ledger, StoredTokens] = WeakKeyDictionary()
        self._by_use: list[StoredTokens] = []  # those with a row, the least recently used first
        self.tokens = torch.empty(0, capacity, dtype=torch.int32, device=device)

    @property
    def capacity(self) -> int:
        """Most tokens of a session."""
        return self._capacity

    @property
    def num_rows(self) -> int:
        """Sessions that have room."""
        return max(0, self.tokens.shape[0] - 1)

    @property
    def spare_row(self) -> int:
        """The row that belongs to nobody."""
        return self.num_rows

    def of(self, ledger: Ledger) -> StoredTokens:
        """Where the tokens of a ledger are, and how many of them are still right."""
        stored = self._stored.get(ledger)
        if stored is None:
            stored = self._stored[ledger] = StoredTokens(revision=ledger.revision)
        stored.compare(ledger)
        return stored

    def place(self, wanted: Sequence[StoredTokens]) -> None:
        """Gives each of these distinct ones a row; others lose theirs if there are too few."""
        if len(wanted) > self.num_rows:
            self._grow(len(wanted))
        ids = {id(stored) for stored in wanted}
        others = [stored for stored in self._by_use if id(stored) not in ids and stored.row >= 0]
        missing = [stored for stored in wanted if stored.row < 0]
        used = {stored.row for stored in self._by_use}
        free = [row for row in range(self.num_rows) if row not in used]
        while len(free) < len(missing):
            oldest = others.pop(0)
            free.append(oldest.row)
            oldest.take(-1)
        # Before they get their rows: whatever an interrupt leaves, each row is known to be used.
        self._by_use = [*others, *wanted]
        for stored, row in zip(missing, free, strict=False):
            stored.take(row)

    def _grow(self, num_sessions: int) -> None:
        """Allocates memory for at least so many sessions; what was there is sent again."""
        num_rows = max(self.NUM_ROWS, 1 << (num_sessions - 1).bit_length())
        for stored in self._by_use:
            stored.take(-1)
        self._by_use = []
        shape = num_rows + 1, self._capacity
        self.tokens = torch.zeros(shape, dtype=torch.int32, device=self._device)
