"""The CUDA kernels pass the op tests on the emulator of tests/emulation, without a GPU."""

from __future__ import annotations

import os
import sys

import pytest

from tests.emulated_run import BUILD, build_emulation, run_emulated

# The order in which the threads of a block run, and whether asynchronous copies are done as late or
# as early as their waits allow. A missing barrier or wait shows in one of them.
ORDERS = [("forward", "late"), ("reversed", "early"), ("3", "late"), ("4", "early")]

pytestmark = pytest.mark.skipif(
    "SKV_EMULATED_CUDA" in os.environ, reason="this is the emulated run"
)


@pytest.fixture(scope="session", autouse=True)
def built() -> None:
    build_emulation()


@pytest.mark.parametrize(("order", "copies"), ORDERS)
def test_the_emulator_keeps_its_promises(order: str, copies: str) -> None:
    result = run_emulated([str(BUILD / "skv_emulation_self_test")], order, copies)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "passed" in result.stdout


@pytest.mark.parametrize("part", ["attention", "not attention"])
def test_op_tests_pass(part: str) -> None:
    options = ["-m", "pytest", "tests/ops", "-q", "-p", "no:cacheprovider", "-k", part]
    result = run_emulated([sys.executable, *options, "-m", "not slow_emulated"])
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert " passed" in result.stdout


def test_results_do_not_depend_on_the_order_of_threads() -> None:
    digests = {}
    for order, copies in ORDERS:
        result = run_emulated([sys.executable, "-m", "tests.ops.digests"], order, copies)
        assert result.returncode == 0, f"{order}, {copies}: {result.stderr[-4000:]}"
        digests[order, copies] = result.stdout
    expected = digests[ORDERS[0]]
    assert len(expected.splitlines()) > 20
    for setting, lines in digests.items():
        assert lines == expected, setting


def test_an_unknown_order_is_refused() -> None:
    result = run_emulated([str(BUILD / "skv_emulation_self_test")], "sideways")
    assert result.returncode != 0
    assert "SKV_EMULATION_ORDER: expected forward, reversed or a number, got 'sideways'" in (
        result.stderr
    )
