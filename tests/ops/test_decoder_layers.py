"""decoder_layers: the bits of the ops called one by one, in every kind of layer and batch."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stateful_kv import ops
from stateful_kv.kv.batch import Batch
from stateful_kv.models import packing
from stateful_kv.models.config import ModelConfig
from stateful_kv.models.llama import LayerWeights, Linear, LlamaModel, LlamaWeights
from stateful_kv.models.rope import cos_sin_table, inverse_frequencies
from tests.ops.cases import valid_arguments
from tests.ops.comparing import assert_same_bits
from tests.ops.paged import offsets
from tests.ops.test_quantized_linear import FORMATS, random_weight

CONFIG = ModelConfig(
    vocab_size=50,
    hidden_size=96,
    intermediate_size=160,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=32,
    max_position=512,
)
PAGES, PAGE_SIZE = 12, 16


class Pools:
    """The pools of all layers, with content everywhere."""

    def __init__(self, dtype: torch.dtype) -> None:
        shape = (CONFIG.num_layers, PAGES, CONFIG.num_kv_heads, PAGE_SIZE, CONFIG.head_dim)
        self.k, self.v = (torch.randn(shape).mul(9).round().to(dtype) for _ in range(2))
        self.k_scales: Tensor | None = None
        self.v_scales: Tensor | None = None
        if dtype == torch.int8:
            self.k_scales, self.v_scales = torch.rand(2, *shape[:-1]) * 0.1

    def scales(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        if self.k_scales is None or self.v_scales is None:
            return None, None
        return self.k_scales[layer], self.v_scales[layer]

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.k, self.v, self.k_scales, self.v_scales) if t is not None]


def make_model(weight_format: str, biases: bool = False, qk_norm: bool = False) -> LlamaModel:
    """Random weights; small enough that nothing overflows in float16 pools."""
    c = CONFIG
    q_width, kv_width = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

    def weight(out_features: int, in_features: int) -> packing.PackedWeight:
        packed = random_weight(weight_format, out_features, in_features)
        scales = None if packed.scales is None else packed.scales * 0.02
        minimums = None if packed.minimums is None else packed.minimums * 0.02
        return replace(packed, scales=scales, minimums=minimums)

    def linear(out_features: int, in_features: int) -> Linear:
        bias = torch.randn(out_features) if biases else None
        return Linear.fuse([weight(out_features, in_features)], [bias])

    layers = tuple(
        LayerWeights(
            attn_norm=torch.randn(c.hidden_size),
            qkv=linear(q_width + 2 * kv_width, c.hidden_size),
            o=linear(c.hidden_size, q_width),
            ffn_norm=torch.randn(c.hidden_size),
            gate_up=Linear.gate_up(
                *(weight(c.intermediate_size, c.hidden_size) for _ in range(2)),
                biases=torch.randn(2, c.intermediate_size) if biases else (None, None),
            ),
            down=linear(c.hidden_size, c.intermediate_size),
            q_norm=torch.randn(c.head_dim) if qk_norm else None,
            k_norm=torch.randn(c.head_dim) if qk_norm else None,
        )
        for _ in range(c.num_layers)
    )
    cos_sin = cos_sin_table(inverse_frequencies(c.head_dim, c.rope_theta, None), c.max_position)
    embedding = torch.randn(c.vocab_size, c.hidden_size)
    head = linear(c.vocab_size, c.hidden_size)
    norm = torch.randn(c.hidden_size)
    return LlamaModel(c, LlamaWeights(embedding, layers, norm, head, cos_sin))


def make_batch(lens: list[int], rows: list[int], logit_rows: list[int]) -> Batch:
    """Sequences of these lengths on pages of their own, the last `rows` of each new."""
    pages = torch.randperm(PAGES, dtype=torch.int32)[: 4 * len(lens)].view(len(lens), 4)
    positions = [torch.arange(n - r, n) for n, r in zip(lens, rows, strict=True)]
    slots = [
        pages[index, at // PAGE_SIZE].long() * PAGE_SIZE + at % PAGE_SIZE
        for index, at in enumerate(positions)
    ]
    return Batch(
        token_ids=torch.randint(0, CONFIG.vocab_size, (sum(rows),)),
        positions=torch.cat(positions).int(),
        query_offsets=offsets(rows),
        page_table=pages,
        seq_lens=torch.tensor(lens, dtype=torch.int32),
        slots=torch.cat(slots),
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
    )


BATCHES = {
    "decode": ([40], [1], [0]),
    "verify": ([33, 20], [5, 1], [0, 1, 2, 3, 4, 5]),
    "extend": ([50, 7, 31], [30, 7, 1], [36, 37]),
    "no logits": ([64], [40], []),
    "no rows": ([5], [0], []),
}


def run_fused(model: LlamaModel, x: Tensor, batch: Batch, pools: Pools) -> Tensor:
    """All layers in one op: float32[N, E] -> float32[R, E]."""
    weights: list[Tensor | None] = []
    for layer in model.weights.layers:
        weights += layer.tensors() or []
    output = x.new_empty(batch.logit_rows.shape[0], x.shape[1])
    ops.decoder_layers(
        x,
        weights,
        batch.positions,
        model.weights.cos_sin,
        batch.slots,
        batch.page_table,
        batch.seq_lens,
        batch.query_offsets,
        batch.logit_rows,
        model.config.num_heads,
        model.config.rms_norm_eps,
        model.config.head_dim**-0.5,
        model.config.sliding_window or 0,
        pools.k,
        pools.v,
        output,
        pools.k_scales,
        pools.v_scales,
    )
    return output


def both_ways(model: LlamaModel, batch: Batch, pools: Pools) -> list[tuple[Tensor, ...]]:
    """Hidden rows and pools after all layers, in one op and op by op."""
    x = model.weights.embedding[batch.token_ids]
    fused, separate = deepcopy(pools), deepcopy(pools)
    return [
        (run_fused(model, x, batch, fused), *fused.tensors()),
        (model._run_ops(x, batch, separate), *separate.tensors()),
    ]


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("weight_format", FORMATS)
def test_same_bits_as_op_by_op(weight_format: str, kind: str) -> None:
    model = make_model(weight_format)
    fused, separate = both_ways(model, make_batch(*BATCHES[kind]), Pools(torch.float16))
    for tensor, other in zip(fused, separate, strict=True):
        assert_same_bits(tensor, other)
    assert fused[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("biases", "qk_norm"), [(True, False), (False, True), (True, True)])
def test_same_bits_in_every_family(dtype: torch.dtype, biases: bool, qk_norm: bool) -> None:
    model = make_model("int8", biases, qk_norm)
    for kind in BATCHES.values():
        fused, separate = both_ways(model, make_batch(*kind), Pools(dtype))
        for tensor, other in zip(fused, separate, strict=True):
            assert_same_bits(tensor, other)


def test_scales_without_int8_pools_and_the_other_way_round() -> None:
    model, batch = make_model("int8"), make_batch(*BATCHES["decode"])
    x, floats, bytes_ = torch.randn(1, 96), Pools(torch.float32), Pools(torch.int8)
    floats.k_scales, bytes_.v_scales = bytes_.k_scales, None
    with pytest.raises(ValueError, match="decoder_layers: k_scales: expected None for pools of"):
        run_fused(model, x, batch, floats)
    with pytest.raises(ValueError, match="decoder_layers: v_scales: expected a float32 tensor"):
        run_fused(model, x, batch, bytes_)


@pytest.mark.parametrize("name", ["norm_eps", "scale"])
def test_scalars_that_float32_cannot_hold(name: str) -> None:
    arguments = valid_arguments("decoder_layers") | {name: 1e39}
    with pytest.raises(ValueError, match=f"decoder_layers: {name}: expected .*float32"):
        ops.decoder_layers(**arguments)


def test_threads_do_not_matter(set_num_threads: Callable[[int], None]) -> None:
    model, batch, pools = make_model("int4"), make_batch(*BATCHES["extend"]), Pools(torch.float16)
    results = []
    for threads in (1, 2, 3):
        set_num_threads(threads)
        results.append(both_ways(model, batch, pools)[0])
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert_same_bits(first, second)


def test_a_model_with_mixed_formats_runs_op_by_op() -> None:
    model = make_model("int8")
    first = model.weights.layers[0]
    parts = [random_weight(f, 16 * n, 96) for f, n in (("int8", 12), ("int4", 4), ("int4", 4))]
    mixed = replace(first, qkv=Linear.fuse(parts, [None] * 3))
    assert mixed.tensors() is None
    weights = replace(model.weights, layers=(mixed, *model.weights.layers[1:]))
    logits = LlamaModel(CONFIG, weights).forward(
        make_batch(*BATCHES["verify"]), Pools(torch.float32)
    )
    assert logits.shape == (6, CONFIG.vocab_size)


@pytest.mark.parametrize("weight_format", ["int8", "fp32"])
def test_rows_of_no_sequence_change_nothing(weight_format: str) -> None:
    """The padding of `fill_rows`: the other rows and the pools keep their bits."""
    model, batch, pools = (
        make_model(weight_format),
        make_batch(*BATCHES["verify"]),
        Pools(torch.int8),
    )
    padded = replace(
        batch,
        token_ids=torch.cat([batch.token_ids, torch.zeros(3, dtype=torch.int64)]),
        positions=torch.cat([batch.positions, torch.zeros(3, dtype=torch.int32)]),
        slots=torch.cat([batch.slots, torch.full((3,), -1)]),
        logit_rows=torch.arange(9),
    )
    expected, *expected_pools = both_ways(model, batch, pools)[0]
    for output, *changed_pools in both_ways(model, padded, pools):
        assert_same_bits(output[:6], expected)
        assert output.isfinite().all()
        for pool, other in zip(changed_pools, expected_pools, strict=True):
            assert_same_bits(pool, other)
