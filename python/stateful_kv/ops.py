"""The ops of `torch.ops.stateful_kv`: one documented function each, its fake kernel right below.

Symbols: S sequences, N new tokens of all sequences together, H query heads, Hk KV heads, D head
dimension, P pages in the pool, B page_size, M pages a sequence has at most, K input features,
V vocabulary. A slot is page * B + offset: one token position in the pool.

Rules that hold for every op:

- A wrong dtype is a TypeError; a wrong device, shape, stride or value is a ValueError. The message
  reads "op: argument: expected ..., got ...". Nothing is written if an argument is refused.
- No op copies or converts an argument behind your back: a layout it cannot read is an error.
- Values of ids, offsets and lengths are checked on the CPU only; on CUDA they are trusted.
- The ops are for inference: a tensor that requires grad is refused unless grad mode is off.
- An op that writes into its arguments returns None; the others return fresh tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

import stateful_kv._native  # noqa: F401  (loads the library that registers the ops)

_ops = torch.ops.stateful_kv
_Function = TypeVar("_Function", bound=Callable[..., Any])


def _fake(op: str) -> Callable[[_Function], _Function]:
    """Registers the decorated function as the fake kernel of an op."""
    register: Callable[[_Function], _Function] = torch.library.register_fake(f"stateful_kv::{op}")
    return register


def _check_devices(op: str, device: torch.device, **tensors: Tensor | None) -> None:
    """Refuses mixed devices in fake kernels too: one meta tensor would turn the op into a no-op."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{op}: {name}: expected device {device}, got {tensor.device}")


def append_kv(
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Writes the keys and values of new tokens to their slots, in the dtype of the pool.

    On the CPU, of rows with the same slot the last one stays; on CUDA any of them may. A vector x
    goes to a pool of int8 as round(x / scale), scale = max |x| / 127, halves to even; its scale is
    0 if all of x is 0, and NaN if x has an infinity or a NaN.

    Args:
        k: float32, or dtype of the pool unless that is int8, [N, Hk, D], D contiguous - new keys.
        v: dtype of k [N, Hk, D], D contiguous - new values.
        slots: int64[N], contiguous - where each row goes, -1 = the row is skipped.
        k_pool: float32|float16|bfloat16|int8 [P, Hk, B, D], contiguous - written in place.
        v_pool: dtype and shape of k_pool, contiguous, memory of its own - written in place.
        k_scales: float32[P, Hk, B], contiguous, for pools of int8, else None - written in place.
        v_scales: as k_scales, of the values, memory of its own - written in place.
    """
    _ops.append_kv.default(k, v, slots, k_pool, v_pool, k_scales, v_scales)


@_fake("append_kv")
def _(
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    _check_devices(
        "append_kv",
        k_pool.device,
        k=k,
        v=v,
        slots=slots,
        v_pool=v_pool,
        k_scales=k_scales,
        v_scales=v_scales,
    )


def copy_pages(
    page_copies: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Copies whole pages within the pools: what copy-on-write asks for.

    Args:
        page_copies: int32[C, 2], contiguous - (from, to) page ids, taking effect in order.
        k_pool: [P, Hk, B, D] or [num_layers, P, Hk, B, D], contiguous - written in place.
        v_pool: dtype and shape of k_pool, contiguous, memory of its own - written in place.
        k_scales: float32, the shape of k_pool without D, contiguous, for pools of int8, else None -
            written in place.
        v_scales: as k_scales, of the values, memory of its own - written in place.
    """
    _ops.copy_pages.default(page_copies, k_pool, v_pool, k_scales, v_scales)


@_fake("copy_pages")
def _(
    page_copies: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    _check_devices(
        "copy_pages",
        k_pool.device,
        page_copies=page_copies,
        v_pool=v_pool,
        k_scales=k_scales,
        v_scales=v_scales,
    )


def paged_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    query_offsets: Tensor,
    scale: float,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """Causal attention of ragged query rows over paged keys and values.

    One op for decode (one row a sequence), extend (several) and verify (a draft). Row i of the
    q_len rows of sequence s has the absolute position seq_lens[s] - q_len + i and sees the keys at
    positions up to its own. The bits of a row depend on its own sequence and position only, not on
    the batch it is computed in; each device has its own. On CUDA, q and pools of one 16-bit dtype,
    and 16-bit q with int8 pools, go to tensor cores (head_dim 64, 96 or 128).

    Args:
        q: float32[N, H, D] (CUDA: also float16, bfloat16), D contiguous, H a multiple of Hk - the
            query rows; D is a multiple of 16, at most 256.
        k_pool: float32|float16|bfloat16|int8 [P, Hk, B, D], contiguous, NaN allowed outside live
            slots.
        v_pool: dtype and shape of k_pool, contiguous, NaN allowed outside live slots.
        page_table: int32[S, M], M contiguous - page ids in order, entries past ceil(seq_len/B) are
            never read.
        seq_lens: int32[S], contiguous - KV length including this step's rows, at most M * B.
        query_offsets: int32[S + 1], contiguous, ascending from 0 to at most N - rows of sequence s
            are [query_offsets[s], query_offsets[s + 1]); it may have none. Rows behind those of
            the last sequence get zeros.
        scale: factor of the scores, usually D ** -0.5.
        sliding_window: a row sees only the last `sliding_window` positions; 0 = all.
        soft_cap: c > 0 turns a score x into c * tanh(x / c), after the scale; 0 = off.
        k_scales: float32[P, Hk, B], contiguous, for pools of int8, else None; NaN allowed outside
            live slots.
        v_scales: as k_scales, of the values.

    Returns:
        [N, H, D] in the dtype of q.
    """
    result: Tensor = _ops.paged_attention.default(
        q,
        k_pool,
        v_pool,
        page_table,
        seq_lens,
        query_offsets,
        scale,
        sliding_window,
        soft_cap,
        k_scales,
        v_scales,
    )
    return result


@_fake("paged_attention")
def _(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    query_offsets: Tensor,
    scale: float,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    _check_devices(
        "paged_attention",
        q.device,
        k_pool=k_pool,
        v_pool=v_pool,
        page_table=page_table,
        seq_lens=seq_lens,
        query_offsets=query_offsets,
        k_scales=k_scales,
        v_scales=v_scales,
    )
    return q.new_empty(q.shape)


def shared_prefix_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    query_offsets: Tensor,
    group_offsets: Tensor,
    prefix_lens: Tensor,
    scale: float,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """`paged_attention` of sequences of which neighbours begin with the same tokens: equal bits.

    On CUDA the keys of a shared prefix, in whole chunks of 512, are read once for all rows of its
    group instead of once for each sequence; the results are merged in the order that
    `paged_attention` has. With a sliding window, and on the CPU, nothing is saved.

    Args:
        q: as in `paged_attention`, like all arguments that are not explained here.
        k_pool: as in `paged_attention`.
        v_pool: as in `paged_attention`.
        page_table: as in `paged_attention`; the sequences of a group have the same pages for the
            tokens that they share.
        seq_lens: as in `paged_attention`.
        query_offsets: as in `paged_attention`.
        group_offsets: int32[G + 1], contiguous, ascending from 0 to S - sequences of group j are
            [group_offsets[j], group_offsets[j + 1]).
        prefix_lens: int32[G], contiguous - tokens that all sequences of the group begin with, at
            least 0 and at most the KV length of each of them.
        scale: as in `paged_attention`.
        sliding_window: as in `paged_attention`.
        soft_cap: as in `paged_attention`.
        k_scales: as in `paged_attention`.
        v_scales: as in `paged_attention`.

    Returns:
        [N, H, D] in the dtype of q.
    """
    result: Tensor = _ops.shared_prefix_attention.default(
        q,
        k_pool,
        v_pool,
        page_table,
        seq_lens,
        query_offsets,
        group_offsets,
        prefix_lens,
        scale,
        sliding_window,
        soft_cap,
        k_scales,
        v_scales,
    )
    return result


@_fake("shared_prefix_attention")
def _(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    query_offsets: Tensor,
    group_offsets: Tensor,
    prefix_lens: Tensor,
    scale: float,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    _check_devices(
        "shared_prefix_attention",
        q.device,
        k_pool=k_pool,
        v_pool=v_pool,
        page_table=page_table,
        seq_lens=seq_lens,
        query_offsets=query_offsets,
        group_offsets=group_offsets,
        prefix_lens=prefix_lens,
        k_scales=k_scales,
        v_scales=v_scales,
    )
    return q.new_empty(q.shape)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """Root-mean-square norm of the last dimension: x / sqrt(mean(x^2) + eps) * weight.

    With a residual, x is added to it first, rounded once to its dtype, and the sum is what is
    normalised: `residual += x; return rms_norm(residual, weight, eps)` in one pass. It is the one
    op that writes an argument and returns a result.

    Args:
        x: float32[..., E] (CUDA: also float16, bfloat16), E contiguous, the leading dimensions
            folding into at most two strides - so the heads of a fused projection are read in place.
        weight: float32[E], contiguous.
        eps: a number >= 0 that float32 can hold.
        residual: dtype and shape of x, contiguous, memory of its own, or None - written in place.

    Returns:
        Dtype and shape of x, contiguous.
    """
    result: Tensor = _ops.rms_norm.default(x, weight, eps, residual)
    return result


@_fake("rms_norm")
def _(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    _check_devices("rms_norm", x.device, weight=weight, residual=residual)
    return x.new_empty(x.shape)


def rope_append_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    slots: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Rotary embedding and append in one pass: rotates q in place, writes rotated k and v.

    The rotated pairs are (i, i + D/2). k itself is left as it is.

    Args:
        q: float32[N, H, D] (CUDA: also float16, bfloat16), D contiguous - rotated in place; may be
            a view of a fused [N, (H + 2 * Hk) * D] projection, as may k and v.
        k: dtype of q [N, Hk, D], D contiguous - new keys.
        v: dtype of q [N, Hk, D], D contiguous - new values.
        positions: int32[N], contiguous - absolute positions in [0, max_pos).
        cos_sin: float32[max_pos, D], contiguous - D/2 cosines, then D/2 sines.
        slots: int64[N], contiguous - where each row goes, -1 = nothing is written for the row.
        k_pool: float32|float16|bfloat16|int8 [P, Hk, B, D], contiguous - written in place, see
            append_kv.
        v_pool: dtype and shape of k_pool, contiguous, memory of its own - written in place.
        k_scales: float32[P, Hk, B], contiguous, for pools of int8, else None - written in place.
        v_scales: as k_scales, of the values, memory of its own - written in place.
    """
    _ops.rope_append_kv.default(
        q, k, v, positions, cos_sin, slots, k_pool, v_pool, k_scales, v_scales
    )


@_fake("rope_append_kv")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    slots: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    _check_devices(
        "rope_append_kv",
        k_pool.device,
        q=q,
        k=k,
        v=v,
        positions=positions,
        cos_sin=cos_sin,
        slots=slots,
        v_pool=v_pool,
        k_scales=k_scales,
        v_scales=v_scales,
    )


def silu_mul(gate_up: Tensor) -> Tensor:
    """Gate of a feed-forward layer: silu(first F) * last F, silu(x) = x / (1 + e^-x).

    Args:
        gate_up: float32[N, 2F] (CUDA: also float16, bfloat16), last dimension contiguous.

    Returns:
        [N, F] in the dtype of gate_up.
    """
    result: Tensor = _ops.silu_mul.default(gate_up)
    return result


@_fake("silu_mul")
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


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
    """Linear layer with a weight packed in panels of 16 output columns (see quantize.py).

    The dtype of the weight tells its format. Every output element is summed over k in ascending
    order, then bias and residual are added, so a row has the same bits for any number of rows.
    Fused with its neighbours it gives the bits of `rms_norm` before it and `silu_mul` after it.

    Args:
        x: float32[N, K], K contiguous; K is a multiple of 32 unless the weight is float32.
        weight: float32[Np, K, 16] | int8[Np, K, 16] | uint8[Np, K/2, 16] with two 4-bit values a
            byte; contiguous, Np = ceil(out_features / 16).
        scales: float32[Np, K/32, 16], contiguous; None for a float32 weight.
        minimums: float32[Np, K/32, 16], contiguous, for a uint8 weight; else None.
        bias: float32[out_features], contiguous, or None.
        out_features: columns of the product; a multiple of 32 with `silu_mul`.
        residual: float32[N, out_features], contiguous, or None - added to the result; None with
            `silu_mul`.
        norm_weight: float32[K], contiguous, or None - then x is normalised first, as by
            `rms_norm(x, norm_weight, norm_eps)`.
        norm_eps: a number >= 0 that float32 can hold.
        silu_mul: return silu(gate) * up, where the panels of the weight are by turns 16 columns
            of the gate and the 16 columns of up that go with them.

    Returns:
        float32[N, out_features], with `silu_mul` float32[N, out_features / 2].
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


@_fake("quantized_linear")
def _(
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
    _check_devices(
        "quantized_linear",
        x.device,
        weight=weight,
        scales=scales,
        minimums=minimums,
        bias=bias,
        residual=residual,
        norm_weight=norm_weight,
    )
    return x.new_empty(x.shape[0], out_features // 2 if silu_mul else out_features)


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
    lower id comes first. So k = 1 is `argmax` of the result of `quantized_linear`, in bits.

    Args:
        x: as in `quantized_linear`, like all arguments but k.
        weight: packed in panels.
        scales: of the weight.
        minimums: of the weight.
        bias: float32[out_features], contiguous, or None.
        out_features: columns of the product.
        k: a number from 1 to 64, at most out_features.
        norm_weight: float32[K], contiguous, or None.
        norm_eps: a number >= 0 that float32 can hold.

    Returns:
        ids: int64[N, k], largest output first.
        values: float32[N, k], the outputs at those ids.
    """
    result: tuple[Tensor, Tensor] = _ops.linear_top_k.default(
        x, weight, scales, minimums, bias, out_features, k, norm_weight, norm_eps
    )
    return result


@_fake("linear_top_k")
def _(
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
    _check_devices(
        "linear_top_k",
        x.device,
        weight=weight,
        scales=scales,
        minimums=minimums,
        bias=bias,
        norm_weight=norm_weight,
    )
    return x.new_empty(x.shape[0], k, dtype=torch.int64), x.new_empty(x.shape[0], k)


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
    called one by one; memory for activations is taken once for all layers. CPU only: elsewhere
    compose the ops.

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


@_fake("decoder_layers")
def _(
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
    _check_devices(
        "decoder_layers",
        x.device,
        positions=positions,
        cos_sin=cos_sin,
        slots=slots,
        page_table=page_table,
        seq_lens=seq_lens,
        query_offsets=query_offsets,
        logit_rows=logit_rows,
        k_pools=k_pools,
        v_pools=v_pools,
        output=output,
        k_scales=k_scales,
        v_scales=v_scales,
        **{f"weights[{i}]": weight for i, weight in enumerate(weights)},
    )


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy choice: the largest logit of each row, of equals the one with the lowest id.

    Args:
        logits: float32[R, V] (CUDA: also float16, bfloat16), V contiguous, V >= 1.

    Returns:
        ids: int64[R].
        values: float32[R], the logits at those ids; NaN where the row has a NaN, and then the id
            of its first one.
    """
    result: tuple[Tensor, Tensor] = _ops.argmax.default(logits)
    return result


@_fake("argmax")
def _(logits: Tensor) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    ids = logits.new_empty(rows, dtype=torch.int64)
    return ids, logits.new_empty(rows, dtype=torch.float32)


def sample(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperatures: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> tuple[Tensor, Tensor]:
    """Draws a token from each row of logits; the number drawn with belongs to (seed, position).

    Weights are integers, floor(2^32 e^((logit - largest) / temperature)), so no sum depends on an
    order: a row gives the same token in any batch, on any number of threads, on every instruction
    set and device. Of a row the top_k largest logits stay (of equals the lowest ids); of these the
    fewest, largest first, whose weights reach top_p of their sum; of these the tokens with at
    least min_p of the largest weight. The token is the first in the order of ids at which the sum
    of the weights left exceeds u times all of them, where u in [0, 1) is the first number of
    Philox4x64-10 with the key (seed, position), cut to 53 bits. Tokens less than e^-22.2 as likely
    as the likeliest are never drawn.

    On CUDA values out of range are not refused but replaced by the nearest valid one, a temperature
    that is no number > 0 by 0, NaN elsewhere by what keeps all tokens.

    Args:
        logits: float32|float16|bfloat16[R, V], V contiguous, V >= 1; -inf is never drawn.
        seeds: int64[R], contiguous - read as 64 bits without a sign.
        positions: int64[R], contiguous, >= 0 - of the tokens to draw.
        temperatures: float32[R], contiguous, finite, >= 0; 0 takes the largest logit, of equals the
            lowest id, as `argmax` does.
        top_k: int32[R], contiguous, >= 0; 0 keeps all tokens.
        top_p: float32[R], contiguous, from 0 to 1; 1 keeps all tokens, 0 the likeliest.
        min_p: float32[R], contiguous, from 0 to 1; 0 keeps all tokens.

    Returns:
        ids: int64[R], in [0, V).
        values: float32[R], the largest logit of each row, NaN if it has a NaN; where it is not
            finite there is nothing to draw from and the id means nothing.
    """
    result: tuple[Tensor, Tensor] = _ops.sample.default(
        logits, seeds, positions, temperatures, top_k, top_p, min_p
    )
    return result


@_fake("sample")
def _(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperatures: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> tuple[Tensor, Tensor]:
    _check_devices(
        "sample",
        logits.device,
        seeds=seeds,
        positions=positions,
        temperatures=temperatures,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )
    rows = logits.shape[0]
    ids = logits.new_empty(rows, dtype=torch.int64)
    return ids, logits.new_empty(rows, dtype=torch.float32)


def ngram_lookup(
    tokens: Tensor,
    offsets: Tensor,
    min_n: int,
    max_n: int,
    max_draft: int,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Prompt lookup: proposes what followed the last earlier occurrence of each text's ending.

    Of the suffixes of min_n to max_n tokens that occur earlier too, the longest is taken, and of
    its earlier occurrences the most recent. The draft is the text behind it. If the occurrence
    overlaps the suffix, the text is periodic and the draft goes on periodically; else it stops
    where the text ends. NgramIndex.propose follows the same rule.

    Args:
        tokens: int32|int64[T], contiguous - the texts of all sequences, ids in [0, 2^31).
        offsets: int32[S + 1], contiguous, ascending from 0 to T - text of sequence s is
            [offsets[s], offsets[s + 1]).
        min_n: shortest suffix that counts, >= 1.
        max_n: longest suffix looked for, >= min_n.
        max_draft: tokens proposed at most, from 0 to (2^31 - 1) / S.
        lengths: int32[S], contiguous, or None - then only the first lengths[s] of these tokens are
            the text of s; the others are never read.

    Returns:
        draft_ids: int32[S, max_draft], padded with -1.
        num_draft: int32[S].
    """
    result: tuple[Tensor, Tensor] = _ops.ngram_lookup.default(
        tokens, offsets, min_n, max_n, max_draft, lengths
    )
    return result


@_fake("ngram_lookup")
def _(
    tokens: Tensor,
    offsets: Tensor,
    min_n: int,
    max_n: int,
    max_draft: int,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _check_devices("ngram_lookup", tokens.device, offsets=offsets, lengths=lengths)
    num_sequences = offsets.shape[0] - 1
    return (
        tokens.new_empty(num_sequences, max_draft, dtype=torch.int32),
        tokens.new_empty(num_sequences, dtype=torch.int32),
    )


def verify_draft(
    draft_ids: Tensor, target_ids: Tensor, draft_offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Greedy check of drafts against the tokens the model chose at the same places.

    Args:
        draft_ids: int32|int64[sum of k_s], contiguous - k_s drafted tokens of each sequence s.
        target_ids: dtype of draft_ids [sum of (k_s + 1)], contiguous - the model's choices; those
            of sequence s start at draft_offsets[s] + s.
        draft_offsets: int32[S + 1], contiguous, ascending from 0 - draft of sequence s is
            [draft_offsets[s], draft_offsets[s + 1]).

    Returns:
        num_accepted: int32[S] - length of the longest agreeing run.
        bonus_ids: dtype of draft_ids [S] - the model's choice after that run.
    """
    result: tuple[Tensor, Tensor] = _ops.verify_draft.default(draft_ids, target_ids, draft_offsets)
    return result


@_fake("verify_draft")
def _(draft_ids: Tensor, target_ids: Tensor, draft_offsets: Tensor) -> tuple[Tensor, Tensor]:
    _check_devices(
        "verify_draft", draft_ids.device, target_ids=target_ids, draft_offsets=draft_offsets
    )
    num_sequences = draft_offsets.shape[0] - 1
    return (
        draft_ids.new_empty(num_sequences, dtype=torch.int32),
        draft_ids.new_empty(num_sequences),
    )


class FilledRows(NamedTuple):
    """What `fill_rows` returns: a batch of N = S * (K + 1) rows, the last of them maybe padding.

    Attributes:
        token_ids: int64[N], rows of the sequences one behind the other, then padding of 0.
        positions: int32[N], absolute positions, padding of 0.
        slots: int64[N], where K and V of each row go, padding of -1.
        seq_lens: int32[S], KV length of each sequence with its new rows; 0 if it has none.
        query_offsets: int32[S + 1], rows of the sequences; the padding is behind the last.
        row_sequences: int64[N], sequence of each row, padding of 0.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    seq_lens: Tensor
    query_offsets: Tensor
    row_sequences: Tensor


def fill_rows(
    history: Tensor,
    lengths: Tensor,
    num_left: Tensor,
    kv_limits: Tensor,
    draft_ids: Tensor,
    num_draft: Tensor,
    page_table: Tensor,
    page_size: int,
) -> FilledRows:
    """The rows of the next step of sequences whose tokens are on the device.

    Sequence s has no rows if num_left[s] <= 0, or if there is no room for its pending token,
    lengths[s] > kv_limits[s]. Else it feeds its pending token and behind it as much of its draft
    as there is room for and as the reply may still get, less one: the last token of a reply is
    never a drafted one. How many rows are padding is known on the device only.

    Args:
        history: int32[S, L], contiguous - tokens; of the first lengths[s] the last is pending, it
            has no KV yet.
        lengths: int32[S], contiguous, in [1, L] where num_left[s] > 0.
        num_left: int32[S], contiguous - tokens the reply may still get; <= 0: it does not run.
        kv_limits: int32[S], contiguous, at most M * page_size - tokens whose KV there is room for.
        draft_ids: int32[S, K], contiguous - proposed tokens.
        num_draft: int32[S], contiguous, in [0, K] - how many of them there are.
        page_table: int32[S, M], contiguous - page ids in order.
        page_size: tokens a page holds, from 1 to 2^31 - 1.

    Returns:
        Tensors of sizes that depend on S and K alone. On CUDA S is at most 1024.
    """
    return FilledRows(
        *_ops.fill_rows.default(
            history, lengths, num_left, kv_limits, draft_ids, num_draft, page_table, page_size
        )
    )


@_fake("fill_rows")
def _(
    history: Tensor,
    lengths: Tensor,
    num_left: Tensor,
    kv_limits: Tensor,
    draft_ids: Tensor,
    num_draft: Tensor,
    page_table: Tensor,
    page_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_devices(
        "fill_rows",
        history.device,
        lengths=lengths,
        num_left=num_left,
        kv_limits=kv_limits,
        draft_ids=draft_ids,
        num_draft=num_draft,
        page_table=page_table,
    )
    num_sequences = history.shape[0]
    num_rows = num_sequences * (draft_ids.shape[1] + 1)
    return (
        history.new_empty(num_rows, dtype=torch.int64),
        history.new_empty(num_rows),
        history.new_empty(num_rows, dtype=torch.int64),
        history.new_empty(num_sequences),
        history.new_empty(num_sequences + 1),
        history.new_empty(num_rows, dtype=torch.int64),
    )


def advance_sequences(
    token_ids: Tensor,
    target_ids: Tensor,
    target_values: Tensor,
    query_offsets: Tensor,
    stop_ids: Tensor,
    history: Tensor,
    lengths: Tensor,
    num_left: Tensor,
    counts: Tensor,
) -> None:
    """The end of a step that began with `fill_rows`: accepts what agrees and appends it.

    Of each sequence the model's choices are appended row by row, until one is not what the next
    row fed, is a stop token, is the last one the reply may get, or cannot be used since the row's
    largest logit is not finite (that one is not appended). A sequence without rows stays as it is.

    Args:
        token_ids: int64[N], contiguous - what each row fed.
        target_ids: int64[N], contiguous, ids in [0, 2^31) - the model's choice after each row.
        target_values: float32[N], contiguous - the largest logit of each row.
        query_offsets: int32[S + 1], contiguous, ascending from 0 to at most N - rows of the
            sequences.
        stop_ids: int32[S, E], contiguous, padded with -1 - tokens that end a reply.
        history: int32[S, L], contiguous - written in place behind the first lengths[s] tokens.
        lengths: int32[S], contiguous, room for the new tokens below L - grows in place.
        num_left: int32[S], contiguous, at least 1 of a sequence with rows - counts down in place;
            becomes 0 with a stop token, -1 where a largest logit was not finite.
        counts: int32[S, 3], contiguous - steps, drafted tokens and accepted ones are added;
            they stay at 2^31 - 1.
    """
    _ops.advance_sequences.default(
        token_ids,
        target_ids,
        target_values,
        query_offsets,
        stop_ids,
        history,
        lengths,
        num_left,
        counts,
    )


@_fake("advance_sequences")
def _(
    token_ids: Tensor,
    target_ids: Tensor,
    target_values: Tensor,
    query_offsets: Tensor,
    stop_ids: Tensor,
    history: Tensor,
    lengths: Tensor,
    num_left: Tensor,
    counts: Tensor,
) -> None:
    _check_devices(
        "advance_sequences",
        token_ids.device,
        target_ids=target_ids,
        target_values=target_values,
        query_offsets=query_offsets,
        stop_ids=stop_ids,
        history=history,
        lengths=lengths,
        num_left=num_left,
        counts=counts,
    )
