"""Drafters without an index: each proposal scans the whole text.

What followed the most recent earlier occurrence of the longest suffix, in three ways. A comparison
of all windows, as prompt lookup has it in other libraries, looks at every token of every window and
is not among them: the second way looks at every token once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]


def propose(tokens: Tokens, min_n: int, max_n: int, max_draft: int) -> Tokens:
    """For each length, the starts that still fit, token by token."""
    length = len(tokens)
    for n in range(min(max_n, length - 1), min_n - 1, -1):
        starts = np.arange(length - n)
        for i in range(n):
            starts = starts[tokens[starts + i] == tokens[length - n + i]]
        if len(starts):
            follow = int(starts[-1]) + n
            return tokens[follow : follow + max_draft]
    return tokens[:0]


def propose_from_last_token(tokens: Tokens, min_n: int, max_n: int, max_draft: int) -> Tokens:
    """One pass for the last token; only its few earlier occurrences are looked at further."""
    length = len(tokens)
    ends = np.flatnonzero(tokens[: length - 1] == tokens[length - 1])
    best, follow = min_n - 1, length
    for end in reversed(ends.tolist()):  # the most recent first: a later one must be longer
        most = min(max_n, end + 1)
        run = 1
        while run < most and tokens[end - run] == tokens[length - 1 - run]:
            run += 1
        if run > best:
            best, follow = run, end + 1
            if run == max_n:
                break
    return tokens[follow : follow + max_draft]


def propose_by_bytes(tokens: Tokens, min_n: int, max_n: int, max_draft: int) -> Tokens:
    """The search for bytes of Python, from the end; a drafter would keep the bytes as it grows."""
    length, width = len(tokens), tokens.itemsize
    text = tokens.tobytes()
    for n in range(min(max_n, length - 1), min_n - 1, -1):
        suffix = text[(length - n) * width :]
        found = text.rfind(suffix, 0, len(text) - width)
        while found % width and found > 0:  # between tokens
            found = text.rfind(suffix, 0, found + len(suffix) - 1)
        if found >= 0 and found % width == 0:
            follow = found // width + n
            return tokens[follow : follow + max_draft]
    return tokens[:0]


WAYS = {
    "numpy, each length": propose,
    "numpy, last token first": propose_from_last_token,
    "rfind of bytes": propose_by_bytes,
}
