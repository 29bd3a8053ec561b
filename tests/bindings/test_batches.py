"""The calls that take a whole batch: the same as single calls, all or nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from stateful_kv._native import _C


def int64(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make(table: _C.SequenceTable, length: int) -> int:
    seq = table.create()
    assert table.reserve(seq, length) is not None
    table.commit(seq, length)
    return seq


@pytest.fixture
def table() -> _C.SequenceTable:
    return _C.SequenceTable(_C.PagePool(8, 4))


def test_append_and_commit(table: _C.SequenceTable) -> None:
    parent = make(table, 6)
    child = table.fork(parent)
    copies = table.reserve_batch(int64(child, parent), int64(1, 3))
    assert copies.dtype == torch.int32
    assert copies.tolist() == [[1, 2]]
    table.commit_batch(np.array([parent, child]), np.array([2, 1]))
    lengths = table.lengths(int64(child, parent, child))
    assert lengths.dtype == torch.int64
    assert lengths.tolist() == [7, 8, 7]
    assert table.reserve_batch(int64(), int64()).shape == (0, 2)
    assert table.lengths(int64()).shape == (0,)


def test_no_room_is_none_and_changes_nothing(table: _C.SequenceTable) -> None:
    first, second = make(table, 4), make(table, 4)
    assert table.reserve_batch(int64(first, second), int64(4, 24)) is None
    assert table.prepare_batch(int64(first, second), int32(4, 24)) is None
    assert [table.num_reserved(seq) for seq in (first, second)] == [0, 0]
    assert table.reserve_batch(int64(first, second), int64(4, 20)) is not None


def test_prepare_is_append_and_fill(table: _C.SequenceTable) -> None:
    parent = make(table, 6)
    child = table.fork(parent)
    other = _C.SequenceTable(_C.PagePool(8, 4))
    assert other.fork(make(other, 6)) == child
    ids, lens = int64(child, parent), int32(3, 1)
    copies, *arrays = table.prepare_batch(ids, lens)
    assert torch.equal(copies, other.reserve_batch(ids, lens.long()))
    expected = other.fill_batch(ids, lens)
    assert [a.dtype for a in arrays] == [a.dtype for a in expected]
    assert [a.tolist() for a in arrays] == [a.tolist() for a in expected]
    copies, *arrays = table.prepare_batch(int64(), int32())
    assert copies.shape == (0, 2)
    assert [a.shape for a in arrays] == [(0, 0), (0,), (1,), (0,), (0,)]


def test_has(table: _C.SequenceTable) -> None:
    seq = table.create()
    assert table.has(seq)
    table.release(seq)
    assert not table.has(seq)
    assert not table.has(-1)
    assert not table.has(2**62)


def test_refusals_change_nothing(table: _C.SequenceTable) -> None:
    first, second, gone = make(table, 3), make(table, 3), table.create()
    table.release(gone)
    table.reserve_batch(int64(first, second), int64(2, 2))
    both = int64(first, second)
    calls: list[tuple[type[Exception], Callable[[], object]]] = [
        (ValueError, lambda: table.reserve_batch(both, int64(1))),
        (ValueError, lambda: table.reserve_batch(int64(first, first), int64(1, 1))),
        (ValueError, lambda: table.reserve_batch(both, int64(1, -1))),
        (ValueError, lambda: table.reserve_batch(both, int64(1, 2**63 - 1))),
        (IndexError, lambda: table.reserve_batch(int64(first, 99), int64(1, 1))),
        (TypeError, lambda: table.reserve_batch(both, int32(1, 1))),
        (TypeError, lambda: table.reserve_batch([first], int64(1))),  # type: ignore[arg-type]
        (ValueError, lambda: table.commit_batch(both, int64(1, 3))),
        (ValueError, lambda: table.commit_batch(int64(first, gone), int64(1, 0))),
        (ValueError, lambda: table.commit_batch(int64(first, first), int64(1, 1))),
        (ValueError, lambda: table.prepare_batch(both, int32(1, -1))),
        (ValueError, lambda: table.prepare_batch(both, int32(1))),
        (ValueError, lambda: table.prepare_batch(int64(first, first), int32(1, 1))),
        (TypeError, lambda: table.prepare_batch(both, int64(1, 1))),
        (IndexError, lambda: table.lengths(int64(first, 99))),
        (ValueError, lambda: table.lengths(int64(gone))),
    ]
    for expected, call in calls:
        with pytest.raises(expected):
            call()
    assert table.lengths(both).tolist() == [3, 3]
    assert [table.num_reserved(seq) for seq in (first, second)] == [2, 2]
    assert table.check_integrity() is None


def test_drafts() -> None:
    first, second, third = (_C.NgramIndex() for _ in range(3))
    tokens = [int32(1, 2, 3, 1, 2), np.array([4, 5, 6]), int64(7, 7, 7, 7)]
    ids, lens, match_lens = _C.propose_drafts([first, second, third], tokens, int64(2, 4, 0))
    assert [a.dtype for a in (ids, lens, match_lens)] == [torch.int32] * 3
    assert ids.tolist() == [3, 1]
    assert lens.tolist() == [2, 0, 0]
    assert match_lens.tolist() == [2, 0, 0]
    assert [index.size() for index in (first, second, third)] == [5, 3, 4]
    ids, lens, match_lens = _C.propose_drafts([third, first], [int32(), int32(3)], int64(3, 1))
    assert ids.tolist() == [7, 7, 7, 1]
    assert (lens.tolist(), match_lens.tolist()) == ([3, 1], [3, 3])
    assert [a.shape for a in _C.propose_drafts([], [], int64())] == [(0,)] * 3


def test_refused_drafts_change_nothing() -> None:
    first, second = _C.NgramIndex(), _C.NgramIndex()
    both, new = [first, second], [int32(1, 2), int32(3)]
    calls: list[tuple[type[Exception], Callable[[], object]]] = [
        (ValueError, lambda: _C.propose_drafts([first, first], new, int64(1, 1))),
        (ValueError, lambda: _C.propose_drafts(both, new[:1], int64(1, 1))),
        (ValueError, lambda: _C.propose_drafts(both, new, int64(1))),
        (ValueError, lambda: _C.propose_drafts(both, new, int64(1, -1))),
        (ValueError, lambda: _C.propose_drafts(both, [new[0], int32(-1)], int64(1, 1))),
        (ValueError, lambda: _C.propose_drafts(both, [new[0], int64(2**31)], int64(1, 1))),
        (TypeError, lambda: _C.propose_drafts(both, [new[0], [1]], int64(1, 1))),  # type: ignore[list-item]
        (TypeError, lambda: _C.propose_drafts([first, None], new, int64(1, 1))),  # type: ignore[list-item]
        (TypeError, lambda: _C.propose_drafts(both, new, int32(1, 1))),
        (TypeError, lambda: _C.propose_drafts(3, new, int64(1, 1))),  # type: ignore[arg-type]
    ]
    for expected, call in calls:
        with pytest.raises(expected):
            call()
    assert (first.size(), second.size()) == (0, 0)
    first.append(int32(1))  # the flags are free
