"""SequenceTable over a memory of tokens: what a sequence reads is always what it wrote."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from stateful_kv._native import _C
from tests.reference.naive_state import Memory, NaiveSequence

NUM_PAGES = 7
PAGE_SIZE = 3
pick = st.integers(0, 1000)


class SequenceMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = _C.PagePool(NUM_PAGES, PAGE_SIZE)
        self.table = _C.SequenceTable(self.pool)
        self.memory = Memory(NUM_PAGES, PAGE_SIZE)
        self.model: dict[int, NaiveSequence] = {}
        self.next_token = 0

    def chosen(self, index: int) -> int:
        return sorted(self.model)[index % len(self.model)]

    def pages(self, seq: int) -> list[int]:
        return self.table.page_table(seq).tolist()

    @rule()
    def create(self) -> None:
        seq = self.table.create()
        assert seq not in self.model
        self.model[seq] = NaiveSequence()

    @precondition(lambda self: self.model)
    @rule(index=pick, n=st.integers(0, 8))
    def reserve(self, index: int, n: int) -> None:
        seq = self.chosen(index)
        before = {other: self.pages(other) for other in self.model}
        needed, free = self.table.pages_needed(seq, n), self.pool.num_free()
        copies = self.table.reserve(seq, n)
        assert (copies is None) == (needed > free)
        assert all(self.pages(other) == before[other] for other in self.model if other != seq)
        if copies is None:
            assert self.pages(seq) == before[seq]
            return
        assert len(copies) <= 1
        for source, target in copies.tolist():
            self.memory.copy(source, target)
        self.model[seq].reserved = n

    @precondition(lambda self: self.model)
    @rule(
        indexes=st.lists(pick, max_size=4),
        counts=st.lists(st.integers(0, 5), min_size=4, max_size=4),
    )
    def reserve_and_fill_batch(self, indexes: list[int], counts: list[int]) -> None:
        seqs = list(dict.fromkeys(self.chosen(index) for index in indexes))
        ids = torch.tensor(seqs, dtype=torch.int64)
        lens = torch.tensor(counts[: len(seqs)], dtype=torch.int32)
        before = {seq: (self.pages(seq), self.table.num_reserved(seq)) for seq in self.model}
        prepared = self.table.prepare_batch(ids, lens)
        if prepared is None:
            assert all(
                (self.pages(seq), self.table.num_reserved(seq)) == old
                for seq, old in before.items()
            )
            return
        copies, *arrays = prepared
        for source, target in copies.tolist():
            self.memory.copy(source, target)
        for seq, count in zip(seqs, lens.tolist(), strict=True):
            self.model[seq].reserved = count
        filled = self.table.fill_batch(ids, lens)
        assert [a.tolist() for a in arrays] == [a.tolist() for a in filled]

    @precondition(lambda self: self.model)
    @rule(indexes=st.lists(pick, max_size=4))
    def drop_reservations(self, indexes: list[int]) -> None:
        seqs = list(dict.fromkeys(self.chosen(index) for index in indexes))
        ids = torch.tensor(seqs, dtype=torch.int64)
        lengths = self.table.lengths(ids).tolist()
        assert lengths == [len(self.model[seq].tokens) for seq in seqs]
        self.table.commit_batch(ids, torch.zeros_like(ids))
        for seq in seqs:
            self.model[seq].reserved = 0

    @precondition(lambda self: self.model)
    @rule(index=pick, accepted=st.integers(0, 8))
    def write_and_commit(self, index: int, accepted: int) -> None:
        seq = self.chosen(index)
        model = self.model[seq]
        ids = torch.tensor([seq], dtype=torch.int64)
        lens = torch.tensor([model.reserved], dtype=torch.int32)
        page_table, seq_lens, offsets, positions, slots = self.table.fill_batch(ids, lens)
        start = len(model.tokens)
        assert seq_lens.tolist() == [start + model.reserved]
        assert offsets.tolist() == [0, model.reserved]
        assert positions.tolist() == list(range(start, start + model.reserved))
        assert page_table[0].tolist() == self.pages(seq)[: page_table.shape[1]]
        written = []
        for slot in slots.tolist():
            assert self.pool.ref_count(slot // PAGE_SIZE) == 1, "a shared page is never written"
            self.next_token += 1
            self.memory.slots[slot] = self.next_token
            written.append(self.next_token)
        accepted = min(accepted, model.reserved)
        self.table.commit(seq, accepted)
        model.tokens += written[:accepted]
        model.reserved = 0

    @precondition(lambda self: self.model)
    @rule(index=pick, length=st.integers(0, 25))
    def truncate(self, index: int, length: int) -> None:
        seq = self.chosen(index)
        model = self.model[seq]
        if length > len(model.tokens):
            with pytest.raises(ValueError, match="truncate"):
                self.table.truncate(seq, length)
            return
        self.table.truncate(seq, length)
        del model.tokens[length:]
        model.reserved = 0

    @precondition(lambda self: self.model)
    @rule(index=pick)
    def fork(self, index: int) -> None:
        seq = self.chosen(index)
        free = self.pool.num_free()
        if self.model[seq].reserved:
            with pytest.raises(ValueError, match="fork"):
                self.table.fork(seq)
            return
        child = self.table.fork(seq)
        assert self.pool.num_free() == free
        self.model[child] = NaiveSequence(list(self.model[seq].tokens))

    @precondition(lambda self: self.model)
    @rule(index=pick, length=st.integers(0, 25))
    def adopt_prefix(self, index: int, length: int) -> None:
        seq = self.chosen(index)
        length = min(length, len(self.model[seq].tokens))
        if self.model[seq].reserved:
            return
        pages = self.table.page_table(seq)[: -(-length // PAGE_SIZE)]
        child = self.table.adopt(pages, length)
        self.model[child] = NaiveSequence(self.model[seq].tokens[:length])

    @precondition(lambda self: self.model)
    @rule(index=pick)
    def release(self, index: int) -> None:
        seq = self.chosen(index)
        assert self.table.has(seq)
        self.table.release(seq)
        assert not self.table.has(seq)
        del self.model[seq]
        with pytest.raises(ValueError, match="already released"):
            self.table.release(seq)

    @invariant()
    def agrees(self) -> None:
        assert self.pool.check_integrity() is None
        assert self.table.check_integrity() is None
        assert _C.check_references(self.pool, self.table, []) is None
        assert self.table.num_sequences() == len(self.model)
        held = {page for seq in self.model for page in self.pages(seq)}
        assert self.pool.num_free() + len(held) == NUM_PAGES
        for seq, model in self.model.items():
            assert self.table.length(seq) == len(model.tokens)
            assert self.table.num_reserved(seq) == model.reserved
            capacity = len(model.tokens) + model.reserved
            assert self.table.num_pages(seq) == -(-capacity // PAGE_SIZE)
            assert self.memory.read(self.pages(seq), len(model.tokens)) == model.tokens


TestSequences = SequenceMachine.TestCase
TestSequences.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
