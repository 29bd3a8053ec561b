"""fill_rows and advance_sequences, and ngram_lookup on texts of a given length, against loops."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import pytest
import torch

from stateful_kv import ops
from tests.ops.comparing import assert_same_bits
from tests.ops.paged import make_batch, offsets
from tests.reference import tokens as reference
from tests.reference.tokens import LoopState

GARBAGE = -77


def int32(values: Sequence[object], device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def padded(rows: Sequence[Sequence[int]], width: int, fill: int) -> list[list[int]]:
    return [[*row, *[fill] * (width - len(row))] for row in rows]


@pytest.mark.parametrize("vocab", [2, 5])
def test_ngram_lookup_reads_only_the_first_tokens(device: torch.device, vocab: int) -> None:
    texts = [[random.randrange(vocab) for _ in range(n)] for n in (0, 1, 7, 30, 64, 63, 2, 40)]
    table = int32(padded(texts, 64, GARBAGE), device)
    borders = int32([64 * i for i in range(len(texts) + 1)], device)
    lengths = int32([len(text) for text in texts], device)
    drafts, counts = ops.ngram_lookup(table.view(-1), borders, 1, 4, 6, lengths)
    for text, draft, count in zip(texts, drafts.tolist(), counts.tolist(), strict=True):
        expected = reference.ngram_lookup(text, 1, 4, 6)
        assert draft[:count] == expected
        assert draft[count:] == [-1] * (6 - count)


def make_states(num: int, page: int, capacity: int, vocab: int = 50) -> list[LoopState]:
    """Sequences of every kind: just begun, in the middle, finished, without room, failed."""
    states = []
    for _ in range(num):
        length = random.randint(1, capacity - page)
        states.append(
            LoopState(
                history=[random.randrange(vocab) for _ in range(length)],
                num_left=random.choice([-1, 0, 1, 2, 3, 5, 100]),
                kv_limit=random.choice([length - 1, length, length + 1, length + 2, capacity - 1]),
                pages=random.sample(range(1000), -(-capacity // page)),
                stops=random.sample(range(vocab), random.randint(0, 3)),
                counts=[random.randrange(9) for _ in range(3)],
            )
        )
    return states


class LoopTensors:
    """The same states as the ops take them; what no op may read is garbage."""

    def __init__(
        self, states: Sequence[LoopState], capacity: int, device: torch.device | str
    ) -> None:
        self.history = int32(padded([s.history for s in states], capacity, GARBAGE), device)
        self.lengths = int32([len(s.history) for s in states], device)
        self.num_left = int32([s.num_left for s in states], device)
        self.kv_limits = int32([s.kv_limit for s in states], device)
        self.page_table = int32([s.pages for s in states], device)
        most = max(len(s.stops) for s in states)
        self.stop_ids = int32(padded([s.stops for s in states], most, -1), device)
        self.counts = int32([s.counts for s in states], device)
        if most == 0:
            self.stop_ids = self.stop_ids.view(len(states), 0)

    def check(self, states: Sequence[LoopState]) -> None:
        """They say what `states` say."""
        assert self.lengths.tolist() == [len(s.history) for s in states]
        assert self.num_left.tolist() == [s.num_left for s in states]
        assert self.counts.tolist() == [s.counts for s in states]
        width = self.history.shape[1]
        assert self.history.tolist() == padded([s.history for s in states], width, GARBAGE)

    def fill(self, drafts: Sequence[Sequence[int]], most: int, page: int) -> ops.FilledRows:
        device = self.history.device
        draft_ids = int32(padded(drafts, most, GARBAGE), device).view(len(drafts), most)
        num_draft = int32([len(draft) for draft in drafts], device)
        before = self.history, self.lengths, self.num_left, self.kv_limits
        return ops.fill_rows(*before, draft_ids, num_draft, self.page_table, page)


def check_fill(states: Sequence[LoopState], tensors: LoopTensors, page: int, most: int) -> None:
    drafts = [[random.randrange(50) for _ in range(random.randint(0, most))] for _ in states]
    filled = tensors.fill(drafts, most, page)
    expected = reference.fill_rows(states, drafts, page)
    total = len(states) * (most + 1)
    rest = total - len(expected)
    dtypes = [torch.int64, torch.int32, torch.int64, torch.int32, torch.int32, torch.int64]
    assert [tensor.dtype for tensor in filled] == dtypes
    assert filled.token_ids.tolist() == [row.token for row in expected] + [0] * rest
    assert filled.positions.tolist() == [row.position for row in expected] + [0] * rest
    assert filled.slots.tolist() == [row.slot for row in expected] + [-1] * rest
    assert filled.row_sequences.tolist() == [row.sequence for row in expected] + [0] * rest
    counts = [sum(row.sequence == s for row in expected) for s in range(len(states))]
    assert filled.query_offsets.tolist() == [0, *itertools.accumulate(counts)]
    lens = [len(s.history) - 1 + n if n else 0 for s, n in zip(states, counts, strict=True)]
    assert filled.seq_lens.tolist() == lens


@pytest.mark.parametrize("page", [1, 5, 16])
@pytest.mark.parametrize("most", [0, 1, 3, 7, 63])
@pytest.mark.parametrize("num", [1, 2, 33])
def test_fill_rows_random(device: torch.device, page: int, most: int, num: int) -> None:
    capacity = 80
    for _ in range(3):
        states = make_states(num, page, capacity)
        check_fill(states, LoopTensors(states, capacity, device), page, most)


@pytest.mark.parametrize("num", [31, 1023, 1024])
def test_fill_rows_of_many_sequences(device: torch.device, num: int) -> None:
    """The prefix sum runs over lanes, then over warps."""
    states = make_states(num, 16, 40)
    check_fill(states, LoopTensors(states, 40, device), 16, 2)


def test_fill_rows_where_none_runs(device: torch.device) -> None:
    states = make_states(3, 16, 40)
    for state in states:
        state.num_left = 0
    check_fill(states, LoopTensors(states, 40, device), 16, 3)


def test_fill_rows_reads_nothing_of_those_that_do_not_run(device: torch.device) -> None:
    states = make_states(3, 16, 40)
    tensors = LoopTensors(states, 40, device)
    for state, value in zip(states, (0, -1, -(2**31)), strict=True):
        state.num_left = value
    tensors.num_left = int32([0, -1, -(2**31)], device)
    for name in ("lengths", "kv_limits", "page_table"):
        setattr(tensors, name, torch.full_like(getattr(tensors, name), GARBAGE))
    filled = tensors.fill([[1], [2], [3]], 1, 16)
    assert filled.query_offsets.tolist() == [0, 0, 0, 0]
    assert filled.seq_lens.tolist() == [0, 0, 0]


def test_fill_rows_of_no_sequences(device: torch.device) -> None:
    none = int32([], device)
    empty = [none.view(0, 4), none, none, none, none.view(0, 3), none, none.view(0, 2)]
    filled = ops.fill_rows(*empty, 16)
    assert filled.query_offsets.tolist() == [0]
    assert all(tensor.numel() == 0 for tensor in filled if tensor is not filled.query_offsets)


Fed = tuple[Sequence[int], Sequence[int], Sequence[float]]


def check_advance(
    states: Sequence[LoopState], fed: Sequence[Fed], capacity: int, device: torch.device | str
) -> None:
    """One call for all sequences, with two rows of padding, against the loop for each."""
    tensors = LoopTensors(states, capacity, device)
    rows = [list(itertools.chain.from_iterable(part)) for part in zip(*fed, strict=True)]
    ops.advance_sequences(
        torch.tensor([*rows[0], 0, 0], dtype=torch.int64, device=device),
        torch.tensor([*rows[1], 5, 6], dtype=torch.int64, device=device),
        torch.tensor([*rows[2], math.nan, 1.0], dtype=torch.float32, device=device),
        offsets([len(tokens) for tokens, _, _ in fed], device),
        tensors.stop_ids,
        tensors.history,
        tensors.lengths,
        tensors.num_left,
        tensors.counts,
    )
    for state, part in zip(states, fed, strict=True):
        reference.advance_sequence(state, *part)
    tensors.check(states)


def test_advance_exhaustive(device: torch.device) -> None:
    """Every draft of up to 3 tokens of 3 words, every answer, every way to end."""
    words = (0, 1, 2)
    states: list[LoopState] = []
    fed: list[Fed] = []
    for most in range(4):
        for draft in itertools.product(words, repeat=most):
            for targets in itertools.product(words, repeat=most + 1):
                for num_left, stop, bad in itertools.product(
                    range(1, most + 3), (None, 2), (None, *range(most + 1))
                ):
                    values = [1.0 if i != bad else math.nan for i in range(most + 1)]
                    stops = [] if stop is None else [9, stop]
                    states.append(LoopState([5, 1], num_left, 99, [0], stops, [0, 0, 0]))
                    fed.append(((1, *draft), targets, values))
    assert len(states) == 3 * 2 * 2 * 2 + 27 * 3 * 2 * 3 + 243 * 4 * 2 * 4 + 2187 * 5 * 2 * 5
    order = random.sample(range(len(states)), len(states))
    check_advance([states[i] for i in order], [fed[i] for i in order], 7, device)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_advance_needs_a_finite_value(device: torch.device, value: float) -> None:
    states = [LoopState([1], 5, 99, [0], [3], [4, 5, 6]) for _ in range(3)]
    fed: list[Fed] = [
        ((1, 2, 3), (2, 3, 4), (0.0, value, 0.0)),
        ((1, 2, 3), (7, 3, 4), (0.0, value, value)),  # refused before it is reached
        ((1,), (3,), (value,)),  # the stop token itself
    ]
    check_advance(states, fed, 8, device)
    assert [state.num_left for state in states] == [-1, 4, -1]


@pytest.mark.parametrize("most", [31, 32, 33, 63, 100])
def test_advance_over_long_drafts(device: torch.device, most: int) -> None:
    """Runs that end in the first round of lanes, at its border and behind it."""
    text = [random.randrange(100, 200) for _ in range(most + 2)]
    states, fed = [], []
    for end in range(most + 1):
        for kind in ("refused", "stop", "left", "bad"):
            targets, values = text[1 : most + 2], [0.5] * (most + 1)
            if kind == "refused":
                targets = [*targets[:end], 7, *targets[end + 1 :]]
            elif kind == "bad":
                values[end] = math.inf
            stop = [text[end + 1]] if kind == "stop" else [8]
            num_left = end + 1 if kind == "left" else 1000
            states.append(LoopState([4, text[0]], num_left, 9999, [0], stop, [1, 2, 3]))
            fed.append((text[: most + 1], targets, values))
    check_advance(states, fed, most + 3, device)


def test_advance_leaves_sequences_without_rows(device: torch.device) -> None:
    states = make_states(5, 16, 40)
    check_advance(states, [((), (), ())] * 5, 40, device)


def test_advance_without_stop_ids_and_without_sequences(device: torch.device) -> None:
    states = [LoopState([1], 2, 9, [0], [], [0, 0, 0])]
    check_advance(states, [((1,), (0,), (0.0,))], 3, device)
    none = int32([], device)
    ids = torch.zeros(0, dtype=torch.int64, device=device)
    ops.advance_sequences(
        *(ids, ids, torch.zeros(0, device=device), int32([0], device), none.view(0, 2)),
        *(none.view(0, 4), none, none, none.view(0, 3)),
    )


def next_token(tokens: Sequence[int]) -> int:
    """A made-up model: what follows depends on the last three tokens, and often repeats."""
    return (7 * tokens[-1] + 3 * sum(tokens[-3:]) + 1) % 11


def test_loop_of_steps_gives_the_text_of_one_token_at_a_time(device: torch.device) -> None:
    page, capacity, most = 4, 64, 5
    for stop in (None, 6):
        states = make_states(9, page, 20, vocab=11)
        for state in states:
            state.num_left, state.kv_limit = random.randint(1, 30), 60
            state.pages = random.sample(range(99), 15)
            state.stops = [] if stop is None else [stop]
        tensors = LoopTensors(states, capacity, device)
        expected = []
        for state in states:
            text = list(state.history)
            for _ in range(state.num_left):
                text.append(next_token(text))
                if text[-1] == stop:
                    break
            expected.append(text)
        borders = int32([capacity * i for i in range(len(states) + 1)], device)
        while bool((tensors.num_left > 0).any()):
            draft_ids, num_draft = ops.ngram_lookup(
                tensors.history.view(-1), borders, 2, 8, most, tensors.lengths
            )
            state_tensors = tensors.history, tensors.lengths, tensors.num_left, tensors.kv_limits
            rows = ops.fill_rows(*state_tensors, draft_ids, num_draft, tensors.page_table, page)
            fed, borders_of = rows.token_ids.tolist(), rows.query_offsets.tolist()
            targets = [0] * len(fed)
            for s, (begin, end) in enumerate(itertools.pairwise(borders_of)):
                text = tensors.history[s, : int(tensors.lengths[s]) - 1].tolist()
                for row in range(begin, end):
                    text.append(fed[row])
                    targets[row] = next_token(text)
            target_ids = torch.tensor(targets, device=device)
            values = torch.zeros(len(fed), device=device)
            ops.advance_sequences(
                *(rows.token_ids, target_ids, values, rows.query_offsets, tensors.stop_ids),
                *(tensors.history, tensors.lengths, tensors.num_left, tensors.counts),
            )
        got = [
            row[:length]
            for row, length in zip(tensors.history.tolist(), tensors.lengths.tolist(), strict=True)
        ]
        assert got == expected


def test_attention_gives_zeros_to_rows_of_no_sequence(device: torch.device) -> None:
    """The padding of fill_rows; the rows before it keep their bits."""
    batch = make_batch([20, 0, 33], [3, 0, 1], head_dim=64, dtype=torch.float32)
    q, *rest = (tensor.to(device) for tensor in batch.arguments)
    padded_q = torch.cat([q, torch.full_like(q[:3], math.nan)])
    expected = ops.paged_attention(q, *rest, batch.scale)
    output = ops.paged_attention(padded_q, *rest, batch.scale)
    assert_same_bits(output[: q.shape[0]], expected)
    assert_same_bits(output[q.shape[0] :], torch.zeros_like(padded_q[q.shape[0] :]))
