"""Fake kernels: what an op returns for tensors without content (torch.compile, meta tensors)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])

# By op name. The package registers them all, see there.
FAKE_KERNELS: dict[str, Callable[..., Any]] = {}


def fake(op: str) -> Callable[[_Function], _Function]:
    """Makes the decorated function the fake kernel of an op."""

    def keep(function: _Function) -> _Function:
        if op in FAKE_KERNELS:
            raise ValueError(f"{op}: expected one fake kernel, got a second one")
        FAKE_KERNELS[op] = function
        return function

    return keep


def check_devices(op: str, device: torch.device, **tensors: Tensor | None) -> None:
    """Refuses mixed devices in fake kernels too: one meta tensor would turn the op into a no-op."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{op}: {name}: expected device {device}, got {tensor.device}")
