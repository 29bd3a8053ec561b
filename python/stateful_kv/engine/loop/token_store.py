"""Tokens of sessions in device memory: what a loop of steps reads and writes there.

The ledger stays the authority. A row of the store holds a beginning of it; what is new is added
when the session's next steps are taken, so that its past is not sent again.
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
        slot: row of the store; -1 when it has none.
        length: tokens of the ledger that are there.
        revision: of the ledger when they were sent; see `Ledger.revision`.
        chosen: int32[T], tokens that the device put behind them; the ledger may have kept fewer.
    """

    slot: int = -1
    length: int = 0
    revision: int = 0
    chosen: TokenArray = field(default_factory=lambda: _NOTHING)

    def take(self, slot: int) -> None:
        """Gets a row of the store, with nothing in it; -1 for none."""
        self.slot, self.length, self.chosen = slot, 0, _NOTHING

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
        tokens: int32[num_slots + 1, capacity]; the last row belongs to nobody.
    """

    NUM_SLOTS = 64

    def __init__(self, capacity: int, device: torch.device) -> None:
        """Begins without memory; the first `place` takes it.

        Args:
            capacity: most tokens of a session.
            device: where they lie.
        """
        self._capacity = capacity
        self._device = device
        self._rows: WeakKeyDictionary[Ledger, StoredTokens] = WeakKeyDictionary()
        self._by_use: list[StoredTokens] = []  # those with a slot, the least recently used first
        self.tokens = torch.empty(0, capacity, dtype=torch.int32, device=device)

    @property
    def capacity(self) -> int:
        """Most tokens of a session."""
        return self._capacity

    @property
    def num_slots(self) -> int:
        """Sessions that have room."""
        return max(0, self.tokens.shape[0] - 1)

    @property
    def spare_slot(self) -> int:
        """The row that belongs to nobody."""
        return self.num_slots

    def row_of(self, ledger: Ledger) -> StoredTokens:
        """Where the tokens of a ledger are, as far as they are still its own."""
        row = self._rows.get(ledger)
        if row is None:
            row = self._rows[ledger] = StoredTokens(revision=ledger.revision)
        row.compare(ledger)
        return row

    def place(self, rows: Sequence[StoredTokens]) -> None:
        """Gives each of these distinct rows a slot; others lose theirs where there are too few."""
        if len(rows) > self.num_slots:
            self._grow(len(rows))
        wanted = {id(row) for row in rows}
        others = [row for row in self._by_use if id(row) not in wanted]
        missing = [row for row in rows if row.slot < 0]
        used = {row.slot for row in self._by_use}
        free = [slot for slot in range(self.num_slots) if slot not in used]
        while len(free) < len(missing):
            oldest = others.pop(0)
            free.append(oldest.slot)
            oldest.take(-1)
        for row, slot in zip(missing, free, strict=False):
            row.take(slot)
        self._by_use = [*others, *rows]

    def _grow(self, num_rows: int) -> None:
        """Takes memory for at least so many sessions; what was there is sent again."""
        num_slots = max(self.NUM_SLOTS, 1 << (num_rows - 1).bit_length())
        for row in self._by_use:
            row.take(-1)
        self._by_use = []
        shape = num_slots + 1, self._capacity
        self.tokens = torch.zeros(shape, dtype=torch.int32, device=self._device)
