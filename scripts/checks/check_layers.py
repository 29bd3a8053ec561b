#!/usr/bin/env python3
"""Checks which layer includes or imports which (docs/architecture.md); Python layers: lint-imports.

Core is the C++ standard library, but for what the thread pool needs of the system. Kernels see four
small headers of core and no torch. Ops know torch, but neither Python nor state objects; bindings
are the only folder with Python and pybind11.
Only stateful_kv/ops touches `torch.ops`, and the references of the tests use none of our code.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')
CPP_SUFFIXES = {".h", ".cpp", ".cu", ".cuh"}
TORCH = re.compile(r"^(torch|ATen|c10|caffe2)/")
PYTHON = re.compile(r"^pybind11/|^Python\.h$|^torch/csrc/(utils/pybind|Exceptions)\.h$")
CUDA_TOOLKIT = re.compile(r"^(cuda|cub/|cute/|cutlass/|thrust/|mma\.h|cooperative_groups)")
CORE_FOR_KERNELS = {"ids.h", "function_ref.h", "parallel_for.h", "assert.h"}
CORE_FOR_OPS = {"parallel_for.h", "thread_pool.h"}
# Headers of the C++ standard library have no suffix and no folder.
STANDARD_HEADER = re.compile(r"^[a-z_]+$")
SYSTEM_HEADERS = {"csrc/core/thread_pool.cpp": {"pthread.h", "immintrin.h"}}
OPS = "python/stateful_kv/ops"
FOLDERS = ("csrc/core", "csrc/kernels", "csrc/ops", "csrc/bindings", "tests/cpp")


def include_error(folder: str, path: Path, quoted: bool, name: str) -> str | None:
    """Why a file of `folder` may not include `name`, or None."""
    if folder != "csrc/bindings" and PYTHON.match(name):
        return "only csrc/bindings includes pybind11 or Python headers"
    if folder not in ("csrc/ops", "csrc/bindings") and TORCH.match(name):
        return "only csrc/ops and csrc/bindings include torch"
    if name.startswith("ATen/cuda"):
        return "ATen/cuda needs cuBLAS and cuSPARSE headers; use c10/cuda"
    is_cuda_file = "cuda" in path.parts or "cuda" in path.stem.split("_")
    if CUDA_TOOLKIT.match(name) and not is_cuda_file:
        return "CUDA headers belong to csrc/kernels/cuda and the cuda files of ops"
    if not quoted:
        allowed = STANDARD_HEADER.match(name) or name in SYSTEM_HEADERS.get(path.as_posix(), set())
        if folder == "csrc/core" and not allowed:
            return "core includes core and the C++ standard library"
        return None
    if ".." in name.split("/"):
        return "include by the path from the repository root"
    if folder == "csrc/core" and not name.startswith("csrc/core/"):
        return "core includes core and the C++ standard library"
    if folder == "csrc/kernels" and name.startswith("csrc/"):
        layer, rest = name.split("/", 2)[1:]
        if layer == "core" and rest not in CORE_FOR_KERNELS:
            return f"of core, kernels include only {', '.join(sorted(CORE_FOR_KERNELS))}"
        if layer not in ("core", "kernels"):
            return f"kernels do not know csrc/{layer}"
    is_of_state = name.startswith(("csrc/core/", "csrc/bindings/")) and (
        name.removeprefix("csrc/core/") not in CORE_FOR_OPS
    )
    if folder == "csrc/ops" and is_of_state:
        return "ops see no state objects: page tables and offsets come as tensors"
    if folder == "tests/cpp" and name.startswith(("csrc/ops/", "csrc/bindings/")):
        return "C++ tests build without torch"
    return None


def cpp_errors(root: Path) -> Iterator[str]:
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix not in CPP_SUFFIXES:
                continue
            relative = path.relative_to(root)
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if found := INCLUDE.match(line):
                    quoted, name = found[1] == '"', found[2]
                    if why := include_error(folder, relative, quoted, name):
                        yield f"{relative}:{number}: includes {name}: {why}"


def python_errors(root: Path) -> Iterator[str]:
    rules = (
        ("python/stateful_kv", r"\btorch\.ops\b", OPS, "only stateful_kv/ops touches torch.ops"),
        ("tests/reference", r"^\s*(from|import)\s+stateful_kv\b", None, "references use own code"),
    )
    for folder, pattern, exempt, why in rules:
        for path in sorted((root / folder).rglob("*.py")):
            if exempt is not None and (root / exempt) in path.parents:
                continue
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if re.search(pattern, line.partition("#")[0]):
                    yield f"{path.relative_to(root)}:{number}: {why}"


def main(root: Path) -> int:
    errors = [*cpp_errors(root), *python_errors(root)]
    print("\n".join(errors) if errors else "layers: no forbidden include or import")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parents[2]))
