"""paged_attention gives a row the same bits whatever else is in the batch.

The checks take the attention function as an argument, so the last tests can show that they catch
functions whose order of summation depends on what it must not depend on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from stateful_kv import ops
from tests.ops import plain_torch
from tests.ops.comparing import assert_same_bits
from tests.ops.paged import PagedBatch, lay_out, make_batch, offsets
from tests.ops.test_paged_attention import UNBUILT

Attention = Callable[..., Tensor]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (sliding window, soft cap)
VARIANTS = [(0, 0.0), (37, 0.0), (0, 20.0), pytest.param(37, 20.0, marks=pytest.mark.isa)]


def row_alone(attention: Attention, batch: PagedBatch, sequence: int, position: int) -> Tensor:
    """One row as a decode step at a time when later tokens are not written yet."""
    rows = batch.rows_of(sequence)
    row = rows.stop - (batch.keys[sequence].shape[0] - position)
    keys = [batch.keys[sequence][: position + 1]]
    values = [batch.values[sequence][: position + 1]]
    page_size = batch.k_pool.shape[2]
    return attention(
        batch.query[row : row + 1],
        *lay_out(keys, values, page_size),
        torch.tensor([position + 1], dtype=torch.int32, device=batch.query.device),
        offsets([1], batch.query.device),
        batch.scale,
    )


def check_rows_alone(attention: Attention, batch: PagedBatch) -> None:
    """Each row of the batch equals the same row in a batch of its own."""
    output = attention(*batch.arguments, batch.scale)
    for sequence, keys in enumerate(batch.keys):
        rows = batch.rows_of(sequence)
        for row in range(rows.start, rows.stop):
            position = keys.shape[0] - (rows.stop - row)
            alone = row_alone(attention, batch, sequence, position)
            assert_same_bits(output[row], alone[0], f"sequence {sequence} position {position}")


def check_chunks(attention: Attention, batch: PagedBatch, chunks: list[int]) -> None:
    """A prefill of the only sequence equals the same rows in several extends."""
    whole = attention(*batch.arguments, batch.scale)
    assert sum(chunks) == batch.query.shape[0] == batch.keys[0].shape[0]
    done = 0
    for chunk in chunks:
        end = done + chunk
        part = replace(
            batch,
            query=batch.query[done:end],
            seq_lens=torch.full_like(batch.seq_lens, end),
            query_offsets=offsets([chunk], batch.query.device),
            keys=[batch.keys[0][:end]],
            values=[batch.values[0][:end]],
        ).with_layout(batch.k_pool.shape[2])
        output = attention(*part.arguments, batch.scale)
        assert_same_bits(output, whole[done:end], f"rows {done} to {end}")
        done = end


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("window", "cap"), VARIANTS)
def test_row_alone_equals_row_in_a_batch(
    device: torch.device, dtype: torch.dtype, window: int, cap: float
) -> None:
    batch = make_batch(
        [1, 15, 16, 17, 113, 260, 1023],
        [1, 15, 1, 3, 20, 1, 2],
        num_heads=6,
        dtype=dtype,
        device=device,
    )
    attention = partial(ops.paged_attention, sliding_window=window, soft_cap=cap)
    check_rows_alone(attention, batch)


@pytest.mark.parametrize(
    "head_dim", [pytest.param(32, marks=UNBUILT), pytest.param(48, marks=UNBUILT), 96, 128, 256]
)
@pytest.mark.parametrize("num_heads", [2, 8, 10])
def test_row_alone_at_other_head_dims(device: torch.device, head_dim: int, num_heads: int) -> None:
    batch = make_batch(
        [65, 130, 7], [9, 1, 7], head_dim=head_dim, num_heads=num_heads, device=device
    )
    check_rows_alone(ops.paged_attention, batch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "page_size",
    [pytest.param(16, marks=pytest.mark.isa), pytest.param(64, marks=pytest.mark.slow_emulated)],
)
def test_any_chunk_split_gives_the_same_rows(
    device: torch.device, dtype: torch.dtype, page_size: int
) -> None:
    length = 131
    batch = make_batch([length], [length], page_size=page_size, dtype=dtype, device=device)
    splits = [
        [1] * length,
        [7] * 18 + [5],
        [page_size - 1, 1, 1, page_size + 1, length - 2 * page_size - 2],
        [length - 1, 1],
        [64, 67],
    ]
    for chunks in splits:
        check_chunks(ops.paged_attention, batch, chunks)


@pytest.mark.slow_emulated
def test_long_chunks_give_the_same_rows(device: torch.device) -> None:
    batch = make_batch([700], [700], num_heads=2, num_kv_heads=1, device=device)
    for chunks in ([256, 256, 188], [513, 187], [699, 1]):
        check_chunks(ops.paged_attention, batch, chunks)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_page_ids_and_page_size_do_not_matter(device: torch.device, dtype: torch.dtype) -> None:
    batch = make_batch([113, 1, 64, 500], [13, 1, 64, 2], dtype=dtype, device=device)
    expected = ops.paged_attention(*batch.arguments, batch.scale)
    for page_size in (16, 16, 32, 64, 128, 8, 3):
        moved = batch.with_layout(page_size)
        output = ops.paged_attention(*moved.arguments, batch.scale)
        assert_same_bits(output, expected, f"page size {page_size}")


def test_width_of_the_page_table_does_not_matter(device: torch.device) -> None:
    batch = make_batch([113, 30], [13, 1], device=device)
    expected = ops.paged_attention(*batch.arguments, batch.scale)
    used = batch.page_table[:, :-2].contiguous()
    wide = torch.cat([batch.page_table, torch.full_like(batch.page_table, -7)], dim=1)
    for table in (used, wide):
        output = ops.paged_attention(*replace(batch, page_table=table).arguments, batch.scale)
        assert_same_bits(output, expected)


@pytest.mark.isa
@pytest.mark.cpu_only("threads of the CPU")
@pytest.mark.parametrize("query_lens", [[1] * 4, [60, 1, 20, 300]], ids=["decode", "mixed"])
def test_thread_count_does_not_matter(
    device: torch.device, query_lens: list[int], set_num_threads: Callable[[int], None]
) -> None:
    batch = make_batch([600, 1, 1023, 300], query_lens, num_heads=8, device=device)
    results = []
    for threads in (1, 2, 3):
        set_num_threads(threads)
        results.append(ops.paged_attention(*batch.arguments, batch.scale))
    assert_same_bits(results[1], results[0], "2 threads")
    assert_same_bits(results[2], results[0], "3 threads")


def test_order_of_sequences_does_not_matter(device: torch.device) -> None:
    batch = make_batch([113, 1, 64, 500], [13, 1, 64, 2], device=device)
    expected = ops.paged_attention(*batch.arguments, batch.scale)
    order = [2, 0, 3, 1]
    parts = [batch.rows_of(sequence) for sequence in order]
    shuffled = replace(
        batch,
        query=torch.cat([batch.query[rows] for rows in parts]),
        page_table=batch.page_table[order].contiguous(),
        seq_lens=batch.seq_lens[order].contiguous(),
        query_offsets=offsets([rows.stop - rows.start for rows in parts], device),
    )
    output = ops.paged_attention(*shuffled.arguments, batch.scale)
    assert_same_bits(output, torch.cat([expected[rows] for rows in parts]))


def test_a_head_group_alone_gives_the_same_bits(device: torch.device) -> None:
    batch = make_batch([113, 20], [13, 1], num_heads=9, num_kv_heads=3, device=device)
    expected = ops.paged_attention(*batch.arguments, batch.scale)
    for head in range(9):
        kv_head = slice(head // 3, head // 3 + 1)
        output = ops.paged_attention(
            batch.query[:, head : head + 1],
            batch.k_pool[:, kv_head].contiguous(),
            batch.v_pool[:, kv_head].contiguous(),
            *batch.arguments[3:],
            batch.scale,
        )
        assert_same_bits(output, expected[:, head : head + 1], f"head {head}")


def test_a_bad_row_leaves_the_others_alone(device: torch.device) -> None:
    batch = make_batch([40, 33, 20], [9, 1, 20], device=device)
    expected = ops.paged_attention(*batch.arguments, batch.scale)
    query = batch.query.clone()
    query[4], query[9] = float("nan"), float("inf")
    output = ops.paged_attention(*replace(batch, query=query).arguments, batch.scale)
    others = [row for row in range(30) if row not in (4, 9)]
    assert_same_bits(output[others], expected[others])


def _plain_attention(reverse: Callable[[int, int], bool]) -> Attention:
    """Attention by torch that sums keys backwards when `reverse(rows, length)` says so."""

    def attention(
        query: Tensor,
        k_pool: Tensor,
        v_pool: Tensor,
        page_table: Tensor,
        seq_lens: Tensor,
        query_offsets: Tensor,
        scale: float,
    ) -> Tensor:
        output = torch.empty_like(query)
        for sequence, length in enumerate(seq_lens.tolist()):
            begin, end = query_offsets[sequence : sequence + 2].tolist()
            pages = page_table[sequence, : -(-length // k_pool.shape[2])].long()
            keys = k_pool[pages].transpose(1, 2).flatten(0, 1)[:length].float()
            values = v_pool[pages].transpose(1, 2).flatten(0, 1)[:length].float()
            for row in range(begin, end):
                seen = length - (end - row) + 1
                order = torch.arange(seen)
                if reverse(end - begin, length):
                    order = order.flip(0)
                total = torch.zeros_like(query[row])
                group = query.shape[1] // keys.shape[1]
                wide = keys[:seen].repeat_interleave(group, dim=1)
                weights = torch.softmax((query[row] * wide).sum(-1) * scale, dim=0)
                for key in order.tolist():
                    total += weights[key, :, None] * values[key].repeat_interleave(group, dim=0)
                output[row] = total
        return output

    return attention


def test_planted_bugs_are_caught() -> None:
    batch = make_batch([40], [40], dtype=torch.float32)
    sound = _plain_attention(lambda rows, length: False)
    check_rows_alone(sound, batch)
    check_chunks(sound, batch, [17, 23])
    by_rows = _plain_attention(lambda rows, length: rows > 1)
    with pytest.raises(AssertionError, match="elements differ"):
        check_rows_alone(by_rows, batch)
    by_length = _plain_attention(lambda rows, length: length >= 40)
    with pytest.raises(AssertionError, match="elements differ"):
        check_chunks(by_length, batch, [17, 23])


def test_torch_itself_is_not_invariant_but_close() -> None:
    """The comparer is stricter than a tolerance: permuted keys are close and yet not equal."""
    batch = make_batch([200], [1], dtype=torch.float32)
    order = torch.randperm(200)
    keys, values = batch.keys[0], batch.values[0]
    first = plain_torch.attention(batch.query, keys, values, batch.scale)
    other = plain_torch.attention(batch.query, keys[order], values[order], batch.scale)
    torch.testing.assert_close(first, other)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same_bits(first, other)
