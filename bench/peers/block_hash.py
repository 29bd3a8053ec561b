"""A prefix cache by hashed blocks, as several engines keep it: page ids by the hash of a prefix.

Full pages only. The key of a page stands for its tokens and all before them. Two ways to make the
keys: a chain of Python's hashes, a page at a time, and sums of the hashes of all pages, which numpy
makes at once. Engines that must not be fooled by made-up collisions use stronger hashes, which cost
more. Both keep what they hash nowhere: a prompt that is matched is new to the index.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # multiples of it are spread over all 64 bits


class Index(Protocol):
    """What a case asks of an index."""

    def insert(self, tokens: Ints, pages: Ints) -> None:
        """Store the full pages of a sequence."""

    def match(self, tokens: Ints) -> list[int]:
        """Pages of the longest stored run of full pages."""

    def clear(self) -> None:
        """Forget everything."""


class ChainedHashes:
    """The key of a page hashes its tokens and the key of the page before."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._pages: dict[int, int] = {}

    def _keys(self, tokens: Ints) -> list[int]:
        keys, parent = [], 0
        data, step = tokens.tobytes(), 4 * self._page_size
        for start in range(0, len(data) - step + 1, step):
            parent = hash((parent, data[start : start + step]))
            keys.append(parent)
        return keys

    def insert(self, tokens: Ints, pages: Ints) -> None:
        """Store the full pages of a sequence."""
        self._pages.update(zip(self._keys(tokens), pages.tolist(), strict=False))

    def match(self, tokens: Ints) -> list[int]:
        """Pages of the longest stored run of full pages."""
        found = []
        for key in self._keys(tokens):
            page = self._pages.get(key)
            if page is None:
                break
            found.append(page)
        return found

    def clear(self) -> None:
        """Forget everything."""
        self._pages.clear()


class SummedHashes:
    """The key of a page is the sum of a 64-bit hash of each page up to it, by its place."""

    def __init__(self, page_size: int) -> None:
        random = np.random.default_rng(0)
        self._page_size = page_size
        self._factors = random.integers(1, 1 << 63, page_size, dtype=np.uint64) | np.uint64(1)
        self._places = np.zeros(0, dtype=np.uint64)
        self._pages: dict[int, int] = {}

    def _keys(self, tokens: Ints) -> list[int]:
        count = len(tokens) // self._page_size
        if len(self._places) < count:
            self._places = np.arange(1, count + 1, dtype=np.uint64) * GOLDEN | np.uint64(1)
        rows = tokens[: count * self._page_size].reshape(count, self._page_size)
        hashes = rows.astype(np.uint64) @ self._factors
        # Folded, so that the low bits of a key depend on all bits of a hash.
        hashes ^= hashes >> np.uint64(32)
        keys: list[int] = np.cumsum(hashes * self._places[:count]).tolist()
        return keys

    def insert(self, tokens: Ints, pages: Ints) -> None:
        """Store the full pages of a sequence."""
        self._pages.update(zip(self._keys(tokens), pages.tolist(), strict=False))

    def match(self, tokens: Ints) -> list[int]:
        """Pages of the longest stored run of full pages."""
        found = list(map(self._pages.get, self._keys(tokens)))
        try:
            end = found.index(None)
        except ValueError:
            end = len(found)
        return [page for page in found[:end] if page is not None]

    def clear(self) -> None:
        """Forget everything."""
        self._pages.clear()


PLAIN = "chained, by Python"


def all_ways(page_size: int) -> dict[str, Index]:
    """An empty index of each kind, the plain one first."""
    return {PLAIN: ChainedHashes(page_size), "summed, by numpy": SummedHashes(page_size)}
