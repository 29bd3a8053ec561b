"""paged_attention against float64: shapes, dtypes, page layouts, masks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stateful_kv import ops
from tests.ops import plain_torch
from tests.ops.comparing import assert_close_to_reference, assert_same_bits, to_numpy64
from tests.ops.paged import PagedBatch, make_batch
from tests.reference import attention

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
UNBUILT = pytest.mark.cpu_only("CUDA has no kernel for this head_dim")


def check_against_reference(
    batch: PagedBatch,
    scale: float | None = None,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
) -> Tensor:
    """Runs the op and holds each sequence to the tolerance; returns the output."""
    scale = batch.scale if scale is None else scale
    pools_before = batch.k_pool.clone(), batch.v_pool.clone()
    output = ops.paged_attention(*batch.arguments, scale, sliding_window, soft_cap)
    assert output.shape == batch.query.shape
    assert output.dtype == batch.query.dtype
    assert output.is_contiguous()
    arrays = [to_numpy64(tensor) for tensor in batch.arguments[:3]]
    tables = [tensor.cpu().numpy() for tensor in batch.arguments[3:]]
    reference = attention.paged_attention(*arrays, *tables, scale, sliding_window, soft_cap)
    for sequence in range(len(batch.keys)):
        rows = batch.rows_of(sequence)
        if rows.start == rows.stop:
            continue
        plain = plain_torch.attention(
            batch.query[rows],
            batch.keys[sequence],
            batch.values[sequence],
            scale,
            sliding_window,
            soft_cap,
        )
        assert_close_to_reference(output[rows], reference[rows], plain)
    assert_same_bits(batch.k_pool, pools_before[0], "k_pool")
    assert_same_bits(batch.v_pool, pools_before[1], "v_pool")
    return output


def odd_lengths(page_size: int) -> tuple[list[int], list[int]]:
    """KV lengths at and around the borders of a page, and how many rows of each are new."""
    kv_lens = [0, 1, page_size - 1, page_size, page_size + 1, 113, 1023, 3 * page_size]
    query_lens = [0, 1, page_size - 1, 1, 3, 19, 2, 0]
    return kv_lens, query_lens


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("head_dim", [pytest.param(32, marks=UNBUILT), 64, 96, 128, 256])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (6, 2)])
def test_odd_lengths(
    device: torch.device,
    dtype: torch.dtype,
    page_size: int,
    head_dim: int,
    num_heads: int,
    num_kv_heads: int,
) -> None:
    kv_lens, query_lens = odd_lengths(page_size)
    batch = make_batch(
        kv_lens,
        query_lens,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        dtype=dtype,
        device=device,
    )
    check_against_reference(batch)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [pytest.param(48, marks=UNBUILT), 64, 128])
def test_ragged_batch(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    batch = make_batch(
        [33, 1, 0, 200, 5], [7, 1, 0, 1, 5], head_dim=head_dim, dtype=dtype, device=device
    )
    check_against_reference(batch)
    check_against_reference(batch, sliding_window=9, soft_cap=15.0)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads"),
    [(1, 1), (5, 1), (8, 1), (9, 3), (8, 2), (7, 7), (32, 2), (14, 2)],
)
def test_head_groups(device: torch.device, num_heads: int, num_kv_heads: int) -> None:
    batch = make_batch(
        [40, 17, 70],
        [1, 17, 5],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        device=device,
    )
    check_against_reference(batch)


@pytest.mark.parametrize("page_size", [1, 2, 5, 16, 48, 128])
def test_unusual_page_sizes(device: torch.device, page_size: int) -> None:
    kv_lens = [1, page_size, page_size + 1, 3 * page_size + 2, 131]
    query_lens = [1, 1, page_size + 1, 2, 4]
    check_against_reference(make_batch(kv_lens, query_lens, page_size=page_size, device=device))


@pytest.mark.parametrize("sliding_window", [1, 2, 15, 16, 17, 64, 100, 5000])
@pytest.mark.parametrize("soft_cap", [0.0, 30.0])
def test_sliding_window(device: torch.device, sliding_window: int, soft_cap: float) -> None:
    batch = make_batch([1, 16, 113, 300, 64], [1, 16, 40, 1, 3], device=device)
    check_against_reference(batch, None, sliding_window, soft_cap)


def test_window_of_one_returns_the_own_value(device: torch.device) -> None:
    batch = make_batch([50], [20], dtype=torch.float32, device=device)
    output = ops.paged_attention(*batch.arguments, batch.scale, 1)
    own = batch.values[0][30:].repeat_interleave(2, dim=1)
    assert_same_bits(output, own)


def test_window_covering_all_changes_no_bit(device: torch.device) -> None:
    batch = make_batch([50, 130], [20, 1], device=device)
    unlimited = ops.paged_attention(*batch.arguments, batch.scale)
    assert_same_bits(ops.paged_attention(*batch.arguments, batch.scale, 130), unlimited)


@pytest.mark.parametrize("soft_cap", [0.5, 5.0, 50.0])
@pytest.mark.parametrize("scale", [0.01, 1.0, 20.0])
def test_soft_cap(device: torch.device, soft_cap: float, scale: float) -> None:
    batch = make_batch([113, 31], [9, 31], device=device)
    check_against_reference(batch, scale, 0, soft_cap)


@pytest.mark.parametrize("scale", [0.0, -0.2, 3.0, 200.0])
def test_extreme_scales_stay_finite(device: torch.device, scale: float) -> None:
    batch = make_batch([113, 200], [5, 1], dtype=torch.float32, device=device)
    check_against_reference(batch, scale)


def test_peaked_scores_pick_one_key(device: torch.device) -> None:
    batch = make_batch([130], [1], num_heads=1, num_kv_heads=1, dtype=torch.float32, device=device)
    for position in (0, 63, 64, 127, 128, 129):
        query = batch.keys[0][position][None] * 100
        output = ops.paged_attention(query, *batch.arguments[1:], 1.0)
        torch.testing.assert_close(output[0], batch.values[0][position], rtol=1e-6, atol=1e-6)


def test_only_empty_sequences(device: torch.device) -> None:
    batch = make_batch([0, 0, 40], [0, 0, 0], device=device)
    output = ops.paged_attention(*batch.arguments, batch.scale)
    assert output.shape == (0, 4, 64)


def test_no_sequences(device: torch.device) -> None:
    batch = make_batch([20], [1], device=device)
    output = ops.paged_attention(
        batch.query[:0],
        batch.k_pool,
        batch.v_pool,
        batch.page_table[:0],
        batch.seq_lens[:0],
        batch.query_offsets[:1],
        batch.scale,
    )
    assert output.shape == (0, 4, 64)


def test_strided_query_and_page_table(device: torch.device) -> None:
    batch = make_batch([40, 20], [3, 20], device=device)
    expected = ops.paged_attention(*batch.arguments, batch.scale)
    rows, heads, dim = batch.query.shape
    fused = torch.full((rows, heads * dim + 2 * 2 * dim), float("nan"), device=device)
    query = fused[:, : heads * dim].view(rows, heads, dim)
    query.copy_(batch.query)
    assert not query.is_contiguous()
    wide = torch.full((2, 11), 2**31 - 1, dtype=torch.int32, device=device)
    table = wide[:, : batch.page_table.shape[1]]
    table.copy_(batch.page_table)
    output = ops.paged_attention(
        query, batch.k_pool, batch.v_pool, table, *batch.arguments[4:], batch.scale
    )
    assert_same_bits(output, expected)
    transposed = batch.query.transpose(0, 1).contiguous().transpose(0, 1)
    output = ops.paged_attention(transposed, *batch.arguments[1:], batch.scale)
    assert_same_bits(output, expected)


def test_pool_may_be_a_layer_of_a_cache(device: torch.device) -> None:
    batch = make_batch([40, 20], [3, 20], device=device)
    expected = ops.paged_attention(*batch.arguments, batch.scale)
    nothing = torch.full_like(batch.k_pool, float("nan"))
    k_cache = torch.stack([nothing, batch.k_pool, nothing])
    v_cache = torch.stack([nothing, batch.v_pool, nothing])
    output = ops.paged_attention(
        batch.query, k_cache[1], v_cache[1], *batch.arguments[3:], batch.scale
    )
    assert_same_bits(output, expected)


def test_sequences_may_share_pages(device: torch.device) -> None:
    batch = make_batch([64], [2], device=device)
    table = batch.page_table.repeat(3, 1)
    output = ops.paged_attention(
        batch.query.repeat(3, 1, 1),
        batch.k_pool,
        batch.v_pool,
        table,
        batch.seq_lens.repeat(3),
        torch.tensor([0, 2, 4, 6], dtype=torch.int32, device=device),
        batch.scale,
    )
    expected = ops.paged_attention(*batch.arguments, batch.scale)
    assert_same_bits(output, expected.repeat(3, 1, 1))
