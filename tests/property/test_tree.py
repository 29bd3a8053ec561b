"""RadixTree over a memory of tokens: a match is the longest prefix, and its pages hold it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from stateful_kv._native import _C
from tests.reference.naive_state import Memory, NaiveTree

NUM_PAGES = 24
PAGE_SIZE = 3
token_lists = st.lists(st.integers(0, 2), max_size=14)
root_keys = st.sampled_from([0, 2**64 - 1])


def array(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


class TreeMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = _C.PagePool(NUM_PAGES, PAGE_SIZE)
        self.tree = _C.RadixTree(self.pool)
        self.memory = Memory(NUM_PAGES, PAGE_SIZE)
        self.model = NaiveTree()
        self.paths: list[tuple[int, list[int]]] = []
        self.pins: dict[int, tuple[int, list[int]]] = {}
        self.guards: list[tuple[torch.Tensor, list[int]]] = []

    def check_pages(self, pages: torch.Tensor, tokens: list[int]) -> None:
        assert len(pages) == -(-len(tokens) // PAGE_SIZE)
        assert self.memory.read(pages.tolist(), len(tokens)) == tokens

    def checked_match(self, root_key: int, tokens: list[int]) -> int:
        match = self.tree.match(root_key, array(tokens))
        self.check_pages(match.pages, tokens[: match.num_tokens])
        return match.num_tokens

    @rule(root_key=root_keys, cut=st.integers(0, 14), more=token_lists, index=st.integers(0, 99))
    def insert(self, root_key: int, cut: int, more: list[int], index: int) -> None:
        base = self.paths[index % len(self.paths)][1] if self.paths else []
        tokens = base[:cut] + more
        pages = self.pool.allocate(-(-len(tokens) // PAGE_SIZE))
        if pages is None:
            return
        for i, token in enumerate(tokens):
            slot = int(pages[i // PAGE_SIZE]) * PAGE_SIZE + i % PAGE_SIZE
            self.memory.slots[slot] = token
        expected = self.model.match(root_key, tokens)
        result = self.tree.insert(root_key, array(tokens), pages)
        assert result.num_matched == expected
        self.check_pages(result.pages, tokens)
        self.model.insert(root_key, tokens)
        self.paths.append((root_key, tokens))
        self.pool.release(pages)
        # Idempotent: the same tokens again change neither tree nor pool.
        free, nodes = self.pool.num_free(), self.tree.num_nodes()
        again = self.tree.insert(root_key, array(tokens), result.pages)
        assert again.num_matched == len(tokens)
        assert again.pages.tolist() == result.pages.tolist()
        assert (self.pool.num_free(), self.tree.num_nodes()) == (free, nodes)

    @rule(root_key=root_keys, tokens=token_lists)
    def match(self, root_key: int, tokens: list[int]) -> None:
        assert self.checked_match(root_key, tokens) == self.model.match(root_key, tokens)

    @rule(root_key=root_keys, tokens=token_lists)
    def touch(self, root_key: int, tokens: list[int]) -> None:
        self.tree.touch(self.tree.match(root_key, array(tokens)))

    @rule(root_key=root_keys, tokens=token_lists)
    def guard(self, root_key: int, tokens: list[int]) -> None:
        match = self.tree.match(root_key, array(tokens))
        self.pool.retain(match.pages)
        self.guards.append((match.pages, tokens[: match.num_tokens]))

    @precondition(lambda self: self.guards)
    @rule(index=st.integers(0, 99))
    def unguard(self, index: int) -> None:
        pages, tokens = self.guards.pop(index % len(self.guards))
        self.check_pages(pages, tokens)
        self.pool.release(pages)

    @rule(root_key=root_keys, tokens=token_lists)
    def pin(self, root_key: int, tokens: list[int]) -> None:
        expected = self.model.match(root_key, tokens)
        pin = self.tree.pin(root_key, array(tokens))
        assert self.tree.pinned_length(pin) == expected
        self.pins[pin] = (root_key, tokens[:expected])

    @precondition(lambda self: self.pins)
    @rule(index=st.integers(0, 99))
    def unpin(self, index: int) -> None:
        pin = sorted(self.pins)[index % len(self.pins)]
        del self.pins[pin]
        self.tree.unpin(pin)
        with pytest.raises(ValueError, match="already released"):
            self.tree.unpin(pin)

    @rule(wanted=st.integers(0, NUM_PAGES + 1))
    def evict(self, wanted: int) -> None:
        free, evictable = self.pool.num_free(), self.tree.num_evictable_pages()
        assert self.tree.evict(wanted) == min(wanted, evictable)
        assert self.pool.num_free() == free + min(wanted, evictable)
        # Which prefixes went is the tree's choice. What is left must be prefix closed and right:
        # ask for every path, and keep as the model what still matches.
        model = NaiveTree()
        for root_key, tokens in self.paths:
            model.insert(root_key, tokens[: self.checked_match(root_key, tokens)])
        for root_key, known in model.prefixes.items():
            assert known <= self.model.prefixes[root_key]
        self.model = model

    @invariant()
    def agrees(self) -> None:
        assert self.pool.check_integrity() is None
        assert self.tree.check_integrity() is None
        for root_key, tokens in self.pins.values():
            assert self.checked_match(root_key, tokens) == len(tokens)
        for pages, tokens in self.guards:
            self.check_pages(pages, tokens)
        guarded = {page for pages, _ in self.guards for page in pages.tolist()}
        assert self.tree.num_tree_pages() + self.pool.num_free() <= NUM_PAGES
        assert self.tree.num_tree_pages() + self.pool.num_free() + len(guarded) >= NUM_PAGES
        in_tree = {
            page
            for page in guarded
            if self.pool.ref_count(page) > sum(page in pages.tolist() for pages, _ in self.guards)
        }
        kept = torch.tensor(sorted(guarded), dtype=torch.int32)
        free_or_kept = self.tree.num_evictable_pages() + len(in_tree)
        assert self.tree.num_blocked_pages(kept) + free_or_kept == self.tree.num_tree_pages()
        if not self.guards:
            assert _C.check_references(self.pool, None, [self.tree]) is None
            evictable, pinned = self.tree.num_evictable_pages(), self.tree.num_pinned_pages()
            assert evictable + pinned == self.tree.num_tree_pages()

    def teardown(self) -> None:
        for pages, _ in self.guards:
            self.pool.release(pages)
        for pin in self.pins:
            self.tree.unpin(pin)
        self.tree.evict_all()
        assert self.pool.num_free() == NUM_PAGES
        assert self.tree.num_nodes() == 0
        assert self.tree.check_integrity() is None


TestTree = TreeMachine.TestCase
TestTree.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
