"""NgramIndex against a search through the text."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from stateful_kv._native import _C
from tests.reference.naive_state import propose


class IndexMachine(RuleBasedStateMachine):
    @initialize(min_n=st.integers(1, 3), more=st.integers(0, 5))
    def create(self, min_n: int, more: int) -> None:
        self.min_n, self.max_n = min_n, min_n + more
        self.forks: list[tuple[_C.NgramIndex, list[int]]] = [
            (_C.NgramIndex(self.min_n, self.max_n), [])
        ]

    def chosen(self, which: int) -> tuple[_C.NgramIndex, list[int]]:
        return self.forks[which % len(self.forks)]

    @rule(which=st.integers(0, 9), tokens=st.lists(st.integers(0, 3), max_size=40))
    def append(self, which: int, tokens: list[int]) -> None:
        index, text = self.chosen(which)
        index.append(torch.tensor(tokens, dtype=torch.int64))
        text += tokens

    @rule(which=st.integers(0, 9), repeats=st.integers(1, 5), period=st.integers(1, 6))
    def repeat_the_end(self, which: int, repeats: int, period: int) -> None:
        index, text = self.chosen(which)
        tokens = text[-period:] * repeats
        index.append(torch.tensor(tokens, dtype=torch.int32))
        text += tokens

    @rule(which=st.integers(0, 9), dropped=st.integers(0, 60))
    def truncate(self, which: int, dropped: int) -> None:
        index, text = self.chosen(which)
        del text[max(0, len(text) - dropped) :]
        index.truncate(len(text))

    @rule(which=st.integers(0, 9))
    def fork(self, which: int) -> None:
        if len(self.forks) < 4:
            index, text = self.chosen(which)
            self.forks.append((index.fork(), list(text)))

    @rule(which=st.integers(0, 9), limit=st.integers(0, 20))
    def propose(self, which: int, limit: int) -> None:
        index, text = self.chosen(which)
        draft, match_len = index.propose(limit)
        assert (draft.tolist(), match_len) == propose(text, self.min_n, self.max_n, limit)

    @rule(
        tokens=st.lists(st.lists(st.integers(0, 3), max_size=6), min_size=4, max_size=4),
        limits=st.lists(st.integers(0, 5), min_size=4, max_size=4),
    )
    def propose_for_all(self, tokens: list[list[int]], limits: list[int]) -> None:
        expected: list[tuple[list[int], int]] = []
        for (_, text), new, limit in zip(self.forks, tokens, limits, strict=False):
            text += new
            expected.append(propose(text, self.min_n, self.max_n, limit) if limit > 0 else ([], 0))
        count = len(expected)
        ids, lens, match_lens = _C.propose_drafts(
            [index for index, _ in self.forks],
            [torch.tensor(new, dtype=torch.int32) for new in tokens[:count]],
            torch.tensor(limits[:count]),
        )
        assert [draft.tolist() for draft in ids.split(lens.tolist())] == [d for d, _ in expected]
        assert match_lens.tolist() == [n for _, n in expected]

    @invariant()
    def agrees(self) -> None:
        for index, text in getattr(self, "forks", []):
            assert index.size() == len(text)
            assert index.check_integrity() is None


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
