"""Schemas, opcheck, meta tensors and autograd of every op."""

from __future__ import annotations

import inspect
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stateful_kv import _C, ops
from tests.ops.cases import CASES, WRITTEN, valid_arguments
from tests.ops.comparing import assert_same_bits

ALL_OPS = sorted(CASES)


def registered_schemas() -> dict[str, Any]:
    """Every schema in the namespace, by op name."""
    schemas = torch._C._jit_get_all_schemas()
    mine = [schema for schema in schemas if schema.name.startswith("stateful_kv::")]
    return {schema.name.removeprefix("stateful_kv::"): schema for schema in mine}


def run(op: str, arguments: dict[str, Any]) -> list[Tensor]:
    """Calls the op; returns its results, then the tensors it wrote."""
    result = getattr(ops, op)(**arguments)
    results = [] if result is None else list(result) if isinstance(result, tuple) else [result]
    return results + [arguments[name] for name in WRITTEN.get(op, ())]


def clone(arguments: dict[str, Any]) -> dict[str, Any]:
    """A copy whose tensors can be written."""
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}


def to_meta(value: Any) -> Any:
    """Tensors, and those in lists, without their content."""
    if isinstance(value, list):
        return [to_meta(item) for item in value]
    return value.to("meta") if isinstance(value, Tensor) else value


def test_table_equals_the_registered_ops() -> None:
    assert set(registered_schemas()) == set(CASES)


@pytest.mark.parametrize("op", ALL_OPS)
def test_schema(op: str) -> None:
    expected = torch._C.parse_schema(f"stateful_kv::{op}{CASES[op][0]}")
    assert str(registered_schemas()[op]) == str(expected)


@pytest.mark.parametrize("op", ALL_OPS)
def test_wrapper_has_the_signature_and_a_docstring(op: str) -> None:
    wrapper = getattr(ops, op)
    parameters = inspect.signature(wrapper).parameters
    schema = registered_schemas()[op]
    assert list(parameters) == [argument.name for argument in schema.arguments]
    for argument in schema.arguments:
        if argument.has_default_value():
            assert parameters[argument.name].default == argument.default_value
        assert f"{argument.name}: " in wrapper.__doc__


@pytest.mark.parametrize("op", ALL_OPS)
def test_opcheck(op: str) -> None:
    overload = getattr(torch.ops.stateful_kv, op).default
    torch.library.opcheck(overload, tuple(valid_arguments(op).values()))


@pytest.mark.parametrize("weight_format", ["fp32", "int8"])
def test_opcheck_other_weight_formats(weight_format: str) -> None:
    scales = None if weight_format == "fp32" else torch.randn(2, 2, 16)
    weight = torch.randn(2, 64, 16)
    weight = weight if weight_format == "fp32" else (weight * 40).to(torch.int8)
    overload = torch.ops.stateful_kv.quantized_linear.default
    torch.library.opcheck(overload, (torch.randn(3, 64), weight, scales, None, None, 30))


def test_opcheck_pools_of_all_layers() -> None:
    pools = torch.randn(2, 3, 5, 2, 16, 32)
    copies = torch.tensor([[1, 2]], dtype=torch.int32)
    torch.library.opcheck(torch.ops.stateful_kv.copy_pages.default, (copies, pools[0], pools[1]))


@pytest.mark.parametrize("op", ALL_OPS)
def test_meta_tensors_give_shapes(op: str) -> None:
    arguments = valid_arguments(op)
    expected = run(op, clone(arguments))
    meta = {name: to_meta(value) for name, value in arguments.items()}
    for result, like in zip(run(op, meta), expected, strict=True):
        assert result.device.type == "meta"
        assert (result.shape, result.dtype, result.stride()) == (
            like.shape,
            like.dtype,
            like.stride(),
        )


@pytest.mark.parametrize("op", ALL_OPS)
def test_gradients_are_refused(op: str) -> None:
    """Not silently detached: an op without a backward says so when it is called."""
    for name, value in valid_arguments(op).items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        arguments = valid_arguments(op)
        arguments[name] = value.clone().requires_grad_()
        with pytest.raises((ValueError, RuntimeError), match="grad"):
            run(op, arguments)


@pytest.mark.parametrize("op", ALL_OPS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_parameters_work_without_grad_mode(op: str, mode: Any) -> None:
    arguments = valid_arguments(op)
    expected = run(op, clone(arguments))
    with mode():
        wrapped = {
            k: torch.nn.Parameter(v) if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in arguments.items()
        }
        results = run(op, wrapped)
    for result, like in zip(results, expected, strict=True):
        assert_same_bits(result.detach(), like)


@pytest.mark.parametrize("op", ALL_OPS)
def test_inputs_in_shared_memory(op: str) -> None:
    arguments = valid_arguments(op)
    expected = run(op, clone(arguments))
    for value in arguments.values():
        if isinstance(value, Tensor):
            value.share_memory_()
    for result, like in zip(run(op, arguments), expected, strict=True):
        assert_same_bits(result, like)


def test_the_library_of_the_ops_works_alone() -> None:
    """Without the Python package: C++ programs and AOTInductor packages load it like this."""
    source = (
        "import sys, torch\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "rows = torch.ones(2, 4)\n"
        "print(torch.ops.stateful_kv.silu_mul(rows).tolist())\n"
        "print(torch.ops.stateful_kv.silu_mul(rows.to('meta')).shape)\n"
        "assert not any(name.startswith('stateful_kv') for name in sys.modules)\n"
    )
    library = Path(str(_C.__file__)).with_name("libstateful_kv_ops.so")
    done = subprocess.run(
        [sys.executable, "-c", source, str(library)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    expected = ops.silu_mul(torch.ones(2, 4)).tolist()
    assert done.stdout.splitlines() == [str(expected), "torch.Size([2, 2])"], done.stderr


def test_public_names_are_the_ops() -> None:
    """Every op is a function of `stateful_kv.ops`; beside them are two names that belong to ops."""
    assert set(ops.__all__) == set(CASES) | {"FilledRows", "LAYER_TENSORS"}


def test_calls_from_several_threads() -> None:
    cases = [(op, valid_arguments(op)) for op in ALL_OPS]
    expected = [run(op, clone(arguments)) for op, arguments in cases]

    def repeat(_: int) -> None:
        for (op, arguments), like in zip(cases, expected, strict=True):
            for result, wanted in zip(run(op, clone(arguments)), like, strict=True):
                assert_same_bits(result, wanted, op)

    with ThreadPoolExecutor(3) as pool:
        for future in [pool.submit(repeat, i) for i in range(12)]:
            future.result()
