"""Every number of rows, on one, two and three threads: each row has the bits it has alone.

The row counts are those of decode and verify (1..33) and both sides of where the kernels change
how they divide work (see ROWS). All tests are repeated with every instruction set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stateful_kv import ops
from tests.ops.comparing import assert_same_bits
from tests.ops.paged import lay_out, offsets, quantized, random_slots
from tests.ops.test_quantized_linear import FORMATS, random_weight
from tests.ops.test_rope_append_kv import gather, make_step

pytestmark = pytest.mark.isa

THREADS = (1, 2, 3)
# 264 rows are one block of a linear layer, 265 are two.
ROWS = [*range(1, 34), 64, 65, 264, 265, 300, 513]
MOST = max(ROWS)

SetThreads = Callable[[int], None]
Run = Callable[[slice], Tensor]


def check_every_row_count(run: Run, set_num_threads: SetThreads) -> None:
    """Compares rows computed together with the same rows computed alone.

    Args:
        run: computes these of MOST rows in one call; one row of the result for each.
        set_num_threads: the fixture.
    """
    set_num_threads(1)
    alone = torch.cat([run(slice(row, row + 1)) for row in range(MOST)])
    for threads in THREADS:
        set_num_threads(threads)
        for rows in ROWS:
            # Start at another row each time, so that a row has many neighbours and alignments.
            start = 37 * (rows + threads) % (MOST - rows + 1)
            part = slice(start, start + rows)
            assert_same_bits(run(part), alone[part], f"{rows} rows on {threads} threads")


# (out_features, in_features). Inputs: one group, sizes of SmolLM2, a size that is no multiple of a
# strip. Outputs: all end inside a panel; some have an odd number of panels, some an even number.
@pytest.mark.parametrize(
    ("out_features", "in_features"), [(1, 32), (81, 288), (90, 576), (103, 1568)]
)
@pytest.mark.parametrize("weight_format", FORMATS)
def test_quantized_linear(
    weight_format: str, out_features: int, in_features: int, set_num_threads: SetThreads
) -> None:
    packed = random_weight(weight_format, out_features, in_features)
    x, residual = torch.randn(MOST, in_features), torch.randn(MOST, out_features)
    weight = packed.weight, packed.scales, packed.minimums, torch.randn(out_features), out_features
    check_every_row_count(
        lambda rows: ops.quantized_linear(x[rows], *weight, residual[rows]), set_num_threads
    )


@pytest.mark.parametrize("width", [17, 576])
def test_rms_norm(width: int, set_num_threads: SetThreads) -> None:
    x, weight = torch.randn(MOST, width), torch.randn(width)
    check_every_row_count(lambda rows: ops.rms_norm(x[rows], weight, 1e-5), set_num_threads)
    before = torch.randn(MOST, width)
    check_every_row_count(
        lambda rows: ops.add_rms_norm(x[rows], before[rows], weight, 1e-5)[0], set_num_threads
    )


@pytest.mark.parametrize("width", [17, 1536])
def test_silu_mul(width: int, set_num_threads: SetThreads) -> None:
    gate_up = torch.randn(MOST, 2 * width) * 4
    check_every_row_count(lambda rows: ops.silu_mul(gate_up[rows]), set_num_threads)


@pytest.mark.parametrize("head_dim", [64, 80])
def test_rope_append_kv(head_dim: int, set_num_threads: SetThreads) -> None:
    step = make_step(MOST, num_heads=3, num_kv_heads=1, head_dim=head_dim)

    def run(rows: slice) -> Tensor:
        num_rows = rows.stop - rows.start
        num_pages = num_rows // 16 + 3
        slots = random_slots(num_rows, num_pages, 16)
        part = replace(step.rows(rows), slots=slots, num_pages=num_pages)
        q, k_pool, v_pool = part.run()
        written = [gather(pool, part.slots).float() for pool in (k_pool, v_pool)]
        return torch.cat([q, *written], dim=1)

    check_every_row_count(run, set_num_threads)


def test_argmax(set_num_threads: SetThreads) -> None:
    logits = torch.randn(MOST, 4097)
    check_every_row_count(
        lambda rows: torch.stack([part.double() for part in ops.argmax(logits[rows])], dim=1),
        set_num_threads,
    )


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "dtype"),
    [
        (9, 3, 64, torch.float16),
        (4, 1, 32, torch.float32),
        (2, 2, 80, torch.bfloat16),
        (9, 3, 64, torch.int8),
    ],
    ids=str,
)
def test_paged_attention(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    set_num_threads: SetThreads,
) -> None:
    """The rows of one sequence, with a second one beside it in the batch wherever there are more.

    Rows are the tokens from position 100 on; a row alone is a decode step on the same pages.
    """
    past = 100
    lengths = [past + MOST, 77]
    float_dtype = torch.float32 if dtype == torch.int8 else dtype
    keys, values = (
        [torch.randn(length, num_kv_heads, head_dim).to(float_dtype) for length in lengths]
        for _ in range(2)
    )
    k_pool, v_pool, page_table = lay_out(keys, values, page_size=16)
    k_scales = v_scales = None
    if dtype == torch.int8:
        (k_pool, k_scales), (v_pool, v_scales) = quantized(k_pool), quantized(v_pool)
    query = torch.randn(MOST, num_heads, head_dim)
    other = torch.randn(1, num_heads, head_dim)

    def run(rows: slice) -> Tensor:
        num_rows = rows.stop - rows.start
        num_sequences = 1 if num_rows == 1 else 2
        output = ops.paged_attention(
            torch.cat([query[rows], other])[: num_rows + num_sequences - 1],
            k_pool,
            v_pool,
            page_table[:num_sequences],
            torch.tensor([past + rows.stop, lengths[1]], dtype=torch.int32)[:num_sequences],
            offsets([num_rows, 1][:num_sequences]),
            head_dim**-0.5,
            k_scales=k_scales,
            v_scales=v_scales,
        )
        return output[:num_rows]

    check_every_row_count(run, set_num_threads)


def chain(x: Tensor) -> Tensor:
    """The sum of each row, column after column."""
    total = torch.zeros(len(x), 1)
    for column in x.split(1, dim=1):
        total = total + column
    return total


BUGS: dict[str, Callable[[Tensor], Tensor]] = {
    "order depends on the rows": lambda x: chain(x.flip(1) if len(x) == 29 else x),
    "order depends on the threads": lambda x: chain(
        x.flip(1) if torch.get_num_threads() == 3 else x
    ),
    "takes in a neighbour": lambda x: chain(x) + 1e-6 * (x - x.roll(1, 0))[:, :1],
    "swaps two rows": lambda x: chain(x.roll(1, 0) if len(x) == 265 else x),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug: str, set_num_threads: SetThreads) -> None:
    x = torch.randn(MOST, 64)
    check_every_row_count(lambda rows: chain(x[rows]), set_num_threads)
    with pytest.raises(AssertionError, match="elements differ"):
        check_every_row_count(lambda rows: BUGS[bug](x[rows]), set_num_threads)
