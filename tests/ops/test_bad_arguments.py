"""Wrong arguments: the message names op and argument, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stateful_kv import ops
from tests.ops.cases import CASES, valid_arguments
from tests.ops.comparing import assert_same_bits

Change = Callable[[Any], Any]
HUGE = 2**31 - 1


def dtype(wanted: torch.dtype) -> Change:
    return lambda value: value.to(wanted)


# Changes of values in a tensor, which the CUDA ops do not check: they would have to synchronise.
VALUE_CHANGES: set[Change] = set()


def set_value(
    index: tuple[int, ...] | int, number: float, wanted: torch.dtype | None = None
) -> Change:
    def change(value: Tensor) -> Tensor:
        value = value.to(wanted or value.dtype)
        value[index] = number
        return value

    VALUE_CHANGES.add(change)
    return change


def to(number: Any) -> Change:
    return lambda value: number


def resize(axis: int, extra: int) -> Change:
    """Zeros of a size that differs in one dimension."""

    def change(value: Tensor) -> Tensor:
        shape = list(value.shape)
        shape[axis] += extra
        return torch.zeros(shape, dtype=value.dtype)

    return change


def spread(value: Tensor) -> Tensor:
    """Same content, no dimension contiguous."""
    return value.repeat_interleave(2, dim=-1)[..., ::2]


def deeper(value: Tensor) -> Tensor:
    return value[None]


def flatter(value: Tensor) -> Tensor:
    return value[0]


def replaced(index: int, tensor: Tensor | None) -> Change:
    """A list of tensors with another one at `index`."""
    return lambda value: [*value[:index], tensor, *value[index + 1 :]]


def overlapping(shape: tuple[int, ...], strides: tuple[int, ...]) -> Change:
    """Some elements share memory, though no stride is 0."""
    return lambda value: torch.zeros(2048).as_strided(shape, strides)


F16, F64, I32, I64 = torch.float16, torch.float64, torch.int32, torch.int64

ROWS: dict[str, Change] = {
    "dtype": dtype(F64),
    "rank": flatter,
    "stride": spread,
    "heads": resize(1, 1),
    "head_dim": resize(2, 16),
}
POOL: dict[str, Change] = {
    "dtype": dtype(F64),
    "int": dtype(I32),
    "rank": flatter,
    "stride": spread,
}
V_POOL = POOL | {"other dtype": dtype(F16), "pages": resize(0, 1), "page_size": resize(2, 1)}
SCALES_WITHOUT_INT8: dict[str, Change] = {"not int8": to(torch.zeros(5, 2, 16))}
SLOTS: dict[str, Change] = {
    "dtype": dtype(I32),
    "rank": deeper,
    "stride": spread,
    "size": resize(0, 1),
    "past the end": set_value(1, 80),
    "huge": set_value(3, 2**62),
    "below -1": set_value(0, -2),
}
OFFSETS: dict[str, Change] = {
    "dtype": dtype(I64),
    "rank": deeper,
    "stride": spread,
    "empty": lambda value: value[:0],
    "start": set_value(0, 1),
    "negative": set_value(0, -1),
    "descending": set_value(1, HUGE),
    "end": set_value(-1, 2),
    "huge end": set_value(-1, HUGE),
}

ROW_OFFSETS = {label: change for label, change in OFFSETS.items() if label != "end"}
LENGTHS: dict[str, Change] = {
    "dtype": dtype(I64),
    "rank": deeper,
    "stride": spread,
    "size": resize(0, 1),
}
MATRIX: dict[str, Change] = {"dtype": dtype(I64), "rank": flatter, "stride": spread}

LINEAR: dict[str, dict[str, Change]] = {
    "x": {"dtype": dtype(F64), "rank": flatter, "stride": spread},
    "weight": {
        "dtype": dtype(I32),
        "rank": flatter,
        "stride": spread,
        "depth": resize(1, 16),
        "panels": resize(0, 1),
        "columns": resize(2, 1),
    },
    "scales": {
        "dtype": dtype(F64),
        "rank": flatter,
        "stride": spread,
        "groups": resize(1, 1),
        "missing": to(None),
    },
    "minimums": {
        "dtype": dtype(F16),
        "rank": flatter,
        "stride": spread,
        "panels": resize(0, 1),
        "missing": to(None),
    },
    "bias": {"dtype": dtype(F64), "rank": deeper, "stride": spread, "size": resize(0, 1)},
    "out_features": {"negative": to(-1)},
    "norm_weight": {
        "dtype": dtype(F64),
        "rank": deeper,
        "stride": spread,
        "size": resize(0, 1),
    },
    "norm_eps": {"negative": to(-1e-9), "infinite": to(float("inf")), "nan": to(float("nan"))},
}

NAN, INFINITY = float("nan"), float("inf")
PER_ROW: dict[str, Change] = {
    "dtype": dtype(torch.int16),
    "rank": deeper,
    "stride": spread,
    "size": resize(0, 1),
}
SHARES: dict[str, Change] = PER_ROW | {
    "double": dtype(F64),
    "negative": set_value(1, -0.1),
    "more than 1": set_value(0, 1.1),
    "nan": set_value(2, NAN),
}

ATTENTION: dict[str, dict[str, Change]] = {
    "q": {
        "dtype": dtype(F64),
        "rank": flatter,
        "stride": spread,
        "head_dim": resize(2, 16),
        "heads": resize(1, 1),
    },
    "k_pool": POOL,
    "v_pool": V_POOL,
    "page_table": {
        "dtype": dtype(I64),
        "rank": flatter,
        "stride": spread,
        "size": resize(0, 1),
        "negative": set_value((0, 1), -1),
        "past the end": set_value((2, 2), 10),
        "huge": set_value((2, 0), HUGE),
    },
    "seq_lens": {
        "dtype": dtype(I64),
        "rank": deeper,
        "size": resize(0, 1),
        "stride": spread,
        "negative": set_value(1, -1),
        "shorter than its rows": set_value(0, 2),
        "beyond the table": set_value(2, 81),
        "huge": set_value(2, HUGE),
    },
    "query_offsets": ROW_OFFSETS,
    "scale": {"nan": to(float("nan")), "inf": to(float("inf"))},
    "sliding_window": {"negative": to(-1)},
    "soft_cap": {"negative": to(-1.0), "nan": to(float("nan"))},
    "k_scales": SCALES_WITHOUT_INT8,
    "v_scales": SCALES_WITHOUT_INT8,
}

BAD: dict[str, dict[str, dict[str, Change]]] = {
    "append_kv": {
        "k": ROWS | {"size": resize(0, 1)},
        "v": ROWS | {"size": resize(0, -1), "other dtype": dtype(F16)},
        "slots": SLOTS,
        "k_pool": POOL,
        "v_pool": V_POOL,
        "k_scales": SCALES_WITHOUT_INT8,
        "v_scales": SCALES_WITHOUT_INT8,
    },
    "copy_pages": {
        "page_copies": {
            "dtype": dtype(I64),
            "rank": flatter,
            "size": resize(1, 1),
            "stride": spread,
            "negative": set_value((0, 0), -1),
            "past the end": set_value((1, 1), 5),
            "huge": set_value((1, 0), HUGE),
        },
        "k_pool": POOL,
        "v_pool": V_POOL,
        "k_scales": SCALES_WITHOUT_INT8,
        "v_scales": SCALES_WITHOUT_INT8,
    },
    "paged_attention": ATTENTION,
    "shared_prefix_attention": ATTENTION
    | {
        "group_offsets": OFFSETS,
        "prefix_lens": {
            "dtype": dtype(I64),
            "rank": deeper,
            "size": resize(0, 1),
            "stride": spread,
            "negative": set_value(0, -1),
            "longer than a sequence": set_value(0, 17),
            "huge": set_value(1, HUGE),
        },
    },
    "rms_norm": {
        "x": {"dtype": dtype(F64), "int": dtype(I32), "stride": spread, "rank": to(torch.ones(()))},
        "weight": {
            "dtype": dtype(F64),
            "rank": deeper,
            "size": resize(0, 1),
            "stride": spread,
        },
        "eps": {"negative": to(-1.0), "nan": to(float("nan"))},
    },
    "add_rms_norm": {
        "x": {"dtype": dtype(F64), "int": dtype(I32), "stride": spread, "rank": to(torch.ones(()))},
        "weight": {
            "dtype": dtype(F64),
            "rank": deeper,
            "size": resize(0, 1),
            "stride": spread,
        },
        "eps": {"negative": to(-1.0), "nan": to(float("nan"))},
        "residual": {
            "dtype": dtype(F64),
            "other dtype": dtype(F16),
            "rank": flatter,
            "rows": resize(0, 1),
            "size": resize(1, -1),
            "stride": spread,
            "one row for all": lambda value: value[:1].expand(3, 40),
        },
    },
    "rope_append_kv": {
        "q": {
            "dtype": dtype(F64),
            "rank": flatter,
            "stride": spread,
            "size": resize(0, 1),
            "head_dim": resize(2, 16),
            "expanded": lambda value: value[:1].expand(4, 6, 32),
            "overlapping rows": overlapping((4, 6, 32), (64, 32, 1)),
            "overlapping heads": overlapping((4, 6, 32), (512, 16, 1)),
        },
        "k": ROWS | {"size": resize(0, 1)},
        "v": ROWS | {"size": resize(0, -1)},
        "positions": {
            "dtype": dtype(I64),
            "rank": deeper,
            "size": resize(0, 1),
            "stride": spread,
            "negative": set_value(0, -1),
            "past the end": set_value(3, 64),
            "huge": set_value(1, HUGE),
        },
        "cos_sin": {
            "dtype": dtype(F64),
            "rank": flatter,
            "stride": spread,
            "head_dim": resize(1, 16),
        },
        "slots": SLOTS,
        "k_pool": POOL,
        "v_pool": V_POOL,
        "k_scales": SCALES_WITHOUT_INT8,
        "v_scales": SCALES_WITHOUT_INT8,
    },
    "silu_mul": {
        "gate_up": {
            "dtype": dtype(F64),
            "rank": flatter,
            "stride": spread,
            "odd": resize(1, 1),
        },
    },
    "quantized_linear": LINEAR
    | {
        "residual": {
            "dtype": dtype(F64),
            "rank": flatter,
            "stride": spread,
            "rows": resize(0, 1),
            "columns": resize(1, 1),
        },
    },
    "linear_top_k": LINEAR
    | {
        "k": {
            "zero": to(0),
            "negative": to(-1),
            "past the most": to(65),
            "more than out_features": to(22),
        },
    },
    "decoder_layers": {
        "x": {"dtype": dtype(F64), "rank": flatter, "stride": spread, "size": resize(0, 1)},
        "weights": {
            "one missing": lambda value: value[:-1],
            "a layer missing": lambda value: value[20:],
            "none": lambda value: [],
            "norm of another size": replaced(0, torch.ones(63)),
            "qkv is None": replaced(1, None),
            "scales of another dtype": replaced(22, torch.zeros(8, 2, 16, dtype=F64)),
            "a norm in the first layer only": replaced(25, None),
            "a norm in the last layer only": replaced(5, None),
            "a norm of q only": replaced(6, None),
            "down is flat": replaced(16, torch.zeros(4)),
            "down of another depth": replaced(36, torch.zeros(4, 64, 16, dtype=torch.int8)),
        },
        "positions": {
            "dtype": dtype(I64),
            "rank": deeper,
            "stride": spread,
            "size": resize(0, 1),
            "past the table": set_value(1, 64),
            "negative": set_value(0, -1),
        },
        "cos_sin": {"dtype": dtype(F64), "rank": flatter, "stride": spread, "D": resize(1, 2)},
        "slots": SLOTS,
        "page_table": {
            "dtype": dtype(I64),
            "rank": flatter,
            "rows": resize(0, 1),
            "negative": set_value((0, 0), -1),
            "past the end": set_value((0, 1), 5),
        },
        "seq_lens": {
            "dtype": dtype(I64),
            "rank": deeper,
            "size": resize(0, 1),
            "below the new rows": set_value(0, 1),
            "past the pages": set_value(1, 33),
        },
        "query_offsets": ROW_OFFSETS,
        "logit_rows": {
            "dtype": dtype(I32),
            "rank": deeper,
            "stride": spread,
            "negative": set_value(0, -1),
            "past the end": set_value(1, 4),
            "more than rows": to(torch.tensor([0, 1, 2, 3, 3])),
        },
        "num_heads": {"zero": to(0), "no multiple of Hk": to(3), "huge": to(2**62)},
        "norm_eps": {"negative": to(-1.0), "nan": to(float("nan"))},
        "scale": {"nan": to(float("nan"))},
        "sliding_window": {"negative": to(-1)},
        "k_pools": {"dtype": dtype(F64), "rank": flatter, "stride": spread},
        "v_pools": {
            "dtype": dtype(F64),
            "rank": flatter,
            "other dtype": dtype(F16),
            "pages": resize(1, 1),
        },
        "output": {
            "dtype": dtype(F64),
            "rank": flatter,
            "stride": spread,
            "rows": resize(0, 1),
            "columns": resize(1, 1),
        },
    },
    "argmax": {
        "logits": {"dtype": dtype(F64), "rank": flatter, "stride": spread},
    },
    "sample": {
        "logits": {
            "dtype": dtype(F64),
            "rank": flatter,
            "stride": spread,
            "empty": lambda value: value[:, :0],
        },
        "seeds": PER_ROW | {"int": dtype(I32)},
        "positions": PER_ROW | {"int": dtype(I32), "negative": set_value(2, -1)},
        "temperatures": PER_ROW
        | {
            "double": dtype(F64),
            "negative": set_value(2, -1.0),
            "nan": set_value(0, NAN),
            "infinite": set_value(0, INFINITY),
        },
        "top_k": PER_ROW | {"long": dtype(I64), "negative": set_value(1, -1)},
        "top_p": SHARES,
        "min_p": SHARES,
    },
    "ngram_lookup": {
        "tokens": {
            "dtype": dtype(torch.float32),
            "rank": deeper,
            "stride": spread,
            "negative": set_value(3, -1),
            "too large": set_value(3, 2**31, I64),
        },
        "offsets": OFFSETS,
        "min_n": {"zero": to(0), "negative": to(-5)},
        "max_n": {"below min_n": to(0)},
        "max_draft": {"negative": to(-1)},
        "lengths": LENGTHS | {"too long": set_value(0, 6), "negative": set_value(1, -1)},
    },
    "verify_draft": {
        "draft_ids": {"dtype": dtype(torch.float32), "rank": deeper, "stride": spread},
        "target_ids": {
            "other dtype": dtype(I32),
            "rank": deeper,
            "stride": spread,
            "size": resize(0, -1),
        },
        "draft_offsets": OFFSETS,
    },
    "fill_rows": {
        "history": MATRIX | {"negative": set_value((0, 4), -1)},
        "lengths": LENGTHS | {"empty": set_value(1, 0), "past L": set_value(0, 21)},
        "num_left": LENGTHS,
        "kv_limits": LENGTHS | {"past M": set_value(0, 33), "huge": set_value(1, HUGE)},
        "draft_ids": MATRIX | {"sequences": resize(0, 1), "negative": set_value((0, 1), -1)},
        "num_draft": LENGTHS | {"past K": set_value(0, 4), "negative": set_value(0, -1)},
        "page_table": MATRIX | {"sequences": resize(0, 1), "negative": set_value((0, 0), -1)},
        "page_size": {"zero": to(0), "negative": to(-16), "huge": to(2**31), "wraps": to(2**62)},
    },
    "advance_sequences": {
        "token_ids": {"dtype": dtype(I32), "rank": deeper, "stride": spread},
        "target_ids": {
            "dtype": dtype(I32),
            "rank": deeper,
            "stride": spread,
            "size": resize(0, 1),
            "negative": set_value(1, -1),
            "too large": set_value(2, 2**31),
        },
        "target_values": {
            "dtype": dtype(F64),
            "rank": deeper,
            "stride": spread,
            "size": resize(0, -1),
        },
        "query_offsets": ROW_OFFSETS,
        "stop_ids": MATRIX | {"sequences": resize(0, 1)},
        "history": MATRIX | {"sequences": resize(0, 1)},
        "lengths": LENGTHS | {"negative": set_value(0, -1), "no room": set_value(0, 6)},
        "num_left": LENGTHS | {"zero": set_value(0, 0), "negative": set_value(2, -1)},
        "counts": MATRIX | {"columns": resize(1, 1), "sequences": resize(0, 1)},
    },
}

# Where two sizes contradict each other the message may name either of the two arguments.
BLAMED = {
    ("append_kv", "slots", "size"): "k",
    ("rope_append_kv", "slots", "size"): "q",
    ("decoder_layers", "x", "size"): "slots",
}


def marks_of(op: str, argument: str, label: str) -> list[pytest.MarkDecorator]:
    """Where CUDA differs."""
    if BAD[op][argument][label] in VALUE_CHANGES:
        return [pytest.mark.cpu_only("values in memory are not checked on CUDA")]
    return []


TABLE = [
    pytest.param(op, argument, label, marks=marks_of(op, argument, label))
    for op, arguments in BAD.items()
    for argument, changes in arguments.items()
    for label in changes
]


def expect_refusal(op: str, argument: str, arguments: dict[str, Any]) -> str:
    """Calls the op; returns the message after checking that no argument changed."""
    tensors = {k: v for k, v in arguments.items() if isinstance(v, Tensor) and not v.is_meta}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    with pytest.raises((TypeError, ValueError)) as error:
        getattr(ops, op)(**arguments)
    for name, tensor in tensors.items():
        assert_same_bits(tensor, before[name], name)
    message = str(error.value).splitlines()[0]
    assert message.startswith(f"{op}: "), message
    assert ": expected " in message, message
    assert ", got " in message, message
    assert f"{op}: {argument}: " in message, message
    return message


def test_every_argument_has_a_bad_case() -> None:
    for op in CASES:
        assert set(BAD[op]) == set(valid_arguments(op)), op


@pytest.mark.emulated
@pytest.mark.parametrize(("op", "argument", "label"), TABLE)
def test_bad_argument(op: str, argument: str, label: str) -> None:
    arguments = valid_arguments(op)
    arguments[argument] = BAD[op][argument][label](arguments[argument])
    message = expect_refusal(op, BLAMED.get((op, argument, label), argument), arguments)
    if label == "dtype":
        assert str(arguments[argument].dtype).removeprefix("torch.") in message


TENSOR_ARGUMENTS = [
    (op, name)
    for op in CASES
    for name, value in valid_arguments(op).items()
    if isinstance(value, Tensor) and sum(map(torch.is_tensor, valid_arguments(op).values())) > 1
]


@pytest.mark.parametrize(("op", "argument"), TENSOR_ARGUMENTS)
def test_one_argument_on_another_device(op: str, argument: str) -> None:
    arguments = valid_arguments(op)
    arguments[argument] = arguments[argument].to("meta")
    with pytest.raises((TypeError, ValueError, RuntimeError), match=f"{op}: .*device"):
        getattr(ops, op)(**arguments)


@pytest.mark.parametrize(
    ("op", "argument"), [("silu_mul", "gate_up"), ("rms_norm", "x"), ("quantized_linear", "x")]
)
def test_sparse_is_refused(op: str, argument: str) -> None:
    arguments = valid_arguments(op)
    arguments[argument] = arguments[argument].to_sparse()
    with pytest.raises((TypeError, ValueError, NotImplementedError, RuntimeError), match=op):
        getattr(ops, op)(**arguments)


@pytest.mark.parametrize("weight_format", ["fp32", "int8"])
def test_parts_of_another_weight_format(weight_format: str) -> None:
    arguments = valid_arguments("quantized_linear")
    weight = torch.zeros(2, 64, 16)
    if weight_format == "fp32":
        expect_refusal("quantized_linear", "scales", arguments | {"weight": weight})
    else:
        weight = weight.to(torch.int8)
        expect_refusal("quantized_linear", "minimums", arguments | {"weight": weight})


@pytest.mark.parametrize("out_features", [0, 16, 33, 2**62])
def test_out_features_outside_the_last_panel(out_features: int) -> None:
    arguments = valid_arguments("quantized_linear") | {"out_features": out_features, "bias": None}
    with pytest.raises(ValueError, match=r"quantized_linear: \w+: expected .*, got "):
        ops.quantized_linear(**arguments)


def test_depth_that_is_no_multiple_of_a_group() -> None:
    arguments = valid_arguments("quantized_linear")
    arguments["x"] = torch.zeros(3, 48)
    arguments["weight"] = torch.zeros(2, 24, 16, dtype=torch.uint8)
    expect_refusal("quantized_linear", "x", arguments)


def test_an_odd_head_dim_cannot_be_rotated() -> None:
    arguments = valid_arguments("rope_append_kv")
    for name in ("q", "k", "v", "k_pool", "v_pool", "cos_sin"):
        arguments[name] = arguments[name][..., :31].contiguous()
    with pytest.raises(ValueError, match=r"rope_append_kv: \w+: expected .*, got "):
        ops.rope_append_kv(**arguments)


def test_repeated_page_ids_are_legal_for_reading() -> None:
    arguments = valid_arguments("paged_attention")
    arguments["page_table"][2] = arguments["page_table"][2, 0]
    assert ops.paged_attention(**arguments).isfinite().all()


def test_unused_table_entries_are_never_checked() -> None:
    arguments = valid_arguments("paged_attention")
    expected = ops.paged_attention(**arguments)
    for unused in (-1, HUGE, -(2**31)):
        arguments["page_table"][1] = unused
        arguments["page_table"][0, 2:] = unused
        assert_same_bits(ops.paged_attention(**arguments), expected)


POOL_WRITERS = ("append_kv", "copy_pages", "rope_append_kv")


@pytest.mark.parametrize("op", POOL_WRITERS)
@pytest.mark.parametrize("shift", [0, 1, 5])
def test_pools_that_share_memory(op: str, shift: int) -> None:
    arguments = valid_arguments(op)
    shape = arguments["k_pool"].shape
    memory = torch.zeros(arguments["k_pool"].numel() + 5)
    arguments["k_pool"] = memory[: shape.numel()].view(shape)
    arguments["v_pool"] = memory[shift : shape.numel() + shift].view(shape)
    assert "in the memory of k_pool" in expect_refusal(op, "v_pool", arguments)


@pytest.mark.parametrize("op", POOL_WRITERS)
def test_pools_side_by_side_are_legal(op: str) -> None:
    arguments = valid_arguments(op)
    both = torch.stack([arguments["v_pool"], arguments["k_pool"]])
    arguments["v_pool"], arguments["k_pool"] = both
    expected = valid_arguments(op)
    for name in ("q", "k", "v", "page_copies", "k_pool", "v_pool"):
        if name in expected:
            expected[name].copy_(arguments[name])
    getattr(ops, op)(**arguments)
    getattr(ops, op)(**expected)
    assert_same_bits(arguments["k_pool"], expected["k_pool"])
    assert_same_bits(arguments["v_pool"], expected["v_pool"])


@pytest.mark.parametrize("pool", ["k_pool", "v_pool"])
def test_queries_inside_a_pool(pool: str) -> None:
    arguments = valid_arguments("rope_append_kv")
    arguments["q"] = arguments[pool].view(-1)[: 4 * 6 * 32].view(4, 6, 32)
    assert f"in the memory of {pool}" in expect_refusal("rope_append_kv", "q", arguments)


@pytest.mark.parametrize("strides", [(192, 32, 1), (256, 40, 1), (32, 128, 1), (1000, 32, 1)])
def test_queries_with_gaps_or_turned_axes_are_written(strides: tuple[int, ...]) -> None:
    arguments = valid_arguments("rope_append_kv")
    expected = arguments["q"].clone()
    memory = torch.zeros(4096)
    arguments["q"] = memory.as_strided((4, 6, 32), strides)
    arguments["q"].copy_(expected)
    ops.rope_append_kv(**arguments)
    ops.rope_append_kv(
        **valid_arguments("rope_append_kv")
        | {"q": expected}
        | {name: arguments[name] for name in ("k", "v", "positions", "cos_sin", "slots")}
    )
    assert_same_bits(arguments["q"], expected)
