"""Paged attention in float64, one sequence at a time."""

from __future__ import annotations

import numpy as np


def gather_vectors(pool: np.ndarray, page_ids: np.ndarray, length: int) -> np.ndarray:
    """Returns the first `length` vectors of a sequence.

    Args:
        pool: [P, Hk, B, D].
        page_ids: int[M], pages of the sequence in order; entries past ceil(length / B) unused.
        length: number of tokens to read.

    Returns:
        [length, Hk, D].
    """
    _, num_kv_heads, page_size, head_dim = pool.shape
    vectors = np.empty((length, num_kv_heads, head_dim), dtype=pool.dtype)
    for position in range(length):
        page = page_ids[position // page_size]
        vectors[position] = pool[page, :, position % page_size]
    return vectors


def visible(query_positions: np.ndarray, length: int, sliding_window: int) -> np.ndarray:
    """Returns bool[rows, length]: which keys each row sees."""
    keys = np.arange(length)[None, :]
    rows = query_positions[:, None]
    mask = keys <= rows
    if sliding_window > 0:
        mask &= keys > rows - sliding_window
    return mask


def dense_attention(
    query: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    scale: float,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
) -> np.ndarray:
    """Attention of the last rows of one sequence.

    Args:
        query: float64[rows, H, D]; the rows are the last positions of the sequence.
        keys: float64[L, Hk, D].
        values: float64[L, Hk, D].
        scale: factor of the scores.
        sliding_window: a row sees keys with position > row - window; 0 = all.
        soft_cap: c > 0 maps a score s to c * tanh(s / c).

    Returns:
        float64[rows, H, D].
    """
    num_rows, num_heads, _ = query.shape
    length, num_kv_heads, _ = keys.shape
    group = num_heads // num_kv_heads
    positions = length - num_rows + np.arange(num_rows)
    mask = visible(positions, length, sliding_window)
    output = np.empty(query.shape, dtype=np.float64)
    for head in range(num_heads):
        # einsum instead of @: one thread, so a busy machine does not stall the test run.
        scores = np.einsum("rd,ld->rl", query[:, head], keys[:, head // group]) * scale
        if soft_cap > 0:
            scores = soft_cap * np.tanh(scores / soft_cap)
        scores = np.where(mask, scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True, initial=-np.inf))
        weights /= weights.sum(axis=1, keepdims=True)
        output[:, head] = np.einsum("rl,ld->rd", weights, values[:, head // group])
    return output


def paged_attention(
    query: np.ndarray,
    k_pool: np.ndarray,
    v_pool: np.ndarray,
    page_table: np.ndarray,
    seq_lens: np.ndarray,
    query_offsets: np.ndarray,
    scale: float,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
) -> np.ndarray:
    """The op `paged_attention` in float64; shapes as in its schema."""
    output = np.full(query.shape, np.nan, dtype=np.float64)
    for sequence, length in enumerate(seq_lens):
        begin, end = query_offsets[sequence], query_offsets[sequence + 1]
        if begin == end:
            continue
        keys = gather_vectors(k_pool, page_table[sequence], int(length))
        values = gather_vectors(v_pool, page_table[sequence], int(length))
        output[begin:end] = dense_attention(
            query[begin:end], keys, values, scale, sliding_window, soft_cap
        )
    return output
