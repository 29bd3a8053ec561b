"""Naive models of the state objects: the rules in the plainest form, slow on purpose.

They say what must be true, not how: the tree knows prefixes as tuples of tokens, a page as the
tokens whose KV it would hold. Nothing here imports stateful_kv.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


class NaivePool:
    """Reference counts in a list."""

    def __init__(self, num_pages: int) -> None:
        self.counts = [0] * num_pages

    def num_free(self) -> int:
        return self.counts.count(0)

    def allocate(self, pages: list[int]) -> None:
        """Notes pages that the real pool chose; they must have been free."""
        assert len(set(pages)) == len(pages)
        for page in pages:
            assert self.counts[page] == 0, "handed out a page that is held"
            self.counts[page] = 1

    def can_retain(self, pages: list[int]) -> bool:
        return all(0 <= p < len(self.counts) and self.counts[p] > 0 for p in pages)

    def can_release(self, pages: list[int]) -> bool:
        return all(
            0 <= p < len(self.counts) and self.counts[p] >= n for p, n in Counter(pages).items()
        )

    def retain(self, pages: list[int]) -> None:
        for page in pages:
            self.counts[page] += 1

    def release(self, pages: list[int]) -> None:
        for page in pages:
            self.counts[page] -= 1


@dataclass
class NaiveSequence:
    """The tokens of a sequence; tokens[committed:] are reserved and not yet written."""

    tokens: list[int] = field(default_factory=list)
    reserved: int = 0


class Memory:
    """KV bytes as a checker sees them: one token per slot, None where nothing was written."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.slots: list[int | None] = [None] * (num_pages * page_size)

    def copy(self, source: int, target: int) -> None:
        size = self.page_size
        self.slots[target * size : (target + 1) * size] = self.slots[
            source * size : (source + 1) * size
        ]

    def read(self, pages: list[int], length: int) -> list[int | None]:
        size = self.page_size
        return [self.slots[pages[i // size] * size + i % size] for i in range(length)]


class NaiveTree:
    """All prefixes that must match, per root key."""

    def __init__(self) -> None:
        self.prefixes: dict[int, set[tuple[int, ...]]] = {}

    def insert(self, root_key: int, tokens: list[int]) -> None:
        known = self.prefixes.setdefault(root_key, set())
        known.update(tuple(tokens[:n]) for n in range(1, len(tokens) + 1))

    def match(self, root_key: int, tokens: list[int]) -> int:
        known = self.prefixes.get(root_key, set())
        return max((n for n in range(1, len(tokens) + 1) if tuple(tokens[:n]) in known), default=0)


def propose(text: list[int], min_n: int, max_n: int, max_tokens: int) -> tuple[list[int], int]:
    """The longest suffix that occurred earlier, latest occurrence first, and what followed it."""
    for n in range(min(max_n, len(text) - 1), min_n - 1, -1):
        for end in range(len(text) - 1, n - 1, -1):
            if text[end - n : end] != text[-n:]:
                continue
            overlaps = end > len(text) - n
            known = list(text)
            draft: list[int] = []
            while len(draft) < max_tokens and end + len(draft) < len(known):
                draft.append(known[end + len(draft)])
                if overlaps:
                    known.append(draft[-1])
            return draft, n
    return [], 0
