"""Numbers that the kernels use as float32: refused if they do not survive that, with their name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from stateful_kv import ops
from tests.ops.cases import CASES, WRITTEN, valid_arguments
from tests.ops.comparing import assert_same_bits
from tests.ops.test_registration import registered_schemas

SMALLEST = 2.0**-149  # of float32
LARGEST = (2 - 2.0**-23) * 2.0**127
SIGNED = {"scale"}
# Infinite in float32, or 0 there and not 0 before.
REFUSED = [math.nan, math.inf, 1e39, 2 * LARGEST, 1.7e308, SMALLEST / 2, 1e-50, 5e-324]

SCALARS = [
    (op, argument.name)
    for op in sorted(CASES)
    for argument in registered_schemas()[op].arguments
    if str(argument.type) == "float"
]


def test_there_are_such_numbers() -> None:
    assert {name for _, name in SCALARS} == {"eps", "norm_eps", "scale", "soft_cap"}


def call(op: str, **changes: Any) -> list[Tensor]:
    """Results and written arguments of the op, its valid arguments changed."""
    torch.manual_seed(0)
    arguments = valid_arguments(op) | changes
    result = getattr(ops, op)(**arguments)
    results = [] if result is None else list(result) if isinstance(result, tuple) else [result]
    return results + [arguments[name] for name in WRITTEN.get(op, ())]


@pytest.mark.emulated
@pytest.mark.parametrize("number", [*REFUSED, *(-number for number in REFUSED)])
@pytest.mark.parametrize(("op", "name"), SCALARS)
def test_a_number_that_float32_cannot_hold(op: str, name: str, number: float) -> None:
    with pytest.raises(ValueError, match=f"^{op}: {name}: expected a finite number .*, got "):
        call(op, **{name: number})


@pytest.mark.emulated
@pytest.mark.parametrize("number", [-SMALLEST, -1.0, -LARGEST])
@pytest.mark.parametrize(("op", "name"), SCALARS)
def test_a_negative_number(op: str, name: str, number: float) -> None:
    if name in SIGNED:
        call(op, **{name: number})
        return
    with pytest.raises(ValueError, match=f"^{op}: {name}: expected a finite number >= 0"):
        call(op, **{name: number})


@pytest.mark.emulated
@pytest.mark.parametrize("number", [SMALLEST, 2.0**-126, 1e-5, 1e20])
@pytest.mark.parametrize(("op", "name"), SCALARS)
def test_the_ends_of_float32_give_numbers(op: str, name: str, number: float) -> None:
    for output in call(op, **{name: number}):
        assert output.isfinite().all()


@pytest.mark.emulated
@pytest.mark.parametrize(("op", "name"), SCALARS)
def test_zero_has_no_sign(op: str, name: str) -> None:
    for left, right in zip(call(op, **{name: 0.0}), call(op, **{name: -0.0}), strict=True):
        assert_same_bits(left + 0.0, right + 0.0)


@pytest.mark.parametrize("op", ["rms_norm", "quantized_linear", "linear_top_k"])
def test_the_least_eps_keeps_a_row_of_zeros_finite(op: str) -> None:
    arguments = valid_arguments(op)
    name = "eps" if op == "rms_norm" else "norm_eps"
    zeros = {key: torch.zeros_like(arguments[key]) for key in ("x", "residual") if key in arguments}
    for output in call(op, **zeros, **{name: SMALLEST}):
        assert output.isfinite().all()
