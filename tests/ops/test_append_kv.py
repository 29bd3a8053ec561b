"""append_kv and copy_pages: exact bytes in the right places, nothing anywhere else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stateful_kv import ops
from tests.ops.comparing import assert_same_bits, bits
from tests.ops.paged import make_pools, random_slots

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def expected_pool(pool: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """The pool after the write, by plain indexing."""
    result = pool.clone()
    page_size = pool.shape[2]
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            result[slot // page_size, :, slot % page_size] = rows[row].to(pool.dtype)
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("head_dim", [32, pytest.param(96, marks=pytest.mark.isa), 64, 128, 256])
@pytest.mark.parametrize("count", [0, 1, 17, 113])
def test_rows_land_in_their_slots(
    device: torch.device, dtype: torch.dtype, page_size: int, head_dim: int, count: int
) -> None:
    num_pages = 2 + -(-count // page_size) + 1
    k_pool, v_pool = make_pools(num_pages, 3, page_size, head_dim, dtype, device)
    slots = random_slots(count, num_pages, page_size)
    slots[1::5] = -1
    slots = slots.to(device)
    k, v = torch.randn(2, count, 3, head_dim, device=device)
    expected_k, expected_v = expected_pool(k_pool, k, slots), expected_pool(v_pool, v, slots)
    assert ops.append_kv(k, v, slots, k_pool, v_pool) is None
    assert_same_bits(k_pool, expected_k, "k_pool")
    assert_same_bits(v_pool, expected_v, "v_pool")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_source_in_the_dtype_of_the_pool_is_copied(
    device: torch.device, dtype: torch.dtype
) -> None:
    k_pool, v_pool = make_pools(4, 2, 16, 32, dtype, device)
    patterns = torch.randint(-(2**15), 2**15, (2, 9, 2, 32), dtype=torch.int16, device=device)
    k, v = patterns.view(dtype)  # any bits, signalling NaN too
    slots = random_slots(9, 4, 16).to(device)
    expected_k, expected_v = expected_pool(k_pool, k, slots), expected_pool(v_pool, v, slots)
    ops.append_kv(k, v, slots, k_pool, v_pool)
    assert_same_bits(k_pool, expected_k)
    assert_same_bits(v_pool, expected_v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("source_dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [30, 64])
def test_source_in_another_dtype_is_rounded_once(
    device: torch.device, source_dtype: torch.dtype, dtype: torch.dtype, head_dim: int
) -> None:
    k_pool, v_pool = make_pools(4, 2, 16, head_dim, dtype, device)
    k, v = torch.randn(2, 9, 2, head_dim, device=device).to(source_dtype)
    slots = random_slots(9, 4, 16).to(device)
    expected_k, expected_v = (
        expected_pool(pool, rows.float(), slots) for pool, rows in ((k_pool, k), (v_pool, v))
    )
    ops.append_kv(k, v, slots, k_pool, v_pool)
    assert_same_bits(k_pool, expected_k)
    assert_same_bits(v_pool, expected_v)


def rounding_cases(dtype: torch.dtype) -> Tensor:
    """Every 16-bit value, every midpoint to the next one, and the floats around both."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = patterns.view(dtype).to(torch.float64)
    following = (patterns + 1).view(dtype).to(torch.float64)
    centres = torch.cat([values, (values + following) / 2]).float()
    infinity = torch.tensor(float("inf"))
    around = [centres, torch.nextafter(centres, infinity), torch.nextafter(centres, -infinity)]
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, 65519.99, 65520.0])
    return torch.cat([*around, special])


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_equals_torch(device: torch.device, dtype: torch.dtype) -> None:
    cases = rounding_cases(torch.float16 if dtype == torch.float32 else dtype)
    count = -(-cases.numel() // 64)
    rows = torch.zeros(count * 64)
    rows[: cases.numel()] = cases
    rows = rows.view(count, 1, 64).to(device)
    k_pool, v_pool = make_pools(-(-count // 64), 1, 64, 64, dtype, device)
    slots = torch.arange(count, device=device)
    ops.append_kv(rows, -rows, slots, k_pool, v_pool)
    for pool, source in ((k_pool, rows), (v_pool, -rows)):
        stored = pool.view(-1, 64)[:count]
        expected = source.view(count, 64).to(dtype)
        assert torch.equal(stored.isnan(), expected.isnan())
        differs = (bits(stored) != bits(expected)) & ~expected.isnan()
        assert not differs.any(), source.view(count, 64)[differs][:5]


def test_strided_sources(device: torch.device) -> None:
    fused = torch.randn(7, (4 + 2 + 2) * 32, device=device)
    k = fused[:, 4 * 32 : 6 * 32].view(7, 2, 32)
    v = fused[:, 6 * 32 :].view(7, 2, 32)
    slots = random_slots(7, 4, 16).to(device)
    pools, expected = make_pools(4, 2, 16, 32, device=device), make_pools(4, 2, 16, 32)
    ops.append_kv(k, v, slots, *pools)
    ops.append_kv(k.contiguous().cpu(), v.contiguous().cpu(), slots.cpu(), *expected)
    assert_same_bits(pools[0].cpu(), expected[0])
    assert_same_bits(pools[1].cpu(), expected[1])
    heads_first = k.transpose(0, 1).contiguous().transpose(0, 1)
    again = make_pools(4, 2, 16, 32, device=device)
    ops.append_kv(heads_first, v, slots, *again)
    assert_same_bits(again[0].cpu(), expected[0])


def test_pools_may_be_layers_of_a_cache(device: torch.device) -> None:
    cache = torch.full((2, 3, 4, 2, 16, 32), float("nan"), device=device)
    k, v = torch.randn(2, 5, 2, 32, device=device)
    slots = random_slots(5, 4, 16).to(device)
    ops.append_kv(k, v, slots, cache[0, 1], cache[1, 1])
    assert_same_bits(cache[0, 1], expected_pool(torch.full_like(cache[0, 1], torch.nan), k, slots))
    assert cache[:, 0].isnan().all()
    assert cache[:, 2].isnan().all()


def test_skipped_rows_write_nothing(device: torch.device) -> None:
    pools = make_pools(4, 2, 16, 32, device=device)
    k, v = torch.randn(2, 5, 2, 32, device=device)
    ops.append_kv(k, v, torch.full((5,), -1, device=device), *pools)
    assert pools[0].isnan().all()
    assert pools[1].isnan().all()


def test_thread_count_does_not_matter(set_num_threads: Callable[[int], None]) -> None:
    k, v = torch.randn(2, 1000, 3, 128)
    slots = random_slots(1000, 70, 16)
    results = []
    for threads in (1, 2, 3):
        set_num_threads(threads)
        pools = make_pools(70, 3, 16, 128, torch.float16)
        ops.append_kv(k, v, slots, *pools)
        results.append(pools)
    for other in results[1:]:
        assert_same_bits(other[0], results[0][0])
        assert_same_bits(other[1], results[0][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_layers", [None, 1, 3])
@pytest.mark.parametrize(
    "copies", [[], [(1, 2)], [(5, 0), (3, 4), (5, 1)], [(1, 2), (2, 3)], [(4, 4)]]
)
def test_copy_pages(
    device: torch.device, dtype: torch.dtype, num_layers: int | None, copies: list[tuple[int, int]]
) -> None:
    shape = (6, 2, 16, 32) if num_layers is None else (num_layers, 6, 2, 16, 32)
    k_pool, v_pool = torch.randn(2, *shape, device=device).to(dtype)
    k_pool[..., 7, :] = float("nan")
    expected_k, expected_v = k_pool.clone(), v_pool.clone()
    for source, target in copies:  # one after the other, so a chain passes a page on
        for pool in (expected_k, expected_v):
            pool[..., target, :, :, :] = pool[..., source, :, :, :].clone()
    page_copies = torch.tensor(copies, dtype=torch.int32, device=device).view(-1, 2)
    assert ops.copy_pages(page_copies, k_pool, v_pool) is None
    assert_same_bits(k_pool, expected_k)
    assert_same_bits(v_pool, expected_v)


def test_copy_pages_thread_count(set_num_threads: Callable[[int], None]) -> None:
    copies = torch.stack([torch.arange(40), torch.arange(40) + 40], 1).to(torch.int32)
    original = torch.randn(2, 4, 80, 2, 16, 64)
    results = []
    for threads in (1, 2, 3):
        set_num_threads(threads)
        pools = original.clone()
        ops.copy_pages(copies, pools[0], pools[1])
        results.append(pools)
    assert_same_bits(results[0][:, :, 40:], original[:, :, :40])
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])
