#!/usr/bin/env python3
"""Compiles the CUDA kernels and writes what each needs as a Markdown table; no GPU needed.

python scripts/cuda_report.py --output docs/cuda-kernels.md

Fails if a kernel spills registers to memory.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "csrc" / "kernels" / "cuda"
BINDINGS = ROOT / "csrc" / "bindings"
ENTRY = re.compile(r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\d+)a?'")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
DEMANGLED = re.compile(r"(?P<name>\w+)(?P<arguments><.*>)?\(")


@dataclass
class Kernel:
    """What ptxas says of one kernel for one architecture; sizes in bytes."""

    name: str
    arch: int
    registers: int = 0
    spills: int = 0
    shared: int = 0


def parse_log(log: str) -> list[Kernel]:
    """The kernels of one `ptxas -v` log: an entry line, then the lines that belong to it."""
    kernels: list[Kernel] = []
    for line in log.splitlines():
        if entry := ENTRY.search(line):
            kernels.append(Kernel(entry["name"], int(entry["arch"])))
        elif kernels and (spills := SPILLS.search(line)):
            kernels[-1].spills += int(spills[1]) + int(spills[2])
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
        short = re.sub(r"skv::cuda::\(anonymous namespace\)::|\(int\)", "", line)
        found = DEMANGLED.search(short)
        readable[symbol] = found["name"] + (found["arguments"] or "") if found else short
    return readable


def compile_source(nvcc: str, source: Path, archs: list[str]) -> list[Kernel]:
    """Compiles one file for all architectures and reads the assembler's log."""
    targets = [f"--generate-code=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-std=c++20", "-O3", "-Xptxas", "-v", f"-I{ROOT}", *targets]
        command += ["-c", str(source), "-o", str(Path(folder) / "kernel.o")]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{source.name} does not compile:\n{result.stderr}")
    return parse_log(result.stderr)


def ops_without_kernel() -> list[str]:
    """Ops of the schema that no *_cuda.cpp registers."""
    defined = re.findall(r'm\.def\(\s*"(\w+)\(', (BINDINGS / "library.cpp").read_text())
    sources = "".join(path.read_text() for path in BINDINGS.glob("*_cuda.cpp"))
    return sorted(set(defined) - set(re.findall(r'm\.impl\("(\w+)"', sources)))


def missing_sentence() -> list[str]:
    """What the page says about them, in lines."""
    *names, last = [f"`{name}`" for name in ops_without_kernel()]
    return textwrap.wrap(
        f"{', '.join(names)} and {last} have no CUDA kernel: on CUDA tensors they raise torch's "
        "NotImplementedError, which names the op and the backend.",
        width=88,
    )


def markdown(kernels: list[tuple[str, Kernel]], nvcc_version: str) -> str:
    """The whole page; one row a kernel, architectures side by side would hide differences."""
    lines = [
        "# CUDA kernels",
        "",
        f"Compiled with nvcc {nvcc_version}, not yet run on a GPU. Written by",
        "`python scripts/cuda_report.py --output docs/cuda-kernels.md`.",
        "",
        *missing_sentence(),
        "",
        "| source | kernel | sm | registers | spills (bytes) | shared memory (bytes) |",
        "|---|---|---|---|---|---|",
    ]
    for source, kernel in kernels:
        lines.append(
            f"| {source} | `{kernel.name}` | {kernel.arch} | {kernel.registers} "
            f"| {kernel.spills} | {kernel.shared} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parses the command line, compiles, writes the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nvcc", default=shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    parser.add_argument("--archs", default="80,90", help="comma-separated, like 80,90")
    parser.add_argument("--output", type=Path, help="write here instead of to the terminal")
    arguments = parser.parse_args()
    if not shutil.which(arguments.nvcc):
        sys.exit(f"nvcc not found: {arguments.nvcc} (name it with --nvcc)")
    about = subprocess.run(
        [arguments.nvcc, "--version"], check=True, capture_output=True, text=True
    )
    version = re.search(r"V(\d+\.\d+\.\d+)", about.stdout)

    rows: list[tuple[str, Kernel]] = []
    for source in sorted(KERNELS.glob("*.cu")):
        kernels = compile_source(arguments.nvcc, source, arguments.archs.split(","))
        names = readable_names(sorted({kernel.name for kernel in kernels}))
        for kernel in kernels:
            kernel.name = names[kernel.name]
        # Numbers inside names by value: <float, 64> before <float, 128>.
        kernels.sort(
            key=lambda kernel: (re.sub(r"\d+", lambda n: f"{n[0]:0>6}", kernel.name), kernel.arch)
        )
        rows += [(source.name, kernel) for kernel in kernels]

    page = markdown(rows, version[1] if version else "of unknown version")
    if arguments.output:
        arguments.output.write_text(page)
    else:
        sys.stdout.write(page)
    if spilling := [kernel.name for _, kernel in rows if kernel.spills]:
        sys.exit("kernels that spill registers: " + ", ".join(spilling))


if __name__ == "__main__":
    main()
