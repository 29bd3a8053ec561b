"""Drafts from a session's own text: propose, learn from what was accepted, verify."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch

from stateful_kv import ops
from stateful_kv._native import _C
from stateful_kv.costs import CostCurve
from stateful_kv.device import to_host
from stateful_kv.ledger import Ledger
from stateful_kv.sampling import BadLogitsError, Sampler, sample_rows

MIN_MATCH = 2
MAX_MATCH = 8


class StepLoad(NamedTuple):
    """What a step computes besides a draft.

    Attributes:
        num_sequences: sequences that decode in it, the draft's own included.
        num_rows: rows it has without the draft: of these, of drafts before it, of prompts.
    """

    num_sequences: int
    num_rows: int


ALONE = StepLoad(1, 1)


@dataclass
class _Matches:
    """What is known of drafts behind matches of one kind, short or long.

    Attributes:
        acceptance: the estimate of p.
        probe_every: a draft that should not pay is tried at every so many opportunities.
        num_skipped: opportunities without a draft since the last one.
        is_probing: the draft that is out is such a try.
    """

    acceptance: float
    probe_every: int
    num_skipped: int = 0
    is_probing: bool = False


class DraftPolicy:
    """How many tokens to draft: as many as pay, by what they cost and what was accepted so far.

    Every drafted token is a trial that is accepted with probability p, one estimate for short
    matches and one for long ones (a moving average over trials; tokens behind the first refused
    one are no trials). A draft of k gives E(k) = 1 + p + ... + p^k tokens. A session alone takes
    the k with the highest E(k) / t(1 + k, context), t being the cost curve. With S sequences in
    the step and n rows before this draft it is (S - 1 + E(k)) / (t(S) + t(n + k) - t(n)): what a
    plain step gives and costs, plus what the draft adds, the others' context taken as one's own.
    Prompts and earlier drafts of the step count in n, since they make further rows dear.

    Where the best k is 0, but one token would pay if accepted, it is tried now and then (a probe),
    so that the estimate can recover: at every opportunity after a success, half as often after
    each failure.

    An account bounds what all this may cost. It holds `CREDIT` plain steps at first and earns
    `INTEREST` of every step; a draft is paid for from it and each accepted token returns the time
    of a plain step, up to `MOST_CREDIT`. No draft is made that the account could not bear being
    refused. So a session alone never lasts longer than CREDIT steps + (1 + INTEREST) times what
    it would without drafts (by the curve): 2 % from 50 tokens on, whatever text it meets.
    """

    LONG_MATCH = 4
    RATE = 0.15
    PROBE_EVERY = 4
    MAX_PROBE_EVERY = 64
    CREDIT = 0.5
    MOST_CREDIT = 8.0
    INTEREST = 0.01

    def __init__(self, max_draft: int, costs: CostCurve) -> None:
        self.max_draft = max_draft
        self._costs = costs
        self._short = _Matches(0.5, self.PROBE_EVERY)
        self._long = _Matches(0.8, self.PROBE_EVERY)
        self._account_s: float | None = None
        self._token_s = 0.0  # what an accepted token of the draft that is out saves
        self._extra_s = 0.0  # what that draft costs

    def acceptance(self, match_len: int) -> float:
        """The estimate of p for drafts that follow a match of this length."""
        return self._matches(match_len).acceptance

    def draft_len(
        self, match_len: int, limit: int, context: int = 0, load: StepLoad = ALONE
    ) -> int:
        """Tokens to draft in this step; to be called once for every step of the session.

        Args:
            match_len: length of the match that the draft would follow; 0 if there is none.
            limit: longest draft there is.
            context: tokens of the session.
            load: what else the step computes.
        """
        costs, num = self._costs, load.num_sequences
        plain_s = costs.linear(num) + num * costs.attention(1, context)
        self._earn(plain_s / num)
        limit = min(limit, self.max_draft)
        if match_len < MIN_MATCH or limit <= 0:
            return 0
        base_s, fixed_s = costs.linear(load.num_rows), costs.attention(1, context)
        extras = [
            costs.linear(load.num_rows + k) - base_s + costs.attention(1 + k, context) - fixed_s
            for k in range(1, limit + 1)
        ]
        matches = self._matches(match_len)
        best = self._best(matches.acceptance, num, plain_s, extras)
        matches.is_probing = best == 0
        if best == 0:
            matches.num_skipped += 1
            can_pay = extras[0] <= min(self._account(), plain_s / num)
            if can_pay and matches.num_skipped >= matches.probe_every:
                best = 1
        if best:
            matches.num_skipped = 0
            self._token_s, self._extra_s = plain_s / num, extras[best - 1]
        return best

    def observe(self, match_len: int, num_drafted: int, num_accepted: int) -> None:
        """Learns from the draft that `draft_len` allowed, now that it is verified."""
        matches = self._matches(match_len)
        p = matches.acceptance
        for _ in range(num_accepted):
            p += self.RATE * (1.0 - p)
        if num_accepted < num_drafted:
            p -= self.RATE * p
        matches.acceptance = p
        if num_accepted:
            matches.probe_every = 1
        elif matches.is_probing:
            longer = max(self.PROBE_EVERY, 2 * matches.probe_every)
            matches.probe_every = min(longer, self.MAX_PROBE_EVERY)
        account = self._account() - self._extra_s + num_accepted * self._token_s
        self._account_s = min(account, self.MOST_CREDIT * self._token_s)

    def copy(self) -> DraftPolicy:
        """Returns an independent policy that has learnt the same."""
        other = DraftPolicy(self.max_draft, self._costs)
        other._short, other._long = replace(self._short), replace(self._long)
        other._account_s = self._account_s
        return other

    def _matches(self, match_len: int) -> _Matches:
        return self._long if match_len >= self.LONG_MATCH else self._short

    def _account(self) -> float:
        return self._account_s or 0.0

    def _earn(self, token_s: float) -> None:
        """Interest of one step."""
        if self._account_s is None:
            self._account_s = self.CREDIT * token_s
        most = max(self._account_s, self.MOST_CREDIT * token_s)
        self._account_s = min(self._account_s + self.INTEREST * token_s, most)

    def _best(self, p: float, num: int, plain_s: float, extras: Sequence[float]) -> int:
        """The affordable k with the most tokens a second, 0 included."""
        account = self._account()
        best, best_rate, expected, power = 0, num / plain_s, float(num), 1.0
        for k, extra_s in enumerate(extras, start=1):
            power *= p
            expected += power
            rate = expected / (plain_s + extra_s)
            if rate > best_rate and extra_s <= account:
                best, best_rate = k, rate
        return best


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


class GreedyTokens(NamedTuple):
    """All that plain greedy sequences need of a forward pass.

    Attributes:
        ids: int64[R], the token with the largest logit of each row (lowest id of equals).
        values: float32[R], that logit; NaN if the row has one.
    """

    ids: torch.Tensor
    values: torch.Tensor


# Chooses for candidates of one kind; takes the rows of all of them as one tensor or several.
Chooser = Callable[..., list[Choice]]


def verify(candidates: Sequence[Candidate], output: torch.Tensor | GreedyTokens) -> list[Choice]:
    """Chooses the next tokens of several sequences.

    Neighbours that are chosen for in the same way share one op: plain greedy ones an argmax, plain
    sampled ones a draw. Those with penalties go one by one.

    Args:
        candidates: the sequences.
        output: float32[sum(len(draft) + 1), V], rows of a sequence in order: after its pending
            token, then after each draft token; or the greedy tokens of these rows, if all
            sequences are plain greedy. Logits may lie on any device, and leave it only for
            candidates with penalties.

    Returns:
        For each sequence the agreeing start of its draft and one more token, or the error that
        kept it from having them.
    """
    groups: list[tuple[Chooser, list[Candidate]]]
    if isinstance(output, GreedyTokens):
        tensors: Sequence[torch.Tensor] = output
        groups = [(_verify_tokens, list(candidates))]
    else:
        tensors = (output,)
        groups = [(chooser, list(group)) for chooser, group in groupby(candidates, _chooser)]
    sizes = [sum(_num_rows(group)) for _, group in groups]
    parts = zip(*(torch.split(tensor, sizes) for tensor in tensors), strict=True)
    return [
        choice
        for (chooser, group), rows in zip(groups, parts, strict=True)
        for choice in _choose(chooser, group, rows)
    ]


def _num_rows(candidates: Sequence[Candidate]) -> list[int]:
    return [len(candidate.draft) + 1 for candidate in candidates]


def _chooser(candidate: Candidate) -> Chooser:
    if candidate.sampler.is_plain_greedy:
        return _verify_greedy_rows
    return _verify_draws if candidate.sampler.is_plain_sampled else _verify_runs


def _choose(
    chooser: Chooser, candidates: Sequence[Candidate], rows: Sequence[torch.Tensor]
) -> list[Choice]:
    """All candidates at once; if that fails, one by one, to find whose fault it is."""
    try:
        return chooser(candidates, *rows)
    except Exception as error:
        if len(candidates) == 1:
            return [Choice([], error)]
    parts = zip(*(torch.split(tensor, _num_rows(candidates)) for tensor in rows), strict=True)
    return [
        choice
        for candidate, part in zip(candidates, parts, strict=True)
        for choice in _choose(chooser, [candidate], part)
    ]


def _verify_greedy_rows(candidates: Sequence[Candidate], logits: torch.Tensor) -> list[Choice]:
    return _verify_tokens(candidates, *ops.argmax(logits))


def _verify_draws(candidates: Sequence[Candidate], logits: torch.Tensor) -> list[Choice]:
    owners = [
        (one.sampler, range(one.position, one.position + len(one.draft) + 1)) for one in candidates
    ]
    return _verify_tokens(candidates, *sample_rows(logits, owners))


def _verify_runs(candidates: Sequence[Candidate], logits: torch.Tensor) -> list[Choice]:
    """With penalties a row's token depends on those before it."""
    (logits,) = to_host([logits])
    parts = torch.split(logits, _num_rows(candidates))
    return [
        Choice(*one.sampler.choose_run(rows.numpy(), one.draft, one.position))
        for one, rows in zip(candidates, parts, strict=True)
    ]


def _verify_tokens(
    candidates: Sequence[Candidate], ids: torch.Tensor, values: torch.Tensor
) -> list[Choice]:
    """One pass over the chosen tokens of all rows and the largest logits they were chosen from."""
    ids, values = to_host([ids, values])
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
