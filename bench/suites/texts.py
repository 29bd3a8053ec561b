"""Token texts for index benches: random words with an ending that occurred before."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

DRAFT = 16
MIN_N, MAX_N = 2, 8


def repeating_text(length: int, seed: int) -> Tensor:
    """int32[length] whose last 8 tokens occur once before, in the middle of the text."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, 49152, size=length, dtype=np.int32)
    middle = length // 2
    tokens[-MAX_N:] = tokens[middle : middle + MAX_N]
    return torch.from_numpy(tokens)
