"""How many tokens to draft: as many as pay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from stateful_kv.drafts.costs import CostCurve
from stateful_kv.drafts.proposer import ALONE, StepLoad

MIN_N = 2
MAX_N = 8


@dataclass
class _Matches:
    """What is known of drafts behind matches of one kind, short or long.

    Attributes:
        acceptance: the estimate of p.
        probe_every: a draft that should not pay is tried at every so many opportunities.
        num_skipped: opportunities without a draft since the last draft.
        is_probing: the last draft is such a try.
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
        self._token_s = 0.0  # seconds that an accepted token of the last draft saves
        self._extra_s = 0.0  # seconds that draft costs

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
        if match_len < MIN_N or limit <= 0:
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
