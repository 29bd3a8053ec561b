"""A forked child can use or at least destroy the state objects, whatever other threads did."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest
import torch

from stateful_kv._native import _C
from stateful_kv.errors import StateBusyError

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]

TOKENS = torch.zeros(20_000_000, dtype=torch.int64)


def run_in_child(check: Callable[[], None]) -> None:
    """Forks, runs `check` in the child and fails unless it returns in time."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            check()
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the child hangs")


def fork_during(call: Callable[[], object], probe: Callable[[], object], check: Callable[[], None]):
    """Forks while another thread is inside `call`, which `probe` finds busy.

    A call that released the GIL leaves its flag set until it has the GIL again; so from the refusal
    to the fork the flag stays as it is.
    """
    stop = threading.Event()

    def repeat() -> None:
        while not stop.is_set():
            try:
                call()
            except StateBusyError:
                time.sleep(0.001)

    worker = threading.Thread(target=repeat)
    worker.start()
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                probe()
            except StateBusyError:
                run_in_child(check)
                return
        pytest.fail("the call was never found busy")
    finally:
        stop.set()
        worker.join()


def test_an_object_that_was_read_can_be_used() -> None:
    pool = _C.PagePool(2, 1 << 25)
    tree = _C.RadixTree(pool)
    tree.insert(0, TOKENS, pool.allocate(1))

    def check() -> None:
        assert tree.num_nodes() == 1
        assert tree.match(0, TOKENS).num_tokens == len(TOKENS)
        assert pool.allocate(1) is not None
        assert tree.check_integrity() is None

    fork_during(lambda: tree.match(0, TOKENS), tree.num_nodes, check)


def test_an_object_that_was_changed_can_be_destroyed() -> None:
    pool = _C.PagePool(4, 1 << 25)
    tree = _C.RadixTree(pool)
    pages = pool.allocate(1)
    others = [_C.SequenceTable(pool), _C.RadixTree(pool)]
    others[0].create()

    def check() -> None:
        for call in (tree.num_nodes, tree.evict_all, pool.num_free, lambda: pool.allocate(1)):
            with pytest.raises(StateBusyError, match=r"is broken: another thread .* forked"):
                call()
        others.clear()  # their destructors want the pool
        fresh = _C.PagePool(4, 4)
        assert _C.SequenceTable(fresh).create() == 0

    fork_during(lambda: tree.insert(0, TOKENS, pages), tree.num_nodes, check)
    assert len(others) == 2
    assert tree.num_nodes() == 1, "the parent goes on"
    assert pool.num_free() == 3


def test_an_idle_object_can_be_used() -> None:
    pool = _C.PagePool(4, 4)
    table = _C.SequenceTable(pool)
    seq = table.create()

    def check() -> None:
        assert table.reserve(seq, 16) is not None
        table.release(seq)
        assert pool.num_free() == 4

    run_in_child(check)
    assert pool.num_free() == 4
