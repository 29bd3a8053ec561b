"""Shapes of SmolLM2-135M, the model of all figures, and inputs of those shapes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NUM_LAYERS = 30
HIDDEN = 576
INTERMEDIATE = 1536
VOCAB = 49152
NUM_HEADS = 9
NUM_KV_HEADS = 3
HEAD_DIM = 64
PAGE_SIZE = 64

# (out, in) of the linear layers of one transformer layer: fused qkv, o, fused gate-up, down.
LAYER_SHAPES = (
    ((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM, HIDDEN),
    (HIDDEN, NUM_HEADS * HEAD_DIM),
    (2 * INTERMEDIATE, HIDDEN),
    (HIDDEN, INTERMEDIATE),
)
HEAD_SHAPE = (VOCAB, HIDDEN)


def rotations(bytes_each: int, total_bytes: int, most: int = 4096) -> int:
    """How many copies of an input are needed to exceed `total_bytes`, within reason."""
    return max(1, min(most, math.ceil(total_bytes / max(1, bytes_each))))


def rows(num_rows: int, width: int, cold_bytes: int) -> tuple[list[Tensor], int]:
    """Rotating inputs float32[num_rows, width] and their bytes."""
    each = 4 * num_rows * width
    copies = rotations(each, cold_bytes)
    return list(torch.randn(copies, num_rows, width).unbind(0)), each * copies


def kv_pool(num_copies: int, num_pages: int, dtype: torch.dtype) -> Tensor:
    """Random K or V of `num_copies` layers: [copies, P, Hk, B, D]."""
    shape = (num_copies, num_pages, NUM_KV_HEADS, PAGE_SIZE, HEAD_DIM)
    return torch.randn(shape, dtype=torch.float32).to(dtype)


def rope_table(max_position: int) -> Tensor:
    """cos_sin float32[max_position, D]."""
    half = HEAD_DIM // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(max_position, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()
