"""What every op with a CUDA kernel keeps there: the CPU's results, streams, graphs, devices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from stateful_kv import ops
from tests.ops.cases import WRITTEN, Arguments, valid_arguments
from tests.ops.comparing import assert_same_bits
from tests.ops.test_cuda_build import CUDA_OPS

DELAY_CYCLES = 50_000_000  # tens of milliseconds

pytestmark = pytest.mark.cuda
every_op = pytest.mark.parametrize("op", sorted(CUDA_OPS))


def on(device: str, arguments: Arguments) -> Arguments:
    """Copies of the tensors on a device, the rest as it is."""
    return {
        name: value.to(device, copy=True) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }


def run(op: str, arguments: Arguments) -> dict[str, Tensor]:
    """What the op returns and what it has written."""
    result = getattr(ops, op)(**arguments)
    results = () if result is None else (result,) if isinstance(result, Tensor) else result
    written = {n: arguments[n] for n in WRITTEN.get(op, ()) if arguments[n] is not None}
    return {f"result {i}": tensor for i, tensor in enumerate(results)} | written


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """No bit differs."""
    assert got.keys() == expected.keys()
    assert got
    for name, tensor in expected.items():
        assert_same_bits(got[name], tensor, name)


@every_op
def test_results_are_those_of_the_cpu(op: str) -> None:
    arguments = valid_arguments(op)
    there = run(op, on("cuda", arguments))
    here = run(op, on("cpu", arguments))
    assert there.keys() == here.keys()
    for name, expected in here.items():
        assert there[name].is_cuda
        # Whole numbers and copies are exact; sums may have another order.
        tolerance = {"rtol": 1e-4, "atol": 1e-4} if expected.is_floating_point() else {}
        torch.testing.assert_close(there[name].cpu(), expected, **tolerance)


@every_op
def test_opcheck(op: str) -> None:
    overload = getattr(torch.ops.stateful_kv, op).default
    torch.library.opcheck(overload, tuple(on("cuda", valid_arguments(op)).values()))


def fill(targets: Arguments, sources: Arguments) -> None:
    """Writes the tensors of one call into those of another."""
    for name, source in sources.items():
        if isinstance(source, Tensor):
            targets[name].copy_(source)


@every_op
def test_work_is_ordered_on_the_current_stream(op: str) -> None:
    """Arguments that come late on that stream: elsewhere the op would see zeros."""
    arguments = on("cuda", valid_arguments(op))
    expected = run(op, on("cuda", arguments))
    late: dict[str, Any] = {
        name: torch.zeros_like(value) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(DELAY_CYCLES)
        fill(late, arguments)
        got = run(op, late)
    stream.synchronize()
    assert_equal(got, expected)


@every_op
def test_a_graph_reads_what_is_there_when_it_is_replayed(op: str) -> None:
    arguments = on("cuda", valid_arguments(op))
    expected = run(op, on("cuda", arguments))
    static = on("cuda", arguments)
    run(op, static)  # libraries and kernels are loaded
    fill(static, arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(op, static)
    for _ in range(2):
        for tensor in tensors_of(got, op):
            tensor.zero_()
        fill(static, arguments)
        graph.replay()
        assert_equal(got, expected)


def tensors_of(results: dict[str, Tensor], op: str) -> Iterable[Tensor]:
    """Those that the op returned."""
    return [tensor for name, tensor in results.items() if name not in WRITTEN.get(op, ())]


@every_op
def test_arguments_of_another_device_are_refused(op: str) -> None:
    names = [name for name, value in valid_arguments(op).items() if isinstance(value, Tensor)]
    for name in names[1:]:
        arguments = on("cuda", valid_arguments(op))
        arguments[name] = arguments[name].cpu()
        with pytest.raises(ValueError, match=f"{op}: .*expected device "):
            getattr(ops, op)(**arguments)
