"""What setup.py tells pip: versions, requirements, names of wheels, and options of CMake."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import setuptools

import stateful_kv
from stateful_kv._extras import EXTRAS

ROOT = Path(__file__).resolve().parent.parent
Setup = Callable[..., dict[str, Any]]


def fake_torch(folder: Path, version: str = "2.12.1+cpu", cuda: str = "None") -> Path:
    """A folder that looks like an installed torch, as far as setup.py looks."""
    header = folder / "include" / "torch" / "library.h"
    header.parent.mkdir(parents=True, exist_ok=True)
    header.touch()
    text = f"from typing import Optional\n__version__ = '{version}'\ncuda: Optional[str] = {cuda}\n"
    (folder / "version.py").write_text(text)
    return folder


@pytest.fixture
def run_setup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Setup:
    """Runs setup.py against a made-up torch: its globals, and what it `told` to setuptools."""
    for name in ("STATEFUL_KV_LOCAL_VERSION", "STATEFUL_KV_CUDA", "STATEFUL_KV_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("STATEFUL_KV_WERROR", raising=False)

    def run(command: str, torch_dir: Path | None = None, **environment: str) -> dict[str, Any]:
        told: dict[str, Any] = {}
        folder = torch_dir or fake_torch(tmp_path / "torch")
        monkeypatch.setenv("STATEFUL_KV_TORCH_DIR", str(folder))
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["setup.py", command])
        monkeypatch.setattr(setuptools, "setup", lambda **given: told.update(given))
        return {**runpy.run_path(str(ROOT / "setup.py")), "told": told}

    return run


@pytest.mark.parametrize("command", ["egg_info", "sdist"])
def test_a_source_archive_knows_no_torch(run_setup: Setup, command: str, tmp_path: Path) -> None:
    """Its version and requirements must be the same wherever they are looked at."""
    told = run_setup(command, tmp_path, STATEFUL_KV_LOCAL_VERSION="auto")["told"]
    assert told["version"] == stateful_kv.__version__
    assert told["install_requires"] == ["torch>=2.11", "numpy"]


@pytest.mark.parametrize("command", ["dist_info", "bdist_wheel", "editable_wheel"])
def test_a_build_requires_the_minor_of_its_torch(run_setup: Setup, command: str) -> None:
    told = run_setup(command)["told"]
    assert told["version"] == stateful_kv.__version__
    assert told["install_requires"] == ["torch==2.12.*", "numpy"]


@pytest.mark.parametrize(
    ("version", "cuda", "choice", "tag"),
    [
        ("2.12.1+cpu", "None", "AUTO", "pt212cpu"),
        ("2.13.0", "'13.0'", "AUTO", "pt213cu130"),
        ("2.13.0", "'13.0'", "off", "pt213cpu"),
        ("2.14.0a0+git1234567", "'12.8'", "ON", "pt214cu128"),
    ],
)
def test_two_wheels_cannot_be_confused(
    run_setup: Setup, tmp_path: Path, version: str, cuda: str, choice: str, tag: str
) -> None:
    torch_dir = fake_torch(tmp_path / "torch", version, cuda)
    found = run_setup("bdist_wheel", torch_dir, STATEFUL_KV_CUDA=choice)
    command = found["TaggedWheel"](setuptools.Distribution({"name": "x"}))
    command.ensure_finalized()
    assert command.build_number == f"1{tag}"
    auto = {"STATEFUL_KV_CUDA": choice, "STATEFUL_KV_LOCAL_VERSION": "auto"}
    told = run_setup("bdist_wheel", torch_dir, **auto)["told"]
    assert told["version"] == f"{stateful_kv.__version__}+{tag}"
    told = run_setup("bdist_wheel", torch_dir, STATEFUL_KV_LOCAL_VERSION="ours.1")["told"]
    assert told["version"] == f"{stateful_kv.__version__}+ours.1"


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("2.10.3", "torch: expected 2.11 or newer, got 2.10 in "),
        ("unknown", "version.py: expected a line such as __version__ = '2.13.0'"),
    ],
)
def test_an_odd_torch_is_named(
    run_setup: Setup, tmp_path: Path, version: str, message: str
) -> None:
    with pytest.raises(SystemExit, match=re.escape(message)):
        run_setup("dist_info", fake_torch(tmp_path / "torch", version))


def test_a_folder_without_torch_is_named(run_setup: Setup, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="STATEFUL_KV_TORCH_DIR: expected the folder of a torch"):
        run_setup("dist_info", tmp_path)


def test_a_torch_has_one_path(run_setup: Setup, tmp_path: Path) -> None:
    torch_dir = fake_torch(tmp_path / "torch")
    (tmp_path / "link").symlink_to(torch_dir)
    assert run_setup("build_ext", tmp_path / "link")["needed_torch"]() == torch_dir.resolve()


@pytest.mark.parametrize("command", ["dist_info", "bdist_wheel", "editable_wheel", "build_ext"])
def test_a_missing_torch_fails_with_the_metadata(command: str, tmp_path: Path) -> None:
    """Whatever comes before it in this interpreter is hidden, so none is found."""
    hidden = (
        "import importlib.util as u, runpy, sys; find = u.find_spec;"
        "u.find_spec = lambda name: None if name == 'torch' else find(name);"
        "import subprocess as s; done = s.CompletedProcess([], 0, '', '');"
        "s.run = lambda *a, **k: done;"
        f"sys.argv = ['setup.py', '{command}']; runpy.run_path('{ROOT}/setup.py')"
    )
    command_line = [sys.executable, "-c", hidden]
    run = subprocess.run(command_line, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 1, run.stdout
    for part in ("none was found", "--no-build-isolation", "--no-isolation", "STATEFUL_KV_TORCH"):
        assert part in run.stderr


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_options_of_an_earlier_build_do_not_stick(run_setup: Setup, tmp_path: Path) -> None:
    """One build folder, configured with options and then without: they are the defaults again."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.25)\n"
        "project(options LANGUAGES NONE)\n"
        f'set(PROJECT_SOURCE_DIR "{ROOT}")\n'
        f'include("{ROOT}/cmake/Options.cmake")\n'
        'message(STATUS "SAYS ${STATEFUL_KV_CUDA} ${STATEFUL_KV_CUDA_ARCHS} '
        '${STATEFUL_KV_WERROR} ${STATEFUL_KV_VERSION}")\n'
    )

    def configure(*options: str) -> str:
        command = ["cmake", "-S", str(project), "-B", str(tmp_path / "build"), *options]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        found = re.search(r"SAYS (.+)", run.stdout)
        assert found is not None
        return found[1]

    set_once = {"STATEFUL_KV_CUDA": "ON", "STATEFUL_KV_CUDA_ARCHS": "75"}
    given = run_setup("build_ext", **set_once, STATEFUL_KV_WERROR="ON")["cmake_options"]()
    assert configure(*given) == f"ON 75 ON {stateful_kv.__version__}"
    unset = dict.fromkeys([*set_once, "STATEFUL_KV_WERROR"], "")
    later = run_setup("build_ext", **unset)["cmake_options"]()
    assert configure(*later) == f"AUTO 80;90a OFF {stateful_kv.__version__}"


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_a_cuda_compiler_that_was_not_found_is_looked_for_again(tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.25)\n"
        "project(again LANGUAGES NONE)\n"
        f'include("{ROOT}/cmake/CudaToolkit.cmake")\n'
        "set(STATEFUL_KV_CUDA_ARCHS 80)\n"
        "skv_find_cuda_compiler()\n"
    )
    command = ["cmake", "-S", str(tmp_path), "-B", str(tmp_path / "build")]
    command += ["-DCMAKE_CUDA_COMPILER=NOTFOUND"]  # as CMake remembers it
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Looking for a CUDA compiler" in run.stdout


def extras(pyproject: str) -> dict[str, str]:
    """The text of each extra in pyproject.toml."""
    table = pyproject.partition("[project.optional-dependencies]\n")[2].partition("\n[project")[0]
    return dict(re.findall(r"^([\w-]+) = \[(.*?)\]$", table, re.MULTILINE | re.DOTALL))


def test_messages_name_the_extras_that_are_there() -> None:
    declared = extras((ROOT / "pyproject.toml").read_text())
    for extra, packages in EXTRAS.items():
        names = set(re.findall(r'"([\w.-]+)[><=]', declared[extra]))
        assert names == set(packages), extra


def test_install_commands_name_extras_that_are_there() -> None:
    declared = set(extras((ROOT / "pyproject.toml").read_text()))
    texts = [ROOT / "README.md", ROOT / "Makefile", *(ROOT / "docs").rglob("*.md")]
    texts += [*(ROOT / "scripts").rglob("*.sh"), *(ROOT / "python").rglob("*.py")]
    used = {
        name
        for path in texts
        for group in re.findall(
            r"(?:stateful-kv|[\"' ]\.|_package \")\[([a-z,-]+)\]", path.read_text()
        )
        for name in group.split(",")
    }
    assert {"cli", "engine", "bench"} <= used <= declared
