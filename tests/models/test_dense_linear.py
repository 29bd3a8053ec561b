"""Dense linear layers: one answer for a row, whatever the library does with other row counts."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stateful_kv import ops
from stateful_kv.models import dense
from stateful_kv.models.dense import DenseLinear, RowCountTable
from stateful_kv.models.row_counts import CANDIDATES, RowCounts, cancelling_inputs, common, probe

WIDTH = 96
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Product = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """The library divides by threads too, which is no part of the promise."""
    torch.set_num_threads(1)


def bits(tensor: Tensor) -> list[bytes]:
    return [row.tobytes() for row in tensor.contiguous().view(torch.uint8).cpu().numpy()]


def sum_in_order(x: Tensor, order: int) -> Tensor:
    """One column: the sum of each row, in an order of the entries that a number names."""
    total = torch.zeros(x.shape[0], 1)
    for place in torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(order)):
        total = total + x[:, place, None]
    return total


def samples(num_rows: int = 256) -> list[Tensor]:
    return [torch.randn(num_rows, WIDTH) for _ in range(2)]


class TestProbe:
    def test_a_product_of_one_order_allows_all(self) -> None:
        counts = probe(lambda x: sum_in_order(x, 0), samples(2048))
        assert counts == RowCounts(64, CANDIDATES)

    @pytest.mark.parametrize("border", [2, 16, 64, 128])
    def test_what_differs_is_left_out(self, border: int) -> None:
        few = probe(lambda x: sum_in_order(x, int(len(x) < border)), samples())
        expected = [c for c in CANDIDATES if c <= 128 and (c < border) == (border > 64)]
        assert few == RowCounts(64, tuple(expected))
        odd_one = probe(lambda x: sum_in_order(x, int(len(x) == border)), samples())
        others = [c for c in CANDIDATES if c <= 128 and c != border]
        assert odd_one.allowed == ((64,) if border == 64 else tuple(others))

    def test_row_counts_in_three_kinds(self) -> None:
        counts = probe(lambda x: sum_in_order(x, len(x).bit_length() // 3), samples())
        # Bit lengths of 64 and 128 are 7 and 8, of 32 it is 6.
        assert counts.allowed == (32, 64, 128)

    @pytest.mark.parametrize("smallest_bad", [64, 16, 2])
    def test_a_place_in_the_block_that_matters_moves_the_reference(self, smallest_bad: int) -> None:
        def product(x: Tensor) -> Tensor:
            result = sum_in_order(x, 0)
            if len(x) >= smallest_bad:
                result[1::2] = sum_in_order(x[1::2], 1)
            return result

        counts = probe(product, samples())
        assert counts.reference == smallest_bad // 2
        assert counts.allowed == tuple(c for c in CANDIDATES if c < smallest_bad)

    def test_neighbours_that_matter_leave_single_rows(self) -> None:
        def product(x: Tensor) -> Tensor:
            return sum_in_order(x, 0) * (1 + 1e-4 * x.sum().sin() * (len(x) > 1))

        assert probe(product, samples()) == RowCounts(1, (1,))

    def test_an_answer_that_changes_is_an_error(self) -> None:
        calls = itertools.count()
        with pytest.raises(ValueError, match="other bits for the same row"):
            probe(lambda x: sum_in_order(x, next(calls)), samples())

    def test_a_difference_in_one_late_row_is_seen(self) -> None:
        def product(x: Tensor) -> Tensor:
            result = sum_in_order(x, 0)
            if len(x) == 32:
                result[-1] = sum_in_order(x[-1:], 1)
            return result

        assert probe(product, samples()).allowed == (1, 2, 4, 8, 16, 64, 128)

    @pytest.mark.parametrize("width", [WIDTH, 33, 576])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_inputs_show_another_order(self, dtype: torch.dtype, width: int) -> None:
        found, weight = cancelling_inputs(64, 32, width, dtype)
        assert weight.shape == (32, width) and weight.dtype == dtype
        order = torch.randperm(width)
        for sample in found:
            assert sample.shape == (64, width) and sample.dtype == dtype
            exact = sample.double() @ weight.double().t()
            assert exact.abs().max() < 1e-9 * sample.abs().max() * weight.abs().max()
            one = (sample.float() @ weight.float().t()).to(dtype)
            other = (sample[:, order].float() @ weight[:, order].float().t()).to(dtype)
            assert torch.isfinite(one).all()
            # Ordinary numbers in bfloat16 show it in one element of some ten thousand.
            assert (one != other).float().mean() > 0.5


class TestBlocks:
    @pytest.mark.parametrize(
        ("allowed", "num_rows", "blocks"),
        [
            (CANDIDATES, 0, ()),
            (CANDIDATES, 1, (1,)),
            (CANDIDATES, 3, (4,)),
            (CANDIDATES, 64, (64,)),
            (CANDIDATES, 65, (128,)),
            (CANDIDATES, 300, (256, 64)),
            (CANDIDATES, 1000, (1024,)),
            (CANDIDATES, 1025, (1024, 1)),
            (CANDIDATES, 5000, (1024, 1024, 1024, 1024, 1024)),
            ((64,), 1, (64,)),
            ((64,), 130, (64, 64, 64)),
            ((1, 64), 2, (64,)),
            ((1, 64), 65, (64, 1)),
            ((1, 1024), 2, (1, 1)),
            ((1, 1024), 900, (1024,)),
            ((1,), 3, (1, 1, 1)),
        ],
    )
    def test_rows_are_covered(
        self, allowed: tuple[int, ...], num_rows: int, blocks: tuple[int, ...]
    ) -> None:
        counts = RowCounts(allowed[-1], allowed)
        assert counts.blocks(num_rows) == blocks
        assert counts.padded(num_rows) == sum(blocks)

    @pytest.mark.parametrize("allowed", [(1,), (64,), (4, 64, 128), (1, 2, 1024), CANDIDATES])
    def test_only_the_last_block_is_padded(self, allowed: tuple[int, ...]) -> None:
        counts = RowCounts(allowed[-1], allowed)
        for num_rows in [*range(1, 300), 511, 513, 1023, 1025, 3000]:
            blocks = counts.blocks(num_rows)
            assert set(blocks) <= set(allowed)
            assert sum(blocks[:-1]) < num_rows <= sum(blocks)
            assert list(blocks) == sorted(blocks, reverse=True)

    def test_what_all_allow(self) -> None:
        one, other = RowCounts(64, (1, 32, 64)), RowCounts(64, (1, 2, 64, 128))
        assert common([one, other]) == RowCounts(64, (1, 64))
        assert common([one]).allowed == one.allowed
        assert common([one, RowCounts(16, (16,))]) is None
        assert common([]) is None

    @pytest.mark.parametrize("allowed", [(), (1, 2), (64, 32), (0, 64), (64, 64)])
    def test_impossible_counts_are_refused(self, allowed: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="allowed: expected ascending counts with 64"):
            RowCounts(64, allowed)


class TestDenseLinear:
    @pytest.mark.parametrize("has_bias", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("device", "shape"),
        [
            ("cpu", (160, WIDTH)),
            # Of the default model, and of one with a billion weights.
            pytest.param("cuda", (960, 576), marks=pytest.mark.cuda),
            pytest.param("cuda", (2048, 8192), marks=pytest.mark.cuda),
        ],
    )
    def test_a_row_has_the_same_bits_among_any_others(
        self, device: str, shape: tuple[int, int], dtype: torch.dtype, has_bias: bool
    ) -> None:
        options = {"dtype": dtype, "device": device}
        weight = torch.randn(shape).to(**options)
        bias = torch.randn(shape[0]).to(**options) if has_bias else None
        layer = RowCountTable().linear(weight, bias)
        print(f"{shape} {dtype}: rows {layer.rows}")
        x = torch.randn(300, shape[1]).to(**options)
        expected = bits(layer(x))
        for count in [*range(1, 34), 63, 64, 65, 100, 128, 129, 192, 257]:
            for start in {0, 1, 300 - count}:
                found = bits(layer(x[start : start + count]))
                assert found == expected[start : start + count], f"{count} rows from {start}"

    def test_the_library_alone_would_not_do(self) -> None:
        """Shows that the test above can fail: torch's float32 product of one row differs."""
        weight, x = torch.randn(160, WIDTH), torch.randn(64, WIDTH)
        alone = torch.cat([dense.multiply(row[None], weight, None) for row in x])
        if bits(alone) == bits(dense.multiply(x, weight, None)):
            pytest.skip("this library gives a row alone the bits it has among others")
        assert 1 not in RowCountTable().linear(weight).rows.allowed

    @pytest.mark.parametrize("allowed", [(64,), (2, 64), (1, 2, 4, 8, 16, 32, 64)])
    def test_the_library_sees_allowed_row_counts_only(
        self, monkeypatch: pytest.MonkeyPatch, allowed: tuple[int, ...]
    ) -> None:
        seen: list[int] = []

        def multiply(x: Tensor, *rest: Tensor) -> Tensor:
            seen.append(x.shape[0])
            assert x.is_contiguous()
            return original(x, *rest)

        original = dense.multiply
        monkeypatch.setattr(dense, "multiply", multiply)
        layer = DenseLinear(torch.randn(32, WIDTH), None, RowCounts(64, allowed))
        for count in (0, 1, 2, 3, 65, 200):
            seen.clear()
            assert layer(torch.randn(count, WIDTH)).shape == (count, 32)
            assert tuple(seen) == layer.rows.blocks(count)

    @pytest.mark.parametrize("num_rows", [0, 1, 5, 70])
    def test_neighbours_are_those_of_the_ops(self, num_rows: int) -> None:
        weight, bias = torch.randn(64, WIDTH), torch.randn(64)
        norm = torch.rand(WIDTH) + 0.5
        x, residual = torch.randn(num_rows, WIDTH), torch.randn(num_rows, 64)
        table = RowCountTable()
        layer = table.linear(weight, bias)
        normed = ops.rms_norm(x, norm, 1e-5)
        plain = layer(normed)
        assert torch.equal(layer(x, norm_weight=norm, norm_eps=1e-5), plain)
        assert torch.equal(layer(normed, residual=residual), plain + residual)
        gated = table.linear(weight, bias, has_silu_mul=True)
        assert torch.equal(gated(normed), ops.silu_mul(plain))
        assert (layer.out_features, gated.out_features) == (64, 32)
        wanted = normed.double() @ weight.double().t() + bias.double()
        torch.testing.assert_close(plain.double(), wanted, rtol=1e-5, atol=1e-4)

    def test_a_shape_is_probed_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        probes: list[int] = []
        monkeypatch.setattr(dense, "probe", lambda *_: probes.append(1) or RowCounts(64, (64,)))
        table = RowCountTable()
        for _ in range(2):
            table.linear(torch.randn(32, WIDTH))
            table.linear(torch.randn(32, WIDTH).bfloat16())
            table.linear(torch.randn(32, WIDTH), torch.zeros(32))
            table.linear(torch.randn(WIDTH, 32), has_silu_mul=True)
        assert len(probes) == 4

    def test_the_largest_come_in_order(self) -> None:
        # Of each token three copies, so that every value has equals.
        weight = torch.randn(40, WIDTH).repeat(3, 1)
        layer = RowCountTable().linear(weight)
        x, norm = torch.randn(9, WIDTH), torch.ones(WIDTH)
        x[4, 0] = torch.nan
        logits = layer(x, norm_weight=norm, norm_eps=1e-5)
        for k in (1, 2, 7):
            ids, values = layer.top_k(x, k, norm, 1e-5)
            assert ids.dtype == torch.int64 and values.dtype == torch.float32
            for row, found, top in zip(logits.tolist(), ids.tolist(), values, strict=True):
                if any(value != value for value in row):
                    assert found == list(range(k)) and top.isnan().all()
                    continue
                order = sorted(range(120), key=lambda token: (-row[token], token))
                assert found == order[:k]
                assert top.tolist() == [row[token] for token in found]
