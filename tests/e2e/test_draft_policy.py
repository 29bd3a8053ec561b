"""How long drafts are: what pays by the cost curve, and what refused drafts may cost at most."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from stateful_kv.drafts.costs import CostCurve
from stateful_kv.drafts.policy import ALONE, MAX_N, MIN_N, DraftPolicy, StepLoad
from tests.e2e.tiny import COSTS

CHEAP = CostCurve((1, 2, 8), (8e-3, 8.1e-3, 9e-3))
DEAR = CostCurve((1, 2, 8), (8e-3, 16.2e-3, 64e-3))
STEEP = CostCurve((1, 2, 4, 8), (8e-3, 11e-3, 18e-3, 33e-3))
# How many of `num_drafted` tokens are accepted: (token of the text, num_drafted) -> number.
Verdict = Callable[[int, int], int]


def taught(costs: CostCurve, num_drafted: int, num_accepted: int, times: int = 8) -> DraftPolicy:
    """A policy with a full account that has seen drafts end like this."""
    policy = DraftPolicy(7, costs)
    policy.draft_len(0, 0)
    for _ in range(10):
        policy.observe(MAX_N, 7, 7)
    for _ in range(times):
        policy.observe(MAX_N, num_drafted, num_accepted)
    policy._account_s = 1e9
    return policy


class Run:
    """A session alone in a simulation: seconds by the curve, with drafts and without."""

    def __init__(self, costs: CostCurve, context: int = 0, max_draft: int = 7) -> None:
        self.policy = DraftPolicy(max_draft, costs)
        self.costs = costs
        self.context = context
        self.num_tokens = self.num_drafted = self.num_accepted = 0
        self.seconds = self.plain_seconds = 0.0

    def step(self, verdict: Verdict, match_len: int = MAX_N) -> int:
        """One step; returns the length of its draft."""
        context = self.context + self.num_tokens
        length = self.policy.draft_len(match_len, self.policy.max_draft, context)
        accepted = verdict(self.num_tokens, length) if length else 0
        self.seconds += self.costs.total(1 + length, context)
        if length:
            self.policy.observe(match_len, length, accepted)
        for _ in range(1 + accepted):
            self.plain_seconds += self.costs.total(1, self.context + self.num_tokens)
            self.num_tokens += 1
        self.num_drafted += length
        self.num_accepted += accepted
        return length

    @property
    def slow_down(self) -> float:
        return self.seconds / self.plain_seconds


def refuse(position: int, length: int) -> int:
    return 0


def accept(position: int, length: int) -> int:
    return length


ADVERSARIES: dict[str, Verdict] = {
    "refuses everything": refuse,
    "accepts probes, refuses drafts": lambda position, length: int(length == 1),
    "refuses probes, accepts drafts": lambda position, length: length if length > 1 else 0,
    "accepts one of each": lambda position, length: min(1, length),
    "phases of 20": lambda position, length: length if position // 20 % 2 else 0,
    "phases of 200": lambda position, length: length if position // 200 % 2 == 0 else 0,
    "good once": lambda position, length: length if position < 30 else 0,
    "coin": lambda position, length: random.Random(position).randrange(2) * length,
}


class TestBound:
    @pytest.mark.parametrize("verdict", ADVERSARIES.values(), ids=ADVERSARIES.keys())
    @pytest.mark.parametrize(
        "costs", [CHEAP, COSTS, STEEP, DEAR], ids=["cheap", "real", "steep", "dear"]
    )
    @pytest.mark.parametrize("context", [0, 6000])
    @pytest.mark.parametrize("max_draft", [1, 7, 20])
    def test_never_two_percent_slower(
        self, verdict: Verdict, costs: CostCurve, context: int, max_draft: int
    ) -> None:
        run = Run(costs, context, max_draft)
        while run.num_tokens < 3000:
            run.step(verdict, MAX_N if run.num_tokens % 3 else MIN_N)
            if run.num_tokens >= 50:
                assert run.slow_down <= 1.02, run.num_tokens

    def test_a_policy_without_an_account_breaks_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(DraftPolicy, "CREDIT", 1e9)
        monkeypatch.setattr(DraftPolicy, "MOST_CREDIT", 1e9)
        run = Run(STEEP)
        while run.num_tokens < 50:
            run.step(refuse)
        assert run.slow_down > 1.02

    def test_refused_drafts_become_rare(self) -> None:
        run = Run(COSTS)
        for _ in range(200):
            run.step(refuse)
        before = run.num_drafted
        for _ in range(640):
            assert run.step(refuse) <= 1
        assert 0 < run.num_drafted - before <= 640 // DraftPolicy.MAX_PROBE_EVERY


class TestLength:
    def test_none_where_rows_are_dear(self) -> None:
        policy = taught(DEAR, 7, 7)
        assert policy.acceptance(MAX_N) > 0.99
        assert policy.draft_len(MAX_N, 7) == 0

    def test_long_where_rows_are_cheap(self) -> None:
        assert taught(CHEAP, 7, 7).draft_len(MAX_N, 7) == 7
        run = Run(CHEAP)
        lengths = [run.step(accept) for _ in range(30)]
        assert lengths[-1] == 7
        assert run.slow_down < 0.3

    def test_it_is_the_best_of_all(self) -> None:
        """Against the definition, for many estimates, contexts and curves."""
        for costs in (CHEAP, COSTS, STEEP, DEAR):
            for context in (0, 500, 6000):
                for times in range(12):
                    policy = taught(costs, 7, 0, times)
                    p = policy.acceptance(MAX_N)
                    rates = [
                        sum(p**i for i in range(k + 1)) / costs.total(1 + k, context)
                        for k in range(8)
                    ]
                    length = policy.draft_len(MAX_N, 7, context)
                    if rates.index(max(rates)):
                        assert length == rates.index(max(rates))
                    else:
                        assert length <= 1  # a probe

    def test_context_makes_rows_dear(self) -> None:
        costs = replace(COSTS, per_token=0.0, per_row_token=5e-6)
        policy = taught(costs, 2, 1, 20)
        policy._long.probe_every = 64
        lengths = [policy.copy().draft_len(MAX_N, 7, context) for context in (0, 10**6)]
        assert lengths[0] >= 1 > lengths[1]

    def test_rows_of_others_make_rows_dear(self) -> None:
        """Where the next rows are nearly free alone, behind those of a prompt they are not."""
        costs = CostCurve((1, 4, 8), (8e-3, 8.2e-3, 16e-3))
        policy = taught(costs, 2, 1, 20)
        alone = policy.copy().draft_len(MAX_N, 7, 0, ALONE)
        beside_rows = policy.copy().draft_len(MAX_N, 7, 0, StepLoad(4, 4))
        beside_prompt = policy.copy().draft_len(MAX_N, 7, 0, StepLoad(1, 500))
        assert alone >= 2
        assert beside_rows < alone
        assert beside_prompt < alone

    def test_never_longer_than_allowed(self) -> None:
        for max_draft in (0, 1, 2, 20):
            policy = DraftPolicy(max_draft, CHEAP)
            for _ in range(50):
                length = policy.draft_len(MAX_N, 20)
                policy.observe(MAX_N, length, length)
            assert policy.draft_len(MAX_N, 20) == max_draft
            assert policy.draft_len(MAX_N, 1) == min(1, max_draft)
            assert policy.draft_len(MIN_N - 1, 20) == 0


class TestRecovery:
    def test_backs_off_and_comes_back(self) -> None:
        run = Run(COSTS)
        first = run.step(accept)
        assert first >= 3
        for _ in range(300):
            run.step(refuse)
        tokens = run.num_tokens
        lengths = []
        while run.num_tokens < tokens + 400:
            lengths.append(run.step(accept))
        assert lengths[-1] >= first
        assert run.num_accepted > 250

    def test_one_kind_of_match_does_not_starve_the_other(self) -> None:
        run = Run(COSTS)
        for _ in range(300):
            run.step(refuse, MIN_N)
        lengths = []
        for _ in range(100):
            run.step(accept, MAX_N)
            lengths.append(run.step(accept, MIN_N))
        assert max(lengths) > 1

    def test_a_copy_learns_on_its_own(self) -> None:
        policy = taught(COSTS, 7, 7)
        copy = policy.copy()
        assert copy.draft_len(MAX_N, 7) == policy.draft_len(MAX_N, 7) == 7
        for _ in range(20):
            copy.observe(MAX_N, 7, 0)
        assert copy.draft_len(MAX_N, 7) == 0
        assert policy.draft_len(MAX_N, 7) == 7
