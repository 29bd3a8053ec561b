"""argmax: torch's answer, ties to the lowest id, NaN never hidden."""

from __future__ import annotations

import pytest
import torch

from stateful_kv import ops
from tests.ops.comparing import assert_same_bits

WIDTHS = [1, 2, 15, 16, 17, 63, 64, 65, 127, 257, 49152]


@pytest.mark.isa
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_largest_and_its_place(width: int, rows: int) -> None:
    logits = torch.randn(rows, width)
    ids, values = ops.argmax(logits)
    assert ids.tolist() == logits.argmax(1).tolist()
    assert_same_bits(values, logits.amax(1))


@pytest.mark.parametrize("width", WIDTHS)
def test_every_place_can_win(width: int) -> None:
    places = sorted({0, 1, width // 3, width // 2, width - 2, width - 1} & set(range(width)))
    logits = torch.full((len(places), width), -3.0)
    logits[range(len(places)), places] = 2.0
    assert ops.argmax(logits)[0].tolist() == places


@pytest.mark.isa
@pytest.mark.parametrize("width", WIDTHS)
def test_of_equals_the_lowest_id(width: int) -> None:
    logits = torch.randint(-2, 2, (16, width)).float()
    ids, values = ops.argmax(logits)
    for row, index in enumerate(ids.tolist()):
        assert logits[row, index] == values[row] == logits[row].max()
        assert (logits[row, :index] < values[row]).all()


@pytest.mark.isa
@pytest.mark.parametrize("width", WIDTHS)
def test_nan_is_never_hidden(width: int) -> None:
    for place in {0, width // 2, width - 1}:
        logits = torch.randn(3, width)
        logits[1, place] = float("nan")
        ids, values = ops.argmax(logits)
        assert values.isnan().tolist() == [False, True, False]
        assert ids[1] == place


def test_infinities() -> None:
    infinity = float("inf")
    logits = torch.full((3, 200), -infinity)
    logits[1, 77] = infinity
    logits[2, 150] = -1e30
    ids, values = ops.argmax(logits)
    assert ids.tolist() == [0, 77, 150]
    assert values.tolist() == [-infinity, infinity, pytest.approx(-1e30)]


def test_strided_rows_and_none() -> None:
    logits = torch.randn(6, 80)
    assert ops.argmax(logits[::2, :70])[0].tolist() == logits[::2, :70].argmax(1).tolist()
    ids, values = ops.argmax(torch.empty(0, 5))
    assert ids.shape == values.shape == (0,)
