"""Drafts from a session's own text: prompt lookup in an n-gram index."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

from stateful_kv._native import _C
from stateful_kv.drafts.costs import CostCurve
from stateful_kv.drafts.policy import ALONE, MAX_MATCH, MIN_MATCH, DraftPolicy, StepLoad
from stateful_kv.session.ledger import Ledger


class Drafter:
    """Proposes what followed the last time the ledger's latest tokens occurred.

    The index follows the ledger lazily: `propose` adds the tokens that are new since last time,
    `truncate` drops what a rewound ledger lost.
    """

    def __init__(self, max_draft: int, costs: CostCurve) -> None:
        self.policy = DraftPolicy(max_draft, costs)
        self._index = _C.NgramIndex(MIN_MATCH, MAX_MATCH)
        self._match_len = 0

    def propose(self, ledger: Ledger, limit: int, load: StepLoad = ALONE) -> list[int]:
        """Returns at most `limit` tokens that may follow the ledger; often none."""
        limit = min(limit, self.policy.max_draft)
        draft: Sequence[int] = ()
        match_len = 0
        if limit > 0:
            self._index.append(ledger.tokens[self._index.size() :])
            found, match_len = self._index.propose(limit)
            draft = found.tolist()
        length = self.policy.draft_len(match_len, len(draft), len(ledger), load)
        self._match_len = match_len
        return list(draft[:length])

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        """Learns what became of the last proposal."""
        self.policy.observe(self._match_len, num_drafted, num_accepted)

    def truncate(self, length: int) -> None:
        """Forgets the tokens from `length` on."""
        if self._index.size() > length:
            self._index.truncate(length)

    def fork(self) -> Drafter:
        """Returns a drafter for a copy of the ledger; O(1), the index is copied on write."""
        other = copy(self)
        other.policy = self.policy.copy()
        other._index = self._index.fork()
        return other
