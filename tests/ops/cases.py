"""One row per op: its schema and valid arguments, by name, in the order of the schema."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.ops.paged import make_batch, make_pools, offsets, quantized
from tests.reference import elementwise

Arguments = dict[str, Any]

# Only int8 pools have scales; `int8_arguments` builds those.
NO_SCALES: Arguments = {"k_scales": None, "v_scales": None}


def _append_kv() -> Arguments:
    k_pool, v_pool = (pool.zero_() for pool in make_pools(5, 2, 16, 32))
    k, v = torch.randn(2, 4, 2, 32)
    slots = torch.tensor([17, 40, -1, 63])
    return {"k": k, "v": v, "slots": slots, "k_pool": k_pool, "v_pool": v_pool} | NO_SCALES


def _copy_pages() -> Arguments:
    k_pool, v_pool = torch.randn(2, 5, 2, 16, 32)
    copies = torch.tensor([[1, 2], [4, 0]], dtype=torch.int32)
    return {"page_copies": copies, "k_pool": k_pool, "v_pool": v_pool} | NO_SCALES


def _paged_attention() -> Arguments:
    batch = make_batch([20, 0, 33], [3, 0, 1], head_dim=64, dtype=torch.float32)
    names = ("q", "k_pool", "v_pool", "page_table", "seq_lens", "query_offsets")
    tensors = dict(zip(names, batch.arguments, strict=True))
    # opcheck compares pools before and after with torch.equal, for which NaN is a change.
    tensors["k_pool"].nan_to_num_()
    tensors["v_pool"].nan_to_num_()
    return {**tensors, "scale": batch.scale, "sliding_window": 7, "soft_cap": 20.0} | NO_SCALES


def _shared_prefix_attention() -> Arguments:
    arguments = _paged_attention()
    # Two sequences of one prefix and one by itself.
    arguments["page_table"][0, 0] = arguments["page_table"][1, 0] = arguments["page_table"][2, 0]
    arguments["seq_lens"][1] = 16
    places = {"group_offsets": offsets([2, 1]), "prefix_lens": torch.tensor([16, 0]).int()}
    names = list(arguments)
    first, last = names[: names.index("scale")], names[names.index("scale") :]
    return {n: arguments[n] for n in first} | places | {n: arguments[n] for n in last}


def _rms_norm() -> Arguments:
    return {"x": torch.randn(3, 40), "weight": torch.randn(40), "eps": 1e-5}


def _add_rms_norm() -> Arguments:
    x, residual = torch.randn(2, 3, 40)
    return {"x": x, "residual": residual, "weight": torch.randn(40), "eps": 1e-5}


def _rope_append_kv() -> Arguments:
    k_pool, v_pool = (pool.zero_() for pool in make_pools(5, 2, 16, 32))
    k, v = torch.randn(2, 4, 2, 32)
    return {
        "q": torch.randn(4, 6, 32),
        "k": k,
        "v": v,
        "positions": torch.tensor([0, 5, 63, 2], dtype=torch.int32),
        "cos_sin": torch.from_numpy(elementwise.rope_table(64, 32)).float(),
        "slots": torch.tensor([17, 40, -1, 63]),
        "k_pool": k_pool,
        "v_pool": v_pool,
    } | NO_SCALES


def _silu_mul() -> Arguments:
    return {"gate_up": torch.randn(3, 80)}


def _quantized_linear() -> Arguments:
    return {
        "x": torch.randn(3, 64),
        "weight": torch.randint(0, 256, (2, 32, 16), dtype=torch.uint8),
        "scales": torch.randn(2, 2, 16),
        "minimums": torch.randn(2, 2, 16),
        "bias": torch.randn(21),
        "out_features": 21,
        "residual": torch.randn(3, 21),
        "norm_weight": torch.randn(64),
        "norm_eps": 1e-5,
    }


def _linear_top_k() -> Arguments:
    return {
        "x": torch.randn(3, 64),
        "weight": torch.randint(0, 256, (2, 32, 16), dtype=torch.uint8),
        "scales": torch.randn(2, 2, 16),
        "minimums": torch.randn(2, 2, 16),
        "bias": torch.randn(21),
        "out_features": 21,
        "k": 4,
        "norm_weight": torch.randn(64),
        "norm_eps": 1e-5,
    }


def _packed(out_features: int, in_features: int) -> list[torch.Tensor | None]:
    q = torch.randint(-9, 10, (-(-out_features // 16), in_features, 16), dtype=torch.int8)
    return [q, torch.rand(q.shape[0], in_features // 32, 16) * 0.1, None, None]


def layer_weights(
    hidden: int, inner: int, num_heads: int, num_kv_heads: int, head_dim: int, qk_norm: bool
) -> list[torch.Tensor | None]:
    """One layer of `decoder_layers`, int8."""
    norms = [torch.randn(head_dim), torch.randn(head_dim)] if qk_norm else [None, None]
    return [
        torch.randn(hidden),
        *_packed((num_heads + 2 * num_kv_heads) * head_dim, hidden),
        *norms,
        *_packed(hidden, num_heads * head_dim),
        torch.randn(hidden),
        *_packed(2 * inner, hidden),
        *_packed(hidden, inner),
    ]


def _decoder_layers() -> Arguments:
    k_pools, v_pools = torch.randn(2, 2, 5, 2, 16, 32)
    layers = [layer_weights(64, 96, 4, 2, 32, qk_norm=True) for _ in range(2)]
    return {
        "x": torch.randn(4, 64),
        "weights": [tensor for layer in layers for tensor in layer],
        "positions": torch.tensor([17, 18, 5, 6], dtype=torch.int32),
        "cos_sin": torch.from_numpy(elementwise.rope_table(64, 32)).float(),
        "slots": torch.tensor([33, 34, 53, -1]),
        "page_table": torch.tensor([[1, 2], [3, 0]], dtype=torch.int32),
        "seq_lens": torch.tensor([19, 7], dtype=torch.int32),
        "query_offsets": offsets([2, 2]),
        "logit_rows": torch.tensor([1, 3]),
        "num_heads": 4,
        "norm_eps": 1e-5,
        "scale": 32**-0.5,
        "sliding_window": 0,
        "k_pools": k_pools,
        "v_pools": v_pools,
        "output": torch.zeros(2, 64),
    }


def _argmax() -> Arguments:
    return {"logits": torch.randn(3, 70)}


def _sample() -> Arguments:
    return {
        "logits": torch.randn(3, 70),
        "seeds": torch.tensor([5, -1, 2**62]),
        "positions": torch.tensor([0, 17, 3]),
        "temperatures": torch.tensor([1.0, 0.0, 0.7]),
        "top_k": torch.tensor([0, 3, 20], dtype=torch.int32),
        "top_p": torch.tensor([1.0, 0.5, 0.9]),
        "min_p": torch.tensor([0.0, 0.1, 0.02]),
    }


def _ngram_lookup() -> Arguments:
    tokens = torch.tensor([1, 2, 3, 1, 2, 9, 9, 9], dtype=torch.int32)
    borders = offsets([5, 0, 3])
    limits = {"min_n": 1, "max_n": 4, "max_draft": 3}
    lengths = torch.tensor([4, 0, 3], dtype=torch.int32)
    return {"tokens": tokens, "offsets": borders, **limits, "lengths": lengths}


def _verify_draft() -> Arguments:
    return {
        "draft_ids": torch.tensor([1, 2, 3]),
        "target_ids": torch.tensor([1, 5, 7, 8, 3]),
        "draft_offsets": offsets([2, 1]),
    }


def _int32(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _fill_rows() -> Arguments:
    """Sequences with a draft, without one, finished, and without room."""
    return {
        "history": torch.randint(0, 50, (4, 20), dtype=torch.int32),
        "lengths": _int32(5, 9, 6, 18),
        "num_left": _int32(3, 9, 0, 4),
        "kv_limits": _int32(16, 16, 16, 17),
        "draft_ids": torch.randint(0, 50, (4, 3), dtype=torch.int32),
        "num_draft": _int32(3, 0, 2, 1),
        "page_table": _int32([3, 1], [4, 2], [0, 5], [6, 7]),
        "page_size": 16,
    }


def _advance_sequences() -> Arguments:
    """Rows of two of three sequences, and one of padding."""
    return {
        "token_ids": torch.tensor([1, 2, 3, 4, 0]),
        "target_ids": torch.tensor([2, 3, 7, 9, 0]),
        "target_values": torch.randn(5),
        "query_offsets": offsets([3, 0, 1]),
        "stop_ids": _int32([7, -1], [7, -1], [5, 9]),
        "history": torch.randint(0, 50, (3, 8), dtype=torch.int32),
        "lengths": _int32(3, 4, 5),
        "num_left": _int32(4, 0, 2),
        "counts": torch.zeros(3, 3, dtype=torch.int32),
    }


CASES: dict[str, tuple[str, Callable[[], Arguments]]] = {
    "append_kv": (
        "(Tensor k, Tensor v, Tensor slots, Tensor(a!) k_pool, Tensor(b!) v_pool, "
        "Tensor(c!)? k_scales=None, Tensor(d!)? v_scales=None) -> ()",
        _append_kv,
    ),
    "copy_pages": (
        "(Tensor page_copies, Tensor(a!) k_pool, Tensor(b!) v_pool, "
        "Tensor(c!)? k_scales=None, Tensor(d!)? v_scales=None) -> ()",
        _copy_pages,
    ),
    "paged_attention": (
        "(Tensor q, Tensor k_pool, Tensor v_pool, Tensor page_table, Tensor seq_lens, "
        "Tensor query_offsets, float scale, int sliding_window=0, float soft_cap=0.0, "
        "Tensor? k_scales=None, Tensor? v_scales=None) -> Tensor",
        _paged_attention,
    ),
    "shared_prefix_attention": (
        "(Tensor q, Tensor k_pool, Tensor v_pool, Tensor page_table, Tensor seq_lens, "
        "Tensor query_offsets, Tensor group_offsets, Tensor prefix_lens, float scale, "
        "int sliding_window=0, float soft_cap=0.0, Tensor? k_scales=None, "
        "Tensor? v_scales=None) -> Tensor",
        _shared_prefix_attention,
    ),
    "rms_norm": ("(Tensor x, Tensor weight, float eps) -> Tensor", _rms_norm),
    "add_rms_norm": (
        "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor normalised, Tensor sum)",
        _add_rms_norm,
    ),
    "rope_append_kv": (
        "(Tensor(a!) q, Tensor k, Tensor v, Tensor positions, Tensor cos_sin, Tensor slots, "
        "Tensor(b!) k_pool, Tensor(c!) v_pool, Tensor(d!)? k_scales=None, "
        "Tensor(e!)? v_scales=None) -> ()",
        _rope_append_kv,
    ),
    "silu_mul": ("(Tensor gate_up) -> Tensor", _silu_mul),
    "quantized_linear": (
        "(Tensor x, Tensor weight, Tensor? scales, Tensor? minimums, Tensor? bias, "
        "int out_features, Tensor? residual=None, Tensor? norm_weight=None, float norm_eps=0., "
        "bool silu_mul=False) -> Tensor",
        _quantized_linear,
    ),
    "linear_top_k": (
        "(Tensor x, Tensor weight, Tensor? scales, Tensor? minimums, Tensor? bias, "
        "int out_features, int k, Tensor? norm_weight=None, float norm_eps=0.) -> "
        "(Tensor ids, Tensor values)",
        _linear_top_k,
    ),
    "decoder_layers": (
        "(Tensor x, Tensor?[] weights, Tensor positions, Tensor cos_sin, Tensor slots, "
        "Tensor page_table, Tensor seq_lens, Tensor query_offsets, Tensor logit_rows, "
        "int num_heads, float norm_eps, float scale, int sliding_window, Tensor(a!) k_pools, "
        "Tensor(b!) v_pools, Tensor(c!) output, Tensor(d!)? k_scales=None, "
        "Tensor(e!)? v_scales=None) -> ()",
        _decoder_layers,
    ),
    "argmax": ("(Tensor logits) -> (Tensor ids, Tensor values)", _argmax),
    "sample": (
        "(Tensor logits, Tensor seeds, Tensor positions, Tensor temperatures, Tensor top_k, "
        "Tensor top_p, Tensor min_p) -> (Tensor ids, Tensor values)",
        _sample,
    ),
    "ngram_lookup": (
        "(Tensor tokens, Tensor offsets, int min_n, int max_n, int max_draft, "
        "Tensor? lengths=None) -> (Tensor draft_ids, Tensor num_draft)",
        _ngram_lookup,
    ),
    "verify_draft": (
        "(Tensor draft_ids, Tensor target_ids, Tensor draft_offsets) -> "
        "(Tensor num_accepted, Tensor bonus_ids)",
        _verify_draft,
    ),
    "fill_rows": (
        "(Tensor history, Tensor lengths, Tensor num_left, Tensor kv_limits, Tensor draft_ids, "
        "Tensor num_draft, Tensor page_table, int page_size) -> (Tensor token_ids, "
        "Tensor positions, Tensor slots, Tensor seq_lens, Tensor query_offsets, "
        "Tensor row_sequences)",
        _fill_rows,
    ),
    "advance_sequences": (
        "(Tensor token_ids, Tensor target_ids, Tensor target_values, Tensor query_offsets, "
        "Tensor stop_ids, Tensor(a!) history, Tensor(b!) lengths, Tensor(c!) num_left, "
        "Tensor(d!) counts) -> ()",
        _advance_sequences,
    ),
}

WRITTEN = {
    "append_kv": ("k_pool", "v_pool"),
    "copy_pages": ("k_pool", "v_pool"),
    "rope_append_kv": ("q", "k_pool", "v_pool"),
    "decoder_layers": ("k_pools", "v_pools", "output"),
    "advance_sequences": ("history", "lengths", "num_left", "counts"),
}


def valid_arguments(op: str) -> Arguments:
    """Fresh arguments that the op accepts."""
    return CASES[op][1]()


INT8_OPS = (
    "append_kv",
    "copy_pages",
    "paged_attention",
    "rope_append_kv",
    "shared_prefix_attention",
)


def int8_arguments(op: str) -> Arguments:
    """The same with pools of int8 and their scales."""
    arguments = valid_arguments(op)
    for name in ("k", "v"):
        pool, scales = quantized(arguments[f"{name}_pool"])
        arguments |= {f"{name}_pool": pool, f"{name}_scales": scales}
    return arguments
