"""Array arguments are read in place; what cannot be is refused by name."""

from __future__ import annotations

import array
from typing import Any

import numpy as np
import pytest
import torch

from stateful_kv._native import _C

TOKENS = [5, 6, 7, 8, 9]


@pytest.fixture
def tree() -> _C.RadixTree:
    pool = _C.PagePool(8, 4)
    tree = _C.RadixTree(pool)
    tree.insert(0, torch.tensor(TOKENS), pool.allocate(2))
    return tree


ACCEPTED = [
    torch.tensor(TOKENS, dtype=torch.int32),
    torch.tensor(TOKENS, dtype=torch.int64),
    np.array(TOKENS, dtype=np.int32),
    np.array(TOKENS, dtype=np.int64),
    array.array("i", TOKENS),
    memoryview(np.array(TOKENS, dtype=np.int64)),
    torch.tensor([0, *TOKENS])[1:],
    np.array([0, *TOKENS])[1:],
]


@pytest.mark.parametrize("tokens", ACCEPTED, ids=lambda value: type(value).__name__)
def test_accepted(tree: _C.RadixTree, tokens: Any) -> None:
    assert tree.match(0, tokens).num_tokens == 5


def test_read_only_numpy_is_enough(tree: _C.RadixTree) -> None:
    tokens = np.array(TOKENS)
    tokens.flags.writeable = False
    assert tree.match(0, tokens).num_tokens == 5


def test_empty_arrays(tree: _C.RadixTree) -> None:
    for empty in (torch.empty(0, dtype=torch.int32), np.empty(0, dtype=np.int64)):
        assert tree.match(0, empty).num_tokens == 0
        assert tree.match(0, empty).pages.shape == (0,)


class _Wrapper(torch.Tensor):
    """A tensor without memory, as FakeTensor is."""

    @staticmethod
    def __new__(cls, size: int) -> _Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, (size,), dtype=torch.int32)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} was called on a wrapper")


REFUSED = {
    "list": (TOKENS, "list"),
    "none": (None, "NoneType"),
    "float": (torch.zeros(5), r"float32\[5\]"),
    "int16": (torch.zeros(5, dtype=torch.int16), r"int16\[5\]"),
    "bool": (torch.zeros(5, dtype=torch.bool), r"bool\[5\]"),
    "two dimensions": (torch.zeros(1, 5, dtype=torch.int32), r"int32\[1, 5\]"),
    "scalar": (torch.tensor(5), r"int64\[\]"),
    "strided": (torch.zeros(10, dtype=torch.int32)[::2], "stride 2"),
    "meta": (torch.zeros(5, dtype=torch.int32, device="meta"), "meta"),
    "sparse": (torch.zeros(5, dtype=torch.int32).to_sparse(), "not dense"),
    "wrapper": (_Wrapper(5), "not dense"),
    "numpy float": (np.zeros(5), "format 'd'"),
    "numpy unsigned": (np.zeros(5, dtype=np.uint32), "format 'I'"),
    "numpy two dimensions": (np.zeros((5, 1), dtype=np.int64), "2 dimensions"),
    "numpy strided": (np.zeros(10, dtype=np.int64)[::2], "stride of 16 bytes"),
    "numpy reversed": (np.zeros(10, dtype=np.int64)[::-1], "stride of -8 bytes"),
    "numpy foreign order": (np.zeros(5, dtype=">i4"), "format '>i'"),
    "numpy unaligned": (np.frombuffer(bytes(21), dtype=np.int32, offset=1, count=5), "aligned"),
    "bytes": (b"12345678", "bytes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tree: _C.RadixTree, case: str) -> None:
    tokens, got = REFUSED[case]
    expected = r"^RadixTree\.match: tokens: expected a contiguous int32 or int64 array .*, got .*"
    with pytest.raises(TypeError, match=expected + got):
        tree.match(0, tokens)


def test_page_ids_are_int32_only() -> None:
    pool = _C.PagePool(4, 4)
    pages = pool.allocate(2)
    with pytest.raises(TypeError, match=r"PagePool\.release: pages: .*int32 array.*got int64"):
        pool.release(pages.long())
    assert pool.num_free() == 2
    pool.release(pages.numpy())
    assert pool.num_free() == 4


def test_arguments_are_not_copied() -> None:
    """A match over 64 MiB must not allocate anything of that size."""
    resource = pytest.importorskip("resource")
    pool = _C.PagePool(1, 4)
    tree = _C.RadixTree(pool)
    tree.insert(0, torch.tensor([1]), pool.allocate(1))
    tokens = torch.ones(8 << 20, dtype=torch.int64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        assert tree.match(0, tokens).num_tokens == 1
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 32 << 10


def test_results_are_fresh_tensors() -> None:
    pool = _C.PagePool(8, 4)
    table = _C.SequenceTable(pool)
    seq = table.create()
    copies = table.append(seq, 6)
    assert copies.dtype == torch.int32
    assert copies.shape == (0, 2)
    pages = table.page_table(seq)
    assert pages.dtype == torch.int32
    pages.fill_(-5)
    assert table.page_table(seq).tolist() == [0, 1]
    table.commit(seq, 6)
    child = table.fork(seq)
    assert table.append(child, 1).tolist() == [[1, 2]]
    assert table.append(child, 1000) is None
    ids = torch.tensor([child, seq])
    arrays = table.fill_batch(ids, torch.tensor([1, 0], dtype=torch.int32))
    assert [a.dtype for a in arrays] == [torch.int32] * 4 + [torch.int64]
    assert [a.tolist() for a in arrays] == [[[0, 2], [0, 1]], [7, 6], [0, 1, 1], [6], [10]]
    with pytest.raises(TypeError, match=r"sequence_ids: .*int64 array"):
        table.fill_batch(ids.int(), torch.tensor([1, 0], dtype=torch.int32))
    with pytest.raises(TypeError, match=r"query_lens: .*int32 array"):
        table.fill_batch(ids, torch.tensor([1, 0]))


def test_empty_batch() -> None:
    table = _C.SequenceTable(_C.PagePool(8, 4))
    empty = torch.empty(0, dtype=torch.int64)
    page_table, seq_lens, offsets, positions, slots = table.fill_batch(empty, empty.int())
    assert page_table.shape == (0, 0)
    assert offsets.tolist() == [0]
    assert len(seq_lens) == len(positions) == len(slots) == 0


def test_draft_is_int32() -> None:
    index = _C.NgramIndex()
    index.append(torch.tensor([1, 2, 3, 1, 2]))
    draft, match_len = index.propose(2)
    assert draft.dtype == torch.int32
    assert (draft.tolist(), match_len) == ([3, 1], 2)
