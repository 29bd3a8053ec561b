"""What must hold of the CUDA half on every machine, with or without a GPU."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import stateful_kv
from stateful_kv import _native
from stateful_kv.cache import KVCache
from stateful_kv.errors import DeviceUnavailableError, StatefulKVError
from tests.ops.cases import CASES

ROOT = Path(__file__).resolve().parents[2]
CUDA_OPS = {
    "advance_sequences",
    "append_kv",
    "argmax",
    "copy_pages",
    "fill_rows",
    "ngram_lookup",
    "paged_attention",
    "rms_norm",
    "rope_append_kv",
    "silu_mul",
    "verify_draft",
}


def load_report() -> ModuleType:
    """scripts/cuda_report.py as a module."""
    spec = importlib.util.spec_from_file_location("cuda_report", ROOT / "scripts/cuda_report.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def make_cache(device: str) -> KVCache:
    return KVCache(
        num_layers=1,
        num_kv_heads=1,
        head_dim=64,
        num_pages=2,
        page_size=16,
        device=device,
    )


def test_build_info_tells_what_was_built() -> None:
    info = stateful_kv.build_info()
    assert info["cuda"] is bool(info["cuda_archs"])
    if torch.version.cuda is None:
        assert info["cuda"] is False, "a CPU build of torch has no CUDA runtime to link"
    for arch in info["cuda_archs"]:
        assert re.fullmatch(r"\d+[a-z]?(-real|-virtual)?", arch)


@pytest.mark.parametrize("op", sorted(CASES))
def test_cuda_kernels_are_registered_where_built(op: str) -> None:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(f"stateful_kv::{op}", "CUDA")
    assert has_kernel is (stateful_kv.build_info()["cuda"] and op in CUDA_OPS)


def test_the_sources_register_the_listed_ops() -> None:
    text = "".join(path.read_text() for path in (ROOT / "csrc/bindings").glob("*_cuda.cpp"))
    registered = re.findall(r'm\.impl\("(\w+)"', text)
    assert sorted(registered) == sorted(CUDA_OPS)


def test_the_report_names_the_ops_without_a_kernel() -> None:
    report = load_report()
    assert report.ops_without_kernel() == sorted(CASES.keys() - CUDA_OPS)
    assert "\n".join(report.missing_sentence()) in (ROOT / "docs/cuda-kernels.md").read_text()


def test_a_cache_on_cuda_without_a_cuda_build_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    info = {**stateful_kv.build_info(), "cuda": False}
    monkeypatch.setattr(_native._C, "build_info", lambda: info)
    with pytest.raises(DeviceUnavailableError, match=r"built without CUDA.*STATEFUL_KV_CUDA=ON"):
        make_cache("cuda")


def test_a_cuda_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    info = {**stateful_kv.build_info(), "cuda": True}
    monkeypatch.setattr(_native._C, "build_info", lambda: info)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(DeviceUnavailableError, match="torch sees 0 CUDA devices"):
        make_cache("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceUnavailableError, match="cuda:2: torch sees 2 CUDA devices"):
        make_cache("cuda:2")


@pytest.mark.parametrize("device", ["meta", "nonsense"])
def test_a_device_without_kernels_is_refused(device: str) -> None:
    with pytest.raises(StatefulKVError, match=f"device {device}: expected cpu or cuda"):
        make_cache(device)


@pytest.mark.cuda
def test_a_cache_on_cuda_lives_there() -> None:
    cache = make_cache("cuda")
    assert cache.k.is_cuda
    assert cache.v.is_cuda


def test_every_kernel_is_in_the_committed_table_without_spills() -> None:
    """A new kernel needs a new docs/cuda-kernels.md; numbers depend on the nvcc version."""
    rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in (ROOT / "docs/cuda-kernels.md").read_text().splitlines()
        if line.startswith("| ") and ".cu " in line
    ]
    assert {row[2] for row in rows} == {"80", "90"}
    assert all(row[4] == "0" for row in rows)
    listed = {(row[0], row[1].split("<")[0]) for row in rows}
    written = {
        (source.name, kernel)
        for source in (ROOT / "csrc/kernels/cuda").glob("*.cu")
        for kernel in re.findall(
            r"__global__ void __launch_bounds__\(\w+\)\s+(\w+)\(", source.read_text()
        )
    }
    assert listed == written


def test_report_reads_the_assembler_log() -> None:
    log = """
ptxas info    : Compiling entry function '_Z1fv' for 'sm_80'
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1gv' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 0 barriers
"""
    first, second = load_report().parse_log(log)
    assert (first.name, first.arch, first.registers, first.spills, first.shared) == (
        "_Z1fv",
        80,
        40,
        12,
        1024,
    )
    assert (second.name, second.arch, second.registers, second.spills, second.shared) == (
        "_Z1gv",
        90,
        24,
        0,
        0,
    )


def test_report_without_nvcc_says_so() -> None:
    command = [sys.executable, str(ROOT / "scripts/cuda_report.py"), "--nvcc", "/nowhere/nvcc"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "nvcc not found: /nowhere/nvcc" in result.stderr


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
@pytest.mark.parametrize(
    ("cuda_line", "choice", "expected"),
    [
        ("cuda: Optional[str] = None", "ON", "STATEFUL_KV_CUDA=ON: the torch in"),
        ("cuda = None", "ON", "was built without CUDA"),
        ("cuda: str | None = '13.0'", "ON", "has no libc10_cuda.so"),
        ("cuda = None", "MAYBE", "STATEFUL_KV_CUDA: expected AUTO, ON or OFF, got 'MAYBE'"),
        ("cuda: Optional[str] = None", "AUTO", "ENABLED=FALSE"),
        ("cuda = '13.0'", "OFF", "ENABLED=FALSE"),
    ],
)
def test_cmake_choice_is_clear(tmp_path: Path, cuda_line: str, choice: str, expected: str) -> None:
    """cmake/Cuda.cmake alone, on a made-up torch folder."""
    torch_dir = tmp_path / "torch"
    torch_dir.mkdir()
    (torch_dir / "version.py").write_text(f"__version__ = '2.11.0'\n{cuda_line}\n")
    project = tmp_path / "project"
    project.mkdir()
    (project / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.25)\n"
        "project(choice LANGUAGES NONE)\n"
        f'set(PROJECT_SOURCE_DIR "{ROOT}")\n'
        f'include("{ROOT}/cmake/Cuda.cmake")\n'
        'message(STATUS "ENABLED=${SKV_CUDA_ENABLED}")\n'
    )
    command = ["cmake", "-S", str(project), "-B", str(tmp_path / "build")]
    command += [f"-DSTATEFUL_KV_CUDA={choice}", f"-DSTATEFUL_KV_TORCH_DIR={torch_dir}"]
    result = subprocess.run(command, capture_output=True, text=True)
    output = " ".join((result.stdout + result.stderr).split())  # CMake wraps its messages
    assert expected in output
    assert (result.returncode == 0) is (expected == "ENABLED=FALSE")
