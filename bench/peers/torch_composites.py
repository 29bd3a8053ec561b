"""Plain torch: the small ops as a user would write them."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`torch.nn.functional.rms_norm`."""
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)


def add_rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> Tensor:
    """The same of a residual that x is added to in place."""
    return rms_norm(residual.add_(x), weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu of the first half times the second half."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def append_kv(k: Tensor, v: Tensor, slots: Tensor, k_pool: Tensor, v_pool: Tensor) -> None:
    """Indexed assignment into pools [P, Hk, B, D]."""
    page_size = k_pool.shape[2]
    pages, offsets = slots // page_size, slots % page_size
    k_pool[pages, :, offsets] = k.to(k_pool.dtype)
    v_pool[pages, :, offsets] = v.to(v_pool.dtype)


def rotate(x: Tensor, positions: Tensor, cos_sin: Tensor) -> Tensor:
    """Half-split rotary embedding of x [N, heads, D]."""
    cos, sin = cos_sin[positions.long()].chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rope_append_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    slots: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
) -> None:
    """Rotate q in place, rotate k, write k and v."""
    q.copy_(rotate(q, positions, cos_sin))
    append_kv(rotate(k, positions, cos_sin), v, slots, k_pool, v_pool)


def copy_pages(page_copies: Tensor, k_pool: Tensor, v_pool: Tensor) -> None:
    """Indexed copy between pages of pools [num_layers, P, Hk, B, D]."""
    source, target = page_copies[:, 0].long(), page_copies[:, 1].long()
    k_pool[:, target] = k_pool[:, source]
    v_pool[:, target] = v_pool[:, source]


def verify_draft(
    draft_ids: Tensor, target_ids: Tensor, num_sequences: int, num_draft: int
) -> tuple[Tensor, Tensor]:
    """Longest agreeing run of drafts of one length, vectorised."""
    draft = draft_ids.view(num_sequences, num_draft)
    target = target_ids.view(num_sequences, num_draft + 1)
    accepted = (draft == target[:, :-1]).long().cumprod(dim=1).sum(dim=1)
    return accepted, target.gather(1, accepted[:, None])[:, 0]
