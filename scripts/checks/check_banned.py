#!/usr/bin/env python3
"""Refuses what could run code from data or change results behind our back.

Python: pickle and its relatives, torch.load, builtin eval/exec/compile, unsafe yaml. Builds: flags
that tie a binary to one machine or let the compiler reorder sums.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

PYTHON_FOLDERS = ("python", "bench", "tests", "scripts", "examples")
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
BUILTINS = {"eval", "exec", "compile"}
ATTRIBUTES = {
    ("torch", "load"): "torch.load unpickles; read safetensors, or say weights_only=True",
    ("yaml", "load"): "yaml.load builds objects; use yaml.safe_load",
    ("yaml", "unsafe_load"): "yaml.unsafe_load builds objects; use yaml.safe_load",
}
BUILD_FILES = ("CMakeLists.txt", "*.cmake", "setup.py", "Makefile")
FLAGS = re.compile(r"-march=native|-mtune=native|-ffast-math|-Ofast|--use_fast_math")


def call_name(node: ast.expr) -> tuple[str, ...]:
    """The dotted name of a called expression, empty if it is not a plain name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return (node.id, *reversed(parts)) if isinstance(node, ast.Name) else ()


def is_data_alone(call: ast.Call) -> bool:
    """Whether the call says weights_only=True, with which torch.load builds tensors alone."""
    return any(
        keyword.arg == "weights_only"
        and isinstance(keyword.value, ast.Constant)
        and keyword.value.value is True
        for keyword in call.keywords
    )


def source_errors(source: str) -> Iterator[tuple[int, str]]:
    """Line and reason of each banned import or call in one Python file."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
            for alias in node.names:
                if why := ATTRIBUTES.get((names[0], alias.name)):
                    yield node.lineno, why
        elif isinstance(node, ast.Call):
            name = call_name(node.func)
            if len(name) == 1 and name[0] in BUILTINS:
                yield node.lineno, f"builtin {name[0]}() runs text as code"
            if len(name) == 2 and (why := ATTRIBUTES.get(name)) and not is_data_alone(node):
                yield node.lineno, why
        for module in names:
            if module.split(".")[0] in MODULES:
                yield node.lineno, f"{module} runs code from data; use a checked format"


def tree_errors(root: Path) -> Iterator[str]:
    python_files = [p for folder in PYTHON_FOLDERS for p in (root / folder).rglob("*.py")]
    for path in sorted([*python_files, *root.glob("*.py")]):
        for line, why in source_errors(path.read_text()):
            yield f"{path.relative_to(root)}:{line}: {why}"
    folders = (root, *(root / name for name in ("cmake", "csrc", "tests")))
    for folder in folders:
        for pattern in BUILD_FILES:
            for path in folder.glob(pattern) if folder == root else folder.rglob(pattern):
                for number, line in enumerate(path.read_text().splitlines(), 1):
                    if flag := FLAGS.search(line):
                        yield f"{path.relative_to(root)}:{number}: {flag[0]} must not be shipped"


def main(root: Path) -> int:
    errors = list(tree_errors(root))
    print("\n".join(errors) if errors else "banned calls: none")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parents[2]))
