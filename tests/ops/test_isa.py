"""Every instruction set this CPU has passes the tests marked `isa`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stateful_kv import _C

ROOT = Path(__file__).resolve().parents[2]
KNOWN = ["generic", "avx2", "avx512"]


def child(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with another instruction set, which is chosen once per process."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "STATEFUL_KV_CPU_ISA": isa},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("isa", KNOWN)
def test_op_tests_pass_with(isa: str) -> None:
    if isa == _C.cpu_isa():
        pytest.skip(f"{isa} is what the whole suite runs with")
    chosen = child(isa, "-c", "from stateful_kv import _C; print(_C.cpu_isa())")
    if isa != "generic" and "STATEFUL_KV_CPU_ISA: expected one of" in chosen.stderr:
        pytest.skip(f"{isa} is not built or this CPU lacks it")
    assert chosen.stdout.strip() == isa, chosen.stderr
    options = ["-m", "pytest", "tests/ops", "-q", "-p", "no:cacheprovider"]
    result = child(isa, *options, "-m", "isa and not cuda")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


def test_an_unknown_set_is_refused() -> None:
    result = child("sse9", "-c", "import stateful_kv.ops")
    assert result.returncode != 0
    assert "STATEFUL_KV_CPU_ISA" in result.stderr
    assert "sse9" in result.stderr
    assert "generic" in result.stderr
