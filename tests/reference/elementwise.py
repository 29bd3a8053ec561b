"""Norm, activation, rotary embedding and pool writes in float64."""

from __future__ import annotations

import numpy as np


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x [..., E] * rsqrt(mean(x^2) + eps) * weight [E]."""
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    return x / np.sqrt(mean_square + eps) * weight


def silu_mul(gate_up: np.ndarray) -> np.ndarray:
    """[N, 2F] -> [N, F]: silu of the first half times the second half."""
    half = gate_up.shape[1] // 2
    gate, up = gate_up[:, :half], gate_up[:, half:]
    with np.errstate(over="ignore"):
        return gate / (1.0 + np.exp(-gate)) * up


def rope_table(max_position: int, head_dim: int, theta: float = 10000.0) -> np.ndarray:
    """float64[max_position, D]: cosines in the first half, sines in the second."""
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    angles = np.arange(max_position)[:, None] * frequencies[None, :]
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)


def rotate(x: np.ndarray, positions: np.ndarray, cos_sin: np.ndarray) -> np.ndarray:
    """Half-split rotation of x [N, heads, D]: dimension i pairs with i + D / 2."""
    half = x.shape[-1] // 2
    output = np.empty(x.shape, dtype=np.float64)
    for row, position in enumerate(positions):
        cos, sin = cos_sin[position, :half], cos_sin[position, half:]
        low, high = x[row, :, :half], x[row, :, half:]
        output[row, :, :half] = low * cos - high * sin
        output[row, :, half:] = high * cos + low * sin
    return output


def append(pool: np.ndarray, rows: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """A copy of pool [P, Hk, B, D] with rows [N, Hk, D] at their slots; slot -1 is skipped."""
    result = pool.copy()
    page_size = pool.shape[2]
    for row, slot in enumerate(slots):
        if slot >= 0:
            result[slot // page_size, :, slot % page_size] = rows[row]
    return result


def copy_pages(pool: np.ndarray, page_copies: np.ndarray) -> np.ndarray:
    """A copy of pool [..., P, Hk, B, D] after page_copies [C, 2] of (from, to)."""
    result = pool.copy()
    for source, target in page_copies:
        result[..., target, :, :, :] = pool[..., source, :, :, :]
    return result
