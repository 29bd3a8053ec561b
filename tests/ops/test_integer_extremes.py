"""Extreme integers in every integer argument: refused by name, or the answer of a plain loop."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stateful_kv import ops
from tests.ops.cases import valid_arguments
from tests.ops.comparing import assert_same_bits
from tests.ops.integer_extremes import INTEGERS, arguments_of, op_of
from tests.ops.integer_references import EXPECTED
from tests.ops.test_registration import registered_schemas

ROOT = Path(__file__).resolve().parents[2]
CHECKED_MALLOC = "libc_malloc_debug.so.0"


def test_the_table_has_every_integer_of_every_op() -> None:
    schemas = registered_schemas()
    assert {op_of(case) for case in INTEGERS} == set(schemas)
    assert set(EXPECTED) == {op_of(case) for case, names in INTEGERS.items() if names}
    for case, names in INTEGERS.items():
        arguments = arguments_of(case)
        integers = [
            argument.name
            for argument in schemas[op_of(case)].arguments
            if str(argument.type) == "int" or is_integer_tensor(arguments.get(argument.name))
        ]
        assert sorted(names) == sorted(integers), case


def is_integer_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the child processes said of each case. A case that kills its child ends only that."""
    found: dict[str, dict[str, Any]] = {}
    progress = tmp_path_factory.mktemp("extremes") / "progress"
    cases = [case for case, names in INTEGERS.items() if names]
    while cases:
        child = subprocess.run(
            [sys.executable, "-m", "tests.ops.integer_extremes", progress, *cases],
            env=os.environ | checked_memory(),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        lines = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
        found |= {line["case"]: line for line in lines}
        cases = [case for case in cases if case not in found]
        if cases:
            last = progress.read_text().strip() if progress.exists() else "nothing"
            text = f"the process ended with {child.returncode} in {last}\n{child.stderr[-2000:]}"
            found[cases.pop(0)] = {"num_calls": 0, "failures": [text]}
    return found


def checked_memory() -> dict[str, str]:
    """Variables with which the C library notices that a block was written past its end."""
    try:
        ctypes.CDLL(CHECKED_MALLOC)
    except OSError:
        return {}
    return {"LD_PRELOAD": CHECKED_MALLOC, "MALLOC_CHECK_": "3"}


@pytest.mark.slow
@pytest.mark.cpu_only("values in memory are not checked on CUDA")
@pytest.mark.parametrize("case", [case for case, names in INTEGERS.items() if names])
def test_extremes(case: str, results: dict[str, dict[str, Any]]) -> None:
    result = results[case]
    assert not result["failures"], "\n".join(result["failures"])
    assert result["num_calls"] > 10


def int32(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


@pytest.mark.parametrize("limit", [-(2**31), -(2**31) + 1, -1, 0, 4])
def test_a_sequence_without_room_gets_no_rows(device: torch.device, limit: int) -> None:
    """Whatever its draft is: limit - length was computed in 32 bits once, and came out positive."""
    arguments = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in valid_arguments("fill_rows").items()
    }
    arguments["kv_limits"][0] = limit
    arguments["num_left"][0] = 2**31 - 1
    arguments["num_draft"][0] = 30000
    rows = ops.fill_rows(**arguments)
    assert rows.query_offsets.tolist() == [0, 0, 1, 1, 1]
    assert rows.seq_lens.tolist() == [0, 9, 0, 0]
    assert rows.slots.tolist()[1:] == [-1] * 15


def test_nothing_is_asked_of_what_no_row_feeds(device: torch.device) -> None:
    """A draft longer than the reply: its last tokens, and the pages behind, are not there yet."""
    arguments = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in valid_arguments("fill_rows").items()
    }
    arguments["lengths"][0], arguments["kv_limits"][0] = 15, 32
    expected = ops.fill_rows(**arguments | {"num_draft": int32([1, 0, 2, 1], device)})
    arguments["num_left"][0] = 2
    arguments["draft_ids"][0, 1:] = -1
    arguments["page_table"][0, 1] = -1
    for left, right in zip(ops.fill_rows(**arguments), expected, strict=True):
        assert_same_bits(left, right)


@pytest.mark.parametrize("before", [2**31 - 4, 2**31 - 2, 2**31 - 1])
def test_counts_stop_at_the_largest_number(device: torch.device, before: int) -> None:
    """A counter that wrapped would say that less than nothing was done."""
    arguments = {
        name: value.to(device) for name, value in valid_arguments("advance_sequences").items()
    }
    arguments["counts"].fill_(before)
    ops.advance_sequences(**arguments)
    # Three rows of the first sequence, a draft of two that agrees; one row of the last.
    most = 2**31 - 1
    first = [min(most, before + 1), min(most, before + 2), min(most, before + 2)]
    last = [min(most, before + 1), before, before]
    assert arguments["counts"].tolist() == [first, [before] * 3, last]


@pytest.mark.emulated
def test_more_tokens_than_offsets_can_count() -> None:
    """Borders of int32 end at 2^31 - 1; what is behind would be looked up at a wrapped place."""
    tokens = torch.from_numpy(np.zeros(2**31, dtype=np.int32))  # never touched, so never in memory
    borders = torch.tensor([0, -(2**31)], dtype=torch.int32)
    lengths = torch.tensor([4], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"ngram_lookup: tokens: expected at most 2147483647 "):
        ops.ngram_lookup(tokens, borders, 1, 4, 3, lengths)


@pytest.mark.emulated
@pytest.mark.parametrize("max_draft", [2**31, 2**62, (2**31 - 1) // 3 + 1])
def test_drafts_of_more_tokens_than_can_be_counted(max_draft: int) -> None:
    arguments = valid_arguments("ngram_lookup") | {"max_draft": max_draft}
    with pytest.raises(ValueError, match="ngram_lookup: max_draft: expected "):
        ops.ngram_lookup(**arguments)


@pytest.mark.emulated
def test_more_rows_than_offsets_can_count() -> None:
    arguments = valid_arguments("fill_rows")
    wide = torch.from_numpy(np.zeros(2**31, dtype=np.int32)).view(4, -1)
    with pytest.raises(ValueError, match="fill_rows: draft_ids: expected "):
        ops.fill_rows(**arguments | {"draft_ids": wide})


def test_a_prefix_of_no_sequence_may_have_any_length(device: torch.device) -> None:
    arguments = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in valid_arguments("shared_prefix_attention").items()
    }
    expected = ops.shared_prefix_attention(**arguments)
    for length in (0, 2**31 - 1):
        arguments["group_offsets"] = int32([0, 2, 2, 3], device)
        arguments["prefix_lens"] = int32([16, length, 0], device)
        assert_same_bits(ops.shared_prefix_attention(**arguments), expected)
