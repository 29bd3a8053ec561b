"""Draft lookup, draft verification and a loop of steps as plain loops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


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


@dataclass
class LoopState:
    """Some sequences of a loop of steps; of each what the host would keep in lists.

    Attributes:
        history: all tokens; the last one is pending.
        num_left: tokens the reply may still get; 0 = finished, -1 = ended by bad logits.
        kv_limit: tokens whose KV there is room for.
        pages: page ids in order.
        stops: tokens that end the reply.
        counts: steps, drafted tokens, accepted tokens.
    """

    history: list[int]
    num_left: int
    kv_limit: int
    pages: list[int]
    stops: list[int]
    counts: list[int]


class Row(NamedTuple):
    """One row of a step."""

    sequence: int
    token: int
    position: int
    slot: int


def fill_rows(states: Sequence[LoopState], drafts: Sequence[Sequence[int]], page: int) -> list[Row]:
    """The rows of all sequences, padding left out; `page` is the number of tokens a page holds."""
    rows: list[Row] = []
    for number, (state, draft) in enumerate(zip(states, drafts, strict=True)):
        fed = [state.history[-1], *draft] if state.history else []
        position = len(state.history) - 1
        num_fed = 0
        # One token more than is fed comes out: none is fed that the reply could not get.
        while num_fed < min(len(fed), state.num_left) and position < state.kv_limit:
            slot = state.pages[position // page] * page + position % page
            rows.append(Row(number, fed[num_fed], position, slot))
            position += 1
            num_fed += 1
    return rows


def advance_sequence(
    state: LoopState, fed: Sequence[int], targets: Sequence[int], values: Sequence[float]
) -> None:
    """What one step does to a sequence that fed its pending token and a draft; changes `state`."""
    if not fed:
        return
    draft = list(fed[1:])
    num_agreed, _ = verify_draft(draft, targets)
    chosen = list(targets[: num_agreed + 1])
    finite = [math.isfinite(value) for value in values[: num_agreed + 1]]
    ends = [i + 1 for i, token in enumerate(chosen) if token in state.stops]
    ends = [*ends, state.num_left, len(chosen)]
    taken = chosen[: min(ends)]
    was_stopped = len(taken) > 0 and taken[-1] in state.stops
    state.num_left = 0 if was_stopped else state.num_left - len(taken)
    if not all(finite[: len(taken)]):
        taken = taken[: finite.index(False)]
        state.num_left = -1
    state.history.extend(taken)
    state.counts[0] += 1
    state.counts[1] += len(draft)
    state.counts[2] += min(len(taken), num_agreed)
