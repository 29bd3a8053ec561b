#!/usr/bin/env python3
"""Writes or checks the table of what each CUDA kernel needs, from the logs of `make cuda-check`.

python scripts/checks/cuda_report.py --output docs/cuda-kernels.md
python scripts/checks/cuda_report.py --check docs/cuda-kernels.md

Fails if a kernel spills registers to memory, or if the checked table lists other kernels.
"""

import argparse
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc" / "kernels" / "cuda"
OPS = ROOT / "csrc" / "ops"
# Where the target cuda_check of cmake/CudaCheck.cmake leaves objects, and their logs beside them.
OBJECTS = Path("CMakeFiles", "skv_cuda_check.dir")
INSTANTIATED = "instantiated"  # folder of the sources that CMake writes, inside the build folder
ENTRY = re.compile(r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\d+)a?'")
STACK = re.compile(r"(\d+) bytes stack frame")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
DEMANGLED = re.compile(r"(?P<name>\w+)(?P<arguments><.*>)?\(")
UPDATE = "python scripts/checks/cuda_report.py --output docs/cuda-kernels.md"


@dataclass
class Kernel:
    """What ptxas says of one kernel for one architecture; sizes in bytes."""

    source: str
    name: str
    arch: int
    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0

    @property
    def key(self) -> tuple[str, str, int]:
        """What identifies it in the table."""
        return self.source, self.name, self.arch


def parse_log(log: str, source: str = "") -> list[Kernel]:
    """The kernels of one `ptxas -v` log: an entry line, then the lines that belong to it."""
    kernels: list[Kernel] = []
    for line in log.splitlines():
        if entry := ENTRY.search(line):
            kernels.append(Kernel(source, entry["name"], int(entry["arch"])))
        elif kernels and (spills := SPILLS.search(line)):
            kernels[-1].spills += int(spills[1]) + int(spills[2])
            stack = STACK.search(line)
            kernels[-1].stack = max(kernels[-1].stack, int(stack[1]) if stack else 0)
        elif kernels and (used := USED.search(line)):
            kernels[-1].registers = int(used[1])
            shared = SHARED.search(line)
            kernels[-1].shared = int(shared[1]) if shared else 0
    return kernels


def readable_names(names: list[str]) -> dict[str, str]:
    """Symbol -> `kernel<template arguments>`."""
    command = ["c++filt", *names]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    readable = {}
    for symbol, line in zip(names, lines, strict=True):
        short = re.sub(r"skv::(cuda::)?(\(anonymous namespace\)::)?|\((?:int|bool)\)", "", line)
        found = DEMANGLED.search(short)
        readable[symbol] = found["name"] + (found["arguments"] or "") if found else short
    return readable


def read_logs(build: Path) -> list[Kernel]:
    """The kernels of every .cu file, in the order of the table."""
    kernels: list[Kernel] = []
    folders = {KERNELS: KERNELS.relative_to(ROOT), build / INSTANTIATED: Path(INSTANTIATED)}
    for source in sorted(path for folder in folders for path in folder.glob("*.cu")):
        log = build / OBJECTS / folders[source.parent] / f"{source.name}.o.log"
        if not log.is_file():
            sys.exit(f"{source.name}: no log {log}; run `make cuda-check` first")
        kernels += parse_log(log.read_text(), source.name)
    names = readable_names(sorted({kernel.name for kernel in kernels}))
    for kernel in kernels:
        kernel.name = names[kernel.name]
    # Numbers inside names by value: <float, 64> before <float, 128>.
    kernels.sort(
        key=lambda kernel: (
            kernel.source,
            re.sub(r"\d+", lambda n: f"{n[0]:0>6}", kernel.name),
            kernel.arch,
        )
    )
    return kernels


def ops_without_kernel() -> list[str]:
    """Ops of the schema that no cuda.cpp registers."""
    defined = re.findall(r'm\.def\(\s*"(\w+)\(', (OPS / "library.cpp").read_text())
    sources = "".join(path.read_text() for path in OPS.glob("*/cuda.cpp"))
    return sorted(set(defined) - set(re.findall(r'm\.impl\(\s*"(\w+)"', sources)))


def missing_sentence() -> list[str]:
    """What the page says about them, in lines."""
    *names, last = [f"`{name}`" for name in ops_without_kernel()]
    return textwrap.wrap(
        f"{', '.join(names)} and {last} have no CUDA kernel: on CUDA tensors they raise torch's "
        "NotImplementedError, which names the op and the backend.",
        width=88,
    )


def markdown(kernels: list[Kernel], nvcc_version: str) -> str:
    """The whole page; one row a kernel, architectures side by side would hide differences."""
    lines = [
        "# CUDA kernels",
        "",
        f"Compiled with nvcc {nvcc_version} and emulated, not yet run on a GPU. Written by",
        f"`{UPDATE}`",
        "from the logs of `make cuda-check`, which fails if this table lacks a kernel or one",
        "spills registers.",
        "",
        *missing_sentence(),
        "",
        "Static shared memory only; sizes in bytes.",
        "",
        "| source | kernel | sm | registers | stack | spills | shared memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for kernel in kernels:
        lines.append(
            f"| {kernel.source} | `{kernel.name}` | {kernel.arch} | {kernel.registers} "
            f"| {kernel.stack} | {kernel.spills} | {kernel.shared} |"
        )
    return "\n".join(lines) + "\n"


def listed_kernels(page: str) -> set[tuple[str, str, int]]:
    """The kernels of a page."""
    rows = [
        [cell.strip(" `") for cell in line.strip("|").split(" | ")]
        for line in page.splitlines()
        if line.startswith("| ") and ".cu | " in line
    ]
    return {(row[0], row[1], int(row[2])) for row in rows}


def differences(page: str, kernels: list[Kernel]) -> list[str]:
    """Kernels that only the page or only the build has. Registers depend on the nvcc version."""
    listed, built = listed_kernels(page), {kernel.key for kernel in kernels}
    return [f"not in the table: {key}" for key in sorted(built - listed)] + [
        f"in the table but not built: {key}" for key in sorted(listed - built)
    ]


def nvcc_version(build: Path) -> str:
    """Of the compiler of that build."""
    compiler = re.search(
        r"^CMAKE_CUDA_COMPILER:\w+=(.+)$", (build / "CMakeCache.txt").read_text(), re.MULTILINE
    )
    if compiler is None:
        sys.exit(f"{build / 'CMakeCache.txt'} names no CMAKE_CUDA_COMPILER")
    command = [compiler[1], "--version"]
    about = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", about)
    return found[1] if found else "of unknown version"


def main() -> None:
    """Parses the command line; writes or checks the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "cuda-check")
    parser.add_argument("--output", type=Path, help="write here instead of to the terminal")
    parser.add_argument("--check", type=Path, help="write nothing, compare with this table")
    arguments = parser.parse_args()

    kernels = read_logs(arguments.build)
    problems = [
        f"spills {kernel.spills} bytes: {kernel.key}" for kernel in kernels if kernel.spills
    ]
    if arguments.check:
        different = differences(arguments.check.read_text(), kernels)
        problems += different + ([f"update the table with: {UPDATE}"] if different else [])
    elif arguments.output:
        arguments.output.write_text(markdown(kernels, nvcc_version(arguments.build)))
    else:
        sys.stdout.write(markdown(kernels, nvcc_version(arguments.build)))
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
