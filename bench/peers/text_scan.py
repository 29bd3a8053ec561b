"""A drafter without an index: for each length, scan the whole text with numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def propose(tokens: NDArray[np.int32], min_n: int, max_n: int, max_draft: int) -> NDArray[np.int32]:
    """What followed the most recent earlier occurrence of the longest suffix."""
    length = len(tokens)
    for n in range(min(max_n, length - 1), min_n - 1, -1):
        starts = np.arange(length - n)
        for i in range(n):
            starts = starts[tokens[starts + i] == tokens[length - n + i]]
        if len(starts):
            follow = int(starts[-1]) + n
            return tokens[follow : follow + max_draft]
    return tokens[:0]
