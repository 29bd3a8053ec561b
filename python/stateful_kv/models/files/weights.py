"""From named tensors of any file format to the weights of a model.

A file format supplies a `WeightSource`: our names, checked shapes, rows of heads in the half-split
order of our rotary op. What is fused, tied, rounded or left as it is in the file is decided here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from stateful_kv.errors import ModelLoadError
from stateful_kv.models import packing
from stateful_kv.models.config import ModelConfig
from stateful_kv.models.llama import LayerWeights, LlamaWeights, Projection
from stateful_kv.models.packed import Linear
from stateful_kv.models.packing import PackedWeight
from stateful_kv.models.rope import cos_sin_table, inverse_frequencies
from stateful_kv.system.memory import HugePageArena

WEIGHT_FORMATS = ("auto", "int8", "int4", "fp32", "dense")
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


class WeightBuilder(Protocol):
    """Makes the weights of a model in one form: packed, or dense on a device."""

    def values(self, tensor: Tensor) -> Tensor:
        """Takes float32 values that stay what they are: norms, the rotary table."""

    def embedding(self, name: str, shape: tuple[int, int]) -> Tensor:
        """Reads the embedding: [V, E] in the dtype of the activations."""

    def linear(
        self,
        parts: Sequence[tuple[str, int]],
        in_features: int,
        biases: Sequence[Tensor | None],
        *,
        has_silu_mul: bool = False,
    ) -> Projection:
        """Reads projections of one input and makes one of them.

        Args:
            parts: name and outputs of each, in this order; with `has_silu_mul` gate and up.
            in_features: their input.
            biases: float32[outputs] or None for each part.
            has_silu_mul: the result is silu(gate) * up.
        """

    def head(self, name: str, embedding: Tensor) -> Projection:
        """Reads the head, E -> V, which may be the embedding again."""


def build_weights(
    source: WeightSource, config: ModelConfig, builder: WeightBuilder
) -> LlamaWeights:
    """Reads all weights of a model.

    Args:
        source: where the tensors come from.
        config: already checked by `check_config`.
        builder: reads from the same source and says what becomes of them.

    Raises:
        ModelLoadError: a tensor is missing, has another shape, holds NaN or infinity, or is there
            although the config says that the model has none.
    """
    embedding = builder.embedding("embedding", (config.vocab_size, config.hidden_size))
    layers = tuple(
        _build_layer(source, config, f"layers.{index}.", builder)
        for index in range(config.num_layers)
    )
    inverse = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    if source.has("rope_factors"):
        factors = source.dense("rope_factors", (config.head_dim // 2,)).numpy()
        if not (factors > 0).all():
            raise ModelLoadError("rope_factors: expected numbers > 0")
        inverse = (inverse / factors).astype(np.float32)
    return LlamaWeights(
        embedding=embedding,
        layers=layers,
        norm=builder.values(source.dense("norm", (config.hidden_size,))),
        head=builder.head("embedding" if config.tie_word_embeddings else "head", embedding),
        cos_sin=builder.values(cos_sin_table(inverse, config.max_position)),
    )


class PackedBuilder:
    """Packs the weights for our own kernels, in memory in the order in which a step reads them."""

    def __init__(self, source: WeightSource, weight_format: str) -> None:
        """Keeps both.

        Args:
            source: where the tensors come from.
            weight_format: "auto" keeps the blocks of the file and rounds F16, BF16 and F32 to
                int8; "int8", "int4" and "fp32" convert everything.
        """
        self._source = source
        self._format = weight_format
        self._arena = HugePageArena()

    def values(self, tensor: Tensor) -> Tensor:
        """Keeps them as they are."""
        return tensor

    def embedding(self, name: str, shape: tuple[int, int]) -> Tensor:
        """Reads it as float32."""
        return self._source.dense(name, shape)

    def linear(
        self,
        parts: Sequence[tuple[str, int]],
        in_features: int,
        biases: Sequence[Tensor | None],
        *,
        has_silu_mul: bool = False,
    ) -> Linear:
        """Reads and fuses projections of one input."""
        weights = [
            self._source.packed(name, (width, in_features), self._format) for name, width in parts
        ]
        if has_silu_mul:
            gate, up = weights
            return Linear.gate_up(gate, up, biases).placed_in(self._arena)
        return Linear.fuse(weights, biases).placed_in(self._arena)

    def head(self, name: str, embedding: Tensor) -> Linear:
        """Reads the head; packed it is no longer the embedding."""
        vocab_size, hidden = embedding.shape
        bias = f"{name}.bias"
        biases = [self._source.dense(bias, (vocab_size,)) if self._source.has(bias) else None]
        return self.linear([(name, vocab_size)], hidden, biases)


def pack_float(w: Tensor, weight_format: str) -> PackedWeight:
    """Packs float32[out, K]; K that is not a multiple of 32 stays fp32."""
    if weight_format == "fp32" or w.shape[1] % packing.GROUP:
        return packing.pack_fp32(w)
    if weight_format == "int4":
        return packing.pack_int4(*packing.quantize_int4(w))
    return packing.pack_int8(*packing.quantize_int8(w))


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
    source: WeightSource, config: ModelConfig, prefix: str, builder: WeightBuilder
) -> LayerWeights:
    hidden, inner = config.hidden_size, config.intermediate_size
    q_width = config.num_heads * config.head_dim
    kv_width = config.num_kv_heads * config.head_dim
    qkv = [(prefix + "q", q_width), (prefix + "k", kv_width), (prefix + "v", kv_width)]
    qkv_biases = [
        _dense_iff(config.attention_bias, "attention_bias", source, f"{name}.bias", width)
        for name, width in qkv
    ]

    def linear(
        names: Sequence[str], out_features: int, in_features: int, has_silu_mul: bool = False
    ) -> Projection:
        parts = [(prefix + name, out_features) for name in names]
        biases = [
            source.dense(f"{name}.bias", (width,)) if source.has(f"{name}.bias") else None
            for name, width in parts
        ]
        return builder.linear(parts, in_features, biases, has_silu_mul=has_silu_mul)

    def norm(name: str) -> Tensor:
        return builder.values(source.dense(prefix + name, (hidden,)))

    def head_norm(name: str) -> Tensor | None:
        found = _dense_iff(config.qk_norm, "qk_norm", source, prefix + name, config.head_dim)
        return None if found is None else builder.values(found)

    return LayerWeights(
        attn_norm=norm("attn_norm"),
        qkv=builder.linear(qkv, hidden, qkv_biases),
        o=linear(["o"], hidden, q_width),
        ffn_norm=norm("ffn_norm"),
        gate_up=linear(["gate", "up"], inner, hidden, has_silu_mul=True),
        down=linear(["down"], hidden, inner),
        q_norm=head_norm("q_norm"),
        k_norm=head_norm("k_norm"),
    )


def _dense_iff(
    wanted: bool, flag: str, source: WeightSource, name: str, width: int
) -> Tensor | None:
    """Reads float32[width] if the config wants it; ModelLoadError if file and config disagree."""
    if wanted:
        return source.dense(name, (width,))
    # Ignoring the tensor would change every logit, and nobody would be told.
    if source.has(name):
        raise ModelLoadError(f"tensor {name!r} is there, but the config says {flag} = false")
    return None
