"""Calls every op with extreme integers and compares it with plain loops; a program of its own.

    python -m tests.ops.integer_extremes PROGRESS CASE...

A kernel that trusts a wrong integer may end the whole process, so test_integer_extremes.py starts
this as a child. For each case it prints one line of JSON with what went wrong; the file PROGRESS
holds the call that was last begun. The arguments lie between guards: memory that nobody may write.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stateful_kv import ops
from tests.ops.cases import INT8_OPS, WRITTEN, Arguments, int8_arguments, valid_arguments
from tests.ops.comparing import bits, same_bits, to_numpy64
from tests.ops.integer_references import EXPECTED
from tests.ops.paged import quantized

INT32, INT64 = np.iinfo(np.int32), np.iinfo(np.int64)
GUARD_ELEMENTS = 64
MOST_PLACES = 40  # of one tensor, first and last element among them

# Every integer that an op takes, as a tensor or as a number; the op's schema has to agree.
INTEGERS: dict[str, tuple[str, ...]] = {
    "append_kv": ("slots",),
    "append_kv int8": ("slots", "k_pool", "v_pool"),
    "copy_pages": ("page_copies",),
    "copy_pages int8": ("page_copies", "k_pool", "v_pool"),
    "paged_attention": ("page_table", "seq_lens", "query_offsets", "sliding_window"),
    "paged_attention int8": (
        *("k_pool", "v_pool", "page_table", "seq_lens", "query_offsets", "sliding_window"),
    ),
    "shared_prefix_attention": (
        *("page_table", "seq_lens", "query_offsets", "group_offsets", "prefix_lens"),
        "sliding_window",
    ),
    "shared_prefix_attention int8": (
        *("k_pool", "v_pool", "page_table", "seq_lens", "query_offsets", "group_offsets"),
        *("prefix_lens", "sliding_window"),
    ),
    "rms_norm": (),
    "add_rms_norm": (),
    "rope_append_kv": ("positions", "slots"),
    "rope_append_kv int8": ("positions", "slots", "k_pool", "v_pool"),
    "silu_mul": (),
    "quantized_linear": ("weight", "out_features"),
    "linear_top_k": ("weight", "out_features", "k"),
    "decoder_layers": (
        *("positions", "slots", "page_table", "seq_lens", "query_offsets", "logit_rows"),
        *("num_heads", "sliding_window"),
    ),
    "decoder_layers int8": (
        *("positions", "slots", "page_table", "seq_lens", "query_offsets", "logit_rows"),
        *("num_heads", "sliding_window", "k_pools", "v_pools"),
    ),
    "argmax": (),
    "sample": ("seeds", "positions", "top_k"),
    "ngram_lookup": ("tokens", "offsets", "min_n", "max_n", "max_draft", "lengths"),
    "verify_draft": ("draft_ids", "target_ids", "draft_offsets"),
    "fill_rows": (
        *("history", "lengths", "num_left", "kv_limits", "draft_ids", "num_draft", "page_table"),
        "page_size",
    ),
    "advance_sequences": (
        *("token_ids", "target_ids", "query_offsets", "stop_ids", "history", "lengths"),
        *("num_left", "counts"),
    ),
}

# A value may be legal by itself and contradict another argument, which is then the one named.
ALSO_BLAMED: dict[tuple[str, str], set[str]] = {
    ("paged_attention", "query_offsets"): {"seq_lens"},
    ("shared_prefix_attention", "query_offsets"): {"seq_lens"},
    ("shared_prefix_attention", "seq_lens"): {"prefix_lens"},
    ("shared_prefix_attention", "group_offsets"): {"prefix_lens", "page_table"},
    ("shared_prefix_attention", "prefix_lens"): {"page_table"},
    ("decoder_layers", "query_offsets"): {"seq_lens"},
    ("ngram_lookup", "offsets"): {"lengths"},
    ("ngram_lookup", "min_n"): {"max_n"},
    ("fill_rows", "num_left"): {"lengths", "kv_limits", "num_draft"},
    ("fill_rows", "lengths"): {"history", "page_table"},
    ("fill_rows", "page_size"): {"kv_limits"},
    ("advance_sequences", "query_offsets"): {"num_left", "lengths", "target_ids"},
    ("advance_sequences", "num_left"): {"lengths"},
    ("quantized_linear", "out_features"): {"weight"},
    ("linear_top_k", "out_features"): {"weight"},
    ("linear_top_k", "k"): {"out_features"},
    ("decoder_layers", "num_heads"): {"weight", "weights", "scales"},
}


@dataclass(frozen=True)
class Plant:
    """One value in one place: an element of a tensor, or a number instead of an argument."""

    argument: str
    index: int | None
    value: int


def op_of(case: str) -> str:
    """The op of a case."""
    return case.split()[0]


def arguments_of(case: str) -> Arguments:
    """Fresh valid arguments."""
    op = op_of(case)
    if op == case:
        return valid_arguments(op)
    if op in INT8_OPS:
        return int8_arguments(op)
    arguments = valid_arguments(op)
    for name in ("k", "v"):
        pool, scales = quantized(arguments[f"{name}_pools"])
        arguments |= {f"{name}_pools": pool, f"{name}_scales": scales}
    return arguments


def places(tensor: Tensor) -> list[int]:
    """Elements to try."""
    if tensor.numel() == 0:
        return []
    spread = np.linspace(0, tensor.numel() - 1, min(tensor.numel(), MOST_PLACES))
    return sorted({int(place) for place in spread})


def extremes(value: Any) -> list[int]:
    """The values to plant in a tensor of this dtype, or instead of this number."""
    if not isinstance(value, Tensor):
        both = {*_ends(INT32.min, INT32.max), *_ends(INT64.min, INT64.max)}
        return sorted(both)
    limits = torch.iinfo(value.dtype)
    return sorted(_ends(limits.min, limits.max))


def _ends(low: int, high: int) -> set[int]:
    return {n for n in (low, low + 1, -1, 0, high - 1, high) if low <= n <= high}


def single_plants(case: str) -> Iterator[tuple[Plant, ...]]:
    """One value at a time."""
    arguments = arguments_of(case)
    for name in INTEGERS[case]:
        value = arguments[name]
        indices: list[int | None] = [None]
        if isinstance(value, Tensor):
            indices = [*places(value)]
        for index, number in itertools.product(indices, extremes(value)):
            yield (Plant(name, index, number),)


def double_plants(case: str) -> Iterator[tuple[Plant, ...]]:
    """Two values for one row, or for one sequence, in two tensors with an element for each."""
    arguments = arguments_of(case)
    vectors = {
        name: arguments[name]
        for name in INTEGERS[case]
        if isinstance(arguments[name], Tensor) and arguments[name].dim() == 1
    }
    for (name, left), (other, right) in itertools.combinations(vectors.items(), 2):
        if left.shape != right.shape:
            continue
        for index in range(left.numel()):
            for pair in itertools.product(extremes(left), extremes(right)):
                yield Plant(name, index, pair[0]), Plant(other, index, pair[1])


class Guarded:
    """Copies of tensor arguments, each between guards of the largest value or NaN."""

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = dict(arguments)
        self._guards: list[tuple[str, Tensor, Tensor]] = []
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                self.arguments[name] = self._put(name, value)

    def _put(self, name: str, value: Tensor) -> Tensor:
        poison = float("nan")
        if not value.is_floating_point():
            poison = torch.iinfo(value.dtype).max
        memory = torch.full((value.numel() + 2 * GUARD_ELEMENTS,), poison, dtype=value.dtype)
        for guard in (memory[:GUARD_ELEMENTS], memory[-GUARD_ELEMENTS:]):
            self._guards.append((name, guard, guard.clone()))
        inside = memory[GUARD_ELEMENTS : GUARD_ELEMENTS + value.numel()].view(value.shape)
        return inside.copy_(value)

    def broken(self) -> str | None:
        """The argument beside which something was written."""
        for name, guard, before in self._guards:
            if not torch.equal(bits(guard), bits(before)):
                return name
        return None


def failure_of(case: str, plants: tuple[Plant, ...], base: Arguments) -> str | None:
    """What is wrong with one call, or None."""
    guarded = Guarded(base)
    arguments = guarded.arguments
    for plant in plants:
        if plant.index is None:
            arguments[plant.argument] = plant.value
        else:
            arguments[plant.argument].view(-1)[plant.index] = plant.value
    before = {k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    op = op_of(case)
    error: Exception | None = None
    result: Any = None
    try:
        result = getattr(ops, op)(**arguments)
    except (ValueError, IndexError) as refusal:
        error = refusal
    except Exception as surprise:
        return f"{type(surprise).__name__}: {surprise}"
    if name := guarded.broken():
        return f"wrote beside {name}"
    written = WRITTEN.get(op, ())
    for name, value in before.items():
        is_input = error is not None or (name not in written and not name.endswith("_scales"))
        if is_input and isinstance(value, Tensor) and not same_bits(value, arguments[name]):
            return f"changed {name}" + (" and refused" if error else "")
    if error is not None:
        return wrong_message(op, plants, str(error).splitlines()[0])
    results = [] if result is None else list(result) if isinstance(result, tuple) else [result]
    return wrong_result(op, before, results, arguments)


def wrong_message(op: str, plants: tuple[Plant, ...], message: str) -> str | None:
    """Why a refusal does not say enough, or None."""
    allowed = {plant.argument for plant in plants}
    for plant in plants:
        allowed |= ALSO_BLAMED.get((op, plant.argument), set())
    found = re.match(rf"{op}: (?:weights: layer \d+: \w+: )?(\w+): expected .*, got ", message)
    if found is None or found[1] not in allowed:
        return f"message: {message}"
    return None


def wrong_result(op: str, before: Arguments, results: list[Tensor], after: Arguments) -> str | None:
    """How the outputs differ from the reference, or None."""
    try:
        expected = EXPECTED[op](before)
    except Exception as error:
        return f"accepted what the reference cannot do: {error!r}"
    actual = {f"output {i}": result for i, result in enumerate(results)} | after
    for name, wanted in expected.items():
        got = to_numpy64(actual[name])
        exact = not actual[name].is_floating_point()
        if exact:
            got, wanted = actual[name].numpy(), np.asarray(wanted)
        if got.shape != wanted.shape:
            return f"{name}: shape {got.shape} instead of {wanted.shape}"
        if exact and np.array_equal(got, wanted):
            continue
        if not exact and np.allclose(got, wanted, rtol=1e-4, atol=1e-4, equal_nan=True):
            continue
        place = tuple(int(i[0]) for i in np.nonzero(~np.isclose(got, wanted, 1e-4, 1e-4, True)))
        return f"{name}: {got[place]} instead of {wanted[place]} at {place}"
    return None


def failures_of(case: str, progress: int) -> tuple[int, list[str]]:
    """The number of calls of a case, and what is wrong with some of them."""
    torch.manual_seed(0)
    base = arguments_of(case)
    failures = []
    num_calls = 0
    for plants in itertools.chain([()], single_plants(case), double_plants(case)):
        text = f"{case}: " + "; ".join(f"{p.argument}[{p.index}] = {p.value}" for p in plants)
        os.pwrite(progress, text.ljust(300).encode(), 0)
        num_calls += 1
        if failure := failure_of(case, plants, base):
            failures.append(f"{text}: {failure}")
    return num_calls, failures


def main(progress_path: str, cases: list[str]) -> None:
    """One line of JSON for each case."""
    torch.set_num_threads(2)
    # Outputs that an op leaves unwritten hold NaN or the largest integer.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    progress = os.open(progress_path, os.O_RDWR | os.O_CREAT)
    for case in cases:
        num_calls, failures = failures_of(case, progress)
        line = {"case": case, "num_calls": num_calls, "failures": failures[:20]}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
