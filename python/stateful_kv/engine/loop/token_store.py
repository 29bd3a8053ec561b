"""Tokens of sessions in device memory: what a loop of steps reads and writes there.

The ledger stays the authority. A row of the store holds a beginning of it; the next visit adds what
is new, so that no visit sends a session's past again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(eq=False)
class HistoryRow:
    """Where a session's tokens are in the store.

    Attributes:
        slot: row of the store; -1 when it has none.
        length: tokens of the ledger that are there.
    """

    slot: int = -1
    length: int = 0

    def truncate(self, length: int) -> None:
        """Forgets the tokens from `length` on: the ledger may go on with others."""
        self.length = min(self.length, length)


class HistoryStore:
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
        self._by_use: list[HistoryRow] = []  # those with a slot, the least recently used first
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

    def place(self, rows: Sequence[HistoryRow]) -> None:
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
            oldest.slot, oldest.length = -1, 0
        for row, slot in zip(missing, free, strict=False):
            row.slot, row.length = slot, 0
        self._by_use = [*others, *rows]

    def _grow(self, num_rows: int) -> None:
        """Takes memory for at least so many sessions; what was there is sent again."""
        num_slots = max(self.NUM_SLOTS, 1 << (num_rows - 1).bit_length())
        for row in self._by_use:
            row.slot, row.length = -1, 0
        self._by_use = []
        shape = num_slots + 1, self._capacity
        self.tokens = torch.zeros(shape, dtype=torch.int32, device=self._device)
