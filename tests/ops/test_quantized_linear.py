"""quantized_linear: the exact chain of sums, and the same bits for a row in any company."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from stateful_kv import _C, ops
from stateful_kv.models import packing
from tests.ops.comparing import assert_close_to_reference, assert_same_bits, same_bits
from tests.reference import linear

pytestmark = pytest.mark.cpu_only("quantized_linear has no CUDA kernel")

# The generic build has no fused instruction; equal bits across instruction sets are not promised.
FUSED = _C.cpu_isa() != "generic"
FORMATS = ["fp32", "int8", "int4"]
# (out_features, in_features)
SHAPES = [(1, 32), (16, 64), pytest.param(17, 96, marks=pytest.mark.isa), (100, 576), (192, 160)]
ROWS = [*range(1, 34), 64, 100, 300]


def random_weight(weight_format: str, out_features: int, in_features: int) -> packing.PackedWeight:
    """A packed weight of random levels and scales."""
    if weight_format == "fp32":
        return packing.pack_fp32(torch.randn(out_features, in_features))
    groups = (out_features, in_features // 32)
    scales = torch.randn(groups) * 0.1
    if weight_format == "int8":
        levels = torch.randint(-128, 128, (out_features, in_features), dtype=torch.int8)
        return packing.pack_int8(levels, scales)
    levels = torch.randint(0, 16, (out_features, in_features), dtype=torch.uint8)
    return packing.pack_int4(levels, scales, torch.randn(groups))


def run(x: Tensor, packed: packing.PackedWeight, bias: Tensor | None = None) -> Tensor:
    """The op on a packed weight that follows the rows to their device."""
    parts = [packed.weight, packed.scales, packed.minimums]
    parts = [None if part is None else part.to(x.device) for part in parts]
    return ops.quantized_linear(x, *parts, bias, packed.out_features)


def unpack(packed: packing.PackedWeight, fused: bool = FUSED) -> np.ndarray:
    """float32[out, K] by the reference's own reading of the layout."""
    parts = [packed.weight, packed.scales, packed.minimums]
    arrays = [None if part is None else part.numpy() for part in parts]
    return linear.unpack(*arrays, packed.out_features, fused)


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_every_sum_is_the_promised_chain(
    weight_format: str, out_features: int, in_features: int, with_bias: bool
) -> None:
    packed = random_weight(weight_format, out_features, in_features)
    x = torch.randn(19, in_features)
    bias = torch.randn(out_features) if with_bias else None
    bias_array = None if bias is None else bias.numpy()
    expected = linear.chain(x.numpy(), unpack(packed), bias_array, FUSED)
    assert_same_bits(run(x, packed, bias), torch.from_numpy(expected))


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize(("out_features", "in_features"), [(100, 576), (48, 1536)])
def test_near_float64(
    device: torch.device, weight_format: str, out_features: int, in_features: int
) -> None:
    packed = random_weight(weight_format, out_features, in_features)
    x, bias = torch.randn(9, in_features), torch.randn(out_features)
    weight = unpack(packed)
    plain = bias + sum(x[:, k : k + 1] * torch.from_numpy(weight[:, k]) for k in range(in_features))
    output = run(x.to(device), packed, bias.to(device))
    reference = linear.linear(x.numpy(), weight, bias.numpy())
    assert_close_to_reference(output, reference, plain)


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_rows_do_not_see_each_other(
    device: torch.device, weight_format: str, out_features: int, in_features: int
) -> None:
    packed = random_weight(weight_format, out_features, in_features)
    bias = torch.randn(out_features, device=device)
    x = torch.randn(max(ROWS), in_features, device=device)
    alone = torch.cat([run(x[row : row + 1], packed, bias) for row in range(max(ROWS))])
    for rows in ROWS:
        assert_same_bits(run(x[:rows], packed, bias), alone[:rows], f"first {rows} rows")
        assert_same_bits(run(x[-rows:], packed, bias), alone[-rows:], f"last {rows} rows")


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_residual_is_added_last(device: torch.device, weight_format: str, rows: int) -> None:
    packed = random_weight(weight_format, 101, 96)
    parts = [packed.weight, packed.scales, packed.minimums]
    parts = [None if part is None else part.to(device) for part in parts]
    x, residual = torch.randn(rows, 96, device=device), torch.randn(rows, 101, device=device)
    bias = torch.randn(101, device=device)
    output = ops.quantized_linear(x, *parts, bias, 101, residual)
    assert_same_bits(output, run(x, packed, bias) + residual)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_columns_depend_on_their_own_panel_only(device: torch.device, weight_format: str) -> None:
    parts = [random_weight(weight_format, size, 64) for size in (32, 16, 21)]
    x = torch.randn(5, 64, device=device)
    fused = run(x, packing.PackedWeight.concat(parts))
    assert_same_bits(fused, torch.cat([run(x, part) for part in parts], dim=1))


@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_bad_row_leaves_the_others_alone(device: torch.device, weight_format: str) -> None:
    packed = random_weight(weight_format, 40, 64)
    x = torch.randn(13, 64, device=device)
    expected = run(x, packed)
    x[5], x[8] = float("nan"), float("inf")
    output = run(x, packed)
    others = [row for row in range(13) if row not in (5, 8)]
    assert_same_bits(output[others], expected[others])
    assert output[5].isnan().all()


@pytest.mark.parametrize("weight_format", FORMATS)
def test_strided_rows(device: torch.device, weight_format: str) -> None:
    packed = random_weight(weight_format, 40, 64)
    wide = torch.randn(13, 100, device=device)
    x = wide[:, 30:94]
    assert_same_bits(run(x, packed), run(x.contiguous(), packed))
    assert_same_bits(run(wide[::2, 30:94], packed), run(x, packed)[::2])
    repeated = x[:1].expand(6, 64)
    assert_same_bits(run(repeated, packed), run(x[:1], packed).expand(6, 40))


@pytest.mark.parametrize("weight_format", FORMATS)
def test_no_rows(device: torch.device, weight_format: str) -> None:
    packed = random_weight(weight_format, 40, 64)
    assert run(torch.empty(0, 64, device=device), packed).shape == (0, 40)


@pytest.mark.parametrize("in_features", [1, 5, 31, 33, 100])
def test_fp32_takes_any_depth(device: torch.device, in_features: int) -> None:
    packed = random_weight("fp32", 20, in_features)
    x = torch.randn(3, in_features)
    expected = linear.chain(x.numpy(), unpack(packed), None, FUSED)
    output = run(x.to(device), packed).cpu()
    if device.type == "cpu":
        assert_same_bits(output, torch.from_numpy(expected))
    else:
        np.testing.assert_allclose(output.numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("out_features", [1, 15, 16, 17, 40])
def test_packing_equals_the_layout_of_the_reference(out_features: int) -> None:
    weight = torch.randn(out_features, 64)
    scales, minimums = torch.randn(2, out_features, 2)
    int8 = torch.randint(-128, 128, (out_features, 64), dtype=torch.int8)
    int4 = torch.randint(0, 16, (out_features, 64), dtype=torch.uint8)
    pairs = [
        (packing.pack_fp32(weight), [linear.pack_fp32(weight.numpy())]),
        (packing.pack_int8(int8, scales), linear.pack_int8(int8.numpy(), scales.numpy())),
        (
            packing.pack_int4(int4, scales, minimums),
            linear.pack_int4(int4.numpy(), scales.numpy(), minimums.numpy()),
        ),
    ]
    for packed, expected in pairs:
        parts = [packed.weight, packed.scales, packed.minimums]
        for part, array in zip([p for p in parts if p is not None], expected, strict=True):
            assert part.dtype == torch.from_numpy(array).dtype
            np.testing.assert_array_equal(part.numpy(), array)
        np.testing.assert_array_equal(packing.unpack(packed).numpy(), unpack(packed, True))


def test_planted_bug_another_order_is_caught() -> None:
    x = np.random.standard_normal((4, 96)).astype(np.float32)
    weight = np.random.standard_normal((32, 96)).astype(np.float32)
    ascending = torch.from_numpy(linear.chain(x, weight))
    order = np.random.permutation(96)
    permuted = torch.from_numpy(linear.chain(x[:, order], weight[:, order]))
    halves = torch.from_numpy(
        linear.chain(x[:, :48], weight[:, :48]) + linear.chain(x[:, 48:], weight[:, 48:])
    )
    unfused = torch.zeros(4, 32)
    for k in range(96):
        unfused += torch.from_numpy(x[:, k : k + 1] * weight[None, :, k])
    for other in (permuted, halves, unfused):
        torch.testing.assert_close(ascending, other, rtol=1e-4, atol=1e-4)
        assert not same_bits(ascending, other)


@pytest.mark.parametrize("rows", [1, 40])
def test_no_input_features(rows: int) -> None:
    bias = torch.randn(20)
    output = ops.quantized_linear(torch.empty(rows, 0), torch.empty(2, 0, 16), None, None, bias, 20)
    assert_same_bits(output, bias.expand(rows, 20))
