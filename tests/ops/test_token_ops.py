"""ngram_lookup and verify_draft against plain loops."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
import torch

from stateful_kv import ops
from tests.ops.comparing import assert_same_bits
from tests.ops.paged import offsets
from tests.reference import tokens as reference

TOKEN_DTYPES = [torch.int32, torch.int64]


def check_lookup(
    texts: list[list[int]],
    min_n: int,
    max_n: int,
    max_draft: int,
    dtype: torch.dtype = torch.int32,
    device: torch.device | str = "cpu",
) -> None:
    """One call for all texts against the loop for each."""
    flat = torch.tensor(list(itertools.chain.from_iterable(texts)), dtype=dtype, device=device)
    drafts, counts = ops.ngram_lookup(
        flat, offsets([len(text) for text in texts], device), min_n, max_n, max_draft
    )
    assert drafts.shape == (len(texts), max_draft)
    assert drafts.dtype == torch.int32
    assert counts.shape == (len(texts),)
    assert counts.dtype == torch.int32
    for text, draft, count in zip(texts, drafts.tolist(), counts.tolist(), strict=True):
        expected = reference.ngram_lookup(text, min_n, max_n, max_draft)
        assert draft == expected + [-1] * (max_draft - len(expected)), text
        assert count == len(expected)


@pytest.mark.parametrize("dtype", TOKEN_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("min_n", "max_n", "max_draft"), [(1, 1, 3), (1, 3, 5), (2, 8, 8), (3, 3, 1), (2, 40, 64)]
)
@pytest.mark.parametrize("vocab", [1, 2, 5, 40])
def test_ngram_lookup_random(
    device: torch.device, dtype: torch.dtype, min_n: int, max_n: int, max_draft: int, vocab: int
) -> None:
    lengths = [0, 1, 2, 3, 4, 5, 9, 16, 33, 113, 200, 0]
    texts = [[random.randrange(vocab) for _ in range(n)] for n in lengths]
    check_lookup(texts, min_n, max_n, max_draft, dtype, device)


def test_ngram_lookup_all_short_texts(device: torch.device) -> None:
    texts = [list(text) for n in range(9) for text in itertools.product((0, 1), repeat=n)]
    for min_n, max_n in ((1, 2), (2, 4), (1, 8)):
        check_lookup(texts, min_n, max_n, 4, device=device)


def test_ngram_lookup_periodic_and_large_ids(device: torch.device) -> None:
    big = 2**31 - 1
    texts = [[big, 0] * 20, [7] * 50, [big] * 3, [1, 2, 3, 1, 2], list(range(100)) * 2]
    for dtype in TOKEN_DTYPES:
        check_lookup(texts, 2, 8, 16, dtype, device)


def test_ngram_lookup_no_sequences(device: torch.device) -> None:
    check_lookup([], 2, 8, 4, device=device)
    check_lookup([[], []], 2, 8, 4, device=device)


def test_ngram_lookup_no_room_for_a_draft(device: torch.device) -> None:
    check_lookup([[1, 2, 1, 2], [3]], 1, 8, 0, device=device)


def test_ngram_lookup_does_not_see_the_neighbours(device: torch.device) -> None:
    """A match must not run over the border of two sequences."""
    check_lookup([[1, 2, 3], [9, 1, 2], [3, 1, 2], [1, 2]], 2, 4, 4, device=device)


def test_ngram_lookup_thread_count(set_num_threads: Callable[[int], None]) -> None:
    flat = torch.randint(0, 3, (5000,), dtype=torch.int32)
    borders = offsets([100] * 50)
    results = []
    for threads in (1, 2, 3):
        set_num_threads(threads)
        results.append(ops.ngram_lookup(flat, borders, 2, 8, 8))
    for other in results[1:]:
        assert_same_bits(other[0], results[0][0])
        assert_same_bits(other[1], results[0][1])


def check_verify(
    pairs: list[tuple[tuple[int, ...], tuple[int, ...]]],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> None:
    """One ragged call for all (draft, target) pairs against the loop for each."""
    drafts = torch.tensor([t for draft, _ in pairs for t in draft], dtype=dtype, device=device)
    targets = torch.tensor([t for _, target in pairs for t in target], dtype=dtype, device=device)
    borders = offsets([len(draft) for draft, _ in pairs], device)
    accepted, bonus = ops.verify_draft(drafts, targets, borders)
    assert accepted.dtype == torch.int32
    assert bonus.dtype == dtype
    assert accepted.shape == bonus.shape == (len(pairs),)
    expected = [reference.verify_draft(*pair) for pair in pairs]
    assert list(zip(accepted.tolist(), bonus.tolist(), strict=True)) == expected


@pytest.mark.parametrize("dtype", TOKEN_DTYPES, ids=str)
def test_verify_draft_exhaustive(device: torch.device, dtype: torch.dtype) -> None:
    words = (0, 1, 2)
    pairs = [
        (draft, target)
        for size in range(4)
        for draft in itertools.product(words, repeat=size)
        for target in itertools.product(words, repeat=size + 1)
    ]
    assert len(pairs) == 3 + 27 + 243 + 2187
    check_verify(pairs, dtype, device)
    random.shuffle(pairs)
    check_verify(pairs, dtype, device)
    for pair in pairs[:100]:
        check_verify([pair], dtype, device)


@pytest.mark.parametrize("dtype", TOKEN_DTYPES, ids=str)
def test_verify_draft_long_and_empty(device: torch.device, dtype: torch.dtype) -> None:
    text = tuple(random.randrange(50000) for _ in range(101))
    broken = (*text[:57], text[57] + 1, *text[58:])
    check_verify([(text[:100], text), ((), (5,)), (text[:100], broken)], dtype, device)
    check_verify([], dtype, device)


def test_verify_draft_int64_ids_are_compared_in_full(device: torch.device) -> None:
    check_verify([((1,), (2**32 + 1, 7)), ((2**40,), (2**40, 2**41))], torch.int64, device)
