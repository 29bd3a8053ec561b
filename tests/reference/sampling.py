"""The draw of a token, naively: Python integers, one token at a time, everything sorted."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
F32 = np.float32


def weights(row: FloatArray, temperature: float) -> list[int]:
    """floor(2^32 e^((x - top) / T)) in float32, every operation rounded once.

    The polynomial is part of the definition: it makes the weights equal everywhere. How far they
    are from the exact ones is for a test to say.
    """
    with np.errstate(over="ignore", under="ignore", divide="ignore"):
        inverse = F32(1) / F32(temperature)
        inverse = min(max(inverse, F32(2.0**-126)), np.finfo(F32).max)
        t = np.maximum((row - row.max()) * inverse, F32(-22.25))
    n = np.rint(t * F32(1.44269504))
    r = (t - n * F32(0.693359375)) + n * F32(2.12194440e-4)
    y = np.full_like(row, F32(1) / F32(720))
    for factor in (120, 24, 6, 2, 1, 1):
        y = y * r + F32(1) / F32(factor)
    assert y.dtype == F32
    scaled = y * np.exp2(n.astype(np.float64) + 32).astype(F32)
    return [int(w) for w in np.floor(scaled)]


def keyed_bits(seed: int, position: int) -> int:
    """The random bits that belong to (seed, position), 64 of them."""
    key = np.array([seed % 2**64, position], dtype=np.uint64)
    return int(np.random.Philox(key=key).random_raw())


def kept_ids(
    row: FloatArray, temperature: float, top_k: int, top_p: float, min_p: float
) -> list[int]:
    """Ids that can be drawn, ascending."""
    weight = weights(row, temperature)
    ids = sorted(range(len(row)), key=lambda i: (-row[i], i))
    if top_k:
        ids = ids[:top_k]
    if F32(top_p) < 1:
        total = sum(weight[i] for i in ids)
        target = max(1, math.ceil(float(F32(top_p)) * float(total)))
        num, reached = 0, 0
        while reached < target:
            reached += weight[ids[num]]
            num += 1
        ids = ids[:num]
    smallest = math.ceil(float(F32(min_p)) * 2**32)
    return sorted(i for i in ids if weight[i] > 0 and weight[i] >= smallest)


def draw(
    row: FloatArray,
    seed: int,
    position: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> int:
    """The token of one row; its largest logit is finite."""
    if F32(temperature) == 0:
        return int(row.argmax())
    weight = weights(row, temperature)
    ids = kept_ids(row, temperature, top_k, top_p, min_p)
    total = sum(weight[i] for i in ids)
    target = (keyed_bits(seed, position) >> 11) * total >> 53
    for i in ids:
        target -= weight[i]
        if target < 0:
            return i
    raise AssertionError("the sum of all weights exceeds the target")


def probabilities(
    row: FloatArray, temperature: float, top_k: int, top_p: float, min_p: float
) -> npt.NDArray[np.float64]:
    """What the draw approximates, in float64 and without integers: float64[V]."""
    scaled = row.astype(np.float64) / temperature
    chances = np.exp(scaled - scaled.max())
    order = np.lexsort((np.arange(len(row)), -scaled))
    chances[order[top_k or len(row) :]] = 0.0
    if top_p < 1:
        sums = np.cumsum(chances[order])
        num = int(np.searchsorted(sums, top_p * sums[-1])) + 1
        chances[order[num:]] = 0.0
    chances[chances < min_p * chances.max()] = 0.0
    return np.asarray(chances / chances.sum())
