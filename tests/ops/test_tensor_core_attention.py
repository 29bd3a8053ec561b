"""Attention on tensor cores: 16-bit queries, on CUDA or in the emulated run.

The kernels cut keys into tiles of 64 and chunks of 512, rows into tiles of 16 to 128, and the
chunks of a row into runs that blocks share; SKV_ATTENTION_RUN_LOG2 and SKV_ATTENTION_WARPS choose
the last two. Lengths here lie around these borders.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from stateful_kv import ops
from tests.ops import plain_torch
from tests.ops.comparing import assert_close_to_reference, assert_same_bits, to_numpy64
from tests.ops.paged import PagedBatch, make_batch, offsets, quantized
from tests.ops.test_paged_attention import check_against_reference
from tests.ops.test_paged_attention_invariance import check_chunks, check_rows_alone
from tests.reference import attention

DTYPES = [torch.bfloat16, torch.float16]
HEAD_DIMS = [64, *(pytest.param(dim, marks=pytest.mark.slow_emulated) for dim in (128, 256))]
Divide = Callable[..., None]

only_emulated = pytest.mark.skipif(
    "SKV_EMULATED_CUDA" not in os.environ, reason="the CUDA kernels are what is tested"
)


@pytest.fixture(
    params=[pytest.param("cpu", marks=only_emulated), pytest.param("cuda", marks=pytest.mark.cuda)]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the CUDA kernels run."""
    return torch.device(request.param)


@pytest.fixture
def divide(monkeypatch: pytest.MonkeyPatch) -> Divide:
    """Chooses how the work is divided: chunks of a run (log2) and warps of a block."""

    def set_division(run_log2: int = -1, warps: int = -1) -> None:
        monkeypatch.setenv("SKV_ATTENTION_RUN_LOG2", str(run_log2))
        monkeypatch.setenv("SKV_ATTENTION_WARPS", str(warps))

    return set_division


def half_batch(*lengths: Any, dtype: torch.dtype = torch.bfloat16, **options: Any) -> PagedBatch:
    """A batch whose queries have the dtype of the pools."""
    batch = make_batch(*lengths, dtype=dtype, **options)
    return replace(batch, query=batch.query.to(dtype))


DIVISIONS = [(0, 1), (0, 4), (1, 2), (1, 8), (2, 1), (2, 4)]


def check_divisions(attend: Callable[[], Tensor], divide: Divide) -> Tensor:
    """Every division of the work gives the bits of the kernel's own choice."""
    expected = attend()
    for run_log2, warps in DIVISIONS:
        divide(run_log2, warps)
        assert_same_bits(attend(), expected, f"runs of 2^{run_log2} chunks, {warps} warps")
    divide()
    return expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("page_size", [16, 32, 64])
def test_lengths_around_tiles_and_chunks(
    device: torch.device, dtype: torch.dtype, head_dim: int, page_size: int
) -> None:
    batch = half_batch(
        [0, 1, 63, 64, 65, 113, 513, 600],
        [0, 1, 5, 1, 3, 19, 2, 1],
        head_dim=head_dim,
        page_size=page_size,
        dtype=dtype,
        device=device,
    )
    check_against_reference(batch)


@pytest.mark.parametrize("group", [1, 3, 4, 8, 16])
@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_head_groups(device: torch.device, group: int, num_kv_heads: int) -> None:
    heads = {"num_heads": group * num_kv_heads, "num_kv_heads": num_kv_heads}
    batch = half_batch([40, 17, 600], [1, 17, 3], **heads, device=device)
    check_against_reference(batch)


@pytest.mark.parametrize("page_size", [1, 5, 16, 48, 64, 128])
def test_contexts_of_several_chunks(device: torch.device, page_size: int, divide: Divide) -> None:
    batch = half_batch([513, 1025, 1600], [1, 1, 2], page_size=page_size, device=device)
    for run_log2 in (0, 1, 2):
        divide(run_log2)
        check_against_reference(batch)


@pytest.mark.parametrize("sliding_window", [1, 63, 64, 65, 512, 600, 5000])
@pytest.mark.parametrize("soft_cap", [0.0, 30.0])
def test_window_and_cap(
    device: torch.device, sliding_window: int, soft_cap: float, divide: Divide
) -> None:
    batch = half_batch([1, 64, 113, 1300], [1, 16, 40, 20], num_heads=2, device=device)
    divide(0)
    check_against_reference(batch, None, sliding_window, soft_cap)


@pytest.mark.parametrize("scale", [0.0, -0.2, 3.0])
def test_unusual_scales(device: torch.device, scale: float) -> None:
    check_against_reference(half_batch([113, 200], [5, 1], device=device), scale)


def test_more_sequences_than_a_warp_has_lanes(device: torch.device) -> None:
    kv_lens = [(37 * i) % 90 for i in range(70)]
    query_lens = [min(length, i % 3) for i, length in enumerate(kv_lens)]
    check_against_reference(half_batch(kv_lens, query_lens, device=device))


def test_rows_of_no_sequence_are_zero(device: torch.device) -> None:
    batch = half_batch([40, 600], [2, 3], device=device)
    expected = ops.paged_attention(*batch.arguments, batch.scale)
    query = torch.cat([batch.query, torch.full_like(batch.query, float("nan"))])
    output = ops.paged_attention(query, *batch.arguments[1:], batch.scale)
    assert_same_bits(output[:5], expected)
    assert_same_bits(output[5:], torch.zeros_like(expected))


@pytest.mark.parametrize("head_dim", [64, 256])  # the query in registers, in shared memory
def test_strided_and_odd_queries(device: torch.device, head_dim: int) -> None:
    batch = half_batch([40, 20], [3, 20], head_dim=head_dim, device=device)
    expected = ops.paged_attention(*batch.arguments, batch.scale)
    rows, heads, dim = batch.query.shape
    memory = torch.zeros(rows * (heads * dim + 3) + 1, dtype=batch.query.dtype, device=device)
    odd = memory[1:].as_strided(batch.query.shape, (heads * dim + 3, dim, 1))
    odd.copy_(batch.query)
    turned = batch.query.transpose(0, 1).contiguous().transpose(0, 1)
    for query in (odd, turned):
        output = ops.paged_attention(query, *batch.arguments[1:], batch.scale)
        assert_same_bits(output, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (37, 0.0), (600, 20.0)])
def test_row_alone_equals_row_in_a_batch(
    device: torch.device, dtype: torch.dtype, window: int, cap: float
) -> None:
    batch = half_batch(
        [1, 17, 113, 520, 1100], [1, 3, 20, 9, 2], num_heads=6, dtype=dtype, device=device
    )
    check_rows_alone(partial(ops.paged_attention, sliding_window=window, soft_cap=cap), batch)


@pytest.mark.parametrize("head_dim", [96, 128, 256])
def test_row_alone_at_other_head_dims(device: torch.device, head_dim: int) -> None:
    batch = half_batch([65, 530, 7], [9, 3, 7], head_dim=head_dim, num_heads=8, device=device)
    check_rows_alone(ops.paged_attention, batch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_verify_and_extend_give_the_same_rows(
    device: torch.device, dtype: torch.dtype
) -> None:
    batch = half_batch([600], [600], num_heads=2, num_kv_heads=1, dtype=dtype, device=device)
    for chunks in ([590] + [1] * 10, [585, 8, 7], [64, 67, 469], [513, 87]):
        check_chunks(ops.paged_attention, batch, chunks)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("query_lens", [[1, 1, 1], [9, 40, 2]], ids=["decode", "mixed"])
@pytest.mark.parametrize("window", [0, 700])
def test_division_of_the_work_does_not_matter(
    device: torch.device, head_dim: int, query_lens: list[int], window: int, divide: Divide
) -> None:
    batch = half_batch([700, 2100, 40], query_lens, num_heads=2, head_dim=head_dim, device=device)
    check_divisions(
        lambda: ops.paged_attention(*batch.arguments, batch.scale, window),
        divide,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_warps_that_share_rows(device: torch.device, dtype: torch.dtype, divide: Divide) -> None:
    """With a head dim of 256 two warps have half of the columns each; tiles are half as large."""
    batch = half_batch(
        [40, 1100], [40, 3], num_heads=4, num_kv_heads=2, head_dim=256, dtype=dtype, device=device
    )
    expected = check_divisions(lambda: ops.paged_attention(*batch.arguments, batch.scale), divide)
    arguments, scales = int8_arguments(batch)
    check_divisions(lambda: ops.paged_attention(*arguments, **scales), divide)
    # Each column is summed by itself, so values with equal halves give results with equal halves.
    alike = [torch.cat([values[..., :128]] * 2, dim=-1) for values in batch.values]
    output = ops.paged_attention(
        *replace(batch, values=alike).with_layout(16).arguments, batch.scale
    )
    assert_same_bits(output[..., 128:], output[..., :128])
    assert_same_bits(output[..., :128], expected[..., :128])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_page_ids_and_page_size_do_not_matter(device: torch.device, dtype: torch.dtype) -> None:
    batch = half_batch([113, 1, 64, 1030], [13, 1, 64, 2], dtype=dtype, device=device)
    expected = ops.paged_attention(*batch.arguments, batch.scale)
    for page_size in (16, 32, 64, 128, 8, 3):
        moved = batch.with_layout(page_size)
        output = ops.paged_attention(*moved.arguments, batch.scale)
        assert_same_bits(output, expected, f"page size {page_size}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (600, 20.0)])
def test_warpgroup_products_give_the_same_bits(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    window: int,
    cap: float,
    divide: Divide,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What has to hold before STATEFUL_KV_WGMMA=1 can become the default."""
    if device.type == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("only compute capability 9.0 has them")
    batch = half_batch(
        [33, 1100, 620], [33, 40, 3], num_heads=4, head_dim=head_dim, dtype=dtype, device=device
    )
    for warps in (4, 8):
        divide(0, warps)
        monkeypatch.delenv("STATEFUL_KV_WGMMA", raising=False)
        expected = ops.paged_attention(*batch.arguments, batch.scale, window, cap)
        monkeypatch.setenv("STATEFUL_KV_WGMMA", "1")
        output = ops.paged_attention(*batch.arguments, batch.scale, window, cap)
        assert_same_bits(output, expected, f"{warps} warps")


def test_warpgroup_products_of_int8_pools(
    device: torch.device, divide: Divide, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = half_batch([90, 700], [70, 9], num_heads=4, head_dim=128, device=device)
    arguments, scales = int8_arguments(batch)
    divide(0, 4)
    expected = ops.paged_attention(*arguments, **scales)
    monkeypatch.setenv("STATEFUL_KV_WGMMA", "1")
    assert_same_bits(ops.paged_attention(*arguments, **scales), expected)


def test_width_of_the_page_table_does_not_matter(device: torch.device) -> None:
    batch = half_batch([1030, 30], [13, 1], device=device)
    expected = ops.paged_attention(*batch.arguments, batch.scale)
    unused = torch.full((2, 500), -7, dtype=torch.int32, device=device)
    wide = replace(batch, page_table=torch.cat([batch.page_table, unused], dim=1))
    assert_same_bits(ops.paged_attention(*wide.arguments, batch.scale), expected)


def test_bad_queries_and_keys_reach_only_the_rows_that_see_them(device: torch.device) -> None:
    batch = half_batch([90, 40], [50, 1], device=device)
    expected = ops.paged_attention(*batch.arguments, batch.scale)
    keys = batch.keys[0].clone()
    keys[70, 0, 3] = float("nan")  # seen by rows 30 to 49, heads 0 and 1
    query = batch.query.clone()
    query[4] = float("inf")
    bad = replace(batch, keys=[keys, batch.keys[1]], query=query).with_layout(16)
    output = ops.paged_attention(*bad.arguments, batch.scale)
    good = [row for row in range(51) if row != 4 and not 30 <= row < 50]
    assert_same_bits(output[good], expected[good])
    assert_same_bits(output[30:50, 2:], expected[30:50, 2:])
    assert output[30:50, :2].isnan().all()


def int8_arguments(batch: PagedBatch) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
    """Arguments on pools of int8, and the scales; slots without a token have the scale NaN."""
    k_pool, k_scales = quantized(batch.k_pool)
    v_pool, v_scales = quantized(batch.v_pool)
    arguments = (batch.query, k_pool, v_pool, *batch.arguments[3:], batch.scale)
    return arguments, {"k_scales": k_scales, "v_scales": v_scales}


def dequantized(vectors: Tensor) -> Tensor:
    """What an int8 pool gives back, exactly: float64."""
    steps, scales = quantized(vectors)
    return steps.double() * scales.double()[..., None]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (70, 20.0)])
def test_int8_pools_equal_float64(
    device: torch.device, dtype: torch.dtype, head_dim: int, window: int, cap: float
) -> None:
    batch = make_batch(
        [33, 0, 600, 65],
        [7, 0, 1, 40],
        num_heads=6,
        head_dim=head_dim,
        dtype=torch.float32,
        device=device,
    )
    batch = replace(batch, query=batch.query.to(dtype))
    arguments, scales = int8_arguments(batch)
    output = ops.paged_attention(*arguments, window, cap, **scales)
    pools = [dequantized(pool).cpu().numpy() for pool in (batch.k_pool, batch.v_pool)]
    tables = [tensor.cpu().numpy() for tensor in batch.arguments[3:]]
    reference = attention.paged_attention(
        to_numpy64(batch.query), *pools, *tables, batch.scale, window, cap
    )
    for sequence, keys in enumerate(batch.keys):
        rows = batch.rows_of(sequence)
        if rows.start == rows.stop:
            continue
        plain = plain_torch.attention(
            batch.query[rows],
            dequantized(keys).float(),
            dequantized(batch.values[sequence]).float(),
            batch.scale,
            window,
            cap,
        )
        assert_close_to_reference(output[rows], reference[rows], plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_pools_are_invariant(device: torch.device, dtype: torch.dtype, divide: Divide) -> None:
    batch = make_batch([1030, 70], [3, 20], dtype=torch.float32, device=device)
    batch = replace(batch, query=batch.query.to(dtype))

    def attend(*arguments: Any) -> Tensor:
        query, k_pool, v_pool, *others = arguments
        k_pool, k_scales = quantized(k_pool)
        v_pool, v_scales = quantized(v_pool)
        return ops.paged_attention(
            query, k_pool, v_pool, *others, k_scales=k_scales, v_scales=v_scales
        )

    check_rows_alone(attend, batch)
    check_divisions(lambda: attend(*batch.arguments, batch.scale), divide)


def shared_batch(
    groups: list[tuple[int, list[int]]], query_len: int, page_size: int = 16, **options: Any
) -> tuple[PagedBatch, dict[str, Tensor]]:
    """A batch and its groups, each a prefix length and the lengths behind it.

    The pages of a prefix are those of its first sequence, as far as they are full.
    """
    kv_lens = [prefix + own for prefix, owns in groups for own in owns]
    batch = half_batch(kv_lens, [query_len] * len(kv_lens), page_size=page_size, **options)
    table = batch.page_table.clone()
    first = 0
    for prefix, owns in groups:
        table[first : first + len(owns), : prefix // page_size] = table[
            first, : prefix // page_size
        ]
        first += len(owns)
    device = batch.query.device
    return replace(batch, page_table=table), {
        "group_offsets": offsets([len(owns) for _, owns in groups], device),
        "prefix_lens": torch.tensor([prefix for prefix, _ in groups]).int().to(device),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("query_len", [1, 5])
@pytest.mark.parametrize("sliding_window", [0, 900])
def test_a_shared_prefix_changes_no_bit(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    query_len: int,
    sliding_window: int,
    divide: Divide,
) -> None:
    batch, groups = shared_batch(
        [(1104, [20, 700, 33]), (0, [5]), (512, [7, 130]), (496, [300, 5])],
        query_len,
        num_heads=2,
        head_dim=head_dim,
        dtype=dtype,
        device=device,
    )
    options = {"sliding_window": sliding_window, "soft_cap": 0.0}
    expected = ops.paged_attention(*batch.arguments, batch.scale, **options)
    shared = check_divisions(
        lambda: ops.shared_prefix_attention(
            *batch.arguments, *groups.values(), batch.scale, **options
        ),
        divide,
    )
    assert_same_bits(shared, expected)


def test_the_keys_of_a_shared_prefix_are_read_from_the_first_sequence(
    device: torch.device,
) -> None:
    """Pages that the others name for whole shared chunks are not looked at."""
    batch, groups = shared_batch([(1024, [20, 30, 40])], 2, device=device)
    expected = ops.shared_prefix_attention(*batch.arguments, *groups.values(), batch.scale)
    table = batch.page_table.clone()
    table[1:, : 1024 // 16] = 0  # a page of NaN
    other = replace(batch, page_table=table)
    output = ops.shared_prefix_attention(*other.arguments, *groups.values(), batch.scale)
    assert_same_bits(output, expected)


@pytest.mark.parametrize("head_dim", [64, 256])
def test_rows_inside_of_the_shared_prefix(
    device: torch.device, head_dim: int, divide: Divide
) -> None:
    """A prefix may reach into the new rows, whose own masks still hold."""
    batch, groups = shared_batch([(1040, [3, 40])], 30, head_dim=head_dim, device=device)
    expected = ops.paged_attention(*batch.arguments, batch.scale)
    groups["prefix_lens"][0] = 1040
    shared = check_divisions(
        lambda: ops.shared_prefix_attention(*batch.arguments, *groups.values(), batch.scale),
        divide,
    )
    assert_same_bits(shared, expected)


def test_int8_pools_with_a_shared_prefix(device: torch.device) -> None:
    batch, groups = shared_batch([(1040, [3, 40, 500])], 2, dtype=torch.float32, device=device)
    batch = replace(batch, query=batch.query.to(torch.bfloat16))
    arguments, scales = int8_arguments(batch)
    expected = ops.paged_attention(*arguments, **scales)
    output = ops.shared_prefix_attention(*arguments[:-1], *groups.values(), arguments[-1], **scales)
    assert_same_bits(output, expected)
