"""What must hold of the CUDA half on every machine, with or without a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import stateful_kv
from stateful_kv import _native
from stateful_kv.errors import DeviceUnavailableError, StatefulKVError
from stateful_kv.kv.cache import KVCache
from tests.conftest import cuda_missing
from tests.ops.cases import CASES

ROOT = Path(__file__).resolve().parents[2]
CUDA_OPS = {
    "add_rms_norm",
    "advance_sequences",
    "append_kv",
    "argmax",
    "copy_pages",
    "fill_rows",
    "ngram_lookup",
    "paged_attention",
    "rms_norm",
    "rope_append_kv",
    "sample",
    "shared_prefix_attention",
    "silu_mul",
    "verify_draft",
}


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


def test_the_sources_compile_as_plain_c_plus_plus_too() -> None:
    """Launches by launch_kernel, PTX in two files: what the emulator of tests/emulation needs."""
    for source in (ROOT / "csrc/kernels/cuda").iterdir():
        text = source.read_text()
        assert not re.search(r">>>\s*\(", text), f"{source.name}: use launch_kernel"
        has_asm = re.search(r"\basm\s*(volatile\s*)?\(", text) is not None
        assert has_asm is (source.name in ("ptx.cuh", "wgmma.cuh")), source.name


def test_the_sources_register_the_listed_ops() -> None:
    text = "".join(path.read_text() for path in (ROOT / "csrc/ops").glob("*/cuda.cpp"))
    registered = re.findall(r'm\.impl\("(\w+)"', text)
    assert sorted(registered) == sorted(CUDA_OPS)


@pytest.mark.parametrize(
    ("variable", "header", "alias"),
    [
        ("SKV_HEAD_DIMS", "kernels.h", "HeadDims"),
        ("SKV_WARPGROUP_HEAD_DIMS", "attention_task.h", "WarpgroupHeadDims"),
    ],
)
def test_what_is_instantiated_is_what_is_launched(variable: str, header: str, alias: str) -> None:
    cmake = (ROOT / "cmake/Instantiate.cmake").read_text()
    written = re.search(rf"^set\({variable} ([\d ]+)\)", cmake, re.MULTILINE)
    text = (ROOT / "csrc/kernels/cuda" / header).read_text()
    launched = re.search(rf"using {alias} = std::integer_sequence<int, ([\d, ]+)>", text)
    assert written is not None
    assert launched is not None
    assert written[1].split() == launched[1].split(", ")


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


def run_a_cuda_test(require_cuda: str) -> subprocess.CompletedProcess[str]:
    """A test marked `cuda` in a process of its own."""
    test = f"{Path(__file__).relative_to(ROOT)}::test_a_cache_on_cuda_lives_there"
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", test]
    environment = {**os.environ, "SKV_REQUIRE_CUDA": require_cuda}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(cuda_missing() is None, reason="CUDA tests run here")
def test_cuda_tests_skip_with_the_reason_or_fail_where_cuda_is_required() -> None:
    skipped, failed = run_a_cuda_test("0"), run_a_cuda_test("1")
    assert skipped.returncode == 0, skipped.stdout
    assert "1 skipped" in skipped.stdout
    assert str(cuda_missing()) in skipped.stdout
    assert failed.returncode == 1, failed.stdout
    assert f"SKV_REQUIRE_CUDA=1, but {cuda_missing()}" in failed.stdout
    assert "skipped" not in failed.stdout


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
