"""CUDA kernels on 16-bit activations, and the same bits whether eight elements move at once or one.

On the emulator of tests/emulation or on a GPU; test_half_activations.py has the CPU kernels.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stateful_kv import ops
from tests.ops import plain_torch
from tests.ops.comparing import assert_close_to_reference, assert_same_bits, to_numpy64
from tests.ops.conftest import EMULATED_CUDA
from tests.ops.paged import make_pools, quantized, random_slots
from tests.reference import elementwise

HALVES = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALVES]
# One warp, more, the most that registers hold, more than that; with and without a ragged end.
WIDTHS = [1, 8, 20, 64, 256, 264, 576, 2048, 2050, 8192, 8200, 9001]

only_emulated = pytest.mark.skipif(not EMULATED_CUDA, reason="the CUDA kernels are what is tested")


@pytest.fixture(
    params=[pytest.param("cpu", marks=only_emulated), pytest.param("cuda", marks=pytest.mark.cuda)]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device whose ops are the CUDA kernels."""
    return torch.device(request.param)


def shifted(tensor: Tensor) -> Tensor:
    """The same content one element further on: no address is a multiple of 16 bytes any more."""
    memory = tensor.new_zeros(tensor.numel() + 1)
    result = memory[1:].view(tensor.shape)
    result.copy_(tensor)
    assert result.data_ptr() % 16 != 0
    return result


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(device: torch.device, dtype: torch.dtype, width: int) -> None:
    x, residual = torch.randn(2, 5, width, device=device).to(dtype)
    weight = torch.randn(width, device=device)
    output, total = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert output.dtype == dtype
    assert_same_bits(total, residual + x, "sum")
    assert_same_bits(output, ops.rms_norm(total, weight, 1e-5), "output")
    reference = elementwise.rms_norm(to_numpy64(total), to_numpy64(weight), 1e-5)
    plain = plain_torch.rms_norm(total.float(), weight, 1e-5).to(dtype)
    assert_close_to_reference(output, reference, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm_at_any_address(device: torch.device, dtype: torch.dtype, width: int) -> None:
    x, residual = torch.randn(2, 3, width, device=device).to(dtype)
    weight = torch.randn(width, device=device)
    expected = ops.add_rms_norm(x, residual, weight, 1e-5)
    for moved in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)):
        arguments = [
            shifted(argument) if is_moved else argument
            for argument, is_moved in zip((x, residual, weight), moved, strict=True)
        ]
        for actual, like in zip(ops.add_rms_norm(*arguments, 1e-5), expected, strict=True):
            assert_same_bits(actual, like)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("width", [64, 576])
def test_rms_norm_rows_do_not_see_each_other(
    device: torch.device, dtype: torch.dtype, width: int
) -> None:
    x, weight = torch.randn(40, width, device=device).to(dtype), torch.randn(width, device=device)
    alone = torch.cat([ops.rms_norm(x[i : i + 1], weight, 1e-5) for i in range(40)])
    for rows in (1, 2, 7, 8, 9, 17, 40):
        assert_same_bits(ops.rms_norm(x[-rows:], weight, 1e-5), alone[-rows:])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("width", [1, 17, 64, 576, 2056])
def test_silu_mul(device: torch.device, dtype: torch.dtype, width: int) -> None:
    gate_up = (torch.randn(9, 2 * width, device=device) * 4).to(dtype)
    output = ops.silu_mul(gate_up)
    reference = elementwise.silu_mul(to_numpy64(gate_up))
    plain = plain_torch.silu_mul(gate_up.float()).to(dtype)
    assert_close_to_reference(output, reference, plain)
    assert_same_bits(ops.silu_mul(shifted(gate_up)), output)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 8, 500, 8192, 32768, 49152, 50001])
def test_argmax(device: torch.device, dtype: torch.dtype, width: int) -> None:
    logits = torch.randn(4, width, device=device).to(dtype)  # of 16 bits: many are equal
    logits[1, width // 2 :: 3] = float("inf")
    logits[2, width // 3 :: 5] = float("nan")
    logits[3] = -float("inf")
    for given in (logits, shifted(logits)):
        ids, values = ops.argmax(given)
        assert values.dtype == torch.float32
        largest = logits.float().amax(1)
        assert_same_bits(values.nan_to_num(), largest.nan_to_num())
        for row, index in enumerate(ids.tolist()):
            equal = logits[row].isnan() if row == 2 else logits[row].float() == largest[row]
            assert index == equal.nonzero()[0].item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pool_dtype", [*DTYPES, torch.int8], ids=str)
@pytest.mark.parametrize("head_dim", [2, 30, 64, 96, 256])
def test_rope_append(
    device: torch.device, dtype: torch.dtype, pool_dtype: torch.dtype, head_dim: int
) -> None:
    count, page_size = 11, 8
    slots = random_slots(count, 5, page_size).to(device)
    slots[2] = -1
    positions = torch.randperm(64)[:count].int().to(device)
    table = torch.from_numpy(elementwise.rope_table(64, head_dim)).float().to(device)
    q = torch.randn(count, 5, head_dim, device=device).to(dtype)
    k, v = torch.randn(2, count, 3, head_dim, device=device).to(dtype)
    turned_q, turned_k = (plain_torch.rotate(x.float(), positions, table) for x in (q, k))

    for given_q, given_k, given_v in ((q.clone(), k, v), (shifted(q), shifted(k), shifted(v))):
        k_pool, v_pool = make_pools(5, 3, page_size, head_dim, device=device)
        scales: list[Tensor | None] = [None, None]
        if pool_dtype == torch.int8:
            (k_pool, scales[0]), (v_pool, scales[1]) = quantized(k_pool), quantized(v_pool)
        else:
            k_pool, v_pool = k_pool.to(pool_dtype), v_pool.to(pool_dtype)
        before = k_pool.clone()
        ops.rope_append_kv(
            given_q, given_k, given_v, positions, table, slots, k_pool, v_pool, *scales
        )
        assert_same_bits(given_q, turned_q.to(dtype), "q")
        for rows, pool, scale in ((turned_k, k_pool, scales[0]), (v.float(), v_pool, scales[1])):
            stored, stored_scale = quantized(rows) if scale is not None else (rows, None)
            for row, slot in enumerate(slots.tolist()):
                if slot < 0:
                    continue
                page, offset = divmod(slot, page_size)
                assert_same_bits(pool[page, :, offset], stored[row].to(pool_dtype), "pool")
                if scale is not None and stored_scale is not None:
                    assert_same_bits(scale[page, :, offset], stored_scale[row], "scale")
            untouched = torch.ones(5 * page_size, dtype=torch.bool)
            untouched[slots[slots >= 0].cpu()] = False
            for slot in untouched.nonzero().flatten().tolist():
                page, offset = divmod(slot, page_size)
                assert_same_bits(pool[page, :, offset], before[page, :, offset], "other slots")


@pytest.mark.parametrize("pool_dtype", [*DTYPES, torch.int8], ids=str)
@pytest.mark.parametrize("head_dim", [4, 30, 64, 96])
def test_append_at_any_address(
    device: torch.device, pool_dtype: torch.dtype, head_dim: int
) -> None:
    k, v = torch.randn(2, 9, 3, head_dim, device=device)
    slots = random_slots(9, 5, 8).to(device)
    results = []
    for move in (False, True):
        pools = [
            *make_pools(5, 3, 8, head_dim, torch.float32, device),
            *torch.zeros(2, 5, 3, 8, device=device),
        ]
        pools[:2] = [pool.nan_to_num().to(pool_dtype) for pool in pools[:2]]
        if move:
            pools[:2] = [shifted(pool) for pool in pools[:2]]
        arguments = pools if pool_dtype == torch.int8 else pools[:2]
        ops.append_kv(shifted(k) if move else k, shifted(v) if move else v, slots, *arguments)
        results.append(pools)
    for name, moved, expected in zip(("k", "v", "ks", "vs"), *reversed(results), strict=True):
        assert_same_bits(moved, expected, name)


def test_a_page_of_an_odd_size(device: torch.device) -> None:
    pools = torch.randint(-128, 128, (2, 3, 4, 1, 3, 5), dtype=torch.int8, device=device)
    scales = torch.rand(2, 3, 4, 1, 3, device=device)
    tensors = [shifted(pool) for pool in (*pools, *scales)]
    ops.copy_pages(torch.tensor([[1, 2], [2, 0]], dtype=torch.int32, device=device), *tensors)
    for moved, before in zip(tensors, (*pools, *scales), strict=True):
        expected = before.clone()
        expected[:, 2] = before[:, 1]
        expected[:, 0] = before[:, 1]
        assert_same_bits(moved, expected)
