"""The ops of the decode loop against numpy and torch: drafts, rows of a step, what it appends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from bench import harness
from bench.harness import Case, Settings, Trial, Work
from bench.peers import loop_composites, text_scan, torch_composites
from bench.suites import peer_ways, shapes, texts
from stateful_kv import ops


def _ngram_lookup(length: int, settings: Settings) -> Trial:
    copies = shapes.rotations(4 * length, settings.cold_bytes, most=64)
    inputs = [texts.repeating_text(length, seed) for seed in range(copies)]
    arrays = [tokens.numpy() for tokens in inputs]
    offsets = torch.tensor([0, length], dtype=torch.int32)
    limits = texts.MIN_N, texts.MAX_N, texts.DRAFT

    def check(_peer: str) -> harness.Check:
        draft, count = ops.ngram_lookup(inputs[0], offsets, *limits)
        expected = torch.from_numpy(text_scan.propose(arrays[0], *limits).copy())
        return harness.compare(draft[0, : int(count[0])], expected, 0.0)

    return Trial(
        ours=lambda i: ops.ngram_lookup(inputs[i], offsets, *limits),
        peers={
            "text_scan": peer_ways.ways(
                text_scan.WAYS,
                lambda propose: lambda i: propose(arrays[i], *limits),
                lambda propose: torch.from_numpy(propose(arrays[0], *limits).copy()),
                0.0,
            )
        },
        check=check,
        work=Work(4 * length),
        rotations=copies,
        rotation_bytes=4 * length * copies,
        units=length,
        unit="token",
    )


def _verify_draft(num_sequences: int, _settings: Settings) -> Trial:
    num_draft = texts.DRAFT
    draft = torch.randint(0, 3, (num_sequences * num_draft,), dtype=torch.int32)
    target = torch.randint(0, 3, (num_sequences * (num_draft + 1),), dtype=torch.int32)
    offsets = torch.arange(num_sequences + 1, dtype=torch.int32) * num_draft

    def result(verify: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return verify(draft, target, num_sequences, num_draft)

    def check(_peer: str) -> harness.Check:
        expected = result(torch_composites.verify_draft)
        return harness.compare(ops.verify_draft(draft, target, offsets), expected, 0.0)

    return Trial(
        ours=lambda _: ops.verify_draft(draft, target, offsets),
        peers={
            "torch": peer_ways.ways(
                torch_composites.VERIFY_DRAFT,
                lambda verify: lambda _: result(verify),
                result,
                0.0,
            )
        },
        check=check,
        work=Work(4 * (draft.numel() + target.numel())),
    )


LOOP_PAGE, LOOP_CAPACITY = 64, 4096


def _loop_state(num_sequences: int) -> tuple[Tensor, Tensor, Tensor]:
    """History, lengths and num_left of sequences in the middle of their replies."""
    history = torch.randint(0, 1000, (num_sequences, LOOP_CAPACITY), dtype=torch.int32)
    lengths = torch.randint(100, LOOP_CAPACITY - 64, (num_sequences,), dtype=torch.int32)
    return history, lengths, torch.full((num_sequences,), 100, dtype=torch.int32)


def _fill_rows(num_sequences: int, _settings: Settings) -> Trial:
    history, lengths, num_left = _loop_state(num_sequences)
    draft = torch.randint(0, 1000, (num_sequences, texts.DRAFT), dtype=torch.int32)
    num_draft = torch.randint(0, texts.DRAFT + 1, (num_sequences,), dtype=torch.int32)
    pages = torch.arange(num_sequences * LOOP_CAPACITY // LOOP_PAGE, dtype=torch.int32)
    limits = torch.full_like(lengths, LOOP_CAPACITY)
    table = pages.view(num_sequences, -1)
    arguments = (history, lengths, num_left, limits, draft, num_draft, table, LOOP_PAGE)

    def check(_peer: str) -> harness.Check:
        rows = ops.fill_rows(*arguments)
        ours = rows.token_ids, rows.slots, rows.query_offsets[1:]
        return harness.compare(ours, loop_composites.fill_rows(*arguments), 0.0)

    return Trial(
        ours=lambda _: ops.fill_rows(*arguments),
        peers={
            "torch": peer_ways.ways(
                loop_composites.FILL_ROWS,
                lambda fill: lambda _: fill(*arguments),
                lambda fill: fill(*arguments),
                0.0,
            )
        },
        check=check,
        work=Work(32 * num_sequences * (texts.DRAFT + 1)),
    )


def _advance_sequences(num_sequences: int, _settings: Settings) -> Trial:
    num_rows = num_sequences * (texts.DRAFT + 1)
    fed, targets = torch.randint(0, 3, (2, num_rows))
    values, stop_ids = torch.randn(num_rows), torch.full((num_sequences, 4), 2, dtype=torch.int32)
    offsets = torch.arange(num_sequences + 1, dtype=torch.int32) * (texts.DRAFT + 1)
    counts = torch.zeros(num_sequences, 3, dtype=torch.int32)
    history, begin, most = _loop_state(num_sequences)

    def ours(_: int) -> tuple[Tensor, Tensor, Tensor]:
        state = history, begin.clone(), most.clone()  # else they would soon be at their end
        ops.advance_sequences(fed, targets, values, offsets, stop_ids, *state, counts)
        return state

    def peer(advance: Callable[..., None], _: int) -> tuple[Tensor, Tensor, Tensor]:
        state = history, begin.clone(), most.clone()
        advance(fed, targets, stop_ids, *state)
        return state

    def result(advance: Callable[..., None]) -> tuple[Tensor, Tensor, Tensor]:
        state = history.clone(), begin.clone(), most.clone()
        advance(fed, targets, stop_ids, *state)
        return state

    def check(_peer: str) -> harness.Check:
        expected = result(loop_composites.advance_sequences)
        return harness.compare(ours(0), expected, 0.0)

    return Trial(
        ours=ours,
        peers={
            "torch": peer_ways.ways(
                loop_composites.ADVANCE_SEQUENCES,
                lambda advance: partial(peer, advance),
                result,
                0.0,
            )
        },
        check=check,
        work=Work(20 * num_rows + 16 * num_sequences),
    )


def cases(settings: Settings) -> Iterator[Case]:
    """One sequence and a full batch; short and long texts."""
    for length in (256,) if settings.smoke else (1024, 8192):
        yield Case("ngram_lookup", {"T": length}, partial(_ngram_lookup, length))
    for num_sequences in (1, 32):
        yield Case("verify_draft", {"S": num_sequences}, partial(_verify_draft, num_sequences))
        yield Case("fill_rows", {"S": num_sequences}, partial(_fill_rows, num_sequences))
        yield Case(
            "advance_sequences", {"S": num_sequences}, partial(_advance_sequences, num_sequences)
        )
