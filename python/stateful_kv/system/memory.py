"""Memory for tensors that a step reads from end to end: on huge pages, close together.

A step walks all weights once, and the keys and values of its sequences. On pages of 4 KiB many of
those reads would wait for an address translation first (several memory reads in a virtual
machine); on pages of 2 MiB there is a five-hundredth of that.
"""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

HUGE_PAGE_BYTES = 1 << 21
_CACHE_LINE_BYTES = 64
_REGION_BYTES = 32 * HUGE_PAGE_BYTES


class HugePageArena:
    """Places tensors one after another in regions that ask the system for huge pages.

    Memory is taken as it is written to, and lives as long as a tensor placed in it.
    """

    def __init__(self) -> None:
        self._region = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def place(self, tensor: Tensor) -> Tensor:
        """Returns a contiguous copy of a CPU tensor, aligned to a cache line."""
        num_bytes = tensor.numel() * tensor.element_size()
        if num_bytes == 0:
            return tensor.contiguous()
        begin = -(-self._used // _CACHE_LINE_BYTES) * _CACHE_LINE_BYTES
        if begin + num_bytes > len(self._region):
            self._region, begin = huge_page_region(max(num_bytes, _REGION_BYTES)), 0
        self._used = begin + num_bytes
        place = self._region[begin : self._used].view(tensor.dtype).view(tensor.shape)
        return place.copy_(tensor)


def huge_page_region(num_bytes: int) -> Tensor:
    """Returns uint8[num_bytes] of zeros that begin at a huge page.

    Raises:
        OSError: the system does not give so much memory.
    """
    # Private: shared memory has its own switch for huge pages, off by default.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, flags=flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without them; the memory is good all the same
            memory.madvise(mmap.MADV_HUGEPAGE)
    region = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -region.data_ptr() % HUGE_PAGE_BYTES
    return region[begin : begin + num_bytes]
