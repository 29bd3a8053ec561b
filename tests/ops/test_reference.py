"""The references themselves, against torch in float64 and against exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.ops import plain_torch
from tests.ops.comparing import to_numpy64
from tests.ops.paged import make_batch
from tests.reference import attention, elementwise, linear, tokens


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (5, 5), (3, 17), (17, 33)])
def test_attention_equals_sdpa(rows: int, length: int) -> None:
    query = torch.randn(rows, 6, 32, dtype=torch.float64)
    keys, values = torch.randn(2, length, 2, 32, dtype=torch.float64)
    mask = torch.ones(rows, length, dtype=torch.bool).tril(length - rows)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1),
        keys.transpose(0, 1),
        values.transpose(0, 1),
        attn_mask=mask,
        scale=0.3,
        enable_gqa=True,
    ).transpose(0, 1)
    actual = attention.dense_attention(query.numpy(), keys.numpy(), values.numpy(), 0.3)
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (4, 0.0), (0, 2.0), (1, 5.0), (99, 1.0)])
def test_attention_equals_plain_torch(window: int, cap: float) -> None:
    query = torch.randn(7, 4, 16, dtype=torch.float64)
    keys, values = torch.randn(2, 20, 2, 16, dtype=torch.float64)
    expected = plain_torch.attention(query, keys, values, 0.25, window, cap)
    actual = attention.dense_attention(
        query.numpy(), keys.numpy(), values.numpy(), 0.25, window, cap
    )
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-12, atol=1e-12)


def test_window_of_one_sees_only_the_row_itself() -> None:
    values = np.arange(5.0).reshape(5, 1, 1)
    ones = np.ones((5, 1, 1))
    output = attention.dense_attention(ones, ones, values, 1.0, sliding_window=1)
    np.testing.assert_array_equal(output, values)


def test_paged_attention_reads_the_dense_content() -> None:
    batch = make_batch([0, 1, 15, 16, 40], [0, 1, 2, 16, 0], dtype=torch.float32)
    arrays = [to_numpy64(tensor) for tensor in batch.arguments[:3]]
    tables = [tensor.numpy() for tensor in batch.arguments[3:]]
    output = attention.paged_attention(*arrays, *tables, batch.scale)
    for sequence in (1, 2, 3):
        rows = batch.rows_of(sequence)
        expected = attention.dense_attention(
            arrays[0][rows],
            to_numpy64(batch.keys[sequence]),
            to_numpy64(batch.values[sequence]),
            batch.scale,
        )
        np.testing.assert_array_equal(output[rows], expected)


def test_rms_norm_equals_torch() -> None:
    x, weight = torch.randn(3, 4, 33, dtype=torch.float64), torch.randn(33, dtype=torch.float64)
    expected = torch.nn.functional.rms_norm(x, (33,), weight, 1e-5)
    actual = elementwise.rms_norm(x.numpy(), weight.numpy(), 1e-5)
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-12)


def test_silu_mul_equals_torch() -> None:
    gate_up = torch.randn(5, 14, dtype=torch.float64) * 20
    actual = elementwise.silu_mul(gate_up.numpy())
    np.testing.assert_allclose(actual, plain_torch.silu_mul(gate_up).numpy(), rtol=1e-12)


def test_rotation_is_a_complex_product() -> None:
    x = np.random.default_rng(1).standard_normal((4, 3, 10))
    positions = np.array([0, 7, 3, 63])
    pairs = x[..., :5] + 1j * x[..., 5:]
    angles = positions[:, None] * 10000.0 ** (-np.arange(0, 10, 2) / 10)
    turned = pairs * np.exp(1j * angles)[:, None]
    actual = elementwise.rotate(x, positions, elementwise.rope_table(64, 10))
    np.testing.assert_allclose(actual, np.concatenate([turned.real, turned.imag], -1), rtol=1e-12)


def _random_floats(count: int) -> np.ndarray:
    mantissas = np.random.randint(0, 2**23, count)
    exponents = np.random.randint(127 - 12, 127 + 12, count)
    signs = np.random.randint(0, 2, count)
    return ((signs << 31) | (exponents << 23) | mantissas).astype(np.uint32).view(np.float32)


def test_fma_rounds_once() -> None:
    a, b, c = (_random_floats(4000) for _ in range(3))
    c[:2000] = -(a * b)[:2000]  # cancellation, where a double rounding shows
    c[2000:2500] = np.float32(2.0**-24)
    a[2000:2500], b[2000:2500] = np.float32(1.0), np.nextafter(np.float32(1), np.float32(2))
    result = linear.fma(a, b, c)
    for x, y, z, got in zip(a, b, c, result, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        distance = abs(Fraction(float(got)) - exact)
        for neighbour in (np.nextafter(got, np.float32(np.inf)), np.nextafter(got, -np.inf)):
            assert distance <= abs(Fraction(float(neighbour)) - exact)


def test_fma_differs_from_two_roundings() -> None:
    a, b, c = (_random_floats(1000) for _ in range(3))
    assert np.any(linear.fma(a, b, c) != a * b + c)


def test_chain_is_near_float64() -> None:
    x = np.random.standard_normal((3, 96)).astype(np.float32)
    weight = np.random.standard_normal((5, 96)).astype(np.float32)
    bias = np.random.standard_normal(5).astype(np.float32)
    np.testing.assert_allclose(
        linear.chain(x, weight, bias), linear.linear(x, weight, bias), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("out_features", [1, 16, 17, 40])
def test_unpack_inverts_pack(out_features: int) -> None:
    random = np.random.default_rng(out_features)
    weight = random.standard_normal((out_features, 64)).astype(np.float32)
    scales = random.standard_normal((out_features, 2)).astype(np.float32)
    minimums = random.standard_normal((out_features, 2)).astype(np.float32)
    int8 = random.integers(-128, 128, (out_features, 64)).astype(np.int8)
    int4 = random.integers(0, 16, (out_features, 64)).astype(np.uint8)
    wide = np.repeat(scales, 32, axis=1)

    panels = linear.pack_fp32(weight)
    assert panels.shape == (-(-out_features // 16), 64, 16)
    np.testing.assert_array_equal(linear.unpack_fp32(panels, out_features), weight)
    unpacked = linear.unpack_int8(*linear.pack_int8(int8, scales), out_features)
    np.testing.assert_array_equal(unpacked, int8 * wide)
    unpacked = linear.unpack_int4(*linear.pack_int4(int4, scales, minimums), out_features)
    expected = linear.fma(int4.astype(np.float32), wide, np.repeat(minimums, 32, axis=1))
    np.testing.assert_array_equal(unpacked, expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("aa", ""),
        ("aaa", "aaaaaaaaa"),
        ("abcXabcYabc", "Yabc"),
        ("bcd_abcd__abc", "d__abc"),
        ("abab", "ab"),
        ("ababab", "ababababa"),
    ],
)
def test_ngram_lookup_examples(text: str, expected: str) -> None:
    codes = [ord(letter) for letter in text]
    draft = tokens.ngram_lookup(codes, min_n=2, max_n=4, max_draft=9)
    assert "".join(map(chr, draft)) == expected


def test_verify_draft_examples() -> None:
    assert tokens.verify_draft([], [7]) == (0, 7)
    assert tokens.verify_draft([1, 2], [1, 2, 3]) == (2, 3)
    assert tokens.verify_draft([1, 2], [1, 5, 3]) == (1, 5)
    assert tokens.verify_draft([4, 2], [1, 2, 3]) == (0, 1)


def test_fill_rows_examples() -> None:
    begun = tokens.LoopState([5, 6, 7], 9, 99, [4, 2], [], [0, 0, 0])
    short = tokens.LoopState([5], 2, 99, [3, 1], [], [0, 0, 0])
    full = tokens.LoopState([5, 6], 9, 1, [8], [], [0, 0, 0])
    ended = tokens.LoopState([5, 6], 0, 99, [8], [], [0, 0, 0])
    rows = tokens.fill_rows([begun, short, full, ended], [[8, 9], [1, 2, 3], [1], [1]], page=4)
    assert rows == [(0, 7, 2, 18), (0, 8, 3, 19), (0, 9, 4, 8), (1, 5, 0, 12), (1, 1, 1, 13)]


@pytest.mark.parametrize(
    ("num_left", "stops", "values", "expected"),
    [
        (9, [], [0, 0, 0], ([1, 2, 3, 7], 6, [1, 2, 2])),
        (2, [], [0, 0, 0], ([1, 2, 3], 0, [1, 2, 2])),
        (9, [2], [0, 0, 0], ([1, 2], 0, [1, 2, 1])),
        (3, [7], [0, 0, 0], ([1, 2, 3, 7], 0, [1, 2, 2])),
        (9, [], [0, math.nan, 0], ([1, 2], -1, [1, 2, 1])),
        (9, [2], [0, math.nan, 0], ([1, 2], 0, [1, 2, 1])),
    ],
)
def test_advance_examples(
    num_left: int, stops: list[int], values: list[float], expected: tuple[list[int], int, list[int]]
) -> None:
    state = tokens.LoopState([1], num_left, 99, [], stops, [0, 0, 0])
    tokens.advance_sequence(state, [1, 2, 3], [2, 3, 7], values)
    assert (state.history, state.num_left, state.counts) == expected
