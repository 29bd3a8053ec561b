"""Verifies drafts: chooses the next tokens of every sequence, which accepts a start of its draft.

A draft token is kept only if it equals the token that its row chooses, so drafts never change a
reply.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple, Protocol

import numpy as np
import torch

from stateful_kv import ops
from stateful_kv.choosing.sampler import Sampler, sample_rows
from stateful_kv.errors import BadLogitsError
from stateful_kv.system.device import to_host
from stateful_kv.types import TokenArray


class Candidate(Protocol):
    """A sequence whose next tokens are to be chosen."""

    @property
    def sampler(self) -> Sampler:
        """How it chooses."""
        ...

    @property
    def draft_ids(self) -> TokenArray:
        """int32[K], what was proposed for it."""
        ...

    @property
    def next_position(self) -> int:
        """Where in the sequence its next token goes."""
        ...


class Outcome(NamedTuple):
    """What one step gave one sequence.

    Attributes:
        tokens: those chosen: the accepted draft tokens and one more; empty where none was asked
            for, or none can be chosen.
        num_drafted: tokens that were proposed.
        num_accepted: how many of them were also chosen; see `ops.verify_draft`.
        error: why there are no more tokens, if something is wrong.
    """

    tokens: list[int]
    num_drafted: int = 0
    num_accepted: int = 0
    error: Exception | None = None


NOTHING_CHOSEN = Outcome([])


class GreedyTokens(NamedTuple):
    """All that plain greedy sequences need of a forward pass.

    Attributes:
        ids: int64[R], the token with the largest logit of each row (lowest id of equals).
        values: float32[R], that logit; NaN if the row has one.
    """

    ids: torch.Tensor
    values: torch.Tensor


# Chooses for candidates of one kind; takes the rows of all of them as one tensor or several.
_Chooser = Callable[..., list[Outcome]]


def verify(candidates: Sequence[Candidate], output: torch.Tensor | GreedyTokens) -> list[Outcome]:
    """Chooses the next tokens of several sequences.

    Neighbours that are chosen for in the same way share one op: plain greedy ones an argmax, plain
    sampled ones a draw. Those with penalties are done one after the other.

    Args:
        candidates: the sequences.
        output: float32[sum(K + 1), V], rows of a sequence in order: after its pending token, then
            after each draft token; or the greedy tokens of these rows, if all sequences are plain
            greedy. Logits may lie on any device, and leave it only for candidates with penalties.

    Returns:
        For each sequence what was chosen, or the error that kept it from being chosen.
    """
    groups: list[tuple[_Chooser, list[Candidate]]]
    if isinstance(output, GreedyTokens):
        tensors: Sequence[torch.Tensor] = output
        groups = [(_verify_tokens, list(candidates))]
    else:
        tensors = (output,)
        groups = [(chooser, list(group)) for chooser, group in groupby(candidates, _chooser)]
    if len(groups) == 1:
        # Most steps. A wrong number of rows is noticed by whoever chooses.
        (group,) = groups
        return _choose(*group, tensors)
    sizes = [sum(_num_rows(group)) for _, group in groups]
    parts = zip(*(torch.split(tensor, sizes) for tensor in tensors), strict=True)
    return [
        outcome
        for (chooser, group), rows in zip(groups, parts, strict=True)
        for outcome in _choose(chooser, group, rows)
    ]


def _num_rows(candidates: Sequence[Candidate]) -> list[int]:
    return [len(candidate.draft_ids) + 1 for candidate in candidates]


def _chooser(candidate: Candidate) -> _Chooser:
    if candidate.sampler.is_plain_greedy:
        return _verify_greedy_rows
    return _verify_draws if candidate.sampler.is_plain_sampled else _verify_runs


def _choose(
    chooser: _Chooser, candidates: Sequence[Candidate], rows: Sequence[torch.Tensor]
) -> list[Outcome]:
    """All candidates at once; if that fails, each alone, so that only those at fault fail."""
    try:
        return chooser(candidates, *rows)
    except Exception as error:
        if len(candidates) == 1:
            return [Outcome([], len(candidates[0].draft_ids), error=error)]
    parts = zip(*(torch.split(tensor, _num_rows(candidates)) for tensor in rows), strict=True)
    return [
        outcome
        for candidate, part in zip(candidates, parts, strict=True)
        for outcome in _choose(chooser, [candidate], part)
    ]


def _verify_greedy_rows(candidates: Sequence[Candidate], logits: torch.Tensor) -> list[Outcome]:
    return _verify_tokens(candidates, *ops.argmax(logits))


def _verify_draws(candidates: Sequence[Candidate], logits: torch.Tensor) -> list[Outcome]:
    owners = []
    for candidate, num in zip(candidates, _num_rows(candidates), strict=True):
        start = candidate.next_position
        owners.append((candidate.sampler, range(start, start + num)))
    return _verify_tokens(candidates, *sample_rows(logits, owners))


def _verify_runs(candidates: Sequence[Candidate], logits: torch.Tensor) -> list[Outcome]:
    """With penalties a row's token depends on those before it."""
    (logits,) = to_host([logits])
    parts = torch.split(logits, _num_rows(candidates))
    outcomes = []
    for candidate, rows in zip(candidates, parts, strict=True):
        draft = candidate.draft_ids.tolist()
        run, error = candidate.sampler.choose_run(rows.numpy(), draft, candidate.next_position)
        outcomes.append(Outcome(run, len(draft), len(run) - (error is None), error))
    return outcomes


def _verify_tokens(
    candidates: Sequence[Candidate], ids: torch.Tensor, values: torch.Tensor
) -> list[Outcome]:
    """Compares drafts with the tokens chosen for their rows.

    Args:
        candidates: the sequences.
        ids: int64[R], the token chosen for each row, rows of a sequence in order.
        values: float32[R], the largest logit of each row; not finite where none can be chosen.
    """
    ids, values = to_host([ids, values])
    sizes = _num_rows(candidates)
    if ids.shape[0] != sum(sizes):
        raise RuntimeError(f"logits: expected {sum(sizes)} rows to split, got {ids.shape[0]}")
    chosen, tops = ids.tolist(), values.tolist()
    num_accepted = _num_accepted(candidates, ids, sizes)
    are_good = all(map(math.isfinite, tops))
    outcomes: list[Outcome] = []
    start = 0
    for candidate, size, num in zip(candidates, sizes, num_accepted, strict=True):
        run, error = chosen[start : start + num + 1], None
        if not are_good:
            own_tops = tops[start : start + num + 1]
            bad = next((i for i, top in enumerate(own_tops) if not math.isfinite(top)), None)
            if bad is not None:
                run = run[:bad]
                error = BadLogitsError.at(candidate.next_position + bad, own_tops[bad])
        outcomes.append(Outcome(run, size - 1, min(num, len(run)), error))
        start += size
    return outcomes


def _num_accepted(
    candidates: Sequence[Candidate], ids: torch.Tensor, sizes: Sequence[int]
) -> list[int]:
    """How many first tokens of each draft equal those chosen for their rows."""
    if len(ids) == len(candidates):
        return [0] * len(candidates)
    offsets = np.zeros(len(sizes) + 1, dtype=np.int32)
    np.cumsum(np.array(sizes) - 1, out=offsets[1:])
    drafts = np.concatenate([candidate.draft_ids for candidate in candidates]).astype(np.int64)
    num_accepted, _ = ops.verify_draft(torch.from_numpy(drafts), ids, torch.from_numpy(offsets))
    counts: list[int] = num_accepted.tolist()
    return counts
