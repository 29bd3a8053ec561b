"""Sampling in plain torch, as a good implementer writes it: one token for each row of logits.

With top-k nothing beyond the k largest is sorted. With top-p alone no sort is needed either: a
token drawn from the whole distribution is kept if what is likelier than it makes up less than p, or
drawn again (rejection). A draw is by `torch.multinomial`, by a race of exponential numbers (what
`multinomial` does inside, without its checks), or by a search in the sums of the probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Draw = Callable[[Tensor], Tensor]
BLOCK = 64  # columns whose largest value is found first, for the top-k


def kept_mask(logits: Tensor, temperature: float, k: int, p: float) -> Tensor:
    """bool[R, V]: the tokens that may be drawn; k 0 for all."""
    values, ids = torch.sort(logits / temperature, dim=-1, descending=True)
    if k:
        values, ids = values[:, :k], ids[:, :k]
    chances = torch.softmax(values, dim=-1)
    kept = chances.cumsum(dim=-1) - chances < p
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, kept)


def by_multinomial(chances: Tensor) -> Tensor:
    """int64[R, 1]: an index into each row, as likely as its entry says."""
    return torch.multinomial(chances, 1)


def by_race(chances: Tensor) -> Tensor:
    """The same: of exponential numbers divided by the chances the least one wins."""
    return (chances / torch.empty_like(chances).exponential_()).argmax(dim=-1, keepdim=True)


def by_sums(chances: Tensor) -> Tensor:
    """The same: where a random number falls among the sums."""
    sums = chances.cumsum(dim=-1)
    picked = torch.searchsorted(sums, torch.rand(len(sums), 1) * sums[:, -1:])
    return picked.clamp_(max=sums.shape[1] - 1)


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and ids of the k largest."""
    return torch.topk(logits, k)


def top_k_of_blocks(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same: they all lie in the k blocks whose largest values are the largest."""
    blocks = logits.view(len(logits), -1, BLOCK)
    best = torch.topk(blocks.amax(dim=-1), min(k, blocks.shape[1]), sorted=False).indices
    candidates = blocks.gather(1, best[:, :, None].expand(-1, -1, BLOCK)).flatten(1)
    values, inside = torch.topk(candidates, k)
    return values, best.gather(1, inside // BLOCK) * BLOCK + inside % BLOCK


def sample_top_k(
    find: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    draw: Draw,
    logits: Tensor,
    temperature: float,
    k: int,
    p: float,
) -> Tensor:
    """int64[R] of the k likeliest, of those the fewest that make up p."""
    values, ids = find(logits, k)
    chances = torch.softmax(values / temperature, dim=-1)
    if p < 1:
        chances = chances.masked_fill(chances.cumsum(dim=-1) - chances >= p, 0.0)
    return ids.gather(1, draw(chances))[:, 0]


def sample_top_p_by_sort(
    draw: Draw, logits: Tensor, temperature: float, k: int, p: float
) -> Tensor:
    """int64[R] of the fewest tokens that make up p, by sorting all."""
    del k  # there is none
    values, ids = torch.sort(logits, dim=-1, descending=True)
    chances = torch.softmax(values / temperature, dim=-1)
    chances = chances.masked_fill(chances.cumsum(dim=-1) - chances >= p, 0.0)
    return ids.gather(1, draw(chances))[:, 0]


def sample_top_p_by_rejection(logits: Tensor, temperature: float, k: int, p: float) -> Tensor:
    """The same distribution without a sort: draws among all until a kept token comes."""
    del k  # there is none
    chances = torch.softmax(logits / temperature, dim=-1)
    sums = chances.cumsum(dim=-1)
    ids = torch.empty(len(logits), dtype=torch.int64)
    rows = torch.arange(len(logits))  # those that have no token yet
    while len(rows):
        all_rows = len(rows) == len(logits)  # nothing is copied as long as no row is done
        own_sums, own = (sums, chances) if all_rows else (sums[rows], chances[rows])
        drawn = torch.searchsorted(own_sums, torch.rand(len(rows), 1) * own_sums[:, -1:])
        drawn.clamp_(max=own.shape[1] - 1)
        likelier = torch.where(own > own.gather(1, drawn), own, 0.0).sum(dim=-1)
        ids[rows] = drawn[:, 0]
        rows = rows[likelier >= p]
    return ids


FIND_TOP_K = {"topk": top_k, "topk of blocks": top_k_of_blocks}
TOP_K: dict[str, Callable[..., Tensor]] = {
    "topk, softmax, multinomial": partial(sample_top_k, top_k, by_multinomial),
    "topk, softmax, race": partial(sample_top_k, top_k, by_race),
    "topk, softmax, sums": partial(sample_top_k, top_k, by_sums),
    "topk of blocks, softmax, race": partial(sample_top_k, top_k_of_blocks, by_race),
}
TOP_P: dict[str, Callable[..., Tensor]] = {
    "sort, softmax, multinomial": partial(sample_top_p_by_sort, by_multinomial),
    "sort, softmax, sums": partial(sample_top_p_by_sort, by_sums),
    "rejection": sample_top_p_by_rejection,
}
