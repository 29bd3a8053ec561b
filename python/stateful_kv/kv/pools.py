"""The memory of keys and values."""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from stateful_kv.errors import InvalidRequestError
from stateful_kv.system.device import free_memory
from stateful_kv.system.memory import HUGE_PAGE_BYTES, huge_page_region

DTYPES = {
    "float16": torch.float16,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}


class Pools(NamedTuple):
    """Keys and values of all layers.

    Attributes:
        k: [num_layers, P, Hk, B, D], keys.
        v: [num_layers, P, Hk, B, D], values.
        k_scales: float32[num_layers, P, Hk, B], scales of the keys of int8 pools; else None.
        v_scales: as k_scales, of the values.
    """

    k: Tensor
    v: Tensor
    k_scales: Tensor | None
    v_scales: Tensor | None


def make_pools(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Pools:
    """Allocates pools of keys and values, and their scales where the dtype is int8.

    Args:
        shape: num_layers, P, Hk, B and D.
        dtype: of keys and values.
        device: where they lie.

    Raises:
        InvalidRequestError: there is not so much memory; the message names the size.
    """
    num_pages, page_size = shape[1], shape[3]
    num_bytes = 2 * math.prod(shape) * dtype.itemsize
    if dtype == torch.int8:  # and a scale for each vector
        num_bytes += 2 * math.prod(shape[:-1]) * torch.float32.itemsize
    size = f"a KV pool of {num_pages} pages of {page_size} tokens ({num_bytes} bytes)"
    limit = _physical_memory() if device.type == "cpu" else free_memory(device)
    # Checked first: systems promise more memory than they have, and kill who writes to it.
    if limit is not None and num_bytes > limit:
        where = "memory" if device.type == "cpu" else f"the free memory of {device}"
        raise InvalidRequestError(
            f"kv_tokens: expected a KV pool that fits into {where} ({limit} bytes), got {size}"
        )
    try:
        k, v = _zeros(shape, dtype, device), _zeros(shape, dtype, device)
        if dtype != torch.int8:
            return Pools(k, v, None, None)
        k_scales, v_scales = (_zeros(shape[:-1], torch.float32, device) for _ in range(2))
        return Pools(k, v, k_scales, v_scales)
    except (RuntimeError, MemoryError, OSError) as error:
        raise InvalidRequestError(f"kv_tokens: expected less, got {size}: {error}") from error


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.zeros; on the CPU on huge pages, unless it is smaller than one."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or num_bytes < HUGE_PAGE_BYTES:
        return torch.zeros(shape, dtype=dtype, device=device)
    return huge_page_region(num_bytes).view(dtype).view(shape)


def _physical_memory() -> int | None:
    """Bytes of memory of this machine; None where that cannot be asked."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
