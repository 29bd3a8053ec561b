"""Tensor data of a GGUF file: block layouts, and how they become packed or plain weights.

Rows of the file's [out, K] matrices are runs of blocks along K, so whole rows can be reordered
while they are still blocks. Q8_0, Q4_0, Q4_1 and Q4_K have one scale (and minimum) per group of 32
and go into the packed formats with their exact values; every other format is expanded to float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stateful_kv._extras import needs
from stateful_kv.models import packing
from stateful_kv.models.packing import PackedWeight

with needs("engine", "the engine"):
    from gguf import GGMLQuantizationType as Type
    from gguf import quants

Blocks = NDArray[np.uint8]

_FLOAT_TYPES: dict[Type, np.dtype[Any]] = {Type.F32: np.dtype("<f4"), Type.F16: np.dtype("<f2")}


def to_float(rows: Blocks, kind: Type) -> Tensor:
    """Expands rows of blocks.

    Args:
        rows: uint8[out, bytes per row].
        kind: block type of the rows.

    Returns:
        float32[out, K].
    """
    if kind in _FLOAT_TYPES:
        return torch.from_numpy(rows.view(_FLOAT_TYPES[kind]).astype(np.float32))
    if kind == Type.BF16:
        bits = rows.view(np.dtype("<u2")).astype(np.uint32) << np.uint32(16)
        return torch.from_numpy(bits.view(np.float32))
    if kind == Type.Q8_0:
        q, scales = _q8_0(rows)
        values = q.numpy().reshape(*scales.shape, packing.GROUP).astype(np.float32)
        values *= scales.numpy()[:, :, np.newaxis]
        return torch.from_numpy(values.reshape(q.shape))
    return torch.from_numpy(np.array(quants.dequantize(rows, kind), dtype=np.float32))


def to_packed(rows: Blocks, kind: Type) -> PackedWeight | None:
    """Packs rows of blocks without rounding, or returns None if this type has no exact form.

    Args:
        rows: uint8[out, bytes per row].
        kind: block type of the rows.
    """
    if kind == Type.Q8_0:
        return packing.pack_int8(*_q8_0(rows))
    unpack = _FOUR_BIT.get(kind)
    return packing.pack_nibbles(*unpack(rows)) if unpack else None


def _q8_0(rows: Blocks) -> tuple[Tensor, Tensor]:
    """Block: scale f16, 32 x int8."""
    blocks = rows.reshape(rows.shape[0], -1, 34)
    q = np.ascontiguousarray(blocks[:, :, 2:]).view(np.int8)
    return torch.from_numpy(q.reshape(rows.shape[0], -1)), _half(blocks[:, :, :2])


def _q4_0(rows: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """Block: scale f16, 16 bytes of q; w = scale * (q - 8)."""
    blocks = rows.reshape(rows.shape[0], -1, 18)
    scales = _half(blocks[:, :, :2])
    return _pair_neighbours(blocks[:, :, 2:]), scales, scales * -8.0


def _q4_1(rows: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """Block: scale f16, minimum f16, 16 bytes of q; w = scale * q + minimum."""
    blocks = rows.reshape(rows.shape[0], -1, 20)
    return _pair_neighbours(blocks[:, :, 4:]), _half(blocks[:, :, :2]), _half(blocks[:, :, 2:4])


def _q4_k(rows: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """Super-block of 8 groups: two f16 factors, 12 bytes of 6-bit pairs, 4 x 32 bytes of q.

    w = (d * scale) * q - dmin * minimum; the products of an 11-bit and a 6-bit number are exact.
    """
    out = rows.shape[0]
    blocks = rows.reshape(out, -1, 144)
    d, dmin = _half(blocks[:, :, 0:2]), _half(blocks[:, :, 2:4])
    low, mid, high = (blocks[:, :, 4 + 4 * i : 8 + 4 * i] for i in range(3))
    scale6 = np.concatenate((low & 63, (high & 15) | ((low >> 6) << 4)), axis=2)
    minimum6 = np.concatenate((mid & 63, (high >> 4) | ((mid >> 6) << 4)), axis=2)
    scales = d.unsqueeze(2) * torch.from_numpy(scale6).float()
    minimums = dmin.unsqueeze(2) * torch.from_numpy(minimum6).float()
    # 32 bytes hold group 2i in their low nibbles and group 2i + 1 in their high ones.
    low_pairs, high_pairs = _low_and_high_pairs(blocks[:, :, 16:].reshape(out, -1, 4, 32))
    pairs = torch.from_numpy(np.stack((low_pairs, high_pairs), axis=3))
    return pairs.reshape(out, -1), scales.reshape(out, -1), -minimums.reshape(out, -1)


_FOUR_BIT: dict[Type, Callable[[Blocks], tuple[Tensor, Tensor, Tensor]]] = {
    Type.Q4_0: _q4_0,
    Type.Q4_1: _q4_1,
    Type.Q4_K: _q4_k,
}


def _pair_neighbours(halves: Blocks) -> Tensor:
    """uint8[out, groups, 16] with k and k+16 in one byte -> uint8[out, K/2] with k and k+1."""
    low, high = _low_and_high_pairs(halves)
    return torch.from_numpy(np.concatenate((low, high), axis=2).reshape(halves.shape[0], -1))


def _low_and_high_pairs(q: Blocks) -> tuple[Blocks, Blocks]:
    """Low nibbles of neighbouring bytes in one byte, and high nibbles: uint8[..., n] -> n/2."""
    # Two bytes at a time in plain numpy: one fast thread, whatever else the machine does.
    pairs = np.ascontiguousarray(q).view(np.dtype("<u2"))
    shifted = pairs >> 4
    low = (pairs & 0x0F) | (shifted & 0xF0)
    high = (shifted & 0x0F) | ((pairs >> 8) & 0xF0)
    return low.astype(np.uint8), high.astype(np.uint8)


def _half(two_bytes: Blocks) -> Tensor:
    """uint8[out, groups, 2] holding little-endian f16 -> float32[out, groups]."""
    values = np.ascontiguousarray(two_bytes).view(np.dtype("<f2"))
    return torch.from_numpy(values[:, :, 0].astype(np.float32))
