"""The engine on the CUDA kernels, in bfloat16, without a GPU: they run on the emulator."""

from __future__ import annotations

import os
import re
import sys

import pytest

from tests.emulated_run import build_emulation, run_emulated

pytestmark = pytest.mark.skipif(
    "SKV_EMULATED_CUDA" in os.environ, reason="this is the emulated run"
)


def run_chosen(path: str, chosen: str, at_least: int) -> None:
    """Runs tests of a file; so many must pass, and none may be skipped."""
    build_emulation()
    options = ["-q", "-p", "no:cacheprovider", "-k", chosen]
    result = run_emulated([sys.executable, "-m", "pytest", path, *options])
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None and int(passed[1]) >= at_least, result.stdout
    assert "skipped" not in result.stdout


def test_the_equality_tests_pass() -> None:
    # Attention on CUDA reads no int8 pools yet; single rows take long.
    chosen = "emulated and not int8 and not 1-emulated and not 2-emulated and not page_size"
    run_chosen("tests/e2e/test_bitwise.py", chosen, 12)


def test_multi_steps_give_what_single_steps_give() -> None:
    some = "rewinds and 8- or several_sessions and 3-True-3 or books and True-3-"
    run_chosen("tests/e2e/test_multi_step.py", f"emulated and not int8 and ({some})", 5)
