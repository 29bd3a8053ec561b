"""Plain torch: the small ops, each in the ways that a good implementer would try.

Of the ways of an op the quickest in the run is the peer (`bench.ways`). What a step of an engine
works out once for all of its layers, such as page numbers and cosines, is worked out beforehand
here and is not in the time. Tables of ways are at the end; the first way is the plain one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 256  # columns whose largest value is found first, for the arg-max of a row
FEW_ROWS = 8  # up to so many, a copy for each row or page is worth a try


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function through `torch.compile`, which fuses what it can; compiled at its first call."""
    ready: list[Callable[..., Any]] = []

    def call(*args: Any) -> Any:
        if not ready:
            from torch._inductor import config

            # Compiled here: worker processes would live on and disturb the timing.
            config.compile_threads = 1
            # Shapes of earlier cases would make this one general, hence slower.
            torch.compiler.reset()
            ready.append(torch.compile(function, dynamic=False, fullgraph=True))
        return ready[0](*args)

    return call


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`torch.nn.functional.rms_norm`."""
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)


def rms_norm_by_mean(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Written out, as models have it."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rms_norm_by_length(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The mean square from the length of the row, which reads x once and stores no squares."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.mul(x, torch.rsqrt(length.square() / x.shape[-1] + eps)).mul_(weight)


def adding(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The norm of the sum of x and a residual, and that sum."""

    def add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = residual + x
        return norm(total, weight, eps), total

    return add_norm


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu of the first half times the second half."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def silu_mul_in_place(gate_up: Tensor) -> Tensor:
    """The same with one tensor of results instead of two."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)


class Places(NamedTuple):
    """Where the rows of a step go in pools [P, Hk, B, D].

    Attributes:
        pages: int64[N].
        offsets: int64[N], slots within the pages.
        flat: int64[N * Hk], rows of the pool seen as [P * Hk * B, D].
        pairs: pages and offsets as numbers.
    """

    pages: Tensor
    offsets: Tensor
    flat: Tensor
    pairs: list[tuple[int, int]]


def places_of(slots: Tensor, k_pool: Tensor) -> Places:
    """Worked out once a step."""
    _, heads, size, _ = k_pool.shape
    pages, offsets = slots // size, slots % size
    flat = ((pages[:, None] * heads + torch.arange(heads)) * size + offsets[:, None]).flatten()
    return Places(pages, offsets, flat, list(zip(pages.tolist(), offsets.tolist(), strict=True)))


def append_kv(k: Tensor, v: Tensor, at: Places, k_pool: Tensor, v_pool: Tensor) -> None:
    """Indexed assignment."""
    k_pool[at.pages, :, at.offsets] = k.to(k_pool.dtype)
    v_pool[at.pages, :, at.offsets] = v.to(v_pool.dtype)


def append_kv_by_index_copy(
    k: Tensor, v: Tensor, at: Places, k_pool: Tensor, v_pool: Tensor
) -> None:
    """`index_copy_` of whole heads."""
    width = k.shape[-1]
    for new, pool in ((k, k_pool), (v, v_pool)):
        pool.view(-1, width).index_copy_(0, at.flat, new.to(pool.dtype).reshape(-1, width))


def append_kv_by_index_put(
    k: Tensor, v: Tensor, at: Places, k_pool: Tensor, v_pool: Tensor
) -> None:
    """`index_put_` of whole heads."""
    width = k.shape[-1]
    for new, pool in ((k, k_pool), (v, v_pool)):
        pool.view(-1, width).index_put_((at.flat,), new.to(pool.dtype).reshape(-1, width))


def append_kv_by_scatter(k: Tensor, v: Tensor, at: Places, k_pool: Tensor, v_pool: Tensor) -> None:
    """`scatter_` of whole heads."""
    width = k.shape[-1]
    index = at.flat[:, None].expand(-1, width)
    for new, pool in ((k, k_pool), (v, v_pool)):
        pool.view(-1, width).scatter_(0, index, new.to(pool.dtype).reshape(-1, width))


def append_kv_row_by_row(k: Tensor, v: Tensor, at: Places, k_pool: Tensor, v_pool: Tensor) -> None:
    """A copy for each row, which converts on its way."""
    for row, (page, offset) in enumerate(at.pairs):
        k_pool[page, :, offset].copy_(k[row])
        v_pool[page, :, offset].copy_(v[row])


def cos_and_sin(positions: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
    """[N, 1, D / 2] each, worked out once a step."""
    cos, sin = cos_sin[positions.long()].chunk(2, dim=-1)
    return cos[:, None].contiguous(), sin[:, None].contiguous()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotary embedding of x [N, heads, D]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rotate_in_place(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same into x, by products that add to others."""
    first, second = x.chunk(2, dim=-1)
    old = first.clone()
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(old, sin)
    return x


def rope_append_kv(
    qk: Tensor,
    num_heads: int,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    at: Places,
    k_pool: Tensor,
    v_pool: Tensor,
) -> None:
    """Rotate q in place, rotate k, write k and v; q and k are neighbours in `qk`."""
    q, k = qk[:, :num_heads], qk[:, num_heads:]
    q.copy_(rotate(q, cos, sin))
    append_kv(rotate(k, cos, sin), v, at, k_pool, v_pool)


def rope_together(
    append: Callable[..., None], turn: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Callable[..., None]:
    """q and k rotated as one tensor, then written by `append`; k is not asked for afterwards."""

    def call(
        qk: Tensor,
        num_heads: int,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        at: Places,
        k_pool: Tensor,
        v_pool: Tensor,
    ) -> None:
        turned = turn(qk, cos, sin)
        if turned is not qk:
            qk[:, :num_heads].copy_(turned[:, :num_heads])
        append(turned[:, num_heads:], v, at, k_pool, v_pool)

    return call


def copy_pages(page_copies: Tensor, k_pool: Tensor, v_pool: Tensor) -> None:
    """Indexed copy between pages of pools [num_layers, P, Hk, B, D]."""
    source, target = page_copies[:, 0].long(), page_copies[:, 1].long()
    k_pool[:, target] = k_pool[:, source]
    v_pool[:, target] = v_pool[:, source]


def copy_pages_by_index_copy(page_copies: Tensor, k_pool: Tensor, v_pool: Tensor) -> None:
    """`index_select` and `index_copy_`."""
    source, target = page_copies[:, 0].long(), page_copies[:, 1].long()
    for pool in (k_pool, v_pool):
        pool.index_copy_(1, target, pool.index_select(1, source))


def copy_pages_one_by_one(page_copies: Tensor, k_pool: Tensor, v_pool: Tensor) -> None:
    """A copy for each page, without a tensor in between."""
    for source, target in page_copies.tolist():
        k_pool[:, target].copy_(k_pool[:, source])
        v_pool[:, target].copy_(v_pool[:, source])


def max_of(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.max`: ids and values."""
    values, ids = torch.max(logits, dim=-1)
    return ids, values


def argmax_and_gather(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.argmax`, then its values."""
    ids = torch.argmax(logits, dim=-1)
    return ids, logits.gather(1, ids[:, None])[:, 0]


def argmax_by_blocks(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each block by `amax`, which runs on vectors; then within the best block."""
    blocks = logits.view(len(logits), -1, BLOCK)
    best = blocks.amax(dim=-1).argmax(dim=-1)
    values, inside = blocks[torch.arange(len(logits)), best].max(dim=-1)
    return best * BLOCK + inside, values


def argmax_of_numpy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """numpy's, on the same memory: it has vectors for this where torch has none."""
    array = logits.numpy()
    ids = torch.from_numpy(array.argmax(axis=-1))
    return ids, logits.gather(1, ids[:, None])[:, 0]


def verify_draft(
    draft_ids: Tensor, target_ids: Tensor, num_sequences: int, num_draft: int
) -> tuple[Tensor, Tensor]:
    """Longest agreeing run of drafts of one length, vectorised."""
    draft = draft_ids.view(num_sequences, num_draft)
    target = target_ids.view(num_sequences, num_draft + 1)
    accepted = (draft == target[:, :-1]).long().cumprod(dim=1).sum(dim=1)
    return accepted, target.gather(1, accepted[:, None])[:, 0]


def verify_draft_by_argmax(
    draft_ids: Tensor, target_ids: Tensor, num_sequences: int, num_draft: int
) -> tuple[Tensor, Tensor]:
    """By the first token that differs; a column that always differs ends each run."""
    target = target_ids.view(num_sequences, num_draft + 1)
    differs = torch.ones(num_sequences, num_draft + 1, dtype=torch.uint8)
    torch.ne(draft_ids.view(num_sequences, num_draft), target[:, :-1], out=differs[:, :-1])
    accepted = differs.argmax(dim=1)
    return accepted, target.gather(1, accepted[:, None])[:, 0]


def verify_draft_by_lists(
    draft_ids: Tensor, target_ids: Tensor, num_sequences: int, num_draft: int
) -> tuple[Tensor, Tensor]:
    """In Python, token by token: nothing is launched, and most runs end early."""
    draft, target = draft_ids.tolist(), target_ids.tolist()
    accepted, tokens = [], []
    for sequence in range(num_sequences):
        first, run = sequence * num_draft, 0
        own = sequence * (num_draft + 1)
        while run < num_draft and draft[first + run] == target[own + run]:
            run += 1
        accepted.append(run)
        tokens.append(target[own + run])
    return torch.tensor(accepted), torch.tensor(tokens)


RMS_NORM = {
    "F.rms_norm": rms_norm,
    "rsqrt of the mean": rms_norm_by_mean,
    "vector_norm": rms_norm_by_length,
}
SILU_MUL = {"F.silu * up": silu_mul, "F.silu, mul_": silu_mul_in_place}
APPEND_KV: dict[str, Callable[..., None]] = {
    "indexed assignment": append_kv,
    "index_copy_": append_kv_by_index_copy,
    "index_put_": append_kv_by_index_put,
    "scatter_": append_kv_by_scatter,
}
ROPE_APPEND_KV: dict[str, Callable[..., None]] = {
    "cat, indexed assignment": rope_append_kv,
    "q and k together, index_copy_": rope_together(append_kv_by_index_copy, rotate),
    "in place, indexed assignment": rope_together(append_kv, rotate_in_place),
    "in place, index_copy_": rope_together(append_kv_by_index_copy, rotate_in_place),
}
COPY_PAGES = {
    "indexed copy": copy_pages,
    "index_select, index_copy_": copy_pages_by_index_copy,
    "page by page": copy_pages_one_by_one,
}
ARGMAX = {
    "torch.max": max_of,
    "torch.argmax, gather": argmax_and_gather,
    "amax of blocks": argmax_by_blocks,
    "numpy": argmax_of_numpy,
}
VERIFY_DRAFT = {
    "cumprod": verify_draft,
    "first difference": verify_draft_by_argmax,
    "Python lists": verify_draft_by_lists,
}


def append_ways(num_rows: int) -> dict[str, Callable[..., None]]:
    """Ways to write rows; one copy a row where they are few."""
    few = {"row by row": append_kv_row_by_row} if num_rows <= FEW_ROWS else {}
    return {**APPEND_KV, **few}


def rope_ways(num_rows: int) -> dict[str, Callable[..., None]]:
    """Ways to rotate and write rows; one copy a row where they are few."""
    few = {}
    if num_rows <= FEW_ROWS:
        few["in place, row by row"] = rope_together(append_kv_row_by_row, rotate_in_place)
    return {**ROPE_APPEND_KV, **few}
