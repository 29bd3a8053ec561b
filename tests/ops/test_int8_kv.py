"""Pools of int8 with a scale for each vector: what is written, what is read, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from stateful_kv import ops
from tests.ops import plain_torch
from tests.ops.cases import INT8_OPS, int8_arguments
from tests.ops.comparing import assert_close_to_reference, assert_same_bits, to_numpy64
from tests.ops.paged import PagedBatch, make_batch, make_pools, quantized, random_slots
from tests.ops.test_bad_arguments import dtype, expect_refusal, flatter, resize, spread, to
from tests.ops.test_paged_attention_invariance import VARIANTS, check_chunks, check_rows_alone
from tests.reference import attention, elementwise

pytestmark = pytest.mark.isa


def int8_attention(
    query: Tensor, k_pool: Tensor, v_pool: Tensor, *others: Any, **options: Any
) -> Tensor:
    """The op on float32 pools that are quantised first; NaN slots get the scale NaN."""
    k_pool, k_scales = quantized(k_pool)
    v_pool, v_scales = quantized(v_pool)
    scales = {"k_scales": k_scales, "v_scales": v_scales}
    return ops.paged_attention(query, k_pool, v_pool, *others, **options, **scales)


def int8_batch(*arguments: Any, **options: Any) -> PagedBatch:
    """A batch of float32 content for int8_attention."""
    return make_batch(*arguments, dtype=torch.float32, **options)


def dequantized(vectors: Tensor) -> Tensor:
    """What an int8 pool gives back of float32 vectors, exactly: float64."""
    steps, scales = quantized(vectors)
    return steps.double() * scales.double()[..., None]


def empty_int8_pools(
    num_pages: int, page_size: int, head_dim: int, device: torch.device
) -> list[Tensor]:
    """k_pool, v_pool, k_scales, v_scales for three KV heads; every scale is NaN."""
    pools = make_pools(num_pages, 3, page_size, head_dim, device=device)
    (k_pool, k_scales), (v_pool, v_scales) = map(quantized, pools)
    return [k_pool, v_pool, k_scales, v_scales]


def expected_pools(before: list[Tensor], k: Tensor, v: Tensor, slots: Tensor) -> list[Tensor]:
    """The pools and scales after the write, by plain indexing."""
    after = [tensor.clone() for tensor in before]
    page_size = before[0].shape[2]
    for rows, pool, scales in ((k, after[0], after[2]), (v, after[1], after[3])):
        steps, row_scales = quantized(rows)
        for row, slot in enumerate(slots.tolist()):
            if slot >= 0:
                pool[slot // page_size, :, slot % page_size] = steps[row]
                scales[slot // page_size, :, slot % page_size] = row_scales[row]
    return after


def assert_all_same(got: list[Tensor], expected: list[Tensor]) -> None:
    for name, tensor, other in zip(("k", "v", "k_scales", "v_scales"), got, expected, strict=True):
        assert_same_bits(tensor, other, name)


def difficult_rows(count: int, head_dim: int) -> Tensor:
    """float32[count, 3, D]: normal rows, then zeros, halves, subnormals, infinities and NaN."""
    rows = torch.randn(count, 3, head_dim) * torch.logspace(-30, 30, count)[:, None, None]
    rows[1] = 0.0
    rows[2] = -0.0
    rows[3] = torch.arange(head_dim) % 127 + 0.5  # with 127 as the largest: ties
    rows[3, :, 0] = 127.0
    rows[4] = 1e-45 * torch.arange(head_dim)
    rows[5] = 1e-40 * torch.randn(3, head_dim)
    rows[6, 0, 1] = float("inf")
    rows[7, 1, head_dim - 1] = float("nan")
    rows[8] = torch.finfo(torch.float32).max
    rows[10] = 190 * 2.0**-149  # the scale rounds to 2^-149: 190 steps, of which 127 fit
    rows[10, 1] *= -1
    return rows


@pytest.mark.parametrize("head_dim", [4, 30, 64, 96, 320])
def test_append_writes_quantised_rows_and_their_scales(device: torch.device, head_dim: int) -> None:
    count, page_size = 40, 16
    pools = empty_int8_pools(6, page_size, head_dim, device)
    slots = random_slots(count, 6, page_size).to(device)
    slots[9::5] = -1
    k = difficult_rows(count, head_dim).to(device)
    v = difficult_rows(count, head_dim).flip(0).to(device)
    expected = expected_pools(pools, k, v, slots)
    ops.append_kv(k, v, slots, *pools)
    assert_all_same(pools, expected)


@pytest.mark.parametrize("head_dim", [2, 30, 64, 256, 528])
def test_rope_append_quantises_the_rotated_key(device: torch.device, head_dim: int) -> None:
    count, page_size = 20, 8
    pools = empty_int8_pools(6, page_size, head_dim, device)
    slots = random_slots(count, 6, page_size).to(device)
    slots[3] = -1
    q = torch.randn(count, 6, head_dim, device=device)
    k, v = torch.randn(2, count, 3, head_dim, device=device)
    positions = torch.randperm(64)[:count].int().to(device)
    table = torch.from_numpy(elementwise.rope_table(64, head_dim)).float().to(device)
    rotated, _ = make_pools(1, 3, count, head_dim, device=device)
    own_slots = torch.arange(count, device=device)
    ops.rope_append_kv(q.clone(), k, v, positions, table, own_slots, rotated, rotated.clone())
    expected = expected_pools(pools, rotated[0].transpose(0, 1), v, slots)
    ops.rope_append_kv(q, k, v, positions, table, slots, *pools)
    assert_all_same(pools, expected)


@pytest.mark.parametrize("num_layers", [None, 3])
@pytest.mark.parametrize("page_shape", [(2, 8, 16), (3, 5, 7), (1, 16, 64)])
def test_copy_pages_copies_the_scales_too(
    device: torch.device, num_layers: int | None, page_shape: tuple[int, ...]
) -> None:
    shape = (5, *page_shape) if num_layers is None else (num_layers, 5, *page_shape)
    pools = torch.randn(2, *shape, device=device)
    (k_pool, k_scales), (v_pool, v_scales) = map(quantized, pools)
    tensors = [k_pool, v_pool, k_scales, v_scales]
    copies = torch.tensor([[1, 2], [2, 4], [0, 0]], dtype=torch.int32, device=device)
    expected = [tensor.clone() for tensor in tensors]
    axis = 0 if num_layers is None else 1
    for tensor, before in zip(expected, tensors, strict=True):
        for target in (2, 4):
            tensor.select(axis, target).copy_(before.select(axis, 1))
    ops.copy_pages(copies, *tensors)
    assert_all_same(tensors, expected)


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("head_dim", [16, 48, 64, 128])
@pytest.mark.parametrize(("window", "cap"), VARIANTS)
def test_attention_equals_float64(page_size: int, head_dim: int, window: int, cap: float) -> None:
    batch = int8_batch(
        [33, 1, 0, 700, 65, 300],
        [7, 1, 0, 1, 40, 3],
        num_heads=6,
        head_dim=head_dim,
        page_size=page_size,
    )
    output = int8_attention(*batch.arguments, batch.scale, sliding_window=window, soft_cap=cap)
    arrays = [to_numpy64(batch.query), *(dequantized(p).numpy() for p in batch.arguments[1:3])]
    tables = [tensor.numpy() for tensor in batch.arguments[3:]]
    reference = attention.paged_attention(*arrays, *tables, batch.scale, window, cap)
    for sequence in range(len(batch.keys)):
        rows = batch.rows_of(sequence)
        if rows.start == rows.stop:
            continue
        keys, values = dequantized(batch.keys[sequence]), dequantized(batch.values[sequence])
        plain = plain_torch.attention(
            batch.query[rows], keys.float(), values.float(), batch.scale, window, cap
        )
        assert_close_to_reference(output[rows], reference[rows], plain)


def test_int8_is_close_to_float32() -> None:
    batch = int8_batch([300], [4], num_heads=6)
    exact = ops.paged_attention(*batch.arguments, batch.scale)
    error = (int8_attention(*batch.arguments, batch.scale) - exact).abs().max()
    assert 0 < error < 0.03 * exact.abs().max()


@pytest.mark.parametrize(("window", "cap"), VARIANTS)
def test_row_alone_equals_row_in_a_batch(window: int, cap: float) -> None:
    batch = int8_batch([1, 15, 17, 113, 260, 1023], [1, 15, 3, 20, 1, 2], num_heads=6)

    def attend(*arguments: Any) -> Tensor:
        return int8_attention(*arguments, sliding_window=window, soft_cap=cap)

    check_rows_alone(attend, batch)


def test_any_chunk_split_gives_the_same_rows() -> None:
    batch = int8_batch([331], [331], num_heads=3, num_kv_heads=1)
    for chunks in ([1] * 20 + [311], [64, 67, 200], [256, 75], [330, 1]):
        check_chunks(int8_attention, batch, chunks)


def test_page_ids_and_page_size_do_not_matter() -> None:
    batch = int8_batch([113, 1, 64, 500], [13, 1, 64, 2])
    expected = int8_attention(*batch.arguments, batch.scale)
    for page_size in (16, 64, 128, 3):
        moved = batch.with_layout(page_size)
        output = int8_attention(*moved.arguments, batch.scale)
        assert_same_bits(output, expected, f"page size {page_size}")


@pytest.mark.parametrize("query_lens", [[1] * 4, [60, 1, 20, 300]], ids=["decode", "mixed"])
def test_thread_count_does_not_matter(
    query_lens: list[int], set_num_threads: Callable[[int], None]
) -> None:
    batch = int8_batch([600, 1, 1023, 300], query_lens, num_heads=8)
    results = []
    for threads in (1, 2, 3):
        set_num_threads(threads)
        results.append(int8_attention(*batch.arguments, batch.scale))
    assert_same_bits(results[1], results[0], "2 threads")
    assert_same_bits(results[2], results[0], "3 threads")


def test_a_bad_vector_reaches_only_the_rows_that_see_it() -> None:
    batch = int8_batch([40], [40])
    expected = int8_attention(*batch.arguments, batch.scale)
    keys = batch.keys[0].clone()
    keys[25, 0, 3] = float("inf")
    output = int8_attention(*replace(batch, keys=[keys]).with_layout(16).arguments, batch.scale)
    assert_same_bits(output[:25], expected[:25])
    assert output[25:, :2].isnan().all()
    assert_same_bits(output[25:, 2:], expected[25:, 2:])


def test_int8_rows_are_refused_as_a_source() -> None:
    arguments = int8_arguments("append_kv")
    arguments["k"] = arguments["k"].to(torch.int8)
    assert "float32" in expect_refusal("append_kv", "k", arguments)


CHANGES = {
    "dtype": dtype(torch.float64),
    "rank": flatter,
    "stride": spread,
    "pages": resize(0, 1),
    "page_size": resize(-1, 1),
    "missing": to(None),
}


@pytest.mark.parametrize("op", INT8_OPS)
@pytest.mark.parametrize("name", ["k_scales", "v_scales"])
@pytest.mark.parametrize("label", CHANGES)
def test_bad_scales(op: str, name: str, label: str) -> None:
    arguments = int8_arguments(op)
    arguments[name] = CHANGES[label](arguments[name])
    expect_refusal(op, name, arguments)


@pytest.mark.parametrize("op", ["append_kv", "copy_pages", "rope_append_kv"])
def test_scales_need_memory_of_their_own(op: str) -> None:
    arguments = int8_arguments(op)
    arguments["v_scales"] = arguments["k_scales"]
    assert "memory of its own" in expect_refusal(op, "v_scales", arguments)


@pytest.mark.parametrize("op", INT8_OPS)
def test_opcheck(op: str) -> None:
    arguments = int8_arguments(op)
    for name in ("k_scales", "v_scales"):
        arguments[name].nan_to_num_()  # torch.equal takes NaN for a change
    overload = getattr(torch.ops.stateful_kv, op).default
    torch.library.opcheck(overload, tuple(arguments.values()))
