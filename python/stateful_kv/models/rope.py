"""Rotary embedding tables: cosines and sines of every absolute position.

The angles are those of the reference implementations (frequencies and their products with the
position rounded to float32, as models were trained with); cosine and sine are taken in float64,
so the table does not depend on the vector width of the machine.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stateful_kv.models.config import RopeScaling


def inverse_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None
) -> NDArray[np.float32]:
    """Returns the angle each pair (i, i + D/2) turns by per position.

    Args:
        head_dim: D.
        theta: base.
        scaling: rescaling for long contexts, or None.

    Returns:
        float32[D/2].
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (1.0 / np.power(float(theta), exponents.astype(np.float64))).astype(np.float32)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return (frequencies / np.float32(scaling.factor)).astype(np.float32)
    return _llama3(frequencies, scaling)


def cos_sin_table(inverse: NDArray[np.float32], num_positions: int) -> Tensor:
    """Returns float32[num_positions, D]: D/2 cosines, then D/2 sines.

    Args:
        inverse: float32[D/2], from `inverse_frequencies`.
        num_positions: longest context.
    """
    table = torch.empty(num_positions, 2 * len(inverse))
    rows = table.numpy()
    step = 4096
    for start in range(0, num_positions, step):
        stop = min(start + step, num_positions)
        positions = np.arange(start, stop, dtype=np.float32)
        angles = np.outer(positions, inverse).astype(np.float64)
        rows[start:stop, : len(inverse)] = np.cos(angles)
        rows[start:stop, len(inverse) :] = np.sin(angles)
    return table


def _llama3(frequencies: NDArray[np.float32], scaling: RopeScaling) -> NDArray[np.float32]:
    """Slows long waves down by `factor`, leaves short ones, and blends those in between."""
    wavelengths = 2.0 * math.pi / frequencies.astype(np.float64)
    turns = scaling.original_max_position / wavelengths
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    scaled = frequencies * ((1.0 - keep) / scaling.factor + keep)
    return scaled.astype(np.float32)
