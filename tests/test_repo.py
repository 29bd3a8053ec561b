"""The repository itself: banned calls, layers, paths of machines, links, pins and figures.

Each rule is also run on a small tree that breaks it, so that a rule which stopped looking fails.
"""

import importlib.util
import json
import re
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import stateful_kv

ROOT = Path(__file__).resolve().parent.parent
BUILT = {".venv", "build", "dist", "demo-report", ".git"}
TEXT_SUFFIXES = {
    ".c", ".cfg", ".cmake", ".cpp", ".cu", ".cuh", ".h", ".html", ".json", ".md", ".py", ".pyi",
    ".sh", ".svg", ".toml", ".txt", ".yaml", ".yml",
}  # fmt: skip
TEXT_NAMES = {"CMakeLists.txt", "Makefile", "run", ".clang-format", ".gitignore", ".gitattributes"}
# Folders that exist on one machine only. /tmp and /usr are everywhere.
MACHINE_PATH = re.compile(r"(?<![\w.$}>/])/(?:home|Users|root|work|mnt|data)/\w")
FIGURE_ROW = re.compile(
    r"^\|(?P<claim>[^|]*)\|(?P<figure>[^|]*)\|"
    r"\s*`(?P<file>bench/results/[^`#]+\.json)#(?P<pointer>/[^`]*)`\s*\|$"
)
MEASURED = re.compile(r"\b\d+(?:\.\d+)?\s*(?:x|ms|us|µs|ns|tok/s|tokens/s|GB/s|GFMA/s)(?!\w)")


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / "checks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text_files(root: Path = ROOT) -> list[Path]:
    """Our text files: what git tracks or would track, or every file outside of build folders."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root, capture_output=True, text=True,
    )  # fmt: skip
    if listed.returncode == 0:
        paths = [root / name for name in listed.stdout.split("\0") if name]
    else:
        paths = [p for p in root.rglob("*") if not BUILT & set(p.relative_to(root).parts)]
    return sorted(
        p for p in paths if p.is_file() and (p.suffix in TEXT_SUFFIXES or p.name in TEXT_NAMES)
    )


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def test_no_banned_call() -> None:
    assert list(load_script("check_banned").tree_errors(ROOT)) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import marshal as m",
        "from dill import loads",
        "def f():\n    from pickle import loads",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "from torch import load",
        "eval('1')",
        "exec('1')",
        "import yaml\nyaml.load('x')",
    ],
)
def test_banned_call_is_found(tmp_path: Path, source: str) -> None:
    write(tmp_path, "python/stateful_kv/bad.py", source)
    assert len(list(load_script("check_banned").tree_errors(tmp_path))) == 1


def test_banned_call_spares_methods(tmp_path: Path) -> None:
    source = "import json\nimport re\nmodel.eval()\njson.load(f)\nre.compile('x')\n"
    source += "torch.load(f, weights_only=True)\n"
    write(tmp_path, "python/stateful_kv/good.py", source)
    assert list(load_script("check_banned").tree_errors(tmp_path)) == []


def test_banned_flag_is_found(tmp_path: Path) -> None:
    write(tmp_path, "csrc/kernels/CMakeLists.txt", "add_compile_options(-ffast-math)")
    assert len(list(load_script("check_banned").tree_errors(tmp_path))) == 1


def layer_errors(root: Path) -> list[str]:
    module = load_script("check_layers")
    return [*module.cpp_errors(root), *module.python_errors(root)]


def test_layers() -> None:
    assert layer_errors(ROOT) == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("csrc/core/a.h", "#include <torch/library.h>"),
        ("csrc/core/a.cpp", '#include "csrc/kernels/params.h"'),
        ("csrc/core/a.cpp", "#include <cuda_runtime.h>"),
        ("csrc/core/a.cpp", "#include <pthread.h>"),
        ("csrc/core/a.h", "#include <sys/mman.h>"),
        ("csrc/core/thread_pool.h", "#include <immintrin.h>"),
        ("csrc/core/thread_pool.cpp", "#include <unistd.h>"),
        ("csrc/kernels/cpu/a.cpp", "#  include <ATen/Parallel.h>"),
        ("csrc/kernels/cpu/a.cpp", '#include "csrc/core/radix_tree.h"'),
        ("csrc/kernels/cpu/a.cpp", '#include "../../core/ids.h"'),
        ("csrc/kernels/cuda/a.cu", '#include "csrc/ops/checks.h"'),
        ("csrc/ops/kv/cuda.cpp", "#include <ATen/cuda/CUDAContext.h>"),
        ("csrc/ops/kv/cpu.cpp", "#include <cuda_runtime.h>"),
        ("csrc/ops/kv/args.h", '#include "csrc/core/page_pool.h"'),
        ("csrc/ops/kv/cpu.cpp", '#include "csrc/bindings/state/busy.h"'),
        ("csrc/ops/kv/cpu.cpp", "#include <pybind11/pybind11.h>"),
        ("csrc/ops/kv/cpu.cpp", "#include <torch/csrc/utils/pybind.h>"),
        ("tests/cpp/a.cpp", "#include <pybind11/pybind11.h>"),
        ("tests/cpp/a.cpp", '#include "csrc/ops/checks.h"'),
        ("python/stateful_kv/engine/step.py", "torch.ops.stateful_kv.append_kv(k)"),
        ("python/stateful_kv/engine/ops.py", "torch.ops.stateful_kv.append_kv(k)"),
        ("tests/reference/a.py", "from stateful_kv import ops"),
    ],
)
def test_layer_break_is_found(tmp_path: Path, name: str, line: str) -> None:
    write(tmp_path, name, line + "\n")
    assert len(layer_errors(tmp_path)) == 1


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("csrc/core/a.h", "#include <string_view>"),
        ("csrc/core/thread_pool.cpp", "#include <pthread.h>"),
        ("csrc/kernels/cpu/a.cpp", '#include "csrc/core/ids.h"'),
        ("csrc/kernels/cuda/a.cu", "#include <cuda_runtime.h>"),
        ("csrc/ops/kv/cuda.cpp", "#include <c10/cuda/CUDAStream.h>"),
        ("csrc/bindings/state/a.cpp", '#include "csrc/core/radix_tree.h"'),
        ("csrc/ops/kv/cpu.cpp", '#include "csrc/ops/offsets.h"'),
        ("python/stateful_kv/ops/kv.py", "torch.ops.stateful_kv.append_kv(k)"),
    ],
)
def test_allowed_include_passes(tmp_path: Path, name: str, line: str) -> None:
    write(tmp_path, name, line + "\n")
    assert layer_errors(tmp_path) == []


def too_long(root: Path) -> list[str]:
    """Source files with more lines than their folder allows."""
    suffixes = {".py", ".pyi", ".h", ".cpp", ".cu", ".cuh"}
    found = []
    for path in sorted([*(root / "python").rglob("*"), *(root / "csrc").rglob("*")]):
        if path.suffix not in suffixes:
            continue
        name = path.relative_to(root).as_posix()
        num_lines = len(path.read_text().splitlines())
        most = 400 if name.startswith("python/stateful_kv/ops/") else 500
        if num_lines > most:
            found.append(f"{name}: expected at most {most} lines, got {num_lines}")
    return found


def test_no_source_file_is_too_long() -> None:
    assert too_long(ROOT) == []


@pytest.mark.parametrize(
    ("name", "num_lines", "is_found"),
    [
        ("python/stateful_kv/ops/kv.py", 400, False),
        ("python/stateful_kv/ops/kv.py", 401, True),
        ("python/stateful_kv/kv/cache.py", 500, False),
        ("python/stateful_kv/kv/cache.py", 501, True),
        ("csrc/kernels/cuda/a.cuh", 501, True),
        ("csrc/core/a.txt", 501, False),
    ],
)
def test_a_long_file_is_found(tmp_path: Path, name: str, num_lines: int, is_found: bool) -> None:
    write(tmp_path, name, "\n" * num_lines)
    assert bool(too_long(tmp_path)) is is_found


def room_rows(pyproject: str) -> list[str]:
    """The rows of the import contract named "Rooms", from the top room to the lowest."""
    contract = pyproject.partition('name = "Rooms"')[2].partition("[[tool.importlinter")[0]
    rows = re.search(r"^layers = \[\n(.*?)^\]", contract, re.MULTILINE | re.DOTALL)
    assert rows is not None, "pyproject.toml has no import contract of layers named Rooms"
    return re.findall(r'"([^"]+)"', rows[1])


def test_the_import_contract_is_short() -> None:
    """Ten rows can be held in mind. That no room is left out is the linter's to check."""
    assert 1 < len(room_rows((ROOT / "pyproject.toml").read_text())) <= 10


def test_no_absolute_machine_path() -> None:
    files = text_files()
    assert len(files) > 50, "the list of files is suspiciously short"
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in files
        if path.parent != ROOT / "python" / "stateful_kv" / "data"  # text of agents, not ours
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []


def test_machine_path_is_found() -> None:
    folder = "/".join(["", "home", "somebody", "src"])
    assert MACHINE_PATH.search(f"see {folder}")
    assert not MACHINE_PATH.search("https://example.org/home/page and $HOME/home/x")


def test_results_are_json() -> None:
    for path in (ROOT / "bench" / "results").glob("**/*.json"):
        assert isinstance(json.loads(path.read_text()), dict), path


def look_up(document: Any, pointer: str) -> Any:
    """The value at a JSON pointer."""
    for part in pointer.split("/")[1:]:
        document = document[int(part)] if isinstance(document, list) else document[part]
    return document


def figure_error(row: str, root: Path) -> str | None:
    """Why a row of the README's figures is not backed by its JSON, or None."""
    found = FIGURE_ROW.match(row)
    if not found:
        return "expected | claim | figure | `bench/results/NAME.json#/path` |"
    path = root / found["file"]
    if not path.is_file():
        return f"{found['file']} does not exist"
    try:
        value = look_up(json.loads(path.read_text()), found["pointer"])
    except (KeyError, IndexError, ValueError) as error:
        return f"{found['pointer']} is not in {found['file']}: {error!r}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"{found['pointer']} is no number: {value!r}"
    shown = re.search(r"\d+(?:\.(\d+))?", found["figure"].replace(",", ""))
    if not shown:
        return "no number shown"
    decimals = len(shown[1] or "")
    # The unit shown may be the stored one or a prefix of it (s, ms, us, ns), or a percentage.
    scales = (1.0, 1e3, 1e6, 1e9, 1e-3, 1e-6, 1e-9, 1e2)
    if not any(f"{value * scale:.{decimals}f}" == shown[0] for scale in scales):
        return f"shows {shown[0]}, the JSON has {value}"
    return None


def figure_rows(readme: str) -> list[str]:
    inside = readme.partition("<!-- figures:begin -->")[2].partition("<!-- figures:end -->")[0]
    rows = [line.strip() for line in inside.splitlines() if line.strip().startswith("|")]
    return [row for row in rows[1:] if not re.fullmatch(r"[|:\- ]+", row)]


def test_every_figure_of_the_readme_has_its_json() -> None:
    readme = (ROOT / "README.md").read_text()
    assert readme.count("<!-- figures:begin -->") == readme.count("<!-- figures:end -->") == 1
    errors = {row: error for row in figure_rows(readme) if (error := figure_error(row, ROOT))}
    assert errors == {}


def test_no_figure_outside_of_its_section() -> None:
    before, _, rest = (ROOT / "README.md").read_text().partition("<!-- figures:begin -->")
    after = rest.partition("<!-- figures:end -->")[2]
    assert MEASURED.findall(before + after) == []


@pytest.mark.parametrize(
    ("figure", "good"),
    [("4.30x", True), ("4.3x", True), ("4.4x", False), ("4300", True), ("no number", False)],
)
def test_figure_is_compared(tmp_path: Path, figure: str, good: bool) -> None:
    write(tmp_path, "bench/results/a.json", '{"rows": [{"ratio": 4.3}]}')
    row = f"| later turn | {figure} | `bench/results/a.json#/rows/0/ratio` |"
    assert (figure_error(row, tmp_path) is None) == good
    assert figure_error(row.replace("/0/", "/1/"), tmp_path) is not None
    assert figure_error(row.replace("a.json", "b.json"), tmp_path) is not None
    assert MEASURED.search("a turn is 4.3x faster") and MEASURED.search("takes 12 ms")


def test_links_of_documents_resolve() -> None:
    link = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")
    broken = [
        f"{path.relative_to(ROOT)}: {target}"
        for path in text_files()
        if path.suffix == ".md"
        for target in link.findall(path.read_text())
        if not (path.parent / target).exists()
    ]
    assert broken == []


def test_decision_records_are_complete() -> None:
    folder = ROOT / "docs" / "adr"
    records = sorted(folder.glob("[0-9]*.md"))
    index = (folder / "README.md").read_text()
    assert [int(p.name[:4]) for p in records] == list(range(1, len(records) + 1))
    for path in records:
        text = path.read_text()
        headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
        assert headings == ["Context", "Decision", "Consequences"], path.name
        assert text.startswith(f"# {path.name[:4]}: "), path.name
        assert path.name in index, f"{path.name} is not in the index"


def test_formatter_pins_agree() -> None:
    pin = re.compile(r'"((?:ruff|clang-format)==[\d.]+)"')
    hooks = set(pin.findall((ROOT / ".pre-commit-config.yaml").read_text()))
    extras = set(pin.findall((ROOT / "pyproject.toml").read_text()))
    assert len(extras) == 2
    assert hooks == extras


def test_scripts_can_be_run() -> None:
    scripts = [ROOT / ".ci" / "run", *(ROOT / "scripts").rglob("*.sh")]
    assert len(scripts) > 10, "the list of scripts is suspiciously short"
    for path in scripts:
        first = path.read_text().splitlines()[0]
        assert path.stat().st_mode & 0o111 or not first.startswith("#!"), f"{path} needs chmod +x"
        checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr


def test_changelog_names_this_version() -> None:
    assert f"## {stateful_kv.__version__}" in (ROOT / "CHANGELOG.md").read_text()
