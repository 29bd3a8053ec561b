"""Ops that write the paged KV pools: new keys and values, and copies of whole pages."""

from __future__ import annotations

import torch
from torch import Tensor

_ops = torch.ops.stateful_kv


def append_kv(
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Writes the keys and values of new tokens to their slots, in the dtype of the pool.

    On the CPU, of rows with the same slot the last one stays; on CUDA any of them may. A vector x
    goes to a pool of int8 as round(x / scale), scale = max |x| / 127, halves to even; its scale is
    0 if all of x is 0, and NaN if x has an infinity or a NaN.

    Args:
        k: float32|float16|bfloat16[N, Hk, D], D contiguous - new keys; those in the dtype of the
            pool are copied as they are, others rounded once.
        v: dtype of k [N, Hk, D], D contiguous - new values.
        slots: int64[N], contiguous - where each row goes, -1 = the row is skipped.
        k_pool: float32|float16|bfloat16|int8 [P, Hk, B, D], contiguous - written in place.
        v_pool: dtype and shape of k_pool, contiguous, memory of its own - written in place.
        k_scales: float32[P, Hk, B], contiguous, for pools of int8, else None - written in place.
        v_scales: as k_scales, of the values, memory of its own - written in place.
    """
    _ops.append_kv.default(k, v, slots, k_pool, v_pool, k_scales, v_scales)


def rope_append_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    slots: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Rotary embedding and append in one pass: rotates q in place, writes rotated k and v.

    The rotated pairs are (i, i + D/2). k itself is left as it is.

    Args:
        q: float32|float16|bfloat16[N, H, D], D contiguous - rotated in place, computed in float32
            and rounded once; may be a view of a fused [N, (H + 2 * Hk) * D] projection, as may k
            and v.
        k: dtype of q [N, Hk, D], D contiguous - new keys.
        v: dtype of q [N, Hk, D], D contiguous - new values.
        positions: int32[N], contiguous - absolute positions in [0, max_pos).
        cos_sin: float32[max_pos, D], contiguous - D/2 cosines, then D/2 sines.
        slots: int64[N], contiguous - where each row goes, -1 = nothing is written for the row.
        k_pool: float32|float16|bfloat16|int8 [P, Hk, B, D], contiguous - written in place, see
            append_kv.
        v_pool: dtype and shape of k_pool, contiguous, memory of its own - written in place.
        k_scales: float32[P, Hk, B], contiguous, for pools of int8, else None - written in place.
        v_scales: as k_scales, of the values, memory of its own - written in place.
    """
    _ops.rope_append_kv.default(
        q, k, v, positions, cos_sin, slots, k_pool, v_pool, k_scales, v_scales
    )


def copy_pages(
    page_copies: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Copies whole pages within the pools: what copy-on-write asks for.

    Args:
        page_copies: int32[C, 2], contiguous - (from, to) page ids, taking effect in order.
        k_pool: [P, Hk, B, D] or [num_layers, P, Hk, B, D], contiguous - written in place.
        v_pool: dtype and shape of k_pool, contiguous, memory of its own - written in place.
        k_scales: float32, the shape of k_pool without D, contiguous, for pools of int8, else None -
            written in place.
        v_scales: as k_scales, of the values, memory of its own - written in place.
    """
    _ops.copy_pages.default(page_copies, k_pool, v_pool, k_scales, v_scales)
