"""rms_norm, add_rms_norm and silu_mul: near float64, and the same bits for a row in any company."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stateful_kv import ops
from tests.ops import plain_torch
from tests.ops.comparing import assert_close_to_reference, assert_same_bits, to_numpy64
from tests.reference import elementwise

WIDTHS = [1, 7, 8, 15, 16, 17, 64, 113, 576, 1023]


@pytest.mark.isa
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 1e6])
def test_rms_norm_near_float64(device: torch.device, width: int, magnitude: float) -> None:
    x = torch.randn(9, width, device=device) * magnitude
    weight = torch.randn(width, device=device)
    output = ops.rms_norm(x, weight, 1e-5)
    reference = elementwise.rms_norm(to_numpy64(x), to_numpy64(weight), 1e-5)
    assert_close_to_reference(output, reference, plain_torch.rms_norm(x, weight, 1e-5), floor=5e-7)


@pytest.mark.parametrize(
    "shape", [(64,), (0, 64), (3, 64), (2, 3, 64), (2, 0, 3, 64), (2, 2, 3, 64)]
)
def test_rms_norm_leading_dimensions(device: torch.device, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape, device=device), torch.randn(64, device=device)
    output = ops.rms_norm(x, weight, 1e-6)
    assert output.shape == x.shape
    rows = ops.rms_norm(x.reshape(-1, 64), weight, 1e-6)
    assert_same_bits(output, rows.view(shape))


@pytest.mark.isa
@pytest.mark.parametrize("width", [17, 64, 576])
def test_rms_norm_rows_do_not_see_each_other(device: torch.device, width: int) -> None:
    x, weight = torch.randn(130, width, device=device), torch.randn(width, device=device)
    alone = torch.cat([ops.rms_norm(x[i : i + 1], weight, 1e-5) for i in range(130)])
    for rows in (1, 2, 3, 5, 8, 16, 17, 64, 130):
        assert_same_bits(ops.rms_norm(x[:rows], weight, 1e-5), alone[:rows])
        assert_same_bits(ops.rms_norm(x[-rows:], weight, 1e-5), alone[-rows:])
    x[3] = float("nan")
    others = [row for row in range(130) if row != 3]
    assert_same_bits(ops.rms_norm(x, weight, 1e-5)[others], alone[others])


def test_rms_norm_strided_rows(device: torch.device) -> None:
    wide, weight = torch.randn(11, 200, device=device), torch.randn(64, device=device)
    x = wide[:, 30:94]
    assert_same_bits(ops.rms_norm(x, weight, 1e-5), ops.rms_norm(x.contiguous(), weight, 1e-5))
    heads = wide[:, :192].view(11, 3, 64)  # heads of a fused projection
    expected = ops.rms_norm(heads.contiguous(), weight, 1e-5)
    assert_same_bits(ops.rms_norm(heads, weight, 1e-5), expected)


@pytest.mark.isa
@pytest.mark.parametrize("width", [*WIDTHS, 2048, 8192, 8200])
def test_add_rms_norm(device: torch.device, width: int) -> None:
    x, residual = torch.randn(2, 5, width, device=device)
    weight = torch.randn(width, device=device)
    output, total = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert_same_bits(total, residual + x, "sum")
    assert_same_bits(output, ops.rms_norm(total, weight, 1e-5), "output")
    reference = elementwise.rms_norm(to_numpy64(residual) + to_numpy64(x), to_numpy64(weight), 1e-5)
    plain = plain_torch.rms_norm(residual + x, weight, 1e-5)
    assert_close_to_reference(output, reference, plain, floor=5e-7)


def test_add_rms_norm_of_strided_rows(device: torch.device) -> None:
    wide, residual = torch.randn(2, 11, 3, 72, device=device)
    weight = torch.randn(64, device=device)
    x, residual = wide[:, :2, 4:68], residual[:, :2, :64].contiguous()
    output, total = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert_same_bits(total, residual + x)
    assert_same_bits(output, ops.rms_norm(residual + x, weight, 1e-5))
    for row in range(11):
        single, single_sum = ops.add_rms_norm(x[row], residual[row], weight, 1e-5)
        assert_same_bits(single, output[row])
        assert_same_bits(single_sum, total[row])
    for empty in ops.add_rms_norm(x[:0], residual[:0], weight, 1e-5):
        assert empty.shape == (0, 2, 64)
    doubled, total = ops.add_rms_norm(residual, residual, weight, 1e-5)  # the same memory
    assert_same_bits(total, 2 * residual)
    assert_same_bits(doubled, ops.rms_norm(2 * residual, weight, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [17, 64, 576])
def test_rms_norm_weight_of_another_dtype(
    device: torch.device, dtype: torch.dtype, weight_dtype: torch.dtype, width: int
) -> None:
    x = torch.randn(5, width, device=device).to(dtype)
    weight = torch.randn(width, device=device).to(weight_dtype)
    expected = ops.rms_norm(x, weight.float(), 1e-5)
    assert_same_bits(ops.rms_norm(x, weight, 1e-5), expected)


def test_rms_norm_of_zeros_is_zero(device: torch.device) -> None:
    x, weight = torch.zeros(3, 40, device=device), torch.randn(40, device=device)
    assert (ops.rms_norm(x, weight, 1e-5) == 0).all()


@pytest.mark.isa
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 30.0])
def test_silu_mul_near_float64(device: torch.device, width: int, magnitude: float) -> None:
    gate_up = torch.randn(9, 2 * width, device=device)
    gate_up[:, :width] *= magnitude
    output = ops.silu_mul(gate_up)
    reference = elementwise.silu_mul(to_numpy64(gate_up))
    assert_close_to_reference(output, reference, plain_torch.silu_mul(gate_up), floor=5e-7)


@pytest.mark.isa
def test_silu_mul_relative_error_over_the_range(device: torch.device) -> None:
    gate = torch.cat([torch.linspace(-87, 90, 4001), torch.tensor([0.0, -0.0, 1e-30, 3e38])])
    gate_up = torch.stack([gate, torch.ones_like(gate)], dim=1).to(device)
    output = to_numpy64(ops.silu_mul(gate_up))
    reference = elementwise.silu_mul(to_numpy64(gate_up))
    np.testing.assert_allclose(output, reference, rtol=1e-6, atol=1e-37)


@pytest.mark.isa
def test_silu_mul_far_out(device: torch.device) -> None:
    gate = torch.tensor([-88.0, -89.0, -100.0, -104.0, -1e4, -3e38, float("inf")], device=device)
    output = ops.silu_mul(torch.stack([gate, torch.ones_like(gate)], dim=1)).squeeze(1)
    assert (output[:6].abs() < 1e-35).all()
    assert output[6] == float("inf")
    nan = torch.full((1, 2), float("nan"), device=device)
    assert ops.silu_mul(nan).isnan().all()


@pytest.mark.isa
@pytest.mark.parametrize("width", [1, 17, 64, 576])
def test_silu_mul_elements_do_not_see_each_other(device: torch.device, width: int) -> None:
    gate_up = torch.randn(70, 2 * width, device=device) * 4
    alone = torch.cat([ops.silu_mul(gate_up[i : i + 1]) for i in range(70)])
    for rows in (1, 2, 7, 16, 33, 70):
        assert_same_bits(ops.silu_mul(gate_up[:rows]), alone[:rows])
    # The tail of a row goes through the same arithmetic as its vector body.
    pairs = torch.stack([gate_up[0, :width], gate_up[0, width:]], dim=1)
    assert_same_bits(ops.silu_mul(pairs).squeeze(1), alone[0])


def test_silu_mul_strided_and_empty(device: torch.device) -> None:
    wide = torch.randn(11, 100, device=device)
    x = wide[:, 7:41]
    assert_same_bits(ops.silu_mul(x), ops.silu_mul(x.contiguous()))
    assert_same_bits(ops.silu_mul(wide[::3, 7:41]), ops.silu_mul(x)[::3])
    assert ops.silu_mul(wide[:0]).shape == (0, 50)
