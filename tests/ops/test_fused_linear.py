"""quantized_linear fused with the norm before it and the activation after it: the same bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stateful_kv import ops
from stateful_kv.models import packing
from stateful_kv.models.llama import Linear
from stateful_kv.system.memory import HUGE_PAGE_BYTES, HugePageArena
from tests.ops.comparing import assert_same_bits
from tests.ops.test_quantized_linear import FORMATS, random_weight, run

ROWS = [1, 2, 3, 6, 7, 8, 12, 13, 33, 270]
EPS = 1e-5


def parts_of(packed: packing.PackedWeight) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return packed.weight, packed.scales, packed.minimums


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize(("out_features", "in_features"), [(21, 96), (160, 576)])
def test_norm_inside_equals_norm_before(
    weight_format: str, out_features: int, in_features: int
) -> None:
    packed = random_weight(weight_format, out_features, in_features)
    wide = torch.randn(max(ROWS), in_features + 7) * 3
    bias, norm = torch.randn(out_features), torch.randn(in_features)
    for rows in ROWS:
        x, residual = wide[:rows, 3:-4], torch.randn(rows, out_features)
        fused = ops.quantized_linear(x, *parts_of(packed), bias, out_features, residual, norm, EPS)
        hidden = ops.rms_norm(x, norm, EPS)
        assert_same_bits(fused, run(hidden, packed, bias) + residual, f"{rows} rows")


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_gate_and_up_in_one_op(weight_format: str, with_bias: bool) -> None:
    gate, up = (random_weight(weight_format, 80, 96) for _ in range(2))
    biases = torch.randn(2, 80) if with_bias else (None, None)
    layer = Linear.gate_up(gate, up, biases)
    assert len(layer.parts) == 1
    x, norm = torch.randn(max(ROWS), 96) * 2, torch.randn(96)
    hidden = ops.rms_norm(x, norm, EPS)
    pairs = [run(hidden, w, b) for w, b in zip((gate, up), biases, strict=True)]
    expected = ops.silu_mul(torch.cat(pairs, dim=1))
    for rows in ROWS:
        fused = layer(x[:rows], norm_weight=norm, norm_eps=EPS)
        assert_same_bits(fused, expected[:rows], f"{rows} rows")


def test_gate_and_up_that_cannot_be_fused_give_the_same() -> None:
    gate, up = random_weight("fp32", 24, 64), random_weight("fp32", 24, 64)
    layer = Linear.gate_up(gate, up, (torch.randn(24), None))
    assert len(layer.parts) == 2
    x = torch.randn(5, 64)
    assert layer.bias is not None
    pair = [run(x, gate, layer.bias[:24]), run(x, up)]
    assert_same_bits(layer(x), ops.silu_mul(torch.cat(pair, dim=1)))
    mixed = Linear.gate_up(random_weight("int8", 32, 64), random_weight("int4", 32, 64))
    assert len(mixed.parts) == 2 and mixed(x).shape == (5, 32)


@pytest.mark.parametrize("rows", [1, 9, 300])
def test_thread_count_does_not_matter(rows: int, set_num_threads: Callable[[int], None]) -> None:
    layer = Linear.gate_up(random_weight("int4", 512, 256), random_weight("int4", 512, 256))
    x, norm, results = torch.randn(rows, 256), torch.randn(256), []
    for threads in (1, 2, 3):
        set_num_threads(threads)
        results.append(layer(x, norm_weight=norm, norm_eps=EPS))
    assert_same_bits(results[1], results[0], "2 threads")
    assert_same_bits(results[2], results[0], "3 threads")


def test_bad_rows_stay_alone() -> None:
    layer = Linear.gate_up(random_weight("int8", 32, 64), random_weight("int8", 32, 64))
    x, norm = torch.randn(9, 64), torch.ones(64)
    expected = layer(x, norm_weight=norm)
    x[4, 7] = float("nan")
    output = layer(x, norm_weight=norm)
    assert output[4].isnan().all()
    others = [row for row in range(9) if row != 4]
    assert_same_bits(output[others], expected[others])


def test_residual_with_activation_is_refused() -> None:
    packed = random_weight("int8", 64, 64)
    x = torch.randn(2, 64)
    with pytest.raises(ValueError, match=r"residual: expected None with silu_mul, got"):
        ops.quantized_linear(
            x, *parts_of(packed), None, 64, torch.zeros(2, 64), None, 0.0, silu_mul=True
        )
    with pytest.raises(ValueError, match=r"out_features: expected a multiple of 32"):
        ops.quantized_linear(x, *parts_of(random_weight("int8", 48, 64)), None, 48, silu_mul=True)


def test_weights_that_do_not_alternate() -> None:
    with pytest.raises(ValueError, match=r"interleave: .* int8\[32, 64\] and int8\[16, 64\]"):
        packing.PackedWeight.interleave(
            random_weight("int8", 32, 64), random_weight("int8", 16, 64)
        )


def test_arena_keeps_values_and_alignment() -> None:
    arena = HugePageArena()
    tensors = [torch.randn(3, 5), torch.randint(0, 9, (7,)), torch.randn(0, 4)]
    tensors.append(torch.randn(5_000_000)[::2])  # more than a region has left, and not contiguous
    placed = [arena.place(tensor) for tensor in tensors]
    for before, after in zip(tensors, placed, strict=True):
        assert after.dtype == before.dtype and after.is_contiguous()
        assert torch.equal(before, after)
    assert placed[0].data_ptr() % HUGE_PAGE_BYTES == 0
    assert all(t.data_ptr() % 64 == 0 for t in placed if t.numel())
    large = torch.zeros(1 << 25)
    assert torch.equal(arena.place(large), large)
