"""A wrong call fails while it is traced, with the message that it has when it is run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from stateful_kv import ops
from tests.ops.cases import valid_arguments
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
    with FakeTensorMode(), pytest.raises(Exception, match="device"):
        ops.rms_norm(torch.empty(3, 16, device="cuda"), torch.empty(16), 1e-5)
