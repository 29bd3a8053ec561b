"""Which exception comes when, and that a refused call changed nothing."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable

import pytest
import torch

from stateful_kv._native import _C
from stateful_kv.errors import InvariantError, StateBusyError, StatefulKVError


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_double_release_changes_nothing() -> None:
    pool = _C.PagePool(4, 4)
    pages = pool.allocate(3)
    pool.release(pages[:1])
    with pytest.raises(ValueError, match="page 0 is not held: released more often than retained"):
        pool.release(pages)
    with pytest.raises(ValueError, match="page 2 is not held"):
        pool.release(ids(1, 2, 2))
    assert [pool.ref_count(page) for page in range(4)] == [0, 1, 1, 0]
    assert pool.num_free() == 2
    assert pool.check_integrity() is None


def test_exception_types() -> None:
    pool = _C.PagePool(4, 4)
    table, tree = _C.SequenceTable(pool), _C.RadixTree(pool)
    seq = table.create()
    table.release(seq)
    calls: list[tuple[type[Exception], Callable[[], object]]] = [
        (IndexError, lambda: pool.ref_count(4)),
        (IndexError, lambda: pool.retain(ids(-1))),
        (ValueError, lambda: pool.retain(ids(0))),
        (ValueError, lambda: pool.allocate(-1)),
        (TypeError, lambda: pool.allocate(1.5)),  # type: ignore[arg-type]
        (ValueError, lambda: table.length(seq)),
        (IndexError, lambda: table.length(99)),
        (IndexError, lambda: tree.unpin(0)),
        (TypeError, lambda: tree.match(-1, ids(1))),
        (TypeError, lambda: tree.match(2**64, ids(1))),
        (ValueError, lambda: tree.insert(0, ids(1, 2), ids())),
        (ValueError, lambda: _C.PagePool(4, 0)),
        (ValueError, lambda: _C.NgramIndex(3, 2)),
        (ValueError, lambda: _C.NgramIndex().truncate(1)),
        (TypeError, lambda: _C.SequenceTable(None)),  # type: ignore[arg-type]
        (TypeError, lambda: _C._set_error_types({"InvariantError": 3})),
    ]
    for expected, call in calls:
        with pytest.raises(expected):
            call()
    assert pool.num_free() == 4


def test_touch_wants_a_match_of_the_same_tree() -> None:
    pool = _C.PagePool(4, 4)
    one, other = _C.RadixTree(pool), _C.RadixTree(pool)
    with pytest.raises(ValueError, match="this tree"):
        one.touch(other.match(0, ids(1)))


def test_touch_knows_a_tree_that_is_gone() -> None:
    """The next tree is often made at the same address."""
    pool = _C.PagePool(4, 4)
    for _ in range(50):
        tree = _C.RadixTree(pool)
        pages = pool.allocate(1)
        tree.insert(0, ids(1, 2), pages)
        match = tree.match(0, ids(1, 2))
        tree.touch(match)
        pool.release(pages)
        assert tree.evict_all() == 1
        tree.touch(match)  # evicted: nothing to mark
        del tree
        later = _C.RadixTree(pool)
        with pytest.raises(ValueError, match="this tree"):
            later.touch(match)
        del later


def test_references_are_counted_in_one_pool_only() -> None:
    """Page ids of a larger pool would lie outside the arrays of the smaller."""
    small, large = _C.PagePool(1, 4), _C.PagePool(1000, 4)
    table, tree = _C.SequenceTable(large), _C.RadixTree(large)
    table.reserve(table.create(), 4000)
    with pytest.raises(ValueError, match="table: expected pages of the given pool"):
        _C.check_references(small, table, [])
    with pytest.raises(ValueError, match="trees: expected pages of the given pool"):
        _C.check_references(small, None, [tree])
    with pytest.raises(ValueError, match="twice"):
        _C.check_references(large, table, [tree, tree])
    with pytest.raises(TypeError):
        _C.check_references(large, table, [None])  # type: ignore[list-item]


def test_invariant_error_is_ours() -> None:
    assert issubclass(InvariantError, Exception)
    # Handing the classes over again must be harmless: a reloaded package does it.
    _C._set_error_types({"InvariantError": InvariantError, "StateBusyError": StateBusyError})


def test_objects_cannot_be_pickled() -> None:
    for value in (_C.PagePool(1, 1), _C.NgramIndex()):
        with pytest.raises(TypeError, match="pickle"):
            copy.copy(value)  # the same hook


def test_the_pool_outlives_its_users() -> None:
    table = _C.SequenceTable(_C.PagePool(4, 4))
    seq = table.create()
    assert table.reserve(seq, 16) is not None
    assert table.check_integrity() is None


def test_dropping_an_object_returns_its_pages() -> None:
    pool = _C.PagePool(4, 4)
    table, tree = _C.SequenceTable(pool), _C.RadixTree(pool)
    table.reserve(table.create(), 4)
    pages = pool.allocate(1)
    tree.insert(0, ids(1), pages)
    pool.release(pages)
    assert _C.check_references(pool, table, [tree]) is None
    assert "page 1" in _C.check_references(pool, table, [])
    assert "page 0" in _C.check_references(pool, None, [tree])
    del table, tree
    assert pool.num_free() == 4


def test_second_entry_is_refused_while_the_gil_is_free() -> None:
    """One thread matches 160 MB of tokens; the other one tries to get in meanwhile."""
    pool = _C.PagePool(1, 1 << 25)
    tree = _C.RadixTree(pool)
    tokens = torch.zeros(20_000_000, dtype=torch.int64)
    tree.insert(0, tokens, pool.allocate(1))
    stop = threading.Event()

    def match_all() -> None:
        while not stop.is_set():
            try:
                assert tree.match(0, tokens).num_tokens == len(tokens)
            except RuntimeError as error:
                assert "busy" in str(error)  # the other thread was inside

    worker = threading.Thread(target=match_all)
    worker.start()
    refusals: list[str] = []
    deadline = time.monotonic() + 30
    while not refusals and time.monotonic() < deadline:
        try:
            tree.num_nodes()
        except RuntimeError as error:
            assert isinstance(error, StateBusyError)
            assert isinstance(error, StatefulKVError)
            refusals.append(str(error))
    stop.set()
    worker.join()
    assert refusals == ["RadixTree is busy: another thread is inside a call"]
    assert tree.num_nodes() == 1, "the flag is free again"


def test_flags_are_free_after_an_error() -> None:
    pool = _C.PagePool(4, 4)
    table = _C.SequenceTable(pool)
    for _ in range(2):
        with pytest.raises(IndexError):
            table.fork(7)
    assert pool.num_free() == 4
    assert table.num_sequences() == 0


def test_build_info() -> None:
    info = _C.build_info()
    assert set(info) == {"version", "torch", "compiler", "cuda", "cuda_archs", "cpu_isas"}
    assert info["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert bool(info["cuda_archs"]) == info["cuda"]
    assert _C.cpu_isa() in info["cpu_isas"]
    assert _C.cpu_isa_error() == ""
