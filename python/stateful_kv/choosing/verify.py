"""Verifies drafts: chooses the next tokens of every row, and keeps the agreeing start of drafts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch

from stateful_kv import ops
from stateful_kv.choosing.sampler import Sampler, sample_rows
from stateful_kv.errors import BadLogitsError
from stateful_kv.system.device import to_host


def verify_greedy(drafts: Sequence[Sequence[int]], target_ids: torch.Tensor) -> list[list[int]]:
    """Accepts the agreeing start of each draft and adds the target's own next token.

    Args:
        drafts: the proposed tokens of each sequence; may be empty.
        target_ids: int64[sum(len(draft) + 1)], the greedy token of every row, rows of a sequence
            in order: after its pending token, then after each draft token.

    Returns:
        For each sequence the accepted tokens and one bonus token.
    """
    if not any(drafts):
        return [[token] for token in target_ids.tolist()]
    offsets = np.zeros(len(drafts) + 1, dtype=np.int32)
    np.cumsum([len(draft) for draft in drafts], out=offsets[1:])
    draft_ids = torch.tensor([token for draft in drafts for token in draft], dtype=torch.int64)
    num_accepted, bonus_ids = ops.verify_draft(draft_ids, target_ids, torch.from_numpy(offsets))
    return [
        [*draft[:accepted], bonus]
        for draft, accepted, bonus in zip(
            drafts, num_accepted.tolist(), bonus_ids.tolist(), strict=True
        )
    ]


class Candidate(NamedTuple):
    """One sequence of a verify: how it samples, what was proposed, where its next token goes."""

    sampler: Sampler
    draft: list[int]
    position: int


class Choice(NamedTuple):
    """Tokens to add to a sequence, and the error that cut them short, if any."""

    tokens: list[int]
    error: Exception | None


class GreedyTokens(NamedTuple):
    """All that plain greedy sequences need of a forward pass.

    Attributes:
        ids: int64[R], the token with the largest logit of each row (lowest id of equals).
        values: float32[R], that logit; NaN if the row has one.
    """

    ids: torch.Tensor
    values: torch.Tensor


# Chooses for candidates of one kind; takes the rows of all of them as one tensor or several.
Chooser = Callable[..., list[Choice]]


def verify(candidates: Sequence[Candidate], output: torch.Tensor | GreedyTokens) -> list[Choice]:
    """Chooses the next tokens of several sequences.

    Neighbours that are chosen for in the same way share one op: plain greedy ones an argmax, plain
    sampled ones a draw. Those with penalties go one by one.

    Args:
        candidates: the sequences.
        output: float32[sum(len(draft) + 1), V], rows of a sequence in order: after its pending
            token, then after each draft token; or the greedy tokens of these rows, if all
            sequences are plain greedy. Logits may lie on any device, and leave it only for
            candidates with penalties.

    Returns:
        For each sequence the agreeing start of its draft and one more token, or the error that
        kept it from having them.
    """
    groups: list[tuple[Chooser, list[Candidate]]]
    if isinstance(output, GreedyTokens):
        tensors: Sequence[torch.Tensor] = output
        groups = [(_verify_tokens, list(candidates))]
    else:
        tensors = (output,)
        groups = [(chooser, list(group)) for chooser, group in groupby(candidates, _chooser)]
    sizes = [sum(_num_rows(group)) for _, group in groups]
    parts = zip(*(torch.split(tensor, sizes) for tensor in tensors), strict=True)
    return [
        choice
        for (chooser, group), rows in zip(groups, parts, strict=True)
        for choice in _choose(chooser, group, rows)
    ]


def _num_rows(candidates: Sequence[Candidate]) -> list[int]:
    return [len(candidate.draft) + 1 for candidate in candidates]


def _chooser(candidate: Candidate) -> Chooser:
    if candidate.sampler.is_plain_greedy:
        return _verify_greedy_rows
    return _verify_draws if candidate.sampler.is_plain_sampled else _verify_runs


def _choose(
    chooser: Chooser, candidates: Sequence[Candidate], rows: Sequence[torch.Tensor]
) -> list[Choice]:
    """All candidates at once; if that fails, one by one, to find whose fault it is."""
    try:
        return chooser(candidates, *rows)
    except Exception as error:
        if len(candidates) == 1:
            return [Choice([], error)]
    parts = zip(*(torch.split(tensor, _num_rows(candidates)) for tensor in rows), strict=True)
    return [
        choice
        for candidate, part in zip(candidates, parts, strict=True)
        for choice in _choose(chooser, [candidate], part)
    ]


def _verify_greedy_rows(candidates: Sequence[Candidate], logits: torch.Tensor) -> list[Choice]:
    return _verify_tokens(candidates, *ops.argmax(logits))


def _verify_draws(candidates: Sequence[Candidate], logits: torch.Tensor) -> list[Choice]:
    owners = [
        (one.sampler, range(one.position, one.position + len(one.draft) + 1)) for one in candidates
    ]
    return _verify_tokens(candidates, *sample_rows(logits, owners))


def _verify_runs(candidates: Sequence[Candidate], logits: torch.Tensor) -> list[Choice]:
    """With penalties a row's token depends on those before it."""
    (logits,) = to_host([logits])
    parts = torch.split(logits, _num_rows(candidates))
    return [
        Choice(*one.sampler.choose_run(rows.numpy(), one.draft, one.position))
        for one, rows in zip(candidates, parts, strict=True)
    ]


def _verify_tokens(
    candidates: Sequence[Candidate], ids: torch.Tensor, values: torch.Tensor
) -> list[Choice]:
    """One pass over the chosen tokens of all rows and the largest logits they were chosen from."""
    ids, values = to_host([ids, values])
    runs = verify_greedy([candidate.draft for candidate in candidates], ids)
    if bool(torch.isfinite(values).all()):
        return [Choice(run, None) for run in runs]
    choices: list[Choice] = []
    start = 0
    for candidate, run in zip(candidates, runs, strict=True):
        tops = values[start : start + len(run)].tolist()
        start += len(candidate.draft) + 1
        bad = next((i for i, top in enumerate(tops) if not math.isfinite(top)), None)
        if bad is None:
            choices.append(Choice(run, None))
        else:
            choices.append(
                Choice(run[:bad], BadLogitsError.at(candidate.position + bad, tops[bad]))
            )
    return choices
