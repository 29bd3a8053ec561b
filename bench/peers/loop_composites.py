"""The ops of the decode loop by whole-tensor operations, in torch and in numpy.

numpy's calls cost less than torch's, which is what counts for a few hundred numbers. Tables of the
ways are at the end; the first way is the plain one.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


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


def fill_rows_of_numpy(
    history: Tensor,
    lengths: Tensor,
    num_left: Tensor,
    kv_limits: Tensor,
    draft_ids: Tensor,
    num_draft: Tensor,
    page_table: Tensor,
    page_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in numpy, on the same memory."""
    known, left, limits = lengths.numpy(), num_left.numpy(), kv_limits.numpy()
    text, drafts, table = history.numpy(), draft_ids.numpy(), page_table.numpy()
    room = limits - known
    num_rows = 1 + np.minimum(num_draft.numpy(), np.minimum(left - 1, room))
    num_rows = np.where((left > 0) & (room >= 0), num_rows, 0)
    places = np.arange(drafts.shape[1] + 1)
    is_row = places < num_rows[:, None]
    positions = np.clip(known[:, None] - 1 + places, 0, text.shape[1] - 1)
    page_index, inside = np.divmod(positions, page_size)
    np.minimum(page_index, table.shape[1] - 1, out=page_index)
    slots = np.take_along_axis(table, page_index, 1).astype(np.int64) * page_size + inside
    pending = np.take_along_axis(text, positions[:, :1], 1)
    tokens = np.concatenate([pending, drafts], axis=1)[is_row]
    token_ids = np.zeros(is_row.size, dtype=np.int64)
    packed_slots = np.full(is_row.size, -1)
    token_ids[: len(tokens)] = tokens
    packed_slots[: len(tokens)] = slots[is_row]
    offsets = np.cumsum(num_rows)
    return torch.from_numpy(token_ids), torch.from_numpy(packed_slots), torch.from_numpy(offsets)


def advance_sequences_of_numpy(
    token_ids: Tensor,
    target_ids: Tensor,
    stop_ids: Tensor,
    history: Tensor,
    lengths: Tensor,
    num_left: Tensor,
) -> None:
    """The same in numpy, on the same memory."""
    count = lengths.shape[0]
    fed, targets = token_ids.numpy().reshape(count, -1), target_ids.numpy().reshape(count, -1)
    text, known, left = history.numpy(), lengths.numpy(), num_left.numpy()
    is_stop = (targets[:, :, None] == stop_ids.numpy()[:, None, :]).any(2)
    goes_on = (targets[:, :-1] == fed[:, 1:]) & ~is_stop[:, :-1]
    taken = np.minimum(np.cumprod(goes_on, axis=1).sum(1) + 1, left)
    places = np.arange(fed.shape[1])
    is_taken = places < taken[:, None]
    rows, columns = np.nonzero(is_taken)
    text[rows, known[rows] + columns] = targets[is_taken]
    was_stopped = is_stop[np.arange(count), taken - 1]
    left[:] = np.where(was_stopped, 0, left - taken)
    known += taken.astype(known.dtype)


FILL_ROWS = {"torch": fill_rows, "numpy": fill_rows_of_numpy}
ADVANCE_SEQUENCES = {"torch": advance_sequences, "numpy": advance_sequences_of_numpy}
