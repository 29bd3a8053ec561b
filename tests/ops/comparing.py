"""The two comparers: equal bits, and distance from float64 measured against plain torch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_BIT_TYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor as integers, so NaN equals NaN and -0.0 differs from 0.0."""
    return tensor.detach().contiguous().view(_BIT_TYPES[tensor.element_size()])


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors agree in shape, dtype and every bit."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return torch.equal(bits(left), bits(right))


def assert_same_bits(left: Tensor, right: Tensor, what: str = "results") -> None:
    """Fails with the number and the place of the differing elements."""
    assert left.shape == right.shape, f"{what}: shapes {left.shape} and {right.shape}"
    assert left.dtype == right.dtype, f"{what}: dtypes {left.dtype} and {right.dtype}"
    differs = bits(left) != bits(right)
    if differs.any():
        place = tuple(differs.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(differs.sum())} of {differs.numel()} elements differ, first at "
            f"{place}: {left[place].item()!r} and {right[place].item()!r}"
        )


def to_numpy64(tensor: Tensor) -> np.ndarray:
    """float64 numpy copy; numpy has no bfloat16 of its own."""
    return tensor.detach().cpu().double().numpy()


def assert_close_to_reference(
    actual: Tensor, reference: np.ndarray, plain: Tensor, floor: float = 1e-6
) -> None:
    """Asks for at most twice the error of plain torch in the same dtype.

    Args:
        actual: result of the op.
        reference: float64 result.
        plain: the same computation by torch in the dtype of the op.
        floor: allowance relative to the largest reference value, for cases where torch happens
            to be almost exact.
    """
    assert tuple(actual.shape) == reference.shape
    if reference.size == 0:
        return
    assert torch.isfinite(actual).all(), "not finite: a masked or unwritten value leaked"
    error = np.abs(to_numpy64(actual) - reference).max()
    plain_error = np.abs(to_numpy64(plain) - reference).max()
    limit = 2 * plain_error + floor * max(np.abs(reference).max(), 1e-30)
    assert error <= limit, f"error {error:.3e}, plain torch {plain_error:.3e}, limit {limit:.3e}"
