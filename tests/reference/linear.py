"""Packed weights and the exact sum of `quantized_linear`.

The op promises more than a small error: each output is one chain of multiply-adds over ascending
k, fused where the instruction set has fused ones. `chain` computes it with correct rounding, so
results can be compared bit for bit.
"""

from __future__ import annotations

import numpy as np

PANEL = 16  # output columns that are stored together
GROUP = 32  # weights along K that share a scale


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float32 a * b + c with a single rounding.

    The product of two float32 is exact in float64. The sum is rounded to odd in float64 (53
    bits), after which rounding to float32 (24 bits) cannot round twice in the wrong direction.
    """
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = c.astype(np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    is_even = (total.view(np.int64) & 1) == 0
    direction = np.where(error > 0, np.inf, -np.inf)
    odd = np.where((error != 0) & is_even, np.nextafter(total, direction), total)
    return odd.astype(np.float32)


def multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray, fused: bool) -> np.ndarray:
    """float32 a * b + c with one rounding, or with two."""
    return fma(a, b, c) if fused else a * b + c


def chain(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None, fused: bool = True
) -> np.ndarray:
    """x [N, K] times weight [out, K], both float32, in the order the op promises."""
    total = np.zeros((x.shape[0], weight.shape[0]), dtype=np.float32)
    for k in range(x.shape[1]):
        total = multiply_add(x[:, k : k + 1], weight[None, :, k], total, fused)
    return total if bias is None else total + bias[None, :]


def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """The same product in float64."""
    product = x.astype(np.float64) @ weight.astype(np.float64).T
    return product if bias is None else product + bias.astype(np.float64)


def _to_panels(rows: np.ndarray) -> np.ndarray:
    """[out, C] -> [ceil(out / 16), C, 16], missing columns zero."""
    out_features, columns = rows.shape
    num_panels = -(-out_features // PANEL)
    padded = np.zeros((num_panels * PANEL, columns), dtype=rows.dtype)
    padded[:out_features] = rows
    return np.ascontiguousarray(padded.reshape(num_panels, PANEL, columns).transpose(0, 2, 1))


def _from_panels(panels: np.ndarray, out_features: int) -> np.ndarray:
    """[Np, C, 16] -> [out, C]."""
    num_panels, columns, _ = panels.shape
    return panels.transpose(0, 2, 1).reshape(num_panels * PANEL, columns)[:out_features]


def pack_fp32(weight: np.ndarray) -> np.ndarray:
    """float32[out, K] -> float32[Np, K, 16]."""
    return _to_panels(weight)


def pack_int8(levels: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8[out, K] and float32[out, K / 32] -> panels of both."""
    return _to_panels(levels), _to_panels(scales)


def pack_int4(
    levels: np.ndarray, scales: np.ndarray, minimums: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Levels 0..15 [out, K], scales and minimums [out, K / 32] -> panels of the three."""
    low, high = levels[:, 0::2].astype(np.uint8), levels[:, 1::2].astype(np.uint8)
    return _to_panels(low | (high << 4)), _to_panels(scales), _to_panels(minimums)


def unpack_fp32(weight: np.ndarray, out_features: int) -> np.ndarray:
    """float32[Np, K, 16] -> float32[out, K]."""
    return _from_panels(weight, out_features)


def unpack_int8(weight: np.ndarray, scales: np.ndarray, out_features: int) -> np.ndarray:
    """int8 panels -> float32[out, K], each product scale * level rounded once."""
    levels = _from_panels(weight, out_features).astype(np.float32)
    return levels * np.repeat(_from_panels(scales, out_features), GROUP, axis=1)


def unpack_int4(
    weight: np.ndarray,
    scales: np.ndarray,
    minimums: np.ndarray,
    out_features: int,
    fused: bool = True,
) -> np.ndarray:
    """uint8 panels -> float32[out, K], each level * scale + minimum rounded once if fused."""
    packed = _from_panels(weight, out_features)
    levels = np.empty((packed.shape[0], packed.shape[1] * 2), dtype=np.float32)
    levels[:, 0::2] = packed & 15
    levels[:, 1::2] = packed >> 4
    row_scales = np.repeat(_from_panels(scales, out_features), GROUP, axis=1)
    row_minimums = np.repeat(_from_panels(minimums, out_features), GROUP, axis=1)
    return multiply_add(levels, row_scales, row_minimums, fused)


def unpack(
    weight: np.ndarray,
    scales: np.ndarray | None,
    minimums: np.ndarray | None,
    out_features: int,
    fused: bool = True,
) -> np.ndarray:
    """Any packed weight -> float32[out, K]; the dtype tells the format, as in the op."""
    if weight.dtype == np.float32:
        return unpack_fp32(weight, out_features)
    assert scales is not None
    if weight.dtype == np.int8:
        return unpack_int8(weight, scales, out_features)
    assert minimums is not None
    return unpack_int4(weight, scales, minimums, out_features, fused)
