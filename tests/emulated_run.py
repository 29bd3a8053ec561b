"""Runs commands in which the emulated CUDA kernels are those of CPU tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build/emulation"


def build_emulation() -> None:
    """Builds the library of the sources as they are now; nothing to do after `make emulation`."""
    result = subprocess.run(
        ["scripts/build_emulation.sh"],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]


def run_emulated(
    arguments: list[str], order: str = "forward", copies: str = "late"
) -> subprocess.CompletedProcess[str]:
    """Runs a process; `order` and `copies` are those of tests/emulation."""
    emulation = {
        "SKV_EMULATED_CUDA": str(BUILD / "libskv_emulated.so"),
        "SKV_EMULATION_ORDER": order,
        "SKV_EMULATION_COPIES": copies,
    }
    return subprocess.run(
        arguments,
        cwd=ROOT,
        env={**os.environ, **emulation},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
