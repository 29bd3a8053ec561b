"""What a device is called, how much memory it has left, and tensors to it and back in one copy.

A copy between host and device costs microseconds whatever its size, so the tensors of a step go up
together from one pinned buffer, and its results come back together into one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stateful_kv.system.machine import cpu_name

_ALIGNMENT = 16  # bytes; every view of a buffer begins at a multiple of it


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Puts tensors of the host onto a device, all in one copy that nothing waits for.

    Args:
        tensors: on the CPU, of at least one dimension.
        device: where to; for the CPU the tensors themselves are returned.
    """
    if device.type == "cpu":
        return list(tensors)
    # Pinned memory is given out again only when the copies from it are done.
    return split(joined(tensors, pin=True).to(device, non_blocking=True), tensors)


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Brings tensors of one device to the host in one copy, and waits for it.

    Args:
        tensors: of one device and at least one dimension; from the CPU they come as they are.
    """
    if not tensors or tensors[0].device.type == "cpu":
        return list(tensors)
    buffer = joined(tensors)
    host = torch.empty(buffer.shape, dtype=torch.uint8, pin_memory=True)
    host.copy_(buffer, non_blocking=True)
    synchronize(buffer.device)
    return split(host, tensors)


def joined(tensors: Sequence[Tensor], *, pin: bool = False) -> Tensor:
    """The bytes of all tensors in one buffer on their device; `split` takes it apart.

    Args:
        tensors: of one device.
        pin: put the buffer into memory of the host that a device can read on its own.
    """
    starts, num_bytes = _starts(tensors)
    device = tensors[0].device if tensors else torch.device("cpu")
    buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device, pin_memory=pin)
    for tensor, start in zip(tensors, starts, strict=True):
        content = tensor.contiguous().view(-1).view(torch.uint8)
        buffer[start : start + content.shape[0]] = content
    return buffer


def split(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of a buffer that `joined` made of tensors with these dtypes and shapes."""
    starts, _ = _starts(like)
    parts = []
    for tensor, start in zip(like, starts, strict=True):
        content = buffer[start : start + tensor.numel() * tensor.element_size()]
        parts.append(content.view(tensor.dtype).view(tensor.shape))
    return parts


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all that it was given; the CPU always has."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def device_name(device: torch.device) -> str:
    """The model of the hardware behind a device."""
    return cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a CUDA device."""
    free, _ = torch.cuda.mem_get_info(device)
    # What torch has taken from the driver and does not use counts as free too.
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _starts(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """Where the bytes of each tensor begin in a buffer of all, and how many bytes that has."""
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
    return starts, end
