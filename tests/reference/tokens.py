"""Draft lookup and draft verification as plain loops."""

from __future__ import annotations

from collections.abc import Sequence


def ngram_lookup(tokens: Sequence[int], min_n: int, max_n: int, max_draft: int) -> list[int]:
    """What followed the most recent earlier occurrence of the longest known suffix.

    An occurrence starts before the suffix itself. If it overlaps the suffix the text is periodic,
    and so is the draft; else the draft stops where the text ends.
    """
    length = len(tokens)
    for size in range(max_n, min_n - 1, -1):
        if size >= length:
            continue
        suffix = list(tokens[length - size :])
        for start in range(length - size - 1, -1, -1):
            if list(tokens[start : start + size]) == suffix:
                rest = list(tokens[start + size :])
                overlaps = start + size > length - size
                return (rest * max_draft if overlaps else rest)[:max_draft]
    return []


def verify_draft(draft: Sequence[int], target: Sequence[int]) -> tuple[int, int]:
    """Returns the length of the agreeing run and the target's token after it."""
    num_accepted = 0
    while num_accepted < len(draft) and draft[num_accepted] == target[num_accepted]:
        num_accepted += 1
    return num_accepted, target[num_accepted]
