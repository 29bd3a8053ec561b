"""Every op under torch.compile, torch.export and AOTInductor, alone and in a decoder block."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim

from stateful_kv import _C
from tests.ops.cases import CASES
from tests.ops.comparing import assert_same_bits
from tests.ops.compiled import BATCHED, DecoderBlock, OpModule, block_inputs, two_sizes

ROOT = Path(__file__).resolve().parents[2]
ALL_OPS = sorted(CASES)
Inputs = tuple[Tensor, ...]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def mark_dynamic(inputs: Inputs, larger: Inputs) -> None:
    """Sizes that two calls differ in are unknown to torch.compile."""
    for tensor, dims in zip(inputs, dynamic_dims(inputs, larger), strict=True):
        for axis in dims:
            torch._dynamo.mark_dynamic(tensor, axis)


def check_op(
    run: Any, module: OpModule, arguments: dict[str, Any], larger: dict[str, Any] | None = None
) -> None:
    """Runs a compiled op beside the plain one; the results and what was written are equal."""
    expected_inputs, inputs = module.inputs(arguments), module.inputs(arguments)
    if larger is not None:
        mark_dynamic(inputs, module.inputs(larger))
    expected, results = module(*expected_inputs), run(*inputs)
    assert len(results) == len(expected)
    for result, like in zip(results, expected, strict=True):
        assert_same_bits(result, like)
    for tensor, like in zip(module.written(inputs), module.written(expected_inputs), strict=True):
        assert_same_bits(tensor, like)


def check_block(run: Any, block: DecoderBlock, num_sequences: int) -> None:
    expected_inputs, inputs = block_inputs(num_sequences), block_inputs(num_sequences)
    expected, results = block(*expected_inputs), run(*inputs)
    for result, like in zip(results, expected, strict=True):
        torch.testing.assert_close(result, like)  # torch may fuse the sums of its own operators
    for tensor, like in zip(inputs[-2:], expected_inputs[-2:], strict=True):
        assert_same_bits(tensor, like)


def dynamic_dims(inputs: Inputs, larger: Inputs) -> tuple[dict[int, Any], ...]:
    """The dimensions in which two calls differ."""
    return tuple(
        {
            axis: Dim.DYNAMIC
            for axis, sizes in enumerate(zip(small.shape, large.shape, strict=True))
            if sizes[0] != sizes[1]
        }
        for small, large in zip(inputs, larger, strict=True)
    )


def export(op: str) -> tuple[torch.export.ExportedProgram, OpModule]:
    arguments, larger = two_sizes(op)
    module = OpModule(op, arguments)
    inputs = module.inputs(arguments)
    dims = dynamic_dims(inputs, module.inputs(larger))
    assert any(dims), "nothing differs"
    return torch.export.export(module, inputs, dynamic_shapes=(dims,)), module


def export_block(block: DecoderBlock) -> torch.export.ExportedProgram:
    dims = dynamic_dims(block_inputs(2), block_inputs(5))
    return torch.export.export(block, block_inputs(3), dynamic_shapes=dims)


def test_every_op_has_two_sizes() -> None:
    assert set(BATCHED) == set(CASES)


@pytest.mark.parametrize("op", ALL_OPS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_inductor(op: str, dynamic: bool) -> None:
    arguments, larger = two_sizes(op)
    module = OpModule(op, arguments)
    compiled = torch.compile(module, fullgraph=True, dynamic=None if dynamic else False)
    check_op(compiled, module, arguments, larger if dynamic else None)
    with torch.compiler.set_stance("fail_on_recompile" if dynamic else "default"):
        check_op(compiled, module, larger)


@pytest.mark.parametrize("op", ALL_OPS)
def test_export(op: str) -> None:
    program, module = export(op)
    for arguments in two_sizes(op):
        check_op(program.module(), module, arguments)


@pytest.mark.parametrize("op", ALL_OPS)
def test_aot_inductor(op: str, tmp_path: Path) -> None:
    program, module = export(op)
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "op.pt2")
    )
    run = torch._inductor.aoti_load_package(package)
    for arguments in two_sizes(op):
        check_op(run, module, arguments)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_block_compiles(backend: str, dynamic: bool) -> None:
    block = DecoderBlock()
    compiled = torch.compile(block, backend=backend, fullgraph=True, dynamic=dynamic)
    check_block(compiled, block, 3)
    with torch.compiler.set_stance("fail_on_recompile" if dynamic else "default"):
        check_block(compiled, block, 7)


def test_block_compiles_with_pools_in_one_tensor() -> None:
    """Views of one tensor that an op writes: torch wants their sizes fixed, see use-the-ops.md."""
    block = DecoderBlock()
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for num_sequences in (3, 7):
        *rest, k_pool, v_pool = block_inputs(num_sequences)
        views = list(torch.stack([k_pool, v_pool]))
        expected, _ = block(*rest, k_pool, v_pool)
        for view in views:
            torch._dynamo.mark_static(view)
        torch.testing.assert_close(compiled(*rest, *views)[0], expected)
        assert_same_bits(views[0], k_pool)
        assert_same_bits(views[1], v_pool)


def test_block_exports() -> None:
    block = DecoderBlock()
    run = export_block(block).module()
    for num_sequences in (3, 7):
        check_block(run, block, num_sequences)


def test_block_in_an_aot_inductor_package(tmp_path: Path) -> None:
    block = DecoderBlock()
    package = torch._inductor.aoti_compile_and_package(
        export_block(block), package_path=str(tmp_path / "block.pt2")
    )
    run = torch._inductor.aoti_load_package(package)
    for num_sequences in (3, 7):
        check_block(run, block, num_sequences)


def build_runner(folder: Path) -> Path:
    """Compiles examples/run_package.cpp against the installed torch."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    torch_dir = Path(torch.__file__).parent
    program = folder / "run_package"
    subprocess.run(
        [
            *(compiler, "-std=c++20", "-O0", ROOT / "examples/run_package.cpp", "-o", program),
            *("-isystem", torch_dir / "include"),
            *("-isystem", torch_dir / "include/torch/csrc/api/include"),
            *("-L", torch_dir / "lib", f"-Wl,-rpath,{torch_dir / 'lib'}"),
            *("-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"),
        ],
        check=True,
    )
    return program


def test_a_package_runs_without_python(tmp_path: Path) -> None:
    block = DecoderBlock()
    package = torch._inductor.aoti_compile_and_package(
        export_block(block), package_path=str(tmp_path / "block.pt2")
    )
    torch.save(list(block_inputs(5)), tmp_path / "inputs.pt")
    library = Path(str(_C.__file__)).with_name("libstateful_kv_ops.so")
    program = build_runner(tmp_path)
    files = [library, package, tmp_path / "inputs.pt", tmp_path / "outputs.pt"]
    linked = subprocess.run(["ldd", library], capture_output=True, text=True, check=True).stdout
    assert not [line for line in linked.splitlines() if "python" in line.partition("=>")[0]]
    subprocess.run([program, *files], check=True)
    outputs = torch.load(tmp_path / "outputs.pt", weights_only=True)
    for result, like in zip(outputs, block(*block_inputs(5)), strict=True):
        torch.testing.assert_close(result, like)
    wrong = subprocess.run([program, "nothing.so", *files[1:]], capture_output=True, check=False)
    assert wrong.returncode == 1 and b"nothing.so" in wrong.stderr
