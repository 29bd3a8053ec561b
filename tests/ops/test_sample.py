"""sample: the token of an integer reference, whatever the batch, the threads or the device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from stateful_kv import ops
from stateful_kv.choosing.sampler import keyed_uniform
from tests.ops.comparing import assert_same_bits
from tests.ops.conftest import EMULATED_CUDA
from tests.reference import sampling as reference

WIDTHS = [1, 2, 7, 63, 64, 65, 130, 257, 1030]
NAN, INFINITY = float("nan"), float("inf")

# temperature, top_k, top_p, min_p
Settings = tuple[float, int, float, float]
ALL_SETTINGS: list[Settings] = list(
    itertools.product([0.3, 1.0, 5.0], [0, 1, 7, 50], [0.0, 0.3, 0.9, 1.0], [0.0, 0.02, 1.0])
)
HARD_SETTINGS: list[Settings] = [
    (1e-40, 0, 1.0, 0.0),  # its inverse is no finite float
    (1e-3, 3, 0.5, 0.0),
    (100.0, 0, 0.999, 0.0),
    (3e38, 0, 0.5, 0.0),
    (3e38, 5, 1.0, 1e-9),
    (1.0, 2**31 - 1, 1.0, 0.0),
    (0.7, 2**31 - 1, 0.9, 0.05),
    (1.0, 0, 1e-6, 0.0),
    (1.0, 0, 1.0 - 2.0**-24, 0.0),
    (1.0, 0, 1.0, 2.0**-32),
    (0.0, 3, 0.5, 0.5),
]


def parameters(settings: Sequence[Settings], device: torch.device | str = "cpu") -> list[Tensor]:
    """temperatures, top_k, top_p and min_p of a call."""
    columns = list(zip(*settings, strict=True)) or [(), (), (), ()]
    dtypes = (torch.float32, torch.int32, torch.float32, torch.float32)
    return [
        torch.tensor(column, dtype=dtype, device=device)
        for column, dtype in zip(columns, dtypes, strict=True)
    ]


def keys(num_rows: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Random seeds of 64 bits, and positions."""
    seeds = torch.randint(-(2**63), 2**63 - 1, (num_rows,))
    return seeds.to(device), torch.randint(0, 2**40, (num_rows,)).to(device)


def rows_of(kind: str, num_rows: int, width: int) -> Tensor:
    """Logits that are hard in one way."""
    logits = torch.randn(num_rows, width) * 3
    if kind == "ties":
        return logits.round()
    if kind == "equal":
        logits = torch.zeros(num_rows, width)
        logits[:, ::2] = -0.0
    if kind == "masked":
        best = torch.randint(0, width, (num_rows,))
        logits[torch.rand(num_rows, width) < 0.5] = -INFINITY
        logits[torch.arange(num_rows), best] = 1.0
    if kind == "flat":
        return logits * 1e-3
    if kind == "huge":
        return (logits * 1e38).clamp(-3.4e38, 3.4e38)
    if kind == "tiny":
        return logits * 1e-38
    return logits


KINDS = ["plain", "ties", "equal", "masked", "flat", "huge", "tiny"]


def expect_reference(logits: Tensor, settings: list[Settings], device: torch.device) -> None:
    """The op gives the tokens of the reference, for rows of random seeds."""
    seeds, positions = keys(len(settings))
    moved = [tensor.to(device) for tensor in (logits, seeds, positions)]
    ids, values = ops.sample(*moved, *parameters(settings, device))
    rows = logits.float().numpy()
    assert values.tolist() == rows.max(axis=1).tolist()
    expected = [
        reference.draw(row, seed, position, *setting)
        for row, seed, position, setting in zip(
            rows, seeds.tolist(), positions.tolist(), settings, strict=True
        )
    ]
    wrong = [
        (setting, got, want)
        for setting, got, want in zip(settings, ids.tolist(), expected, strict=True)
        if got != want
    ]
    assert not wrong


@pytest.mark.isa
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_token_of_the_reference(width: int, kind: str, device: torch.device) -> None:
    places = torch.randperm(len(ALL_SETTINGS))[:20].tolist()
    settings = [ALL_SETTINGS[place] for place in places] + HARD_SETTINGS
    expect_reference(rows_of(kind, len(settings), width), settings, device)


@pytest.mark.isa
def test_all_settings(device: torch.device) -> None:
    expect_reference(rows_of("ties", len(ALL_SETTINGS), 100), ALL_SETTINGS, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 8, 67, 300])
def test_16_bit_logits(width: int, dtype: torch.dtype, device: torch.device) -> None:
    settings = ALL_SETTINGS[::9] + HARD_SETTINGS
    expect_reference(rows_of("plain", len(settings), width).to(dtype), settings, device)


@pytest.mark.parametrize("kind", ["plain", "ties", "equal", "flat"])
def test_more_tokens_than_a_list_holds(kind: str, device: torch.device) -> None:
    """Of 9000 tokens more stay than the CUDA kernel collects."""
    settings: list[Settings] = [
        (100.0, 0, 0.99, 0.0),
        (100.0, 6000, 1.0, 0.0),
        (100.0, 8999, 0.9, 0.1),
        (5.0, 4097, 0.5, 0.0),
        (5.0, 4095, 1.0, 0.0),
    ]
    expect_reference(rows_of(kind, len(settings), 9000), settings, device)


def test_a_large_vocabulary(device: torch.device) -> None:
    settings: list[Settings] = [
        (1.0, 0, 1.0, 0.0),
        (0.7, 0, 0.9, 0.0),
        (0.7, 50, 1.0, 0.0),
        (0.8, 40, 0.95, 0.05),
    ]
    expect_reference(rows_of("plain", len(settings), 151936), settings, device)


@pytest.mark.isa
@pytest.mark.parametrize("stride", [64, 65, 67, 70])
def test_rows_with_a_stride(stride: int, device: torch.device) -> None:
    wide = torch.full((8, stride), NAN)
    wide[:, :64] = torch.randn(8, 64)
    settings = ALL_SETTINGS[40:48]
    expect_reference(wide[:, :64], settings, device)
    expect_reference(wide[::2, 1:63], settings[:4], device)
    no_rows = wide[:0].to(device)
    ids, values = ops.sample(no_rows, *keys(0, device), *parameters([], device))
    assert ids.shape == values.shape == (0,)


def test_random_numbers_are_those_of_numpy(device: torch.device) -> None:
    """Of V equal tokens, floor(u V) is drawn."""
    width = 50_000
    pairs = [(0, 0), (1, 2), (2**63, 5), (2**64 - 1, 2**63 - 1), (7, 2**40)]
    pairs += [(seed, position) for seed in range(3) for position in range(5)]
    seeds = torch.from_numpy(np.array([seed for seed, _ in pairs], np.uint64)).view(torch.int64)
    positions = torch.tensor([position for _, position in pairs])
    logits = torch.zeros(1, width, device=device).expand(len(pairs), width)
    every = parameters([(1.0, 0, 1.0, 0.0)] * len(pairs), device)
    ids, _ = ops.sample(logits, seeds.to(device), positions.to(device), *every)
    assert ids.tolist() == [int(keyed_uniform(*pair) * width) for pair in pairs]


@pytest.mark.parametrize(
    "settings",
    [
        (1.0, 0, 1.0, 0.0),
        (0.5, 0, 1.0, 0.0),
        (2.0, 12, 1.0, 0.0),
        (1.0, 0, 0.8, 0.0),
        (1.5, 15, 0.9, 0.05),
        (1.0, 0, 1.0, 0.1),
    ],
)
def test_frequencies_follow_the_distribution(settings: Settings) -> None:
    """Chi-square of 20000 draws against float64; no token outside the filter is drawn."""
    row = torch.from_numpy(np.random.default_rng(5).normal(size=20).astype(np.float32)) * 0.7
    num = 20_000
    chances = reference.probabilities(row.numpy(), *settings)
    rows = row.expand(num, 20)
    seeds, positions = torch.full((num,), 11), torch.arange(num)
    ids, _ = ops.sample(rows, seeds, positions, *parameters([settings] * num))
    counts = np.bincount(ids.numpy(), minlength=20)
    kept = chances > 0
    assert (counts[~kept] == 0).all()
    expected = num * chances[kept]
    assert expected.min() > 20, "too rare for this test"
    chi_square = float(((counts[kept] - expected) ** 2 / expected).sum())
    freedom = int(kept.sum()) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5 + 6


def test_weights_are_exact_to_a_millionth() -> None:
    """The float32 polynomial that op and reference share, against float64."""
    row = -np.linspace(0, 25, 100_001).astype(np.float32)
    for temperature in (1.0, 0.7, 0.9, 1.1):
        given = np.array(reference.weights(row, temperature)) / 2**32
        exact = np.exp(row.astype(np.float64) / np.float64(np.float32(temperature)))
        assert np.abs(given - exact).max() < 2e-7
        likely = exact > 1e-3
        assert (np.abs(given - exact)[likely] < 1e-6 * exact[likely]).all()
        assert given[0] == 1


@pytest.mark.isa
def test_a_row_alone_equals_the_row_in_a_batch(
    device: torch.device, set_num_threads: Callable[[int], None]
) -> None:
    settings = ALL_SETTINGS[::5] + HARD_SETTINGS
    logits = rows_of("ties", len(settings), 500).to(device)
    arguments = [logits, *keys(len(settings), device), *parameters(settings, device)]
    together = ops.sample(*arguments)
    for num_threads in (1, 2, 3):
        set_num_threads(num_threads)
        for result, expected in zip(ops.sample(*arguments), together, strict=True):
            assert_same_bits(result, expected)
    order = torch.randperm(len(settings))
    shuffled = ops.sample(*(tensor[order] for tensor in arguments))
    assert_same_bits(shuffled[0], together[0][order])
    for i in range(len(settings)):
        alone = ops.sample(*(tensor[i : i + 1] for tensor in arguments))
        assert_same_bits(alone[0], together[0][i : i + 1])
        assert_same_bits(alone[1], together[1][i : i + 1])


@pytest.mark.isa
@pytest.mark.parametrize("width", [1, 5, 64, 200, 3000])
def test_temperature_0_is_argmax(width: int, device: torch.device) -> None:
    logits = torch.randint(-2, 2, (9, width)).float()
    settings: list[Settings] = [(0.0, 5, 0.5, 0.5)] * 9
    arguments = [tensor.to(device) for tensor in (logits, *keys(9), *parameters(settings))]
    ids, values = ops.sample(*arguments)
    expected_ids, expected_values = ops.argmax(logits.to(device))
    assert_same_bits(ids, expected_ids)
    assert values.tolist() == expected_values.tolist()


@pytest.mark.isa
@pytest.mark.parametrize("width", [1, 3, 64, 100, 5000])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bad_rows_are_told_by_their_value(
    width: int, temperature: float, device: torch.device
) -> None:
    logits = torch.randn(7, width)
    logits[0] = -INFINITY
    logits[1, width // 2] = INFINITY
    logits[2, width - 1] = NAN
    logits[3, 0], logits[3, width - 1] = INFINITY, NAN
    logits[4] = NAN
    logits[5] = INFINITY
    logits[6, width // 3 + 1 :] = -INFINITY
    arguments = [logits, *keys(7), *parameters([(temperature, 3, 0.9, 0.1)] * 7)]
    ids, values = ops.sample(*(tensor.to(device) for tensor in arguments))
    assert values.isnan().tolist() == [False, False, True, True, True, False, False]
    assert values[[0, 1, 5]].tolist() == [-INFINITY, INFINITY, INFINITY]
    assert values[6] == logits[6].max()
    assert all(0 <= token < width for token in ids.tolist())
    assert ids[6] <= width // 3


def test_masked_tokens_are_never_drawn(device: torch.device) -> None:
    logits = torch.full((200, 300), -INFINITY, device=device)
    logits[:, [3, 260]] = 1.0
    every = parameters([(100.0, 0, 1.0, 0.0)] * 200, device)
    ids, _ = ops.sample(logits, *keys(200, device), *every)
    assert set(ids.tolist()) == {3, 260}


@pytest.mark.parametrize(
    ("settings", "same"),
    [
        ((-1.0, 0, 1.0, 0.0), (0.0, 0, 1.0, 0.0)),
        ((NAN, 0, 1.0, 0.0), (0.0, 0, 1.0, 0.0)),
        ((INFINITY, 0, 1.0, 0.0), (3e38, 0, 1.0, 0.0)),
        ((1.0, -5, 1.0, 0.0), (1.0, 0, 1.0, 0.0)),
        ((1.0, 0, -0.5, 0.0), (1.0, 0, 0.0, 0.0)),
        ((1.0, 0, 1.5, 0.0), (1.0, 0, 1.0, 0.0)),
        ((1.0, 0, NAN, 0.0), (1.0, 0, 1.0, 0.0)),
        ((1.0, 0, 1.0, 7.0), (1.0, 0, 1.0, 1.0)),
        ((1.0, 0, 1.0, -1.0), (1.0, 0, 1.0, 0.0)),
        ((1.0, 0, 1.0, NAN), (1.0, 0, 1.0, 0.0)),
    ],
)
def test_settings_out_of_range(settings: Settings, same: Settings, device: torch.device) -> None:
    """Refused on the CPU; on CUDA, where nobody looks at them first, the nearest valid ones."""
    logits = torch.randn(20, 100, device=device)
    chosen = logits, *keys(20, device)
    if device.type == "cpu" and not EMULATED_CUDA:
        with pytest.raises(ValueError, match=r"sample: \w+: expected"):
            ops.sample(*chosen, *parameters([settings] * 20, device))
        return
    clamped = ops.sample(*chosen, *parameters([settings] * 20, device))
    valid = ops.sample(*chosen, *parameters([same] * 20, device))
    assert_same_bits(clamped[0], valid[0])


@pytest.mark.cuda
def test_capture_in_a_cuda_graph() -> None:
    device = torch.device("cuda")
    logits = torch.randn(4, 5000, device=device)
    rest = [*keys(4, device), *parameters([(0.8, 40, 0.9, 0.01)] * 4, device)]
    ops.sample(logits, *rest)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.sample(logits, *rest)
    for _ in range(2):
        logits.copy_(torch.randn(4, 5000))
        graph.replay()
        for result, expected in zip(captured, ops.sample(logits, *rest), strict=True):
            assert_same_bits(result, expected)
