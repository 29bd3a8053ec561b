"""Linear layers on packed weights, alone and as whole decoder layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ops = torch.ops.stateful_kv


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    minimums: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 0.0,
    silu_mul: bool = False,
) -> Tensor:
    """Linear layer with a weight packed in panels of 16 output columns (see models/packing.py).

    The dtype of the weight tells its format. Every output element is summed over k in ascending
    order, then bias and residual are added, so a row has the same bits for any number of rows.
    Fused with its neighbours it gives, for a float32 x, the bits of `rms_norm` before it and
    `silu_mul` after it; for a 16-bit x it rounds once, at the end, and not between them.

    Args:
        x: float32|float16|bfloat16[N, K], K contiguous; K is a multiple of 32 unless the weight is
            float32.
        weight: float32[Np, K, 16] | int8[Np, K, 16] | uint8[Np, K/2, 16] with two 4-bit values a
            byte; contiguous, Np = ceil(out_features / 16).
        scales: float32[Np, K/32, 16], contiguous; None for a float32 weight.
        minimums: float32[Np, K/32, 16], contiguous, for a uint8 weight; else None.
        bias: float32|float16|bfloat16[out_features], contiguous, or None.
        out_features: columns of the product; a multiple of 32 with `silu_mul`.
        residual: dtype of x [N, out_features], contiguous, or None - added to the result; None with
            `silu_mul`.
        norm_weight: float32|float16|bfloat16[K], contiguous, or None - then x is normalised first,
            as by `rms_norm(x, norm_weight, norm_eps)`, in float32 whatever the dtype of x.
        norm_eps: a number >= 0 that float32 can hold.
        silu_mul: return silu(gate) * up, where the panels of the weight are by turns 16 columns
            of the gate and the 16 columns of up that go with them.

    Returns:
        [N, out_features], with `silu_mul` [N, out_features / 2], in the dtype of x: everything is
        computed in float32 and the result rounded once.
    """
    result: Tensor = _ops.quantized_linear.default(
        x,
        weight,
        scales,
        minimums,
        bias,
        out_features,
        residual,
        norm_weight,
        norm_eps,
        silu_mul,
    )
    return result


def linear_top_k(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    minimums: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    k: int,
    norm_weight: Tensor | None = None,
    norm_eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The k largest outputs of each row of `quantized_linear`, without ever writing the others.

    A NaN counts as larger than every number, and of equal outputs (of two NaN too) the one with the
    lower id comes first. So for a float32 x k = 1 is `argmax` of the result of `quantized_linear`,
    in bits; for a 16-bit x the outputs that are compared are not rounded.

    Args:
        x: as in `quantized_linear`, like all arguments but k.
        weight: packed in panels.
        scales: of the weight.
        minimums: of the weight.
        bias: float32|float16|bfloat16[out_features], contiguous, or None.
        out_features: columns of the product.
        k: a number from 1 to 64, at most out_features.
        norm_weight: float32|float16|bfloat16[K], contiguous, or None.
        norm_eps: a number >= 0 that float32 can hold.

    Returns:
        ids: int64[N, k], largest output first.
        values: float32[N, k], the outputs at those ids.
    """
    result: tuple[Tensor, Tensor] = _ops.linear_top_k.default(
        x, weight, scales, minimums, bias, out_features, k, norm_weight, norm_eps
    )
    return result


# What `decoder_layers` reads of each layer, in this order.
LAYER_TENSORS = (
    "attn_norm",
    *(f"qkv.{part}" for part in ("weight", "scales", "minimums", "bias")),
    "q_norm",
    "k_norm",
    *(f"o.{part}" for part in ("weight", "scales", "minimums", "bias")),
    "ffn_norm",
    *(f"gate_up.{part}" for part in ("weight", "scales", "minimums", "bias")),
    *(f"down.{part}" for part in ("weight", "scales", "minimums", "bias")),
)


def decoder_layers(
    x: Tensor,
    weights: Sequence[Tensor | None],
    positions: Tensor,
    cos_sin: Tensor,
    slots: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    query_offsets: Tensor,
    logit_rows: Tensor,
    num_heads: int,
    norm_eps: float,
    scale: float,
    sliding_window: int,
    k_pools: Tensor,
    v_pools: Tensor,
    output: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """All layers of a Llama-family model: the ops above one after another, in one call.

    A layer is: norm, fused q, k and v, norms of the heads where there are any, `rope_append_kv`,
    `paged_attention`, o added to the layer's input, norm, gate and up, down added to that. The
    last layer computes `logit_rows` only from its attention on. The bits are those of the ops
    called one by one; memory for activations is taken once for all layers. CPU and float32 only
    (activations, norms and biases): elsewhere compose the ops.

    Args:
        x: float32[N, E], contiguous - embeddings of the new tokens.
        weights: for each layer the tensors named in `LAYER_TENSORS`, packed as `quantized_linear`
            takes them (gate and up by turns, panel by panel); None for those a layer has not.
        positions: int32[N], contiguous - absolute positions, below the rows of cos_sin.
        cos_sin: float32[max_pos, D], contiguous - as in `rope_append_kv`.
        slots: int64[N], contiguous - where each row's K and V go, -1 = nowhere.
        page_table: int32[S, M] - as in `paged_attention`.
        seq_lens: int32[S], contiguous - KV length of each sequence with its new rows.
        query_offsets: int32[S + 1], contiguous, to at most N - as in `paged_attention`.
        logit_rows: int64[R], contiguous, R <= N - rows of x whose results are wanted.
        num_heads: H, a multiple of Hk.
        norm_eps: of all norms.
        scale: of the attention scores.
        sliding_window: keys a row sees, 0 = all.
        k_pools: float32|float16|bfloat16|int8 [num_layers, P, Hk, B, D], contiguous - written in
            place.
        v_pools: dtype and shape of k_pools, contiguous, memory of its own - written in place.
        output: float32[R, E], contiguous, memory of its own - gets the results, before the model's
            last norm.
        k_scales: float32[num_layers, P, Hk, B], contiguous, for pools of int8, else None - written
            in place.
        v_scales: as k_scales, of the values, memory of its own - written in place.
    """
    _ops.decoder_layers.default(
        x,
        weights,
        positions,
        cos_sin,
        slots,
        page_table,
        seq_lens,
        query_offsets,
        logit_rows,
        num_heads,
        norm_eps,
        scale,
        sliding_window,
        k_pools,
        v_pools,
        output,
        k_scales,
        v_scales,
    )
