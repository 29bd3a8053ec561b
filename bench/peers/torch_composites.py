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


def sample(logits: Tensor, temperature: float, k: int, p: float) -> tuple[Tensor, Tensor]:
    """Top-k, top-p and a draw from each row: the token, and the ids that could have been drawn."""
    scaled, ids = torch.sort(logits / temperature, dim=-1, descending=True)
    if k:
        scaled, ids = scaled[:, :k], ids[:, :k]
    chances = torch.softmax(scaled, dim=-1)
    chances = chances.masked_fill(chances.cumsum(dim=-1) - chances >= p, 0.0)
    drawn = ids.gather(1, torch.multinomial(chances, 1))[:, 0]
    return drawn, ids.masked_fill(chances == 0.0, -1)


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


def fill_rows(
    history: Tensor,
    lengths: Tensor,
    num_left: Tensor,
    kv_limits: Tensor,
    draft_ids: Tensor,
    num_draft: Tensor,
    page_table: Tensor,
    page_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, slots and row offsets of `ops.fill_rows`, by whole-tensor operations."""
    room = kv_limits - lengths
    num_rows = 1 + torch.minimum(num_draft, torch.minimum(num_left - 1, room))
    num_rows = torch.where((num_left > 0) & (room >= 0), num_rows, 0)
    places = torch.arange(draft_ids.shape[1] + 1)
    is_row = places < num_rows[:, None]
    positions = (lengths[:, None] - 1 + places).clamp(0, history.shape[1] - 1).long()
    pending = history.gather(1, positions[:, :1])
    page_index = (positions // page_size).clamp(max=page_table.shape[1] - 1)
    slots = page_table.gather(1, page_index) * page_size + positions % page_size
    token_ids = torch.zeros(is_row.numel(), dtype=torch.int64)
    packed_slots = torch.full((is_row.numel(),), -1)
    tokens = torch.cat([pending, draft_ids], dim=1)[is_row]
    token_ids[: len(tokens)] = tokens.long()
    packed_slots[: len(tokens)] = slots[is_row]
    return token_ids, packed_slots, torch.cumsum(num_rows, 0)


def advance_sequences(
    token_ids: Tensor,
    target_ids: Tensor,
    stop_ids: Tensor,
    history: Tensor,
    lengths: Tensor,
    num_left: Tensor,
) -> None:
    """`ops.advance_sequences` where all S sequences have the same number of rows, all finite."""
    num_sequences = lengths.shape[0]
    fed, targets = token_ids.view(num_sequences, -1), target_ids.view(num_sequences, -1)
    num_rows = fed.shape[1]
    is_stop = (targets[:, :, None] == stop_ids[:, None, :]).any(2)
    goes_on = (targets[:, :-1] == fed[:, 1:]) & ~is_stop[:, :-1]
    run = torch.cumprod(goes_on.int(), dim=1).sum(1) + 1
    taken = torch.minimum(run, num_left)
    places = torch.arange(num_rows)
    columns = (lengths[:, None] + places).long()
    kept = torch.where(places < taken[:, None], targets, history.gather(1, columns))
    history.scatter_(1, columns, kept.int())
    was_stopped = is_stop.gather(1, taken[:, None].long() - 1).squeeze(1)
    num_left.copy_(torch.where(was_stopped, 0, num_left - taken))
    lengths.add_(taken)
