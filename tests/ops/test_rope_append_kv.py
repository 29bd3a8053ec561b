"""rope_append_kv: the rotation by absolute position, then append_kv, for a row in any company."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from stateful_kv import ops
from tests.ops import plain_torch
from tests.ops.comparing import assert_close_to_reference, assert_same_bits, to_numpy64
from tests.ops.paged import make_pools, random_slots
from tests.reference import elementwise

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MAX_POSITION = 2048


@dataclass(frozen=True)
class Step:
    """Inputs of one call; q is a fresh copy in each run."""

    q: Tensor
    k: Tensor
    v: Tensor
    positions: Tensor
    cos_sin: Tensor
    slots: Tensor
    num_pages: int
    page_size: int
    dtype: torch.dtype

    def empty_pools(self) -> tuple[Tensor, Tensor]:
        """k_pool and v_pool, all NaN."""
        _, num_kv_heads, head_dim = self.k.shape
        shape = self.num_pages, num_kv_heads, self.page_size, head_dim
        return make_pools(*shape, self.dtype, self.q.device)

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q and both pools."""
        pools = self.empty_pools()
        q = self.q.clone()
        result = ops.rope_append_kv(
            q, self.k, self.v, self.positions, self.cos_sin, self.slots, *pools
        )
        assert result is None
        return q, *pools

    def rows(self, index: slice) -> Step:
        """Some of the rows."""
        return replace(
            self,
            q=self.q[index],
            k=self.k[index],
            v=self.v[index],
            positions=self.positions[index],
            slots=self.slots[index],
        )


def make_step(
    count: int,
    device: torch.device | str = "cpu",
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    page_size: int = 16,
    dtype: torch.dtype = torch.float16,
) -> Step:
    """Random rows at random positions."""
    num_pages = 2 + -(-max(count, 1) // page_size) + 1
    table = torch.from_numpy(elementwise.rope_table(MAX_POSITION, head_dim)).float()
    positions = torch.randint(0, MAX_POSITION, (count,), dtype=torch.int32)
    positions[:2] = torch.tensor([0, MAX_POSITION - 1])[:count]
    return Step(
        q=torch.randn(count, num_heads, head_dim, device=device),
        k=torch.randn(count, num_kv_heads, head_dim, device=device),
        v=torch.randn(count, num_kv_heads, head_dim, device=device),
        positions=positions.to(device),
        cos_sin=table.to(device),
        slots=random_slots(count, num_pages, page_size).to(device),
        num_pages=num_pages,
        page_size=page_size,
        dtype=dtype,
    )


def gather(pool: Tensor, slots: Tensor) -> Tensor:
    """[N, Hk, D] at the slots."""
    page_size = pool.shape[2]
    return pool[slots // page_size, :, slots % page_size]


@pytest.mark.isa
@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 96, 128, 256])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (9, 3)])
def test_rotation_near_float64(
    device: torch.device, head_dim: int, num_heads: int, num_kv_heads: int
) -> None:
    step = make_step(21, device, num_heads, num_kv_heads, head_dim, dtype=torch.float32)
    q, k_pool, v_pool = step.run()
    positions, table = step.positions.cpu().numpy(), to_numpy64(step.cos_sin)
    for source, rotated in ((step.q, q), (step.k, gather(k_pool, step.slots))):
        reference = elementwise.rotate(to_numpy64(source), positions, table)
        plain = plain_torch.rotate(source, step.positions, step.cos_sin)
        assert_close_to_reference(rotated, reference, plain, floor=1e-7)
    assert_same_bits(gather(v_pool, step.slots), step.v)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
def test_equals_rotation_then_append(
    device: torch.device, dtype: torch.dtype, page_size: int, head_dim: int
) -> None:
    """Keys as queries come back rotated in float32; append_kv of them gives the same pool."""
    step = make_step(33, device, 2, 2, head_dim, page_size, dtype)
    _, k_pool, v_pool = step.run()
    rotated = replace(step, q=step.k).run()[0]
    expected = step.empty_pools()
    ops.append_kv(rotated, step.v, step.slots, *expected)
    assert_same_bits(k_pool, expected[0], "k_pool")
    assert_same_bits(v_pool, expected[1], "v_pool")


def test_skipped_rows_rotate_q_and_write_nothing(device: torch.device) -> None:
    step = make_step(6, device)
    expected_q = step.run()[0]
    q, k_pool, v_pool = replace(step, slots=torch.full_like(step.slots, -1)).run()
    assert_same_bits(q, expected_q)
    assert k_pool.isnan().all()
    assert v_pool.isnan().all()


def test_position_zero_changes_nothing(device: torch.device) -> None:
    step = make_step(5, device, dtype=torch.float32)
    step = replace(step, positions=torch.zeros_like(step.positions))
    q, k_pool, _ = step.run()
    assert_same_bits(q, step.q)
    assert_same_bits(gather(k_pool, step.slots), step.k)


@pytest.mark.parametrize("count", [0, 1, 2, 16, 113])
def test_views_of_a_fused_projection(device: torch.device, count: int) -> None:
    step = make_step(count, device, 4, 2, 64)
    fused = torch.cat([part.flatten(1) for part in (step.q, step.k, step.v)], dim=1)
    original = fused.clone()
    q = fused[:, : 4 * 64].view(count, 4, 64)
    k = fused[:, 4 * 64 : 6 * 64].view(count, 2, 64)
    v = fused[:, 6 * 64 :].view(count, 2, 64)
    expected = step.run()
    pools = step.empty_pools()
    ops.rope_append_kv(q, k, v, step.positions, step.cos_sin, step.slots, *pools)
    assert_same_bits(q, expected[0], "q")
    assert_same_bits(pools[0], expected[1], "k_pool")
    assert_same_bits(pools[1], expected[2], "v_pool")
    assert_same_bits(fused[:, 4 * 64 :], original[:, 4 * 64 :], "k and v of the projection")


@pytest.mark.isa
@pytest.mark.parametrize("head_dim", [64, 80])
def test_rows_do_not_see_each_other(device: torch.device, head_dim: int) -> None:
    step = make_step(40, device, 3, 1, head_dim)
    q, k_pool, _ = step.run()
    keys = gather(k_pool, step.slots)
    for begin, end in [(i, i + 1) for i in range(40)] + [(0, 7), (7, 40), (13, 29)]:
        slots = random_slots(end - begin, step.num_pages, 16).to(device)
        part = replace(step.rows(slice(begin, end)), slots=slots)
        part_q, part_k, _ = part.run()
        assert_same_bits(part_q, q[begin:end])
        assert_same_bits(gather(part_k, slots), keys[begin:end])


def test_thread_count_does_not_matter(set_num_threads: Callable[[int], None]) -> None:
    step = make_step(500, num_heads=8)
    results = []
    for threads in (1, 2, 3):
        set_num_threads(threads)
        results.append(step.run())
    for other in results[1:]:
        for left, right in zip(other, results[0], strict=True):
            assert_same_bits(left, right)


def test_planted_bug_interleaved_pairs_are_caught() -> None:
    """The other rotary convention (neighbours form a pair) must not pass for ours."""
    step = make_step(21, dtype=torch.float32)
    reference = elementwise.rotate(
        to_numpy64(step.q), step.positions.numpy(), to_numpy64(step.cos_sin)
    )
    order = np.arange(64).reshape(2, 32).T.reshape(-1)
    wrong = plain_torch.rotate(step.q[..., np.argsort(order)], step.positions, step.cos_sin)
    plain = plain_torch.rotate(step.q, step.positions, step.cos_sin)
    with pytest.raises(AssertionError, match="error"):
        assert_close_to_reference(wrong[..., order], reference, plain)
