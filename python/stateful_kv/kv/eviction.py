"""Frees pages when there are too few; the only place that decides who gives them up.

Pages that only the prefix tree holds go first, the least recently used ones before others. If
that is not enough, sequences at rest are released, in the order of an `EvictionPolicy`. No text is
lost: a session computes its KV again from its ledger when it needs it. Sequences that a running
turn works on are never released.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch

from stateful_kv._native import _C


class EvictionPolicy(Protocol):
    """Decides which sequence at rest is released next."""

    def rest(self, sequence_id: int) -> None:
        """No turn works on this sequence any more: it may be released."""
        ...

    def wake(self, sequence_id: int) -> None:
        """A turn works on this sequence, or it is gone: it is no candidate any more."""
        ...

    def candidates(self) -> Iterable[int]:
        """The sequences at rest, the one to release first at the front."""
        ...


class LeastRecentlyUsed:
    """Releases the sequence first that has been at rest for longest."""

    def __init__(self) -> None:
        self._resting: dict[int, None] = {}  # in the order in which they came to rest

    def rest(self, sequence_id: int) -> None:
        """Puts the sequence behind all others."""
        self._resting.pop(sequence_id, None)
        self._resting[sequence_id] = None

    def wake(self, sequence_id: int) -> None:
        """Forgets the sequence."""
        self._resting.pop(sequence_id, None)

    def candidates(self) -> Iterable[int]:
        """The sequences at rest, the one that has rested for longest at the front."""
        return tuple(self._resting)


class Eviction:
    """Frees pages of one pool: from its prefix tree, then from sequences at rest.

    Attributes:
        policy: the order of the sequences at rest.
    """

    def __init__(
        self,
        pool: _C.PagePool,
        table: _C.SequenceTable,
        tree: _C.RadixTree,
        policy: EvictionPolicy | None = None,
    ) -> None:
        """Keeps the three; a policy of None is `LeastRecentlyUsed`."""
        self.policy: EvictionPolicy = LeastRecentlyUsed() if policy is None else policy
        self._pool = pool
        self._table = table
        self._tree = tree

    def evict_prefixes(self, num_pages: int) -> int:
        """Frees pages that only the tree holds, at most so many; returns how many were freed."""
        return self._tree.evict(num_pages)

    def next_at_rest(self) -> int | None:
        """The sequence at rest to release next; None if there is none."""
        return next(iter(self.policy.candidates()), None)

    def could_free(self, sequence_id: int, wanted: int, *, from_resting: bool) -> bool:
        """Whether `wanted` pages can be made free for this sequence; changes nothing.

        Args:
            sequence_id: the sequence that is to grow.
            wanted: pages it needs.
            from_resting: sequences at rest may be released for it.
        """
        free = self._pool.num_free()
        if wanted <= free or wanted <= free + self._tree.num_evictable_pages():
            return True
        if not from_resting:
            return False
        resting = [other for other in self.policy.candidates() if other != sequence_id]
        kept = set(self._table.sequence_ids()).difference(resting)
        kept.add(sequence_id)
        tables = [self._table.page_table(other) for other in kept]
        pages = torch.unique(torch.cat(tables))
        room: int = self._pool.num_pages() - pages.numel() - self._tree.num_blocked_pages(pages)
        # A copy of the tail is not needed once the only others that share it are released.
        return wanted - self._is_tail_shared_with(sequence_id, resting) <= room

    def _is_tail_shared_with(self, sequence_id: int, resting: Sequence[int]) -> bool:
        """Whether the partly filled last page is shared, and only with sequences at rest."""
        length, page_size = self._table.length(sequence_id), self._pool.page_size()
        if length % page_size == 0:
            return False
        tail = int(self._table.page_table(sequence_id)[length // page_size])
        num_others = self._pool.ref_count(tail) - 1
        num_resting = sum(int((self._table.page_table(other) == tail).any()) for other in resting)
        return 0 < num_others == num_resting
