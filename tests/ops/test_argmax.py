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
def test_largest_and_its_place(device: torch.device, width: int, rows: int) -> None:
    logits = torch.randn(rows, width, device=device)
    ids, values = ops.argmax(logits)
    assert ids.tolist() == logits.argmax(1).tolist()
    assert_same_bits(values, logits.amax(1))


@pytest.mark.parametrize("width", WIDTHS)
def test_every_place_can_win(device: torch.device, width: int) -> None:
    places = sorted({0, 1, width // 3, width // 2, width - 2, width - 1} & set(range(width)))
    logits = torch.full((len(places), width), -3.0, device=device)
    logits[range(len(places)), places] = 2.0
    assert ops.argmax(logits)[0].tolist() == places


@pytest.mark.isa
@pytest.mark.parametrize("width", WIDTHS)
def test_of_equals_the_lowest_id(device: torch.device, width: int) -> None:
    logits = torch.randint(-2, 2, (16, width)).float().to(device)
    ids, values = ops.argmax(logits)
    for row, index in enumerate(ids.tolist()):
        assert logits[row, index] == values[row] == logits[row].max()
        assert (logits[row, :index] < values[row]).all()


@pytest.mark.isa
@pytest.mark.parametrize("width", WIDTHS)
def test_nan_is_never_hidden(device: torch.device, width: int) -> None:
    for place in {0, width // 2, width - 1}:
        logits = torch.randn(3, width, device=device)
        logits[1, place:] = float("inf")
        logits[1, place::3] = float("nan")
        ids, values = ops.argmax(logits)
        assert values.isnan().tolist() == [False, True, False]
        assert ids[1] == place


def test_zeros_of_both_signs_are_equal(device: torch.device) -> None:
    logits = torch.full((2, 300), -1.0, device=device)
    logits[0, 40], logits[0, 250] = -0.0, 0.0
    logits[1, 40], logits[1, 250] = 0.0, -0.0
    ids, values = ops.argmax(logits)
    assert ids.tolist() == [40, 40]
    assert values.tolist() == [0.0, 0.0]


def test_infinities(device: torch.device) -> None:
    infinity = float("inf")
    logits = torch.full((3, 200), -infinity, device=device)
    logits[1, 77] = infinity
    logits[2, 150] = -1e30
    ids, values = ops.argmax(logits)
    assert ids.tolist() == [0, 77, 150]
    assert values.tolist() == [-infinity, infinity, pytest.approx(-1e30)]


def test_strided_rows_and_none(device: torch.device) -> None:
    logits = torch.randn(6, 80, device=device)
    for part in (logits[::2, :70], logits[::2, 8:72], logits[1:, 3:75]):
        assert ops.argmax(part)[0].tolist() == part.argmax(1).tolist()
    ids, values = ops.argmax(torch.empty(0, 5, device=device))
    assert ids.shape == values.shape == (0,)
