"""Drafts from a session's own text: propose, learn from what was accepted, verify."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from stateful_kv import ops
from stateful_kv._native import _C
from stateful_kv.ledger import Ledger
from stateful_kv.sampling import BadLogitsError, Sampler

MIN_MATCH = 2
MAX_MATCH = 8

# Cost of a step with 1 + k rows in units of a one-row step, k = 0, 1, ...: int8 linear layers of
# a small model on two AVX2 cores. Beyond four rows every row is paid in full.
STEP_COSTS = (1.0, 1.08, 1.25, 1.41, 1.48, 1.73, 2.15, 2.57)
_COST_OF_A_FURTHER_ROW = 0.35


class DraftPolicy:
    """How many tokens to draft, learnt from what was accepted.

    The rule: every drafted token is a trial that is accepted with probability p, one estimate
    for short matches and one for long ones (a moving average over trials; tokens behind the
    first refused one are no trials). A step with k drafts gives E(k) = 1 + p + ... + p^k tokens
    and costs t(k); k is the one with the highest E(k) / t(k). Where that is 0, every
    `PROBE_EVERY`-th opportunity still drafts one token, so the estimate can recover.

    `costs` may be replaced by a measured curve.
    """

    LONG_MATCH = 4
    RATE = 0.15
    PROBE_EVERY = 4

    def __init__(self, max_draft: int, costs: Sequence[float] = STEP_COSTS) -> None:
        self.max_draft = max_draft
        extra = max(0, max_draft + 1 - len(costs))
        self._costs = list(costs) + [
            costs[-1] + _COST_OF_A_FURTHER_ROW * (i + 1) for i in range(extra)
        ]
        self._acceptance = {False: 0.5, True: 0.8}
        self._skipped = 0

    def acceptance(self, match_len: int) -> float:
        """The estimate of p for drafts that follow a match of this length."""
        return self._acceptance[match_len >= self.LONG_MATCH]

    def draft_len(self, match_len: int) -> int:
        """Tokens to draft after a match of `match_len` tokens."""
        if match_len < MIN_MATCH or self.max_draft == 0:
            return 0
        p = self.acceptance(match_len)
        best, best_rate, expected, power = 0, 1.0 / self._costs[0], 1.0, 1.0
        for k in range(1, self.max_draft + 1):
            power *= p
            expected += power
            rate = expected / self._costs[k]
            if rate > best_rate:
                best, best_rate = k, rate
        if best == 0:
            self._skipped += 1
            if self._skipped >= self.PROBE_EVERY:
                best = 1
        if best:
            self._skipped = 0
        return best

    def observe(self, match_len: int, num_drafted: int, num_accepted: int) -> None:
        """Learns from one verified draft."""
        is_long = match_len >= self.LONG_MATCH
        p = self._acceptance[is_long]
        for _ in range(num_accepted):
            p += self.RATE * (1.0 - p)
        if num_accepted < num_drafted:
            p -= self.RATE * p
        self._acceptance[is_long] = p

    def copy(self) -> DraftPolicy:
        """Returns an independent policy that has learnt the same."""
        other = DraftPolicy(self.max_draft, self._costs)
        other._acceptance = dict(self._acceptance)
        return other


class Drafter:
    """Proposes what followed the last time the ledger's latest tokens occurred.

    The index follows the ledger lazily: `propose` adds the tokens that are new since last time,
    `truncate` drops what a rewound ledger lost.
    """

    def __init__(self, max_draft: int) -> None:
        self.policy = DraftPolicy(max_draft)
        self._index = _C.NgramIndex(MIN_MATCH, MAX_MATCH)
        self._match_len = 0

    def propose(self, ledger: Ledger, limit: int) -> list[int]:
        """Returns at most `limit` tokens that may follow the ledger; often none."""
        limit = min(limit, self.policy.max_draft)
        if limit <= 0:
            return []
        self._index.append(ledger.tokens[self._index.size() :])
        draft, self._match_len = self._index.propose(limit)
        if len(draft) == 0:
            return []
        tokens: list[int] = draft[: self.policy.draft_len(self._match_len)].tolist()
        return tokens

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        """Learns what became of the last proposal."""
        self.policy.observe(self._match_len, num_drafted, num_accepted)

    def truncate(self, length: int) -> None:
        """Forgets the tokens from `length` on."""
        if self._index.size() > length:
            self._index.truncate(length)

    def fork(self) -> Drafter:
        """Returns a drafter for a copy of the ledger; O(1), the index is copied on write."""
        other = Drafter(self.policy.max_draft)
        other.policy = self.policy.copy()
        other._index = self._index.fork()
        return other


def verify_greedy(drafts: Sequence[Sequence[int]], target_ids: torch.Tensor) -> list[list[int]]:
    """Accepts the agreeing start of each draft and adds the target's own next token.

    Args:
        drafts: the proposed tokens of each sequence; may be empty.
        target_ids: int64[sum(len(draft) + 1)], the greedy token of every row, rows of a sequence
            in order: after its pending token, then after each draft token.

    Returns:
        For each sequence the accepted tokens and one bonus token.
    """
    if not any(drafts):
        return [[token] for token in target_ids.tolist()]
    offsets = np.zeros(len(drafts) + 1, dtype=np.int32)
    np.cumsum([len(draft) for draft in drafts], out=offsets[1:])
    draft_ids = torch.tensor([token for draft in drafts for token in draft], dtype=torch.int64)
    num_accepted, bonus_ids = ops.verify_draft(draft_ids, target_ids, torch.from_numpy(offsets))
    return [
        [*draft[:accepted], bonus]
        for draft, accepted, bonus in zip(
            drafts, num_accepted.tolist(), bonus_ids.tolist(), strict=True
        )
    ]


class Candidate(NamedTuple):
    """One sequence of a verify: how it samples, what was proposed, where its next token goes."""

    sampler: Sampler
    draft: list[int]
    position: int


class Choice(NamedTuple):
    """Tokens to add to a sequence, and the error that cut them short, if any."""

    tokens: list[int]
    error: Exception | None


def verify(candidates: Sequence[Candidate], logits: torch.Tensor) -> list[Choice]:
    """Chooses the next tokens of several sequences.

    Args:
        candidates: the sequences.
        logits: float32[sum(len(draft) + 1), V], rows of a sequence in order: after its pending
            token, then after each draft token.

    Returns:
        For each sequence the agreeing start of its draft and one more token, or the error that
        kept it from having them.
    """
    num_rows = [len(candidate.draft) + 1 for candidate in candidates]
    parts = torch.split(logits, num_rows)
    choices: list[Choice | None] = [
        None if candidate.sampler.is_plain_greedy else _choose_sampled(candidate, part)
        for candidate, part in zip(candidates, parts, strict=True)
    ]
    greedy = [index for index, choice in enumerate(choices) if choice is None]
    if greedy:
        all_rows = len(greedy) == len(candidates)
        rows = logits if all_rows else torch.cat([parts[index] for index in greedy])
        chosen = _choose_greedy([candidates[index] for index in greedy], rows)
        for index, choice in zip(greedy, chosen, strict=True):
            choices[index] = choice
    return [choice for choice in choices if choice is not None]


def _choose_sampled(candidate: Candidate, rows: torch.Tensor) -> Choice:
    try:
        run = candidate.sampler.choose_run(rows.numpy(), candidate.draft, candidate.position)
    except Exception as error:
        return Choice([], error)
    return Choice(*run)


def _choose_greedy(candidates: Sequence[Candidate], logits: torch.Tensor) -> list[Choice]:
    """All candidates at once; if that fails, one by one, to find whose fault it is."""
    try:
        return _verify_plain_greedy(candidates, logits)
    except Exception as error:
        if len(candidates) == 1:
            return [Choice([], error)]
    parts = torch.split(logits, [len(candidate.draft) + 1 for candidate in candidates])
    return [
        choice
        for candidate, part in zip(candidates, parts, strict=True)
        for choice in _choose_greedy([candidate], part)
    ]


def _verify_plain_greedy(candidates: Sequence[Candidate], logits: torch.Tensor) -> list[Choice]:
    """The fast path: one pass over all rows finds each row's token (lowest id of equals)."""
    ids, values = ops.argmax(logits)
    runs = verify_greedy([candidate.draft for candidate in candidates], ids)
    if bool(torch.isfinite(values).all()):
        return [Choice(run, None) for run in runs]
    choices: list[Choice] = []
    start = 0
    for candidate, run in zip(candidates, runs, strict=True):
        tops = values[start : start + len(run)].tolist()
        start += len(candidate.draft) + 1
        bad = next((i for i, top in enumerate(tops) if not math.isfinite(top)), None)
        if bad is None:
            choices.append(Choice(run, None))
        else:
            choices.append(
                Choice(run[:bad], BadLogitsError.at(candidate.position + bad, tops[bad]))
            )
    return choices
