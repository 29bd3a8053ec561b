"""A prefix cache by hashed blocks, as several engines keep it: page ids by chained block hash."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class BlockHashIndex:
    """Full pages only; the key of a page hashes its tokens and the key of the page before."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._pages: dict[int, int] = {}

    def _keys(self, tokens: NDArray[np.int32]) -> list[int]:
        keys, parent = [], 0
        data, step = tokens.tobytes(), 4 * self._page_size
        for start in range(0, len(data) - step + 1, step):
            parent = hash((parent, data[start : start + step]))
            keys.append(parent)
        return keys

    def insert(self, tokens: NDArray[np.int32], pages: NDArray[np.int32]) -> None:
        """Store the full pages of a sequence."""
        self._pages.update(zip(self._keys(tokens), pages.tolist(), strict=False))

    def match(self, tokens: NDArray[np.int32]) -> list[int]:
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
