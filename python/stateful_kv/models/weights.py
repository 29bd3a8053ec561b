"""From named tensors of any file format to the weights of a model.

A file format supplies a `WeightSource`: our names, checked shapes, rows of heads in the half-split
order of our rotary op. What is fused, tied, rounded or left as it is in the file is decided here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from stateful_kv import quantize
from stateful_kv.config import ModelConfig
from stateful_kv.errors import ModelLoadError
from stateful_kv.host_memory import HugePageArena
from stateful_kv.models.llama import LayerWeights, Linear, LlamaWeights
from stateful_kv.models.rope import cos_sin_table, inverse_frequencies
from stateful_kv.quantize import PackedWeight

WEIGHT_FORMATS = ("auto", "int8", "int4", "fp32")
MAX_LAYERS = 1024
MAX_ROTARY_BYTES = 1 << 29  # half a million positions at the largest head_dim
MIN_HEAD_DIM, MAX_HEAD_DIM, HEAD_DIM_STEP = 32, 256, 16


class WeightSource(Protocol):
    """Tensors of one model file or folder under our names.

    Names are "embedding", "norm", "head", "rope_factors" and, below "layers.N.", "attn_norm",
    "ffn_norm", "q_norm", "k_norm", "q", "k", "v", "o", "gate", "up", "down"; a bias has ".bias"
    appended.
    """

    def has(self, name: str) -> bool:
        """True if the file holds this tensor."""

    def dense(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Returns it as float32; ModelLoadError if missing or of another shape."""

    def packed(self, name: str, shape: tuple[int, int], weight_format: str) -> PackedWeight:
        """Returns it packed; ModelLoadError if missing or of another shape."""


def check_config(config: ModelConfig, where: str) -> None:
    """ModelLoadError if the kernels or sane sizes do not allow this model; allocates nothing."""
    max_position = MAX_ROTARY_BYTES // (4 * config.head_dim)
    checks = (
        ("num_layers", config.num_layers <= MAX_LAYERS, f"at most {MAX_LAYERS}"),
        (
            "head_dim",
            MIN_HEAD_DIM <= config.head_dim <= MAX_HEAD_DIM
            and config.head_dim % HEAD_DIM_STEP == 0,
            f"a multiple of {HEAD_DIM_STEP} from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}",
        ),
        (
            "max_position",
            config.max_position <= max_position,
            f"at most {max_position} at head_dim {config.head_dim} "
            f"(a rotary table of {MAX_ROTARY_BYTES >> 20} MiB)",
        ),
    )
    for field, good, want in checks:
        if not good:
            raise ModelLoadError(f"{where}: {field}: expected {want}, got {getattr(config, field)}")


def build_weights(source: WeightSource, config: ModelConfig, weight_format: str) -> LlamaWeights:
    """Reads all weights of a model.

    Args:
        source: where the tensors come from.
        config: already checked by `check_config`.
        weight_format: "auto" keeps the blocks of the file and rounds F16, BF16 and F32 to int8;
            "int8", "int4" and "fp32" convert everything.

    Raises:
        ModelLoadError: a tensor is missing, has another shape, holds NaN or infinity, or is there
            although the config says that the model has none.
    """
    vocab_shape = (config.vocab_size, config.hidden_size)
    embedding = source.dense("embedding", vocab_shape)
    arena = HugePageArena()
    layers = tuple(
        _build_layer(source, config, f"layers.{index}.", weight_format).placed_in(arena)
        for index in range(config.num_layers)
    )
    head_name = "embedding" if config.tie_word_embeddings else "head"
    inverse = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    if source.has("rope_factors"):
        factors = source.dense("rope_factors", (config.head_dim // 2,)).numpy()
        if not (factors > 0).all():
            raise ModelLoadError("rope_factors: expected numbers > 0")
        inverse = (inverse / factors).astype(np.float32)
    return LlamaWeights(
        embedding=embedding,
        layers=layers,
        norm=source.dense("norm", (config.hidden_size,)),
        head=_linear(
            source, "", [(head_name, config.vocab_size)], config.hidden_size, weight_format
        ).placed_in(arena),
        cos_sin=cos_sin_table(inverse, config.max_position),
    )


def pack_float(w: Tensor, weight_format: str) -> PackedWeight:
    """Packs float32[out, K]; K that is not a multiple of 32 stays fp32."""
    if weight_format == "fp32" or w.shape[1] % quantize.GROUP:
        return quantize.pack_fp32(w)
    if weight_format == "int4":
        return quantize.pack_int4(*quantize.quantize_int4(w))
    return quantize.pack_int8(*quantize.quantize_int8(w))


def require_finite(name: str, where: str, *tensors: Tensor | None) -> None:
    """ModelLoadError if a tensor holds NaN or infinity."""
    for tensor in tensors:
        if tensor is not None and not np.isfinite(tensor.numpy()).all():
            raise ModelLoadError(f"{where}: tensor {name!r} holds NaN or infinity")


def require_shape(name: str, where: str, got: tuple[int, ...], want: tuple[int, ...]) -> None:
    """ModelLoadError unless the shapes agree."""
    if tuple(got) != tuple(want):
        raise ModelLoadError(
            f"{where}: tensor {name!r}: expected shape {list(want)}, got {list(got)}"
        )


def _build_layer(
    source: WeightSource, config: ModelConfig, prefix: str, weight_format: str
) -> LayerWeights:
    hidden, inner = config.hidden_size, config.intermediate_size
    q_width = config.num_heads * config.head_dim
    kv_width = config.num_kv_heads * config.head_dim

    def linear(parts: Sequence[tuple[str, int]], in_features: int) -> Linear:
        return _linear(source, prefix, parts, in_features, weight_format)

    def head_norm(name: str) -> Tensor | None:
        return _dense_iff(config.qk_norm, "qk_norm", source, prefix + name, config.head_dim)

    qkv = (("q", q_width), ("k", kv_width), ("v", kv_width))
    gated = (("gate", inner), ("up", inner))
    gate, up = _packed(source, prefix, gated, hidden, weight_format)
    qkv_biases = [
        _dense_iff(config.attention_bias, "attention_bias", source, f"{prefix}{name}.bias", width)
        for name, width in qkv
    ]
    return LayerWeights(
        attn_norm=source.dense(prefix + "attn_norm", (hidden,)),
        qkv=_linear(source, prefix, qkv, hidden, weight_format, qkv_biases),
        o=linear([("o", hidden)], q_width),
        ffn_norm=source.dense(prefix + "ffn_norm", (hidden,)),
        gate_up=Linear.gate_up(gate, up, _biases_of(source, prefix, gated)),
        down=linear([("down", hidden)], inner),
        q_norm=head_norm("q_norm"),
        k_norm=head_norm("k_norm"),
    )


def _linear(
    source: WeightSource,
    prefix: str,
    parts: Sequence[tuple[str, int]],
    in_features: int,
    weight_format: str,
    biases: Sequence[Tensor | None] | None = None,
) -> Linear:
    """Reads and fuses projections of one input; `biases` None takes those the file has."""
    weights = _packed(source, prefix, parts, in_features, weight_format)
    return Linear.fuse(weights, _biases_of(source, prefix, parts) if biases is None else biases)


def _packed(
    source: WeightSource,
    prefix: str,
    parts: Sequence[tuple[str, int]],
    in_features: int,
    weight_format: str,
) -> list[PackedWeight]:
    return [
        source.packed(prefix + name, (width, in_features), weight_format) for name, width in parts
    ]


def _biases_of(
    source: WeightSource, prefix: str, parts: Sequence[tuple[str, int]]
) -> list[Tensor | None]:
    """The biases that the file has."""
    return [
        source.dense(f"{prefix}{name}.bias", (width,))
        if source.has(f"{prefix}{name}.bias")
        else None
        for name, width in parts
    ]


def _dense_iff(
    wanted: bool, flag: str, source: WeightSource, name: str, width: int
) -> Tensor | None:
    """Reads float32[width] if the config wants it; ModelLoadError if file and config disagree."""
    if wanted:
        return source.dense(name, (width,))
    # Left out, it would change every logit without a word.
    if source.has(name):
        raise ModelLoadError(f"tensor {name!r} is there, but the config says {flag} = false")
    return None
