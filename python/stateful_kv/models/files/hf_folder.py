"""A model in a Hugging Face folder: config.json, safetensors shards, tokenizer files."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stateful_kv._extras import needs
from stateful_kv.errors import ModelLoadError, shown
from stateful_kv.models.config import ModelConfig, RopeScaling
from stateful_kv.models.files.fields import Fields
from stateful_kv.models.files.weights import pack_float, require_finite, require_shape
from stateful_kv.models.packing import PackedWeight
from stateful_kv.text.template import ChatTemplate
from stateful_kv.text.tokenizer import ChatTokenizer

with needs("engine", "the engine"):
    from safetensors import safe_open
    from tokenizers import Tokenizer

_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
_MAX_JSON_BYTES = 1 << 28
_FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_NAMES = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def read_config(folder: Path) -> ModelConfig:
    """Builds the config from config.json.

    Raises:
        ModelLoadError: a missing or impossible value, or a model that is not supported.
    """
    path = folder / "config.json"
    fields = Fields(_read_object(path), str(path))
    kind = fields.text("model_type")
    if kind not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise ModelLoadError(f"{path}: model_type {shown(kind)} is not supported ({known} are)")
    if fields.get("quantization_config") is not None:
        raise ModelLoadError(f"{path}: quantization_config is not supported; use GGUF")
    if fields.get("hidden_act") not in (None, "silu"):
        raise fields.unsupported("hidden_act", "'silu'")
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    try:
        theta, scaling = _rope(fields)
        return ModelConfig(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=fields.integer("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=fields.integer("num_key_value_heads", heads),
            head_dim=fields.integer("head_dim", hidden // heads if heads > 0 else 0),
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position=fields.integer("max_position_embeddings", 2048),
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            attention_bias=fields.flag("attention_bias") or kind == "qwen2",
            qk_norm=kind == "qwen3",
            sliding_window=_sliding_window(fields, kind),
            architecture=kind,
        )
    except ValueError as error:
        raise ModelLoadError(f"{path}: {error}") from error


def read_tokenizer(folder: Path) -> ChatTokenizer:
    """Builds the tokenizer and chat template from the folder's files.

    Raises:
        ModelLoadError: a file is missing, cut or not supported.
    """
    path = folder / "tokenizer.json"
    text = _read_text(path)
    config = folder / "tokenizer_config.json"
    settings = Fields(_read_object(config, missing_ok=True), str(config))
    source = _template_source(folder, settings)
    bos, eos = (_token_text(settings, key) for key in ("bos_token", "eos_token"))
    ends = _end_ids(folder)
    with _library_errors(path):
        tokenizer = Tokenizer.from_str(text)
        template = None if source is None else ChatTemplate(source, bos, eos)
        eos_id = tokenizer.token_to_id(eos)
        return ChatTokenizer(tokenizer, template, ends if eos_id is None else ends | {eos_id})


class HFSource:
    """Tensors of a folder's safetensors files under our names (see `WeightSource`)."""

    def __init__(self, folder: Path) -> None:
        """Opens every shard; the headers are checked by `safetensors`.

        Raises:
            ModelLoadError: no weights, a shard that is missing or cut, or a name outside.
        """
        self._folder = folder
        self._shard_of: dict[str, Any] = {}
        self.files = _shard_files(folder)
        for path in self.files:
            with _library_errors(path):
                shard = safe_open(path, framework="pt")
                names = _tensor_names(shard)
            for name in names:
                if name in self._shard_of:
                    raise ModelLoadError(f"{path}: tensor {name!r} is in two shards")
                self._shard_of[name] = shard

    def has(self, name: str) -> bool:
        """True if a shard holds this tensor."""
        return _file_name(name) in self._shard_of

    def dense(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Returns it as float32."""
        file_name = _file_name(name)
        where = str(self._folder)
        shard = self._shard_of.get(file_name)
        if shard is None:
            raise ModelLoadError(f"{where}: tensor {file_name!r} is missing")
        with _library_errors(f"{where}: tensor {file_name!r}"):
            require_shape(file_name, where, tuple(shard.get_slice(file_name).get_shape()), shape)
            tensor: Tensor = shard.get_tensor(file_name)
        if tensor.dtype not in _FLOAT_DTYPES:
            raise ModelLoadError(
                f"{where}: tensor {file_name!r}: expected float32, float16 or bfloat16, "
                f"got {tensor.dtype}"
            )
        # A copy: float32 tensors would otherwise stay views of the mapped file.
        values = tensor.to(torch.float32, copy=True)
        require_finite(file_name, where, values)
        return values

    def packed(self, name: str, shape: tuple[int, int], weight_format: str) -> PackedWeight:
        """Returns it packed."""
        return pack_float(self.dense(name, shape), weight_format)


def _rope(fields: Fields) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from the old (rope_theta, rope_scaling) or new (rope_parameters) keys."""
    rules = fields.child("rope_parameters") or fields.child("rope_scaling")
    theta = fields.number("rope_theta", 10000.0)
    if fields.get("partial_rotary_factor") not in (None, 1):
        raise fields.unsupported("partial_rotary_factor", "1")
    if rules is None:
        return theta, None
    if rules.get("partial_rotary_factor") not in (None, 1):
        raise rules.unsupported("partial_rotary_factor", "1")
    theta = rules.number("rope_theta", theta)
    kind = rules.text("rope_type") or rules.text("type") or "default"
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", rules.number("factor"))
    if kind != "llama3":
        raise ModelLoadError(
            f"{rules.where}: rope type {shown(kind)} is not supported (default, linear, llama3)"
        )
    original = rules.integer("original_max_position_embeddings", 0)
    return theta, RopeScaling(
        "llama3",
        rules.number("factor"),
        rules.number("low_freq_factor"),
        rules.number("high_freq_factor"),
        original if original else fields.integer("max_position_embeddings"),
    )


def _sliding_window(fields: Fields, kind: str) -> int | None:
    """The window if all layers have it; a mix of layers is refused."""
    if kind in ("qwen2", "qwen3") and not fields.flag("use_sliding_window"):
        return None
    window = fields.integer("sliding_window", 0)
    types = fields.get("layer_types") or []
    if not isinstance(types, list) or not all(isinstance(name, str) for name in types):
        raise fields.unsupported("layer_types", "a list of names")
    if kind in ("qwen2", "qwen3") and not types and fields.integer("max_window_layers", 0) > 0:
        types = ["full_attention", "sliding_attention"]
    if window and len(set(types)) > 1:
        raise ModelLoadError(f"{fields.where}: layers with different windows are not supported")
    return window if window and set(types) != {"full_attention"} else None


def _template_source(folder: Path, settings: Fields) -> str | None:
    """Template text: a file of its own, or the (default) entry of tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if _exists(path):
        return _read_text(path)
    source = settings.get("chat_template")
    if not isinstance(source, list):
        return settings.text("chat_template")
    for entry in source:
        if not isinstance(entry, dict):
            raise settings.unsupported("chat_template", "text or a list of named templates")
        if entry.get("name") == "default":
            return Fields(entry, settings.where).text("template")
    return None


def _end_ids(folder: Path) -> set[int]:
    """End-of-reply ids of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        fields = Fields(_read_object(path, missing_ok=True), str(path))
        value = fields.get("eos_token_id")
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in values):
            raise fields.unsupported("eos_token_id", "a token id or a list of token ids")
        if values:
            return set(values)
    return set()


def _token_text(settings: Fields, key: str) -> str:
    """A special token is text, or an object with its text as content."""
    value = settings.get(key)
    if isinstance(value, dict):
        value = Fields(value, f"{settings.where}: {key}").text("content")
    if value is None:
        return ""
    if not isinstance(value, str):
        raise settings.unsupported(key, "text or an object with text as content")
    return value


def _shard_files(folder: Path) -> list[Path]:
    """Safetensors files of the folder, all of them plain names inside it."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if _exists(single):
        return [_regular(single)]
    weight_map = _read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{index}: weight_map: expected an object that is not empty")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or "\\" in name:
            raise ModelLoadError(f"{index}: {shown(name)} is not a file name of this folder")
    return [_regular(folder / name) for name in sorted(set(weight_map.values()))]


@contextmanager
def _library_errors(where: object) -> Iterator[None]:
    """What libraries raise for a file they refuse becomes a ModelLoadError.

    `tokenizers` raises plain Exception, `safetensors` also what torch says to its tensors.
    """
    try:
        yield
    except ModelLoadError:
        raise
    except Exception as error:
        raise ModelLoadError(f"{where}: {error}") from error


def _tensor_names(shard: Any) -> list[str]:
    """Names of the tensors in a shard."""
    return list(shard.keys())


def _regular(path: Path) -> Path:
    """The path itself; ModelLoadError unless a regular file is there."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path}: cannot be read: {error}") from error
    if not stat.S_ISREG(mode):
        raise ModelLoadError(f"{path}: not a regular file")
    return path


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:  # a folder that may not be searched, for example
        raise ModelLoadError(f"{path}: cannot be read: {error}") from error


def _read_text(path: Path) -> str:
    if _regular(path).stat().st_size > _MAX_JSON_BYTES:
        raise ModelLoadError(f"{path}: larger than {_MAX_JSON_BYTES} bytes")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"{path}: cannot be read: {error}") from error


def _read_object(path: Path, missing_ok: bool = False) -> dict[str, Any]:
    """Reads a JSON object."""
    if missing_ok and not _exists(path):
        return {}
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path}: bad JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path}: expected a JSON object")
    return value


def _file_name(name: str) -> str:
    """Our name -> the one in the file."""
    prefix, _, last = name.removesuffix(".bias").rpartition(".")
    suffix = "bias" if name.endswith(".bias") else "weight"
    middle = f"model.{prefix}." if prefix else ""
    # "rope_factors" exists in GGUF files only; here it names nothing.
    return f"{middle}{_NAMES.get(last, last)}.{suffix}"
