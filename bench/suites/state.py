"""Suite `state`: host state of the engine through its Python bindings, per token and per call.

Times include the call from Python (about half a microsecond), as the engine pays it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import harness
from bench.harness import Case, Check, Settings, Trial, Work
from bench.peers import block_hash, text_scan
from bench.selection import Row
from bench.suites import peer_ways, shapes, texts
from stateful_kv import _C

ROOT = 0
MAX_PROMPTS = 16
LIMITS = (texts.MIN_N, texts.MAX_N, texts.DRAFT)


def _num_pages(length: int) -> int:
    return -(-length // shapes.PAGE_SIZE)


def _prompts(length: int, settings: Settings) -> list[Tensor]:
    # Text and tree copy: 8 bytes a token.
    count = shapes.rotations(8 * length, settings.cold_bytes, most=MAX_PROMPTS)
    return [texts.repeating_text(length, seed) for seed in range(count)]


def _allocate(pool: _C.PagePool, length: int) -> Tensor:
    pages = pool.allocate(_num_pages(length))
    assert pages is not None
    return pages


def _match(length: int, settings: Settings) -> Trial:
    prompts = _prompts(length, settings)
    pool = _C.PagePool(_num_pages(length) * len(prompts), shapes.PAGE_SIZE)
    tree, indexes = _C.RadixTree(pool), block_hash.all_ways(shapes.PAGE_SIZE)
    arrays = [tokens.numpy() for tokens in prompts]
    for tokens, array in zip(prompts, arrays, strict=True):
        pages = _allocate(pool, length)
        tree.insert(ROOT, tokens, pages)
        for index in indexes.values():
            index.insert(array, pages.numpy())

    def pages_of(index: block_hash.Index) -> Tensor:
        return torch.tensor(index.match(arrays[0]))

    def check(_peer: str) -> Check:
        found = tree.match(ROOT, prompts[0])
        full = length // shapes.PAGE_SIZE
        same = pages_of(indexes[block_hash.PLAIN]).tolist() == found.pages[:full].tolist()
        return Check(same and found.num_tokens == length)

    return Trial(
        ours=lambda i: tree.match(ROOT, prompts[i]),
        peers={
            "block_hash": peer_ways.ways(
                indexes, lambda index: lambda i: index.match(arrays[i]), pages_of, 0.0
            )
        },
        check=check,
        work=Work(2 * 4 * length),
        rotations=len(prompts),
        rotation_bytes=2 * 4 * length * len(prompts),
        units=length,
        unit="token",
    )


def _insert(length: int, settings: Settings) -> Trial:
    prompts = _prompts(length, settings)
    arrays = [tokens.numpy() for tokens in prompts]
    pool = _C.PagePool(_num_pages(length), shapes.PAGE_SIZE)
    tree, indexes = _C.RadixTree(pool), block_hash.all_ways(shapes.PAGE_SIZE)
    held = [_allocate(pool, length)]

    def reset() -> None:
        # The tree evicts only pages that nobody else holds, so ours are released first. After that
        # all pages are free again.
        pool.release(held[0])
        tree.evict_all()
        for index in indexes.values():
            index.clear()
        held[0] = _allocate(pool, length)

    def inserted(index: block_hash.Index) -> Tensor:
        index.clear()
        index.insert(arrays[0], held[0].numpy())
        return torch.tensor(index.match(arrays[0]))

    def check(_peer: str) -> Check:
        tree.insert(ROOT, prompts[0], held[0])
        same = tree.match(ROOT, prompts[0]).num_tokens == length
        reset()
        return Check(same and tree.match(ROOT, prompts[0]).num_tokens == 0)

    return Trial(
        ours=lambda i: tree.insert(ROOT, prompts[i], held[0]),
        peers={
            "block_hash": peer_ways.ways(
                indexes,
                lambda index: lambda i: index.insert(arrays[i], held[0].numpy()),
                inserted,
                0.0,
            )
        },
        check=check,
        work=Work(2 * 4 * length),
        rotations=len(prompts),
        rotation_bytes=4 * length * len(prompts),
        calls_per_sample=1,
        reset=reset,
        units=length,
        unit="token",
    )


def _fork(length: int, _settings: Settings) -> Trial:
    pool = _C.PagePool(_num_pages(length), shapes.PAGE_SIZE)
    table = _C.SequenceTable(pool)
    parent = table.adopt(_allocate(pool, length), length)
    forks: list[int] = []

    def fork(_index: int) -> None:
        forks.append(table.fork(parent))

    def reset() -> None:
        for sequence in forks:
            table.release(sequence)
        forks.clear()

    def check(_peer: str) -> Check:
        pages = table.page_table(parent)
        last, held = int(pages[-1]), pool.ref_count(int(pages[-1]))
        fork(0)
        ok = table.length(forks[0]) == length and torch.equal(table.page_table(forks[0]), pages)
        ok = ok and pool.ref_count(last) == held + 1
        ok = ok and table.check_integrity() is None and pool.check_integrity() is None
        reset()
        return Check(ok and pool.ref_count(last) == held)

    return Trial(
        ours=fork,
        check=check,
        # For each page of the parent an id and a count are read and written, 4 bytes each.
        work=Work(4 * 4 * _num_pages(length)),
        calls_per_sample=64,
        reset=reset,
    )


def _propose(length: int, settings: Settings) -> Trial:
    prompts = _prompts(length, settings)
    arrays = [tokens.numpy() for tokens in prompts]
    indexes = []
    for tokens in prompts:
        indexes.append(_C.NgramIndex(texts.MIN_N, texts.MAX_N))
        indexes[-1].append(tokens)

    def check(_peer: str) -> Check:
        draft, match_len = indexes[0].propose(texts.DRAFT)
        expected = text_scan.propose(arrays[0], *LIMITS)
        return Check(draft.tolist() == expected.tolist() and match_len == texts.MAX_N)

    return Trial(
        ours=lambda i: indexes[i].propose(texts.DRAFT),
        peers={
            "text_scan": peer_ways.ways(
                text_scan.WAYS,
                lambda propose: lambda i: propose(arrays[i], *LIMITS),
                lambda propose: torch.from_numpy(propose(arrays[0], *LIMITS).copy()),
                0.0,
            )
        },
        check=check,
        work=Work(2 * 4 * texts.DRAFT),
        rotations=len(prompts),
        rotation_bytes=4 * length * len(prompts),
        units=texts.DRAFT,
        unit="drafted token",
    )


def _index_append(length: int, num_new: int, settings: Settings) -> Trial:
    tokens = texts.repeating_text(length, 0)
    index = _C.NgramIndex(texts.MIN_N, texts.MAX_N)
    index.append(tokens)
    pieces = [texts.repeating_text(4 * texts.MAX_N, seed)[:num_new] for seed in range(1, 65)]

    def check(_peer: str) -> Check:
        index.append(pieces[0])
        whole = torch.cat([tokens, pieces[0]]).numpy()
        expected = text_scan.propose(whole, *LIMITS)
        ok = index.size() == length + num_new and index.check_integrity() is None
        ok = ok and index.propose(texts.DRAFT)[0].tolist() == expected.tolist()
        index.truncate(length)
        return Check(ok and index.size() == length and index.check_integrity() is None)

    return Trial(
        ours=lambda i: index.append(pieces[i]),
        check=check,
        work=Work(2 * 4 * num_new),
        rotations=len(pieces),
        calls_per_sample=len(pieces),
        reset=lambda: index.truncate(length),
        units=num_new,
        unit="token",
    )


def cases(settings: Settings) -> Iterator[Case]:
    """Lengths up to the 100k tokens of the targets."""
    lengths = (1_000,) if settings.smoke else (1_000, 10_000, 100_000)
    for length in lengths:
        yield Case("match", {"L": length}, partial(_match, length))
        yield Case("insert", {"L": length}, partial(_insert, length))
        yield Case("fork", {"L": length}, partial(_fork, length))
        yield Case("propose", {"L": length}, partial(_propose, length))
        for num_new in (1, 16):
            setup = partial(_index_append, length, num_new)
            yield Case("ngram_append", {"L": length, "new": num_new}, setup)


def rows(settings: Settings) -> list[Row]:
    """Names and axes of all cases."""
    return harness.rows_of(cases(settings))


def run(settings: Settings, roofs: dict[str, Any], emit: Callable[[dict[str, Any]], None]) -> None:
    """Run the suite."""
    torch.manual_seed(0)
    harness.run_cases("state", cases(settings), settings, roofs, emit)
