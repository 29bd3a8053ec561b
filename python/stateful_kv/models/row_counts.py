"""Row counts at which a library's matrix product gives a row the same bits.

A library picks its kernel by the shape of the product, so the bits of a row may depend on how many
rows are computed with it. Here that is measured, once for each weight shape: a product of 64 rows
is the reference, and another row count is used only where its rows have the bits of the reference.
Rows come in blocks of those counts, the last one padded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

REFERENCE = 64
CANDIDATES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# Up to about this many rows a product takes the time of reading the weight, whatever their number.
_ROWS_OF_ONE_READ = 192
# Rows of a weight to try with that differ; a large one would take seconds to make.
_MAX_OTHER_ROWS = 4096
# Blocks that are tried begin here too, so that a row is computed at several places of a block.
_ODD_STARTS = (1, 37)


@dataclass(frozen=True)
class RowCounts:
    """Row counts that give every row the same bits, for products of one shape.

    Attributes:
        reference: row count of the product whose bits the others have.
        allowed: ascending, the reference among them.
    """

    reference: int
    allowed: tuple[int, ...]

    def __post_init__(self) -> None:
        """Checks both."""
        allowed = self.allowed
        if self.reference not in allowed or allowed[0] < 1 or sorted(set(allowed)) != [*allowed]:
            raise ValueError(
                f"allowed: expected ascending counts with {self.reference}, got {allowed}"
            )

    def blocks(self, num_rows: int) -> tuple[int, ...]:
        """Row counts of the products that compute `num_rows` rows, in order.

        Only the last product may have more rows than are left: the rest of it is padding. Among
        the ways to cover the rows a cheap one is chosen; a product costs its rows, but never less
        than one read of the weight.
        """
        return _blocks(self.allowed, num_rows)

    def padded(self, num_rows: int) -> int:
        """Rows that are computed in all where `num_rows` are wanted."""
        return sum(self.blocks(num_rows))

    def __str__(self) -> str:
        return f"{', '.join(map(str, self.allowed))} as {self.reference}"


def common(counts: Sequence[RowCounts]) -> RowCounts | None:
    """The row counts that all of these allow; None if there are none."""
    sets = [set(row_counts.allowed) for row_counts in counts]
    allowed = tuple(sorted(set.intersection(*sets))) if sets else ()
    return RowCounts(allowed[-1], allowed) if allowed else None


def probe(product: Callable[[Tensor], Tensor], samples: Sequence[Tensor]) -> RowCounts:
    """Finds the row counts at which rows have the bits of the reference.

    Args:
        product: [M, K] -> [M, out] for any number of rows M.
        samples: [T, K] each, rows to try; a count is tried up to T / 2, so T is at least 2.

    Raises:
        ValueError: even a row alone gives other bits each time.
    """
    limit = min(sample.shape[0] for sample in samples) // 2
    candidates = [count for count in CANDIDATES if count <= limit]
    # A count at which the bits depend on the row's place in the block cannot be the reference.
    preferred = [c for c in candidates if c >= REFERENCE] + [c for c in candidates[::-1] if c < 64]
    for reference in preferred:
        answers = [_in_blocks(product, sample, reference) for sample in samples]
        pairs = list(zip(samples, answers, strict=True))
        if all(_agrees(product, *pair, reference) for pair in pairs):
            allowed = [c for c in candidates if all(_agrees(product, *pair, c) for pair in pairs)]
            return RowCounts(reference, tuple(allowed))
    raise ValueError("a matrix product gave other bits for the same row")


def cancelling_inputs(
    num_rows: int, out_features: int, width: int, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """Inputs and a weight whose products are nothing but rounding errors, always the same ones.

    Each term of a sum occurs again elsewhere with the other sign, and the terms are far apart in
    size. The exact result is 0; what comes out is what was rounded away on the way, and another
    order of the sum gives another value. With ordinary numbers a result in 16 bits would hide the
    order in all but a few of ten thousand elements.

    Args:
        num_rows: T.
        out_features: rows of the weight.
        width: K; with an odd one the last column is 0.
        dtype: of both.

    Returns:
        samples: two tensors [T, K] on the CPU.
        weight: [out, K] on the CPU.
    """
    random = torch.Generator().manual_seed(REFERENCE)
    first, second = torch.randperm(width, generator=random)[: width // 2 * 2].chunk(2)

    def uneven(rows: int, sign: int) -> Tensor:
        values = torch.randn(rows, width // 2, generator=random)
        values *= torch.exp2(8.0 * torch.rand(rows, width // 2, generator=random))
        result = torch.zeros(rows, width, dtype=dtype)
        result[:, first] = values.to(dtype)
        result[:, second] = (sign * values).to(dtype)
        return result

    some = uneven(min(out_features, _MAX_OTHER_ROWS), -1)
    repeated = some[torch.arange(out_features) % len(some)]
    return [uneven(num_rows, 1) for _ in range(2)], repeated


def _in_blocks(product: Callable[[Tensor], Tensor], sample: Tensor, count: int) -> Tensor:
    """The products of all rows, `count` at a time; the last block begins early, to be full."""
    total = sample.shape[0]
    starts = [min(start, total - count) for start in range(0, total, count)]
    answer = torch.empty(0)
    for index, start in enumerate(starts):
        rows = product(sample[start : start + count])
        if index == 0:
            answer = rows.new_empty(total, rows.shape[1])
        answer[start : start + count] = rows
    return answer


def _agrees(
    product: Callable[[Tensor], Tensor], sample: Tensor, answer: Tensor, count: int
) -> bool:
    """True if products of `count` rows have the bits of `answer`, wherever in the sample."""
    last = sample.shape[0] - count
    # A few rows could agree by chance: at least 64 of them are compared.
    starts = {*range(0, REFERENCE, count), *_ODD_STARTS, last}
    return all(
        _same_bits(product(sample[start : start + count].clone()), answer[start : start + count])
        for start in sorted({min(start, last) for start in starts})
    )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """True if no bit differs; 0 and -0 do."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@lru_cache(maxsize=4096)
def _blocks(allowed: tuple[int, ...], num_rows: int) -> tuple[int, ...]:
    largest = allowed[-1]
    whole = (largest,) * (num_rows // largest)
    rest = num_rows % largest
    if rest == 0:
        return whole
    taken: list[int] = []
    best: tuple[int, ...] = (next(count for count in allowed if count >= rest),)
    # The largest blocks that fit, one after another, as long as that beats what is best so far.
    while True:
        fitting = [count for count in allowed if count < rest]
        if not fitting:
            break
        taken.append(fitting[-1])
        rest -= fitting[-1]
        found = (*taken, next(count for count in allowed if count >= rest))
        if _price(found) < _price(best):
            best = found
        if _price(taken) >= _price(best):
            break
    return whole + best


def _price(counts: Sequence[int]) -> int:
    return sum(max(count, _ROWS_OF_ONE_READ) for count in counts)
