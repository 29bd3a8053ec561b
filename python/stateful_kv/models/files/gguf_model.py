"""A model in a GGUF file: its config from the metadata, its tensors under our names."""

from __future__ import annotations

import re

import numpy as np
from torch import Tensor

from stateful_kv.errors import ModelLoadError, shown
from stateful_kv.models.config import ModelConfig, RopeScaling
from stateful_kv.models.files import gguf_blocks
from stateful_kv.models.files.fields import Fields
from stateful_kv.models.files.gguf_blocks import Blocks
from stateful_kv.models.files.gguf_file import GGUFFile, GGUFTensor
from stateful_kv.models.files.weights import pack_float, require_finite, require_shape
from stateful_kv.models.packing import PackedWeight

# Architectures whose q and k rows were reordered for interleaved rotary when the file was made.
_INTERLEAVED = ("llama", "mistral")
_ARCHITECTURES = (*_INTERLEAVED, "qwen2", "qwen3")
_NAMES = {
    "embedding": "token_embd",
    "norm": "output_norm",
    "head": "output",
    "rope_factors": "rope_freqs",
    "attn_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
_QKV_BIASES = ("attn_q.bias", "attn_k.bias", "attn_v.bias")
_QK_NORMS = ("attn_q_norm.weight", "attn_k_norm.weight")
_LAYER_NAME = re.compile(r"layers\.(\d+)\.(.*)")


def read_config(file: GGUFFile) -> ModelConfig:
    """Builds the config.

    Raises:
        ModelLoadError: a missing or impossible value, or an architecture that is not supported.
    """
    where = str(file.path)
    architecture = Fields(file.metadata, where).text("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise ModelLoadError(
            f"{where}: architecture {shown(architecture)} is not supported "
            f"({', '.join(_ARCHITECTURES)} are)"
        )
    fields = Fields(file.metadata, where, f"{architecture}.")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelLoadError(f"{file.path}: tensor 'token_embd.weight' is missing")
    hidden, heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    head_dim = fields.integer("attention.key_length", hidden // heads if heads > 0 else 0)
    if fields.integer("attention.value_length", head_dim) != head_dim:
        raise fields.unsupported("attention.value_length", "values as wide as keys")
    if fields.integer("rope.dimension_count", head_dim) != head_dim:
        raise fields.unsupported("rope.dimension_count", "rotary over the whole head")
    if fields.integer("expert_count", 0):
        raise fields.unsupported("expert_count", "no mixture of experts")
    try:
        return ModelConfig(
            vocab_size=embedding.shape[0],
            hidden_size=hidden,
            intermediate_size=fields.integer("feed_forward_length"),
            num_layers=fields.integer("block_count"),
            num_heads=heads,
            num_kv_heads=fields.integer("attention.head_count_kv", heads),
            head_dim=head_dim,
            rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
            rope_theta=fields.number("rope.freq_base", 10000.0),
            rope_scaling=_rope_scaling(fields),
            max_position=fields.integer("context_length"),
            tie_word_embeddings="output.weight" not in file.tensors,
            attention_bias=architecture == "qwen2" or _any_layer_has(file, _QKV_BIASES),
            qk_norm=architecture == "qwen3" or _any_layer_has(file, _QK_NORMS),
            sliding_window=fields.integer("attention.sliding_window", 0) or None,
            architecture=architecture,
        )
    except ValueError as error:
        raise ModelLoadError(f"{file.path}: {error}") from error


class GGUFSource:
    """Tensors of a GGUF file under our names (see `WeightSource`)."""

    def __init__(self, file: GGUFFile, config: ModelConfig) -> None:
        """Keeps both; nothing is read yet."""
        self._file = file
        self._config = config

    def has(self, name: str) -> bool:
        """True if the file holds this tensor."""
        return _file_name(name) in self._file.tensors

    def dense(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Returns it as float32."""
        tensor = self._find(name, shape)
        values = self._to_float(tensor, self._rows(name, tensor))
        require_finite(tensor.name, str(self._file.path), values)
        return values.reshape(shape)

    def packed(self, name: str, shape: tuple[int, int], weight_format: str) -> PackedWeight:
        """Returns it packed, exactly where block type and `weight_format` allow it."""
        tensor = self._find(name, shape)
        rows = self._rows(name, tensor)
        exact = None if weight_format == "fp32" else gguf_blocks.to_packed(rows, tensor.kind)
        if exact is not None and weight_format in ("auto", exact.format):
            result = exact
        else:
            result = pack_float(self._to_float(tensor, rows), weight_format)
        plain = result.weight if result.format == "fp32" else None
        require_finite(tensor.name, str(self._file.path), result.scales, result.minimums, plain)
        return result

    def _find(self, name: str, shape: tuple[int, ...]) -> GGUFTensor:
        file_name = _file_name(name)
        tensor = self._file.tensors.get(file_name)
        if tensor is None:
            raise ModelLoadError(f"{self._file.path}: tensor {file_name!r} is missing")
        require_shape(file_name, str(self._file.path), tensor.shape, shape)
        return tensor

    def _rows(self, name: str, tensor: GGUFTensor) -> Blocks:
        """Rows of blocks, q and k of each head back in half-split order."""
        rows = self._file.rows(tensor.name)
        part = name.removesuffix(".bias").rpartition(".")[2]
        if part not in ("q", "k") or self._config.architecture not in _INTERLEAVED:
            return rows
        heads = self._config.num_heads if part == "q" else self._config.num_kv_heads
        if len(tensor.shape) == 1:
            rows = rows.reshape(tensor.shape[0], -1)
        pairs = rows.reshape(heads, self._config.head_dim // 2, 2, -1)
        return np.ascontiguousarray(pairs.transpose(0, 2, 1, 3)).reshape(rows.shape)

    def _to_float(self, tensor: GGUFTensor, rows: Blocks) -> Tensor:
        try:
            return gguf_blocks.to_float(rows, tensor.kind)
        except (NotImplementedError, ValueError) as error:
            where = f"{self._file.path}: tensor {tensor.name!r} of type {tensor.kind.name}"
            raise ModelLoadError(f"{where}: {error}") from error


def _any_layer_has(file: GGUFFile, names: tuple[str, ...]) -> bool:
    """True if a layer has one of them; GGUF metadata does not say it."""
    return any(name.split(".", 2)[-1] in names for name in file.tensors)


def _rope_scaling(fields: Fields) -> RopeScaling | None:
    """Linear scaling; the Llama 3 rule comes as a tensor of factors instead."""
    kind = fields.text("rope.scaling.type")
    if kind is None or kind == "none":
        return None
    if kind != "linear":
        raise fields.unsupported("rope.scaling.type", "none or linear")
    return RopeScaling("linear", fields.number("rope.scaling.factor", 1.0))


def _file_name(name: str) -> str:
    """Our name -> the one in the file."""
    prefix, match = "", _LAYER_NAME.fullmatch(name)
    if match:
        prefix, name = f"blk.{match[1]}.", match[2]
    if name.endswith(".bias"):
        return f"{prefix}{_NAMES[name.removesuffix('.bias')]}.bias"
    return f"{prefix}{_NAMES[name]}.weight"
