"""Drafts from a session's own text: prompt lookup in an n-gram index.

Proposes the tokens that followed the last time that the text's newest tokens occurred.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch

from stateful_kv._native import _C
from stateful_kv.drafts.costs import CostCurve
from stateful_kv.drafts.policy import MAX_N, MIN_N, DraftPolicy
from stateful_kv.drafts.proposer import NO_DRAFT, Draft, StepLoad
from stateful_kv.types import TokenArray

SOURCE = "ngram"


class NgramDrafter:
    """The drafter of one session; see `proposer.Drafter`.

    The index follows the session's tokens lazily: `propose` adds those that are new. How many it
    has is kept here too, since that is asked in every step; `truncate` compares the two, also
    after an interrupt.
    """

    def __init__(self, max_draft: int, costs: CostCurve) -> None:
        self.policy = DraftPolicy(max_draft, costs)
        self._index = _C.NgramIndex(MIN_N, MAX_N)
        self._size = 0

    def propose(self, tokens: TokenArray, limit: int) -> Draft:
        """At most `limit` tokens that may follow `tokens`; often none."""
        return propose_all([self], [tokens], [limit])[0]

    def worthwhile(self, draft: Draft, context: int, load: StepLoad) -> Draft:
        """The part of the draft that is expected to pay."""
        return draft.first(self.policy.draft_len(draft.match_len, len(draft), context, load))

    def observe(self, draft: Draft, num_accepted: int) -> None:
        """Learns how many tokens of a verified draft were accepted."""
        self.policy.observe(draft.match_len, len(draft), num_accepted)

    def truncate(self, length: int) -> None:
        """Forgets the tokens from `length` on."""
        if self._index.size() > length:
            self._index.truncate(length)
        self._size = self._index.size()

    def fork(self) -> NgramDrafter:
        """A drafter for a copy of the session; O(1), the index is copied on write."""
        other = copy(self)
        other.policy = self.policy.copy()
        other._index = self._index.fork()
        other._size = other._index.size()
        return other


def propose_all(
    drafters: Sequence[NgramDrafter], tokens: Sequence[TokenArray], limits: Sequence[int]
) -> list[Draft]:
    """The drafts of several distinct drafters, by one call of the extension.

    Args:
        drafters: S of them.
        tokens: all tokens of each session.
        limits: the longest draft of each; where it is 0 the index is not looked at.
    """
    asked = [index for index, limit in enumerate(limits) if limit > 0]
    drafts = [NO_DRAFT] * len(drafters)
    if not asked:
        return drafts
    indexes = [drafters[i]._index for i in asked]
    new = [tokens[i][drafters[i]._size :] for i in asked]
    most = [min(limits[i], drafters[i].policy.max_draft) for i in asked]
    ids, lens, matches = _C.propose_drafts(indexes, new, torch.tensor(most, dtype=torch.int64))
    for i in asked:
        drafters[i]._size = len(tokens[i])
    found, start = ids.numpy(), 0
    for i, length, match_len in zip(asked, lens.tolist(), matches.tolist(), strict=True):
        if length:
            drafts[i] = Draft(found[start : start + length], match_len, SOURCE)
        start += length
    return drafts
