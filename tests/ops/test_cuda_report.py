"""The table of CUDA kernels, the script that writes and checks it, and the logs it is made from."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.ops.cases import CASES
from tests.ops.test_cuda_build import CUDA_OPS, ROOT

PAGE = ROOT / "docs/cuda-kernels.md"
SCRIPT = ROOT / "scripts/checks/cuda_report.py"
LOG = """
ptxas info    : Compiling entry function '_Z1fILi3EEvv' for 'sm_80'
ptxas info    : Function properties for _Z1fILi3EEvv
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1gv' for 'sm_90a'
ptxas info    : Function properties for _Z1gv
    24 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 0 barriers
"""


@pytest.fixture
def report() -> ModuleType:
    """scripts/checks/cuda_report.py as a module."""
    spec = importlib.util.spec_from_file_location("cuda_report", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_page_names_the_ops_without_a_kernel(report: ModuleType) -> None:
    assert report.ops_without_kernel() == sorted(CASES.keys() - CUDA_OPS)
    assert "\n".join(report.missing_sentence()) in PAGE.read_text()


def test_every_kernel_is_in_the_committed_table_without_spills(report: ModuleType) -> None:
    """A new kernel needs a new docs/cuda-kernels.md; numbers depend on the nvcc version."""
    page = PAGE.read_text()
    assert "and emulated, not yet run on a GPU" in page
    listed = report.listed_kernels(page)
    assert {arch for _, _, arch in listed} == {80, 90}
    folder = ROOT / "csrc/kernels/cuda"
    committed = {path.name for path in folder.glob("*.cu")}
    cmake = (ROOT / "cmake/Instantiate.cmake").read_text()
    for source in {source for source, _, _ in listed} - committed:
        assert f"{source.rpartition('_')[0]}_${{head_dim}}.cu" in cmake
    text = "".join(path.read_text() for path in sorted(folder.glob("*.cu*")))
    written = set(
        re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^;{]*?\)\s+)?(\w+)\(", text)
    )
    assert {name.split("<")[0] for _, name, _ in listed} == written
    spills = [row.split(" | ")[5] for row in page.splitlines() if ".cu | " in row]
    assert len(spills) == len(listed)
    assert set(spills) == {"0"}


def test_the_assembler_log_is_read(report: ModuleType) -> None:
    first, second = report.parse_log(LOG, "a.cu")
    assert first == report.Kernel("a.cu", "_Z1fILi3EEvv", 80, 40, 16, 12, 1024)
    assert second == report.Kernel("a.cu", "_Z1gv", 90, 24, 24, 0, 0)
    assert report.readable_names([first.name, second.name]) == {
        "_Z1fILi3EEvv": "f<3>",
        "_Z1gv": "g",
    }


def made_up_build(folder: Path, report: ModuleType, log: str) -> Path:
    """A build folder as the compile check leaves it, with one log for every source."""
    objects = folder / report.OBJECTS
    committed, written = objects / "csrc/kernels/cuda", objects / report.INSTANTIATED
    for directory in (committed, written, folder / report.INSTANTIATED):
        directory.mkdir(parents=True)
    for source in report.KERNELS.glob("*.cu"):
        (committed / f"{source.name}.o.log").write_text("")
    (committed / "argmax.cu.o.log").write_text(log)
    (folder / report.INSTANTIATED / "attention_tiles_7.cu").write_text("")
    (written / "attention_tiles_7.cu.o.log").write_text(log)
    compiler = folder / "nvcc"
    compiler.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.1, V13.1.2'\n")
    compiler.chmod(0o755)
    (folder / "CMakeCache.txt").write_text(f"CMAKE_CUDA_COMPILER:FILEPATH={compiler}\n")
    return folder


def run_report(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_written_table_passes_its_own_check(tmp_path: Path, report: ModuleType) -> None:
    build = made_up_build(
        tmp_path,
        report,
        LOG.replace("8 bytes spill", "0 bytes spill").replace("4 bytes spill", "0 bytes spill"),
    )
    page = tmp_path / "page.md"
    written = run_report("--build", build, "--output", page)
    assert written.returncode == 0, written.stderr
    assert "nvcc 13.1.2 and emulated, not yet run on a GPU" in page.read_text()
    for source in ("argmax.cu", "attention_tiles_7.cu"):
        assert f"| {source} | `f<3>` | 80 | 40 | 16 | 0 | 1024 |" in page.read_text()
    assert run_report("--build", build, "--check", page).returncode == 0
    assert page.read_text() == run_report("--build", build).stdout

    page.write_text(page.read_text().replace("argmax.cu | `g`", "argmax.cu | `h`"))
    checked = run_report("--build", build, "--check", page)
    assert checked.returncode == 1
    assert "not in the table: ('argmax.cu', 'g', 90)" in checked.stderr
    assert "in the table but not built: ('argmax.cu', 'h', 90)" in checked.stderr
    assert "update the table with: python scripts/checks/cuda_report.py" in checked.stderr


def test_a_spilling_kernel_is_named(tmp_path: Path, report: ModuleType) -> None:
    build = made_up_build(tmp_path, report, LOG)
    written = run_report("--build", build, "--output", tmp_path / "page.md")
    assert written.returncode == 1
    assert "spills 12 bytes: ('argmax.cu', 'f<3>', 80)" in written.stderr


def test_without_logs_it_says_what_to_run(tmp_path: Path) -> None:
    result = run_report("--build", tmp_path)
    assert result.returncode == 1
    assert "run `make cuda-check` first" in result.stderr


@pytest.mark.parametrize(("status", "keeps"), [(0, True), (3, False)])
def test_the_launcher_keeps_the_log_beside_the_object(
    tmp_path: Path, status: int, keeps: bool
) -> None:
    compiler, object_file = tmp_path / "compiler", tmp_path / "folder" / "kernel.o"
    object_file.parent.mkdir()
    compiler.write_text(
        f"#!/bin/sh\ncat <<'END' >&2\n{LOG}\na.cu(3): warning: odd\nEND\nexit {status}\n"
    )
    compiler.chmod(0o755)
    log = object_file.with_name("kernel.o.log")
    log.write_text("of an earlier run")
    launcher = ROOT / "scripts/checks/keep_ptxas_log.sh"
    command = [str(launcher), str(compiler), "-c", "kernel.cu", "-o", str(object_file)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == status
    assert "a.cu(3): warning: odd" in result.stderr
    assert ("Used 40 registers" in result.stderr) is not keeps
    assert log.exists() is keeps
    if keeps:
        assert "Used 40 registers" in log.read_text()
