"""Attention of ragged query rows over paged keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

_ops = torch.ops.stateful_kv


def paged_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    query_offsets: Tensor,
    scale: float,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """Causal attention of ragged query rows over paged keys and values.

    One op for decode (one row a sequence), extend (several) and verify (a draft). Row i of the
    q_len rows of sequence s has the absolute position seq_lens[s] - q_len + i and sees the keys at
    positions up to its own. The bits of a row depend on its own sequence and position only, not on
    the batch it is computed in; each device has its own. On CUDA, q and pools of one 16-bit dtype,
    and 16-bit q with int8 pools, go to tensor cores (head_dim 64, 96 or 128).

    Args:
        q: float32|float16|bfloat16[N, H, D], D contiguous, H a multiple of Hk - the query rows; D
            is a multiple of 16, at most 256.
        k_pool: float32|float16|bfloat16|int8 [P, Hk, B, D], contiguous, NaN allowed outside live
            slots.
        v_pool: dtype and shape of k_pool, contiguous, NaN allowed outside live slots.
        page_table: int32[S, M], M contiguous - page ids in order, entries past ceil(seq_len/B) are
            never read.
        seq_lens: int32[S], contiguous - KV length including this step's rows, at most M * B.
        query_offsets: int32[S + 1], contiguous, ascending from 0 to at most N - rows of sequence s
            are [query_offsets[s], query_offsets[s + 1]); it may have none. Rows behind those of
            the last sequence get zeros.
        scale: factor of the scores, usually D ** -0.5.
        sliding_window: a row sees only the last `sliding_window` positions; 0 = all.
        soft_cap: c > 0 turns a score x into c * tanh(x / c), after the scale; 0 = off.
        k_scales: float32[P, Hk, B], contiguous, for pools of int8, else None; NaN allowed outside
            live slots.
        v_scales: as k_scales, of the values.

    Returns:
        [N, H, D] in the dtype of q; on the CPU computed in float32 and rounded once.
    """
    result: Tensor = _ops.paged_attention.default(
        q,
        k_pool,
        v_pool,
        page_table,
        seq_lens,
        query_offsets,
        scale,
        sliding_window,
        soft_cap,
        k_scales,
        v_scales,
    )
    return result


def shared_prefix_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    query_offsets: Tensor,
    group_offsets: Tensor,
    prefix_lens: Tensor,
    scale: float,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """`paged_attention` of sequences of which neighbours begin with the same tokens: equal bits.

    On CUDA the keys of a shared prefix, in whole chunks of 512, are read once for all rows of its
    group instead of once for each sequence; the results are merged in the order that
    `paged_attention` has. With a sliding window, and on the CPU, nothing is saved.

    Args:
        q: as in `paged_attention`, like all arguments that are not explained here.
        k_pool: as in `paged_attention`.
        v_pool: as in `paged_attention`.
        page_table: as in `paged_attention`; the sequences of a group have the same pages for the
            tokens that they share.
        seq_lens: as in `paged_attention`.
        query_offsets: as in `paged_attention`.
        group_offsets: int32[G + 1], contiguous, ascending from 0 to S - sequences of group j are
            [group_offsets[j], group_offsets[j + 1]).
        prefix_lens: int32[G], contiguous - tokens that all sequences of the group begin with, at
            least 0 and at most the KV length of each of them.
        scale: as in `paged_attention`.
        sliding_window: as in `paged_attention`.
        soft_cap: as in `paged_attention`.
        k_scales: as in `paged_attention`.
        v_scales: as in `paged_attention`.

    Returns:
        [N, H, D] in the dtype of q.
    """
    result: Tensor = _ops.shared_prefix_attention.default(
        q,
        k_pool,
        v_pool,
        page_table,
        seq_lens,
        query_offsets,
        group_offsets,
        prefix_lens,
        scale,
        sliding_window,
        soft_cap,
        k_scales,
        v_scales,
    )
    return result
