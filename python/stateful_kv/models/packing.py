"""Weights of `quantized_linear`: rounding to 8 or 4 bits, and the column panels the kernel reads.

A linear layer y = x @ w.T has a weight w of shape [out, in]. Its output columns are stored in
panels of 16, each panel in the order the kernel walks along K = in:

    fp32  weight float32[Np, K, 16]
    int8  weight int8[Np, K, 16], scales float32[Np, K/32, 16];           w = scale * q
    int4  weight uint8[Np, K/2, 16], scales and minimums as above;        w = fma(q, scale, minimum)
          byte (k2, c) holds q of k = 2*k2 in its low nibble and of k = 2*k2 + 1 in its high one

Np = ceil(out / 16); the columns that fill up the last panel are zero. Nothing here rounds except
the two `quantize_*` functions, so blocks of a file that already have one of these forms keep their
exact values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import overload

import numpy as np
import torch
from torch import Tensor

from stateful_kv.system.memory import HugePageArena

PANEL = 16
GROUP = 32


@dataclass(frozen=True)
class PackedWeight:
    """One packed weight: the tensors `quantized_linear` takes, and what they stand for.

    Attributes:
        weight: float32[Np, K, 16], int8[Np, K, 16] or uint8[Np, K/2, 16] - see the module.
        scales: float32[Np, K/32, 16], None for fp32.
        minimums: float32[Np, K/32, 16], int4 only.
        out_features: output columns that count (the rest of the last panel is zero).
        in_features: K.
        format: "fp32", "int8" or "int4".
    """

    weight: Tensor
    scales: Tensor | None
    minimums: Tensor | None
    out_features: int
    in_features: int
    format: str

    @property
    def nbytes(self) -> int:
        """Bytes a product reads."""
        parts = (self.weight, self.scales, self.minimums)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def can_precede(self, other: PackedWeight) -> bool:
        """True if `other` can follow this weight in one panel array (see `concat`)."""
        return (
            self.format == other.format
            and self.in_features == other.in_features
            and self.out_features % PANEL == 0
        )

    def placed_in(self, arena: HugePageArena) -> PackedWeight:
        """Returns the same weight with its tensors copied into `arena`."""
        return replace(
            self,
            weight=arena.place(self.weight),
            scales=None if self.scales is None else arena.place(self.scales),
            minimums=None if self.minimums is None else arena.place(self.minimums),
        )

    @staticmethod
    def concat(weights: Sequence[PackedWeight]) -> PackedWeight:
        """Joins weights along their outputs, so one product computes all of them.

        Args:
            weights: same format and in_features; out_features of all but the last a multiple of 16.

        Raises:
            ValueError: the weights do not fit together.
        """
        if not weights:
            raise ValueError("concat: weights: expected at least one, got none")
        for left, right in pairwise(weights):
            if not left.can_precede(right):
                raise ValueError(
                    "concat: weights: expected one format and in_features and whole panels, got "
                    f"{left.format}[{left.out_features}, {left.in_features}] before "
                    f"{right.format}[{right.out_features}, {right.in_features}]"
                )
        if len(weights) == 1:
            return weights[0]
        first = weights[0]
        scales = [w.scales for w in weights if w.scales is not None]
        minimums = [w.minimums for w in weights if w.minimums is not None]
        return PackedWeight(
            weight=_join([w.weight for w in weights]),
            scales=_join(scales) if scales else None,
            minimums=_join(minimums) if minimums else None,
            out_features=sum(w.out_features for w in weights),
            in_features=first.in_features,
            format=first.format,
        )

    @staticmethod
    def interleave(gate: PackedWeight, up: PackedWeight) -> PackedWeight:
        """Joins two weights panel by panel, as `quantized_linear` with `silu_mul` reads them.

        Args:
            gate: out_features a multiple of 16.
            up: as `gate`: same format, in_features and out_features.

        Raises:
            ValueError: the weights do not fit together.
        """
        if not gate.can_precede(up) or gate.out_features != up.out_features:
            raise ValueError(
                "interleave: expected two weights alike, of whole panels, got "
                f"{gate.format}[{gate.out_features}, {gate.in_features}] and "
                f"{up.format}[{up.out_features}, {up.in_features}]"
            )
        return replace(
            gate,
            weight=_alternate(gate.weight, up.weight),
            scales=_alternate(gate.scales, up.scales),
            minimums=_alternate(gate.minimums, up.minimums),
            out_features=2 * gate.out_features,
        )


def pack_fp32(w: Tensor) -> PackedWeight:
    """Packs unrounded weights.

    Args:
        w: float32[out, K], any K.

    Raises:
        ValueError: wrong dtype or rank.
    """
    _check("pack_fp32", "w", w, torch.float32, None)
    return PackedWeight(_panels(w), None, None, w.shape[0], w.shape[1], "fp32")


def pack_int8(q: Tensor, scales: Tensor) -> PackedWeight:
    """Packs 8-bit weights w = scale * q.

    Args:
        q: int8[out, K], K a multiple of 32.
        scales: float32[out, K/32].

    Raises:
        ValueError: wrong dtype, rank or size.
    """
    _check("pack_int8", "q", q, torch.int8, None)
    out_features, in_features = q.shape
    num_groups = _num_groups("pack_int8", in_features)
    _check("pack_int8", "scales", scales, torch.float32, (out_features, num_groups))
    return PackedWeight(_panels(q), _panels(scales), None, out_features, in_features, "int8")


def pack_int4(q: Tensor, scales: Tensor, minimums: Tensor) -> PackedWeight:
    """Packs 4-bit weights w = fma(q, scale, minimum).

    Args:
        q: uint8[out, K], values 0..15, K a multiple of 32.
        scales: float32[out, K/32].
        minimums: float32[out, K/32].

    Raises:
        ValueError: wrong dtype, rank, size or a value over 15.
    """
    _check("pack_int4", "q", q, torch.uint8, None)
    _num_groups("pack_int4", q.shape[1])
    if q.numel() and int(q.max()) > 15:
        raise ValueError(f"pack_int4: q: expected values 0..15, got {int(q.max())}")
    return pack_nibbles(q[:, 0::2] | (q[:, 1::2] << 4), scales, minimums)


def pack_nibbles(pairs: Tensor, scales: Tensor, minimums: Tensor) -> PackedWeight:
    """Packs 4-bit weights of which two neighbours along K share a byte already.

    Args:
        pairs: uint8[out, K/2], k = 2*k2 in the low nibble, k = 2*k2 + 1 in the high one.
        scales: float32[out, K/32].
        minimums: float32[out, K/32].

    Raises:
        ValueError: wrong dtype, rank or size.
    """
    _check("pack_nibbles", "pairs", pairs, torch.uint8, None)
    out_features, in_features = pairs.shape[0], 2 * pairs.shape[1]
    groups = (out_features, _num_groups("pack_nibbles", in_features))
    _check("pack_nibbles", "scales", scales, torch.float32, groups)
    _check("pack_nibbles", "minimums", minimums, torch.float32, groups)
    return PackedWeight(
        _panels(pairs), _panels(scales), _panels(minimums), out_features, in_features, "int4"
    )


def quantize_int8(w: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each group of 32 along K to -127..127 times its own scale.

    Args:
        w: float32[out, K], K a multiple of 32.

    Returns:
        q int8[out, K] and scales float32[out, K/32].
    """
    _check("quantize_int8", "w", w, torch.float32, None)
    groups = w.reshape(w.shape[0], _num_groups("quantize_int8", w.shape[1]), GROUP)
    scales = groups.abs().amax(dim=2) / 127.0
    q = (groups * _inverse(scales).unsqueeze(2)).round_().clamp_(-127, 127)
    return q.to(torch.int8).reshape(w.shape), scales


def quantize_int4(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds each group of 32 along K to 16 even steps from its smallest to its largest value.

    Args:
        w: float32[out, K], K a multiple of 32.

    Returns:
        q uint8[out, K], scales float32[out, K/32] and minimums float32[out, K/32].
    """
    _check("quantize_int4", "w", w, torch.float32, None)
    groups = w.reshape(w.shape[0], _num_groups("quantize_int4", w.shape[1]), GROUP)
    minimums, maximums = groups.aminmax(dim=2)
    scales = (maximums - minimums) / 15.0
    steps = (groups - minimums.unsqueeze(2)) * _inverse(scales).unsqueeze(2)
    q = steps.round_().clamp_(0, 15).to(torch.uint8)
    return q.reshape(w.shape), scales, minimums


def unpack(packed: PackedWeight) -> Tensor:
    """Returns the weight a packed one stands for, as float32[out, in].

    The values are those the kernel multiplies with: scale * q is exact in float64, so the result
    is rounded once, as the kernel's product (int8) or fused multiply-add (int4) is.
    """
    if packed.format == "fp32":
        return _rows(packed.weight, packed.out_features)
    assert packed.scales is not None
    scales = _rows(packed.scales, packed.out_features).double().unsqueeze(2)
    if packed.format == "int8":
        q = _rows(packed.weight, packed.out_features)
        w = q.reshape(*scales.shape[:2], GROUP).double() * scales
    else:
        assert packed.minimums is not None
        pairs = _rows(packed.weight, packed.out_features)
        q = torch.stack((pairs & 15, pairs >> 4), dim=2)
        minimums = _rows(packed.minimums, packed.out_features).double().unsqueeze(2)
        w = q.reshape(*scales.shape[:2], GROUP).double() * scales + minimums
    return w.float().reshape(packed.out_features, packed.in_features)


def _panels(rows: Tensor) -> Tensor:
    """[out, X] -> [ceil(out/16), X, 16], zeros in the columns past out."""
    out_features, width = rows.shape
    missing = -out_features % PANEL
    if missing:
        rows = torch.cat((rows, rows.new_zeros(missing, width)))
    # numpy: one thread, several times as fast as torch's when the cores are busy.
    columns = rows.numpy().reshape(-1, PANEL, width).transpose(0, 2, 1)
    return torch.from_numpy(np.ascontiguousarray(columns))


def _join(panels: Sequence[Tensor]) -> Tensor:
    """Panel arrays one after another."""
    return torch.from_numpy(np.concatenate([part.numpy() for part in panels]))


@overload
def _alternate(first: Tensor, second: Tensor) -> Tensor: ...
@overload
def _alternate(first: Tensor | None, second: Tensor | None) -> Tensor | None: ...
def _alternate(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Panels of both by turns; None of None."""
    if first is None or second is None:
        return None
    return torch.stack((first, second), dim=1).flatten(0, 1)


def _rows(panels: Tensor, out_features: int) -> Tensor:
    """The inverse of `_panels`."""
    return panels.transpose(1, 2).reshape(-1, panels.shape[1])[:out_features].contiguous()


def _inverse(scales: Tensor) -> Tensor:
    """1 / scale, and 0 where a group is constant (its q is then 0)."""
    inverse = scales.reciprocal()
    return torch.where(torch.isfinite(inverse), inverse, torch.zeros_like(inverse))


def _num_groups(function: str, in_features: int) -> int:
    """K / 32; ValueError unless that is whole."""
    if in_features % GROUP:
        raise ValueError(f"{function}: K: expected a multiple of {GROUP}, got {in_features}")
    return in_features // GROUP


def _check(
    function: str, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, int] | None
) -> None:
    """ValueError unless `tensor` is a matrix of this dtype (and shape)."""
    if tensor.dtype != dtype or tensor.dim() != 2 or (shape and tuple(tensor.shape) != shape):
        want = list(shape) if shape else "[out, K]"
        raise ValueError(
            f"{function}: {name}: expected {dtype}{want}, got {tensor.dtype}{list(tensor.shape)}"
        )
