"""PagePool against counts in a list."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from stateful_kv._native import _C
from tests.reference.naive_state import NaivePool

NUM_PAGES = 6
page_lists = st.lists(st.integers(-1, NUM_PAGES), max_size=5)


class PoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = _C.PagePool(NUM_PAGES, 4)
        self.model = NaivePool(NUM_PAGES)

    @rule(n=st.integers(0, NUM_PAGES + 1))
    def allocate(self, n: int) -> None:
        pages = self.pool.allocate(n)
        assert (pages is None) == (n > self.model.num_free())
        if pages is not None:
            assert len(pages) == n
            self.model.allocate(pages.tolist())

    @rule(pages=page_lists)
    def retain(self, pages: list[int]) -> None:
        array = torch.tensor(pages, dtype=torch.int32)
        if self.model.can_retain(pages):
            self.pool.retain(array)
            self.model.retain(pages)
        else:
            with pytest.raises((ValueError, IndexError)):
                self.pool.retain(array)

    @rule(pages=page_lists)
    def release(self, pages: list[int]) -> None:
        array = torch.tensor(pages, dtype=torch.int32)
        if self.model.can_release(pages):
            self.pool.release(array)
            self.model.release(pages)
        else:
            with pytest.raises((ValueError, IndexError)):
                self.pool.release(array)

    @invariant()
    def agrees(self) -> None:
        assert self.pool.check_integrity() is None
        assert [self.pool.ref_count(p) for p in range(NUM_PAGES)] == self.model.counts
        assert self.pool.num_free() == self.model.num_free()


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
