"""A wrong call fails while it is traced, with the message that it has when it is run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from stateful_kv import ops
from tests.ops.cases import valid_arguments
from tests.ops.compiled import BATCHED
from tests.ops.test_bad_arguments import BAD, VALUE_CHANGES

CASES = [
    pytest.param(op, argument, label)
    for op, arguments in BAD.items()
    for argument, changes in arguments.items()
    for label, change in changes.items()
    if change not in VALUE_CHANGES
]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Torch writes each refusal of a traced call to its log, too."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    yield
    log.disabled = before


def to_fake(mode: FakeTensorMode, value: Any) -> Any:
    if isinstance(value, list):
        return [to_fake(mode, item) for item in value]
    return mode.from_tensor(value) if isinstance(value, Tensor) else value


def outcome(op: str, arguments: dict[str, Any]) -> tuple[type[Exception] | None, str]:
    try:
        getattr(ops, op)(**arguments)
    except (TypeError, ValueError) as error:
        return type(error), str(error).splitlines()[0]
    return None, "it was accepted"


@pytest.mark.parametrize(("op", "argument", "label"), CASES)
def test_the_message_is_the_same(op: str, argument: str, label: str) -> None:
    arguments = valid_arguments(op)
    arguments[argument] = BAD[op][argument][label](arguments[argument])
    with FakeTensorMode() as mode:
        fake = {name: to_fake(mode, value) for name, value in arguments.items()}
        traced = outcome(op, fake)
    assert traced == outcome(op, arguments)
    assert traced[0] is not None


def test_unknown_sizes_are_checked_too() -> None:
    """Where sizes are symbols, a condition that they break ends the tracing."""

    def attend(q: Tensor, *rest: Tensor) -> Tensor:
        return ops.paged_attention(q, *rest, 0.25)

    arguments = valid_arguments("paged_attention")
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    tensors[0] = tensors[0][..., :16].contiguous()
    torch.compiler.reset()
    with pytest.raises(Exception, match=r"paged_attention: q: expected shape \[N, H, D\] with D ="):
        torch.compile(attend, backend="eager", fullgraph=True, dynamic=True)(*tensors)


def test_mixed_devices_are_refused_while_tracing() -> None:
    with FakeTensorMode():
        x, weight = torch.empty(3, 16, device="cuda"), torch.empty(16)
        with pytest.raises(Exception, match="device"):
            ops.rms_norm(x, weight, 1e-5)


# Of each, arguments whose first dimension is the number of rows.
ROWS = {op: batched for op, (batched, offsets) in BATCHED.items() if not offsets}


@pytest.mark.parametrize("op", sorted(ROWS))
def test_a_number_of_rows_that_data_decides(op: str) -> None:
    """As in x[mask]: nothing is known of it while a program is traced."""
    shapes = ShapeEnv()
    rows = shapes.create_unbacked_symint()
    with FakeTensorMode(shape_env=shapes) as mode:
        arguments = {name: to_fake(mode, value) for name, value in valid_arguments(op).items()}
        for name in ROWS[op]:
            if arguments[name] is not None:
                old = arguments[name]
                arguments[name] = old.new_empty((rows, *old.shape[1:]))
        getattr(ops, op)(**arguments)


def test_views_of_a_number_of_rows_that_data_decides() -> None:
    shapes = ShapeEnv()
    rows = shapes.create_unbacked_symint()
    with FakeTensorMode(shape_env=shapes):
        heads = torch.empty(rows, 8 * 32).view(-1, 8, 32)
        pools = torch.empty(2, 5, 2, 16, 32)
        positions, slots = torch.empty(rows).int(), torch.empty(rows).long()
        q, k, v = heads.split([4, 2, 2], dim=1)
        ops.rope_append_kv(q, k, v, positions, torch.empty(64, 32), slots, pools[0], pools[1])
        assert ops.rms_norm(q, torch.empty(32), 1e-5).shape == (rows, 4, 32)
