"""16-bit activations on the CPU: widened exactly, computed in float32, rounded once.

So a call has, bit for bit, the result of the float32 call on the same numbers, rounded by torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stateful_kv import ops
from tests.ops import plain_torch
from tests.ops.cases import valid_arguments
from tests.ops.comparing import assert_close_to_reference, assert_same_bits, to_numpy64
from tests.ops.paged import make_batch, make_pools, offsets, quantized, random_slots
from tests.reference import attention, elementwise

HALVES = [torch.float16, torch.bfloat16]
FLOATS = [torch.float32, *HALVES]
half = pytest.mark.parametrize("dtype", HALVES, ids=str)
weights = pytest.mark.parametrize("weight_dtype", FLOATS, ids=str)
# Around the vectors of all instruction sets, and the runs in which rows are widened.
WIDTHS = [1, 7, 16, 17, 113, 255, 256, 257, 1023]


def assert_same(left: Tensor, right: Tensor, what: str = "results") -> None:
    """Equal bits; but a NaN is a NaN, whatever it carries."""
    assert left.dtype == right.dtype, f"{what}: {left.dtype} and {right.dtype}"
    assert torch.equal(left.isnan(), right.isnan()), f"{what}: NaN in other places"
    assert_same_bits(left.nan_to_num(nan=0.0), right.nan_to_num(nan=0.0), what)


def any_bits(*shape: int, dtype: torch.dtype) -> Tensor:
    """Any 16-bit patterns: NaN, infinities, subnormal numbers and both zeros among them."""
    return torch.randint(-(2**15), 2**15, shape, dtype=torch.int16).view(dtype)


def rows_of(count: int, width: int, dtype: torch.dtype) -> Tensor:
    """Rows in a wider tensor: ordinary numbers, in the last one any bits."""
    wide = torch.randn(count, width + 5).to(dtype)
    wide[-1] = any_bits(width + 5, dtype=dtype)
    return wide[:, 3 : 3 + width]


@pytest.mark.isa
@half
@weights
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(dtype: torch.dtype, weight_dtype: torch.dtype, width: int) -> None:
    x, weight = rows_of(7, width, dtype), torch.randn(width).to(weight_dtype)
    expected = ops.rms_norm(x.float(), weight.float(), 1e-5)
    assert_same(ops.rms_norm(x, weight, 1e-5), expected.to(dtype))


@pytest.mark.isa
@half
@pytest.mark.parametrize("width", WIDTHS)
def test_add_rms_norm(dtype: torch.dtype, width: int) -> None:
    x, weight = rows_of(7, width, dtype), torch.randn(width)
    residual = torch.randn(7, width).to(dtype)
    expected = (residual.float() + x.float()).to(dtype)
    output, total = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert_same(total, expected, "sum")
    assert_same(output, ops.rms_norm(total.float(), weight, 1e-5).to(dtype), "output")


@pytest.mark.isa
@pytest.mark.parametrize("width", WIDTHS)
@half
def test_rms_norm_of_float32_by_a_16_bit_weight(dtype: torch.dtype, width: int) -> None:
    x, weight = torch.randn(7, width), torch.randn(width).to(dtype)
    assert_same_bits(ops.rms_norm(x, weight, 1e-5), ops.rms_norm(x, weight.float(), 1e-5))


@half
def test_rms_norm_of_heads_of_a_fused_row(dtype: torch.dtype) -> None:
    fused, weight = torch.randn(11, 200).to(dtype), torch.randn(64)
    heads = fused[:, :192].view(11, 3, 64)
    expected = ops.rms_norm(heads.float(), weight, 1e-5).to(dtype)
    assert_same_bits(ops.rms_norm(heads, weight, 1e-5), expected)


@half
def test_rms_norm_near_float64(dtype: torch.dtype) -> None:
    x, weight = torch.randn(9, 576).to(dtype), torch.randn(576).to(dtype)
    reference = elementwise.rms_norm(to_numpy64(x), to_numpy64(weight), 1e-5)
    plain = plain_torch.rms_norm(x, weight, 1e-5)
    assert_close_to_reference(ops.rms_norm(x, weight, 1e-5), reference, plain)


@pytest.mark.isa
@half
@pytest.mark.parametrize("width", WIDTHS)
def test_silu_mul(dtype: torch.dtype, width: int) -> None:
    gate_up = rows_of(7, 2 * width, dtype)
    assert_same(ops.silu_mul(gate_up), ops.silu_mul(gate_up.float()).to(dtype))


@half
def test_silu_mul_near_float64(dtype: torch.dtype) -> None:
    gate_up = (torch.randn(9, 512) * 3).to(dtype)
    reference = elementwise.silu_mul(to_numpy64(gate_up))
    assert_close_to_reference(ops.silu_mul(gate_up), reference, plain_torch.silu_mul(gate_up))


def logit_rows(width: int, dtype: torch.dtype) -> Tensor:
    """Distinct ones, many equal ones, zeros of both signs, all -inf, any bits, one NaN."""
    rows = torch.randn(6, width + 3)
    rows[1] = rows[1].round()
    rows[2] = torch.where(rows[2] > 0, 0.0, -0.0)
    rows[3] = float("-inf")
    rows[5, 3 + width // 2] = float("nan")
    halves = rows.to(dtype)
    halves[4] = any_bits(width + 3, dtype=dtype)
    return halves[:, 3:]


@pytest.mark.isa
@half
@pytest.mark.parametrize("width", [1, 7, 64, 70, 1000, 4099])
def test_argmax(dtype: torch.dtype, width: int) -> None:
    logits = logit_rows(width, dtype)
    ids, values = ops.argmax(logits)
    expected_ids, expected_values = ops.argmax(logits.float())
    assert torch.equal(ids, expected_ids)
    assert_same(values, expected_values)


def new_pools(head_dim: int, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """k_pool, v_pool and for int8 their scales, all marked as unwritten."""
    k_pool, v_pool = make_pools(4, 2, 16, head_dim)
    if dtype != torch.int8:
        return k_pool.to(dtype), v_pool.to(dtype), None, None
    pools = torch.full((2, 4, 2, 16, head_dim), 99, dtype=torch.int8)
    scales = torch.full((2, 4, 2, 16), -1.0)
    return pools[0], pools[1], scales[0], scales[1]


def assert_same_pools(left: tuple[Tensor | None, ...], right: tuple[Tensor | None, ...]) -> None:
    """Both pools and both scales."""
    names = ("k_pool", "v_pool", "k_scales", "v_scales")
    for name, got, expected in zip(names, left, right, strict=True):
        if got is not None and expected is not None:
            assert_same(got, expected, name)


def key_rows(head_dim: int, dtype: torch.dtype) -> Tensor:
    """[9, 2, head_dim], rows and heads apart; two vectors have any bits."""
    rows = torch.randn(9, 3, head_dim + 6).to(dtype)
    rows[4] = any_bits(3, head_dim + 6, dtype=dtype)
    return rows[:, :2, 5 : 5 + head_dim]


pool_dtypes = pytest.mark.parametrize("pool_dtype", [*FLOATS, torch.int8], ids=str)


@pytest.mark.isa
@half
@pool_dtypes
@pytest.mark.parametrize("head_dim", [1, 30, 64, 80, 300])
def test_append_kv(dtype: torch.dtype, pool_dtype: torch.dtype, head_dim: int) -> None:
    k, v = key_rows(head_dim, dtype), key_rows(head_dim, dtype)
    slots = random_slots(9, 4, 16)
    slots[2] = -1
    pools, expected = new_pools(head_dim, pool_dtype), new_pools(head_dim, pool_dtype)
    ops.append_kv(k, v, slots, *pools)
    ops.append_kv(k.float(), v.float(), slots, *expected)
    assert_same_pools(pools, expected)


@pytest.mark.isa
@half
@pool_dtypes
@pytest.mark.parametrize("head_dim", [2, 30, 64, 80, 256, 600])
def test_rope_append_kv(dtype: torch.dtype, pool_dtype: torch.dtype, head_dim: int) -> None:
    q = torch.randn(9, 5, head_dim + 6).to(dtype)[:, :3, 5 : 5 + head_dim]
    k, v = key_rows(head_dim, dtype), key_rows(head_dim, dtype)
    positions = torch.randint(0, 64, (9,), dtype=torch.int32)
    table = torch.from_numpy(elementwise.rope_table(64, head_dim)).float()
    slots = random_slots(9, 4, 16)
    slots[2] = -1
    wide_q, wide_k, wide_v = q.float(), k.float(), v.float()
    k_before, v_before = k.clone(), v.clone()
    pools, expected = new_pools(head_dim, pool_dtype), new_pools(head_dim, pool_dtype)
    ops.rope_append_kv(q, k, v, positions, table, slots, *pools)
    ops.rope_append_kv(wide_q, wide_k, wide_v, positions, table, slots, *expected)
    assert_same(q, wide_q.to(dtype), "q")
    assert_same_pools(pools, expected)
    assert_same_bits(k, k_before, "k")
    assert_same_bits(v, v_before, "v")


def attention_arguments(head_dim: int, pool_dtype: torch.dtype) -> dict[str, Any]:
    """Sequences long and short, one without rows, and a row that belongs to none."""
    batch = make_batch(
        [700, 0, 33, 1], [5, 0, 1, 1], head_dim=head_dim, dtype=torch.float32
    ).arguments
    names = ("q", "k_pool", "v_pool", "page_table", "seq_lens", "query_offsets")
    arguments: dict[str, Any] = dict(zip(names, batch, strict=True))
    arguments["q"] = torch.randn(8, 4, head_dim)
    for name in ("k", "v"):
        pool = arguments[f"{name}_pool"]
        if pool_dtype == torch.int8:
            arguments[f"{name}_pool"], arguments[f"{name}_scales"] = quantized(pool)
        else:
            arguments[f"{name}_pool"] = pool.to(pool_dtype)
    return arguments


@pytest.mark.isa
@half
@pool_dtypes
@pytest.mark.parametrize("head_dim", [16, 80, 256])
@pytest.mark.parametrize("extras", [{}, {"sliding_window": 70, "soft_cap": 5.0}], ids=str)
def test_paged_attention(
    dtype: torch.dtype, pool_dtype: torch.dtype, head_dim: int, extras: dict[str, Any]
) -> None:
    arguments = attention_arguments(head_dim, pool_dtype) | {"scale": head_dim**-0.5} | extras
    q = torch.randn(8, 6, head_dim + 3).to(dtype)[:, 1:5, 3:]
    q[6] = any_bits(4, head_dim, dtype=dtype)
    output = ops.paged_attention(**arguments | {"q": q})
    expected = ops.paged_attention(**arguments | {"q": q.float()})
    assert_same(output, expected.to(dtype))
    assert (output[7] == 0).all()


@half
def test_paged_attention_near_float64(dtype: torch.dtype) -> None:
    batch = make_batch([70], [3], head_dim=64, dtype=dtype)
    query = batch.query.to(dtype)
    keys, values = batch.keys[0], batch.values[0]
    reference = attention.dense_attention(
        to_numpy64(query), to_numpy64(keys), to_numpy64(values), batch.scale
    )
    plain = plain_torch.attention(query, keys, values, batch.scale)
    output = ops.paged_attention(query, *batch.arguments[1:], batch.scale)
    assert_close_to_reference(output, reference, plain)


@half
def test_shared_prefix_attention(dtype: torch.dtype) -> None:
    arguments = valid_arguments("shared_prefix_attention")
    q = arguments["q"].to(dtype)
    output = ops.shared_prefix_attention(**arguments | {"q": q})
    expected = ops.shared_prefix_attention(**arguments | {"q": q.float()})
    assert_same_bits(output, expected.to(dtype))


def packed_weight(weight_format: str, out_features: int, in_features: int) -> dict[str, Any]:
    """A random weight in panels."""
    panels = -(-out_features // 16)
    if weight_format == "fp32":
        weight = torch.randn(panels, in_features, 16)
        return {"weight": weight, "scales": None, "minimums": None}
    scales = torch.rand(panels, in_features // 32, 16) * 0.1
    if weight_format == "int8":
        weight = torch.randint(-127, 128, (panels, in_features, 16), dtype=torch.int8)
        return {"weight": weight, "scales": scales, "minimums": None}
    weight = torch.randint(0, 256, (panels, in_features // 2, 16), dtype=torch.uint8)
    return {"weight": weight, "scales": scales, "minimums": -8 * scales}


def widened(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in float32."""
    return {
        name: value.float() if isinstance(value, Tensor) and value.dtype in HALVES else value
        for name, value in arguments.items()
    }


linear_formats = pytest.mark.parametrize("weight_format", ["fp32", "int8", "int4"])


@pytest.mark.isa
@half
@linear_formats
@weights
@pytest.mark.parametrize("rows", [1, 2, 3, 12, 13, 40])
@pytest.mark.parametrize("has_norm", [False, True])
def test_quantized_linear(
    dtype: torch.dtype, weight_format: str, weight_dtype: torch.dtype, rows: int, has_norm: bool
) -> None:
    depth, out_features = (37, 21) if weight_format == "fp32" else (64, 45)
    arguments = packed_weight(weight_format, out_features, depth) | {
        "x": rows_of(rows, depth, dtype),
        "bias": torch.randn(out_features).to(weight_dtype),
        "out_features": out_features,
        "residual": torch.randn(rows, out_features).to(dtype),
        "norm_weight": torch.randn(depth).to(weight_dtype) if has_norm else None,
        "norm_eps": 1e-5,
    }
    output = ops.quantized_linear(**arguments)
    assert_same(output, ops.quantized_linear(**widened(arguments)).to(dtype))
    bare = arguments | {"bias": None, "residual": None}
    assert_same(ops.quantized_linear(**bare), ops.quantized_linear(**widened(bare)).to(dtype))


@pytest.mark.isa
@half
@linear_formats
@pytest.mark.parametrize("rows", [1, 2, 13])
def test_quantized_linear_with_silu_mul(dtype: torch.dtype, weight_format: str, rows: int) -> None:
    arguments = packed_weight(weight_format, 96, 64) | {
        "x": rows_of(rows, 64, dtype),
        "bias": torch.randn(96).to(dtype),
        "out_features": 96,
        "silu_mul": True,
    }
    output = ops.quantized_linear(**arguments)
    assert output.shape == (rows, 48)
    assert_same(output, ops.quantized_linear(**widened(arguments)).to(dtype))


@half
def test_quantized_linear_without_depth_or_rows(dtype: torch.dtype) -> None:
    bias = torch.randn(5).to(dtype)
    nothing = torch.empty(3, 0, dtype=dtype), torch.empty(1, 0, 16), None, None
    assert_same_bits(ops.quantized_linear(*nothing, bias, 5), bias.expand(3, 5))
    weight = packed_weight("fp32", 5, 8)
    empty = ops.quantized_linear(
        torch.empty(0, 8, dtype=dtype), **weight, bias=bias, out_features=5
    )
    assert (empty.shape, empty.dtype) == ((0, 5), dtype)


@pytest.mark.isa
@half
@linear_formats
@pytest.mark.parametrize("rows", [1, 13, 50])
@pytest.mark.parametrize("has_norm", [False, True])
def test_linear_top_k(dtype: torch.dtype, weight_format: str, rows: int, has_norm: bool) -> None:
    arguments = packed_weight(weight_format, 300, 64) | {
        "x": rows_of(rows, 64, dtype),
        "bias": torch.randn(300).to(dtype),
        "out_features": 300,
        "k": 5,
        "norm_weight": torch.randn(64).to(dtype) if has_norm else None,
        "norm_eps": 1e-5,
    }
    ids, values = ops.linear_top_k(**arguments)
    expected_ids, expected_values = ops.linear_top_k(**widened(arguments))
    assert torch.equal(ids, expected_ids)
    assert_same(values, expected_values)


def test_the_residual_has_the_dtype_of_x() -> None:
    weight = packed_weight("fp32", 5, 8)
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="residual: expected dtype bfloat16, got float32"):
        ops.quantized_linear(x, **weight, bias=None, out_features=5, residual=torch.zeros(3, 5))


@half
def test_thread_count_does_not_matter(
    dtype: torch.dtype, set_num_threads: Callable[[int], None]
) -> None:
    """Threads that share the columns or the rows of a 16-bit result write their own elements."""
    x, weight = torch.randn(300, 64).to(dtype), packed_weight("int8", 1000, 64)
    gate_up, logits = torch.randn(2, 300, 1000).to(dtype)
    results = []
    for threads in (1, 2, 3):
        set_num_threads(threads)
        results.append(
            (
                ops.quantized_linear(x, **weight, bias=None, out_features=1000),
                ops.quantized_linear(x[:1], **weight, bias=None, out_features=1000),
                ops.silu_mul(gate_up),
                ops.rms_norm(gate_up, torch.ones(1000), 1e-5),
                ops.argmax(logits)[1],
            )
        )
    for others in results[1:]:
        for left, right in zip(others, results[0], strict=True):
            assert_same_bits(left, right)


# What may be 16-bit in each op, beside pools.
ACTIVATIONS = {
    "append_kv": ("k", "v"),
    "argmax": ("logits",),
    "linear_top_k": ("x", "bias", "norm_weight"),
    "paged_attention": ("q",),
    "quantized_linear": ("x", "bias", "residual", "norm_weight"),
    "add_rms_norm": ("x", "weight", "residual"),
    "rms_norm": ("x", "weight"),
    "rope_append_kv": ("q", "k", "v"),
    "shared_prefix_attention": ("q",),
    "silu_mul": ("gate_up",),
}


@half
@pytest.mark.parametrize("op", sorted(ACTIVATIONS))
def test_opcheck(op: str, dtype: torch.dtype) -> None:
    arguments = valid_arguments(op)
    for name in ACTIVATIONS[op]:
        arguments[name] = arguments[name].to(dtype)
    overload = getattr(torch.ops.stateful_kv, op).default
    torch.library.opcheck(overload, tuple(arguments.values()))


class Attention(torch.nn.Module):
    """Attention of one sequence: torch's projections, the ops between them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.Parameter(torch.rand(64) + 0.5)
        self.qkv = torch.nn.Linear(64, (4 + 2 + 2) * 16, bias=False)
        self.out = torch.nn.Linear(64, 64)
        table = torch.from_numpy(elementwise.rope_table(32, 16)).float()
        self.table: Tensor
        self.register_buffer("table", table, persistent=False)

    def forward(self, x: Tensor, pools: tuple[Tensor, Tensor]) -> tuple[Tensor, torch.dtype]:
        """The result, and the dtype in which q reached the ops."""
        count = x.shape[0]
        fused = self.qkv(ops.rms_norm(x, self.norm, 1e-5)).view(count, 8, 16)
        q, k, v = fused.split((4, 2, 2), dim=1)
        positions = torch.arange(count, dtype=torch.int32)
        ops.rope_append_kv(q, k, v, positions, self.table.float(), positions.long(), *pools)
        pages = torch.zeros(1, 1, dtype=torch.int32)
        length = torch.tensor([count], dtype=torch.int32)
        output = ops.paged_attention(q, *pools, pages, length, offsets([count]), 0.25)
        return self.out(output.flatten(1)), q.dtype


def test_autocast_mixes_torch_layers_and_ops() -> None:
    model, x = Attention(), torch.randn(7, 64)
    with torch.no_grad():
        expected, dtype = model(x, make_pools(1, 2, 16, 16))
        assert dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output, dtype = model(x, make_pools(1, 2, 16, 16, torch.bfloat16))
        assert (dtype, output.dtype) == (torch.bfloat16, torch.bfloat16)
        torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)


@half
def test_a_model_in_16_bit(dtype: torch.dtype) -> None:
    model, x = Attention(), torch.randn(7, 64)
    with torch.no_grad():
        expected, _ = model(x, make_pools(1, 2, 16, 16))
        output, seen = model.to(dtype)(x.to(dtype), make_pools(1, 2, 16, 16, dtype))
    assert (seen, output.dtype) == (dtype, dtype)
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)
