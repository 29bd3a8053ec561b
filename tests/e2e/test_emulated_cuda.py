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


def test_the_equality_tests_pass() -> None:
    build_emulation()
    # Attention on CUDA reads no int8 pools yet; single rows take long.
    chosen = "emulated and not int8 and not 1-emulated and not 2-emulated and not page_size"
    options = ["-q", "-p", "no:cacheprovider", "-k", chosen]
    result = run_emulated([sys.executable, "-m", "pytest", "tests/e2e/test_bitwise.py", *options])
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None and int(passed[1]) >= 12, result.stdout
    assert "skipped" not in result.stdout
