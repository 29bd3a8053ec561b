"""Array arguments are read as they are; what cannot be is refused by name."""

from __future__ import annotations

import array
import ctypes
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

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
    (ctypes.c_int32 * 5)(*TOKENS),  # its format names the byte order
    torch.tensor(TOKENS).as_subclass(torch.nn.Buffer),
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


def _emptied() -> torch.Tensor:
    """A tensor whose memory was taken away."""
    tensor = torch.zeros(5, dtype=torch.int32)
    tensor.untyped_storage().resize_(0)
    return tensor


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
    "zeros without memory": (torch._efficientzerotensor(5, dtype=torch.int64), "not dense"),
    "negative view": (torch._neg_view(torch.tensor(TOKENS)), r"negative view \(resolve_neg"),
    "conjugate": (torch.zeros(5, dtype=torch.complex64).conj(), "not dense"),
    "emptied": (_emptied(), r"int32\[5\] without memory"),
    "sparse rows": (torch.zeros(2, 5, dtype=torch.int32).to_sparse_csr(), "not dense"),
    "nested": (torch.nested.nested_tensor([torch.tensor(TOKENS)]), "not dense"),
    "gradient": (torch.zeros(5, requires_grad=True), r"float32\[5\]"),
    "numpy bool": (np.zeros(5, dtype=bool), r"format '\?'"),
    "numpy object": (np.array(TOKENS, dtype=object), "format 'O'"),
    "numpy unsigned 64": (np.zeros(5, dtype=np.uint64), "format 'L'"),
    "numpy int16": (np.zeros(5, dtype=np.int16), "format 'h'"),
    "numpy no dimension": (np.array(5), "0 dimensions"),
    "numpy scalar": (np.int64(5), "0 dimensions"),
    "numpy record": (np.zeros(5, dtype="i4,i4"), "format 'T{"),
    "memoryview strided": (memoryview(np.arange(10))[::2], "stride of 16 bytes"),
    "bytearray": (bytearray(40), "format 'B'"),
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


def test_transforms_of_torch_are_refused(tree: _C.RadixTree) -> None:
    def count(row: torch.Tensor) -> torch.Tensor:
        return torch.tensor(tree.match(0, row).num_tokens)

    with pytest.raises(TypeError, match="not dense"):
        torch.vmap(count)(torch.tensor([TOKENS]))


def test_results_are_real_tensors_under_any_mode(tree: _C.RadixTree) -> None:
    tokens = torch.tensor(TOKENS)
    with FakeTensorMode():
        pages = tree.match(0, tokens).pages
    assert pages.tolist() == [0, 1]
    with torch.inference_mode():
        assert tree.match(0, tokens).pages.tolist() == [0, 1]


def _array_calls() -> dict[str, Callable[[Any], object]]:
    """Every argument that takes an array, given to a call that is fine but for it."""
    pool = _C.PagePool(8, 4)
    table, tree = _C.SequenceTable(pool), _C.RadixTree(pool)
    seq = table.create()
    index = _C.NgramIndex()
    ids, lens = torch.tensor([seq]), torch.tensor([0], dtype=torch.int32)
    return {
        "PagePool.retain: pages": pool.retain,
        "PagePool.release: pages": pool.release,
        "SequenceTable.adopt: pages": lambda x: table.adopt(x, 0),
        "SequenceTable.replace_prefix: pages": lambda x: table.replace_prefix(seq, x),
        "SequenceTable.fill_batch: sequence_ids": lambda x: table.fill_batch(x, lens),
        "SequenceTable.fill_batch: query_lens": lambda x: table.fill_batch(ids, x),
        "SequenceTable.reserve_batch: sequence_ids": lambda x: table.reserve_batch(x, ids),
        "SequenceTable.reserve_batch: num_tokens": lambda x: table.reserve_batch(ids, x),
        "SequenceTable.commit_batch: sequence_ids": lambda x: table.commit_batch(x, ids),
        "SequenceTable.commit_batch: num_tokens": lambda x: table.commit_batch(ids, x),
        "SequenceTable.prepare_batch: sequence_ids": lambda x: table.prepare_batch(x, lens),
        "SequenceTable.prepare_batch: query_lens": lambda x: table.prepare_batch(ids, x),
        "SequenceTable.lengths: sequence_ids": table.lengths,
        "RadixTree.match: tokens": lambda x: tree.match(0, x),
        "RadixTree.insert: tokens": lambda x: tree.insert(0, x, lens[:0]),
        "RadixTree.insert: pages": lambda x: tree.insert(0, ids[:0], x),
        "RadixTree.pin: tokens": lambda x: tree.pin(0, x),
        "RadixTree.num_blocked_pages: kept": tree.num_blocked_pages,
        "NgramIndex.append: tokens": index.append,
        "propose_drafts: tokens": lambda x: _C.propose_drafts([index], [x], ids),
        "propose_drafts: max_tokens": lambda x: _C.propose_drafts([index], [ids], x),
    }


ARRAY_CALLS = _array_calls()


@pytest.mark.parametrize("name", ARRAY_CALLS)
def test_every_array_argument_refuses_what_has_no_memory(name: str) -> None:
    for value in (
        torch._efficientzerotensor(1, dtype=torch.int64),
        torch._neg_view(torch.tensor([0])),
        torch.zeros(1, dtype=torch.int32, device="meta"),
        _Wrapper(1),
        _emptied(),
    ):
        with pytest.raises(TypeError, match=f"^{name}: expected a contiguous int"):
            ARRAY_CALLS[name](value)


@pytest.mark.parametrize("name", ARRAY_CALLS)
def test_a_refused_buffer_is_released(name: str) -> None:
    data = bytearray(8)
    values = array.array("I", [0, 0])
    before = sys.getrefcount(data), sys.getrefcount(values)
    for _ in range(3):
        for value in (data, values, memoryview(data).cast("d")):
            with pytest.raises(TypeError, match=name):
                ARRAY_CALLS[name](value)
            del value
    data.append(0)  # a BufferError while somebody holds the buffer
    values.append(0)
    assert (sys.getrefcount(data), sys.getrefcount(values)) == before


def test_an_accepted_buffer_is_released(tree: _C.RadixTree) -> None:
    tokens = array.array("q", TOKENS)
    assert tree.match(0, tokens).num_tokens == 5
    tree.insert(0, tokens, tree.match(0, tokens).pages)
    with pytest.raises(ValueError, match="pages"):
        tree.insert(0, tokens, array.array("i"))
    with pytest.raises(TypeError, match="got int32"):
        _C.SequenceTable(_C.PagePool(1, 1)).lengths(ids := array.array("i", [0]))
    tokens.append(1)
    ids.append(1)


def test_a_closed_buffer_is_an_error(tree: _C.RadixTree) -> None:
    view = memoryview(array.array("i", TOKENS))
    view.release()
    with pytest.raises(ValueError, match="released memoryview"):
        tree.match(0, view)


def test_values_that_change_during_a_call_break_nothing() -> None:
    """A thread writes bad tokens into the array without the GIL while it is inserted."""
    pool = _C.PagePool(4, 1 << 25)
    tokens = torch.zeros(4 << 20, dtype=torch.int64)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            tokens.fill_(-1)
            tokens.fill_(0)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(30):
            tree, index = _C.RadixTree(pool), _C.NgramIndex(1, 1)
            pages = pool.allocate(1)
            try:
                tree.insert(0, tokens, pages)
                index.append(tokens[:65536])
            except ValueError as error:
                assert "token -1" in str(error)
            pool.release(pages)
            assert tree.check_integrity() is None
            assert index.check_integrity() is None
    finally:
        stop.set()
        writer.join()


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
    copies = table.reserve(seq, 6)
    assert copies.dtype == torch.int32
    assert copies.shape == (0, 2)
    pages = table.page_table(seq)
    assert pages.dtype == torch.int32
    pages.fill_(-5)
    assert table.page_table(seq).tolist() == [0, 1]
    table.commit(seq, 6)
    child = table.fork(seq)
    assert table.reserve(child, 1).tolist() == [[1, 2]]
    assert table.reserve(child, 1000) is None
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
