"""Our own attention under every way to divide its work: how good is the one that it chooses?

The way changes no bit, so the results must be equal. What a fixed order of sums costs cannot be
seen here: every way has that order.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bench.harness import Call, PeerMissingError

# Environment variables that the op reads at each launch; for tests and this peer only.
RUN, WARPS = "SKV_ATTENTION_RUN_LOG2", "SKV_ATTENTION_WARPS"
WGMMA = "STATEFUL_KV_WGMMA"
RUNS_LOG2 = range(7)
MOST_WARPS = 8
ROWS_OF_A_WARP = 16


def ways(num_rows: int) -> list[tuple[int, int]]:
    """Runs and warps worth a trial; more warps than rows can fill are not.

    Args:
        num_rows: rows that share keys: of a sequence or a group, times the heads of a KV head.
    """
    warps = [1]
    while warps[-1] < MOST_WARPS and warps[-1] * ROWS_OF_A_WARP < num_rows:
        warps.append(2 * warps[-1])
    return list(itertools.product(RUNS_LOG2, warps))


@contextmanager
def divided(run_log2: int, warps: int) -> Iterator[None]:
    """Launches inside use runs of 2 ** run_log2 chunks and blocks of this many warps."""
    before = {name: os.environ.get(name) for name in (RUN, WARPS)}
    os.environ.update({RUN: str(run_log2), WARPS: str(warps)})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def by_warpgroups() -> Iterator[None]:
    """Launches inside use the warpgroup products of Hopper, where the op has them."""
    before = os.environ.get(WGMMA)
    os.environ[WGMMA] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[WGMMA]
        else:
            os.environ[WGMMA] = before


def _under(call: Call, run_log2: int, warps: int) -> Call:
    def run(index: int) -> object:
        with divided(run_log2, warps):
            return call(index)

    return run


def best(
    call: Call, num_rows: int, seconds_of: Callable[[Call], float]
) -> tuple[str, Call, dict[str, float]]:
    """The quickest way.

    Args:
        call: our op on one of the copies.
        num_rows: see `ways`.
        seconds_of: takes such a call.

    Returns:
        name: of the way.
        call: the op under it.
        seconds: of all ways that the op takes.

    Raises:
        PeerMissingError: the op takes none.
    """
    calls, seconds = {}, {}
    for run_log2, warps in ways(num_rows):
        name = f"runs of {1 << run_log2} chunks, {warps} warps"
        calls[name] = _under(call, run_log2, warps)
        try:
            seconds[name] = seconds_of(calls[name])
        except (RuntimeError, ValueError):
            continue  # more than this device holds
    if not seconds:
        raise PeerMissingError("the op takes no way to divide its work but its own")
    name = min(seconds, key=seconds.__getitem__)
    return name, calls[name], seconds
