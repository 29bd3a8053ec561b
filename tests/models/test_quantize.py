"""Packing into panels and back, and the rounding of weights."""

from __future__ import annotations

import pytest
import torch

from stateful_kv.models import packing
from stateful_kv.models.packing import PackedWeight

SIZES = [(1, 32), (15, 64), (16, 32), (17, 96), (48, 256)]


@pytest.mark.parametrize(("out", "k"), SIZES)
def test_fp32_round_trip(out: int, k: int) -> None:
    w = torch.randn(out, k)
    packed = packing.pack_fp32(w)
    assert packed.weight.shape == (-(-out // 16), k, 16)
    assert torch.equal(packing.unpack(packed), w)


@pytest.mark.parametrize(("out", "k"), SIZES)
def test_int8_round_trip(out: int, k: int) -> None:
    q = torch.randint(-128, 128, (out, k), dtype=torch.int8)
    scales = torch.rand(out, k // 32)
    packed = packing.pack_int8(q, scales)
    want = (q.reshape(out, -1, 32).double() * scales.unsqueeze(2).double()).float()
    assert torch.equal(packing.unpack(packed), want.reshape(out, k))
    assert packed.weight[0, 3, 0] == q[0, 3]
    assert packed.weight[-1, k - 1, (out - 1) % 16] == q[-1, -1]


@pytest.mark.parametrize(("out", "k"), SIZES)
def test_int4_round_trip(out: int, k: int) -> None:
    q = torch.randint(0, 16, (out, k), dtype=torch.uint8)
    scales, minimums = torch.rand(out, k // 32), torch.randn(out, k // 32)
    packed = packing.pack_int4(q, scales, minimums)
    wide = q.reshape(out, -1, 32).double() * scales.unsqueeze(2).double()
    want = (wide + minimums.unsqueeze(2).double()).float().reshape(out, k)
    assert torch.equal(packing.unpack(packed), want)
    assert packed.weight.shape == (-(-out // 16), k // 2, 16)
    assert int(packed.weight[0, 1, 0]) == int(q[0, 2]) | int(q[0, 3]) << 4


def test_padding_columns_are_zero() -> None:
    q, scales, minimums = packing.quantize_int4(torch.randn(17, 32) + 3)
    packed = packing.pack_int4(q, scales, minimums)
    assert packed.minimums is not None and packed.scales is not None
    assert not packed.weight[1, :, 1:].any()
    assert not packed.scales[1, :, 1:].any() and not packed.minimums[1, :, 1:].any()


def test_rounding_errors_are_half_a_step() -> None:
    w = torch.randn(40, 128)
    q, scales = packing.quantize_int8(w)
    step = scales.repeat_interleave(32, dim=1)
    assert ((q * step - w).abs() <= 0.5001 * step).all()
    q, scales, minimums = packing.quantize_int4(w)
    step, low = (x.repeat_interleave(32, dim=1) for x in (scales, minimums))
    assert ((q * step + low - w).abs() <= 0.5001 * step).all()


@pytest.mark.parametrize("value", [0.0, 1.5, -2.0, 1e-44])
def test_constant_groups(value: float) -> None:
    w = torch.full((3, 64), value)
    eight = packing.unpack(packing.pack_int8(*packing.quantize_int8(w)))
    four = packing.unpack(packing.pack_int4(*packing.quantize_int4(w)))
    assert torch.allclose(eight, w, atol=1e-40) and torch.allclose(four, w, atol=1e-40)


@pytest.mark.parametrize("kind", ["fp32", "int8", "int4"])
def test_concat(kind: str) -> None:
    def pack(w: torch.Tensor) -> PackedWeight:
        if kind == "fp32":
            return packing.pack_fp32(w)
        if kind == "int8":
            return packing.pack_int8(*packing.quantize_int8(w))
        return packing.pack_int4(*packing.quantize_int4(w))

    parts = [pack(torch.randn(out, 64)) for out in (32, 16, 5)]
    joined = PackedWeight.concat(parts)
    assert (joined.out_features, joined.in_features, joined.format) == (53, 64, kind)
    assert torch.equal(packing.unpack(joined), torch.cat([packing.unpack(p) for p in parts]))
    with pytest.raises(ValueError, match="whole panels"):
        PackedWeight.concat([parts[2], parts[0]])


def test_bad_arguments_are_named() -> None:
    w = torch.randn(16, 64)
    with pytest.raises(ValueError, match=r"w: expected torch\.float32"):
        packing.pack_fp32(w.double())
    with pytest.raises(ValueError, match="K: expected a multiple of 32, got 33"):
        packing.quantize_int8(torch.randn(2, 33))
    with pytest.raises(ValueError, match=r"scales: expected torch.float32\[16, 2\]"):
        packing.pack_int8(w.to(torch.int8), torch.ones(16, 1))
    with pytest.raises(ValueError, match=r"values 0\.\.15, got 16"):
        packing.pack_int4(torch.full((16, 64), 16, dtype=torch.uint8), w[:, :2], w[:, :2])
    with pytest.raises(ValueError, match="one format"):
        PackedWeight.concat([packing.pack_fp32(w), packing.pack_fp32(w[:, :32].contiguous())])
    with pytest.raises(ValueError, match="at least one"):
        PackedWeight.concat([])
