"""linear_top_k: what a stable sort of quantized_linear's result begins with, in bits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from stateful_kv import ops
from stateful_kv.models import packing
from tests.ops.comparing import assert_same_bits
from tests.ops.test_quantized_linear import FORMATS, random_weight, unpack
from tests.reference import linear

NAN, INFINITY = float("nan"), float("inf")
SetThreads = Callable[[int], None]
Result = tuple[Tensor, Tensor]


def packed_parts(packed: packing.PackedWeight) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weight, scales and minimums, in the order of the op."""
    return packed.weight, packed.scales, packed.minimums


def first_of_sorted(outputs: Tensor, k: int) -> Result:
    """NaN first, then from large to small, of equals the lowest id first."""
    values, ids = torch.sort(outputs, dim=1, descending=True, stable=True)
    return ids[:, :k], values[:, :k]


def assert_same(result: Result, expected: Result, label: str = "") -> None:
    """Equal ids, equal bits of values; a NaN equals a NaN of other bits."""
    assert result[0].tolist() == expected[0].tolist(), label
    assert_same_bits(result[1].nan_to_num(7.5), expected[1].nan_to_num(7.5), label)
    assert result[1].isnan().tolist() == expected[1].isnan().tolist(), label


def outputs_as_planned(planned: Tensor, k: int) -> Result:
    """The op on a layer whose outputs are given: float32[N, out], row n of a unit matrix each."""
    rows, out_features = planned.shape
    if rows == 1:  # as a bias: in a product with the unit matrix a NaN would spoil its column
        packed = packing.pack_fp32(torch.zeros(out_features, 1))
        return ops.linear_top_k(
            torch.zeros(1, 1), *packed_parts(packed), planned[0].clone(), out_features, k
        )
    packed = packing.pack_fp32(planned.T.contiguous())
    return ops.linear_top_k(torch.eye(rows), *packed_parts(packed), None, out_features, k)


@pytest.mark.isa
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize(
    ("out_features", "in_features"), [(1, 32), (17, 64), (100, 96), (2083, 64)]
)
@pytest.mark.parametrize("has_extras", [False, True])
def test_equals_sorted_outputs(
    weight_format: str,
    out_features: int,
    in_features: int,
    has_extras: bool,
    set_num_threads: SetThreads,
) -> None:
    weight = packed_parts(random_weight(weight_format, out_features, in_features))
    bias = torch.randn(out_features) if has_extras else None
    norm = torch.randn(in_features) if has_extras else None
    x = torch.randn(33, in_features + 5)[:, :in_features]
    full = ops.quantized_linear(x, *weight, bias, out_features, None, norm, 1e-5)
    for k in sorted({min(k, out_features) for k in (1, 5, 64)}):
        expected = first_of_sorted(full, k)
        assert_same_bits(expected[1], torch.topk(full, k).values)
        if k == 1:
            ids, values = ops.argmax(full)
            assert_same((ids[:, None], values[:, None]), expected)
        for threads in (1, 2, 3):
            set_num_threads(threads)
            for rows in range(1, 34):
                start = (7 * rows + threads) % (34 - rows)
                part = slice(start, start + rows)
                result = ops.linear_top_k(x[part], *weight, bias, out_features, k, norm, 1e-5)
                label = f"k = {k}, {rows} rows, {threads} threads"
                assert_same(result, (expected[0][part], expected[1][part]), label)


@pytest.mark.isa
@pytest.mark.parametrize("rows", [48, 49, 64, 100])
def test_many_rows(rows: int) -> None:
    weight = packed_parts(random_weight("int8", 200, 64))
    x = torch.randn(rows, 64)
    full = ops.quantized_linear(x, *weight, None, 200)
    assert_same(ops.linear_top_k(x, *weight, None, 200, 3), first_of_sorted(full, 3))


@pytest.mark.isa
def test_a_vocabulary(set_num_threads: SetThreads) -> None:
    packed = random_weight("int8", 49152, 64)
    weight, x = packed_parts(packed), torch.randn(3, 64)
    full = ops.quantized_linear(x, *weight, None, 49152)
    for threads in (1, 3):
        set_num_threads(threads)
        for k in (1, 64):
            assert_same(ops.linear_top_k(x, *weight, None, 49152, k), first_of_sorted(full, k))


@pytest.mark.parametrize("weight_format", FORMATS)
def test_near_float64(weight_format: str) -> None:
    packed, x = random_weight(weight_format, 300, 96), torch.randn(5, 96)
    ids, values = ops.linear_top_k(x, *packed_parts(packed), None, 300, 6)
    exact = linear.linear(x.numpy(), unpack(packed), None)
    largest = -np.sort(-exact, axis=1)[:, :6]
    np.testing.assert_allclose(values.numpy(), largest, rtol=1e-4, atol=1e-4)
    chosen = np.take_along_axis(exact, ids.numpy(), axis=1)
    np.testing.assert_allclose(chosen, largest, rtol=1e-4, atol=1e-4)


@pytest.mark.isa
@pytest.mark.parametrize("width", [1, 16, 63, 64, 65, 129, 2000])
@pytest.mark.parametrize("k", [1, 5, 64])
def test_of_equals_the_lowest_id(width: int, k: int, set_num_threads: SetThreads) -> None:
    outputs = torch.randint(-2, 3, (16, width)).float()
    k = min(k, width)
    for threads in (1, 3):
        set_num_threads(threads)
        assert_same(outputs_as_planned(outputs, k), first_of_sorted(outputs, k))


@pytest.mark.isa
@pytest.mark.parametrize("width", [2, 64, 65, 200, 2000])
@pytest.mark.parametrize("k", [1, 2, 5, 64])
def test_nan_goes_before_every_number(width: int, k: int) -> None:
    k = min(k, width)
    for places in ([0], [width - 1], [width // 2, width - 1], list(range(0, width, 3))):
        outputs = torch.randn(1, width)
        outputs[0, (width // 2 + 1) % width] = INFINITY
        outputs[0, places] = NAN
        result = outputs_as_planned(outputs, k)
        assert_same(result, first_of_sorted(outputs, k), f"NaN at {places}")
        assert result[0][0, 0] == places[0] == ops.argmax(outputs)[0][0]
        assert result[1][0, 0].isnan()


@pytest.mark.isa
@pytest.mark.parametrize("width", [3, 64, 200, 2000])
def test_infinities(width: int) -> None:
    k = min(5, width)
    nothing = torch.full((1, width), -INFINITY)
    assert outputs_as_planned(nothing, k)[0].tolist() == [list(range(k))]
    some = nothing.clone()
    some[0, [width - 1, width // 2]] = torch.tensor([-1e30, INFINITY])
    assert_same(outputs_as_planned(some, k), first_of_sorted(some, k))


@pytest.mark.parametrize("width", [1, 16, 65, 129, 2000])
def test_every_place_can_win(width: int) -> None:
    places = sorted({0, 1, width // 3, width // 2, width - 2, width - 1} & set(range(width)))
    outputs = torch.full((len(places), width), -3.0)
    outputs[range(len(places)), places] = 2.0
    assert outputs_as_planned(outputs, 1)[0][:, 0].tolist() == places


def test_no_rows_and_no_input_features() -> None:
    weight = packed_parts(random_weight("int8", 40, 64))
    ids, values = ops.linear_top_k(torch.empty(0, 64), *weight, None, 40, 3)
    assert ids.shape == values.shape == (0, 3)
    bias = torch.randn(20)
    for rows in (1, 40):
        result = ops.linear_top_k(
            torch.empty(rows, 0), torch.empty(2, 0, 16), None, None, bias, 20, 4
        )
        assert_same(result, first_of_sorted(bias.expand(rows, 20), 4))


def test_columns_behind_the_last_are_never_chosen() -> None:
    """A cut panel is stored whole; what lies behind its last column must not count."""
    packed = packing.pack_fp32(-torch.rand(19, 8) - 0.1)
    packed.weight.view(-1, 8, 16)[1, :, 3:] = 100.0
    ids, values = ops.linear_top_k(torch.ones(3, 8), *packed_parts(packed), None, 19, 19)
    assert ids.max() < 19
    assert (values < 0).all()
