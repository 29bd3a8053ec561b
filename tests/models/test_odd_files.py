"""Files with odd values in every place: loading gives a model or one of our exceptions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stateful_kv.errors import InvalidRequestError, ModelLoadError, ModelNotFoundError
from stateful_kv.models.files import gguf_model, gguf_tokenizer, hf_folder
from stateful_kv.models.files.gguf_file import GGUFFile
from stateful_kv.models.files.loading import load_model
from stateful_kv.models.files.weights import check_config
from stateful_kv.text.tokenizer import ChatTokenizer
from tests.models import tiny
from tests.models.test_small_models import save_model, write_gguf

MESSAGES = [{"role": "user", "content": "a <|im_end|> b\ue0005\ue001"}]
# JSON text, so that it can say what no Python value can.
ODD = {
    "null": "null",
    "list": "[1, null, {}]",
    "empty list": "[]",
    "object": '{"a": [1], "content": null, "name": [], "type": {}}',
    "empty object": "{}",
    "empty text": '""',
    "text": '"odd"',
    "lone surrogate": '"\\ud800"',
    "NUL": '"\\u0000"',
    "zero": "0",
    "negative": "-1",
    "large": str(2**63),
    "larger than a float": "1" + "0" * 4000,
    "infinity": "1e400",
    "nan": "NaN",
    "fraction": "0.5",
    "tiny": "5e-324",
    "true": "true",
    "deep": "[" * 900 + "]" * 900,
    "too deep": '{"a":' * 100_000 + "1" + "}" * 100_000,
}
MARK = "@@the odd value@@"


def places(value: Any) -> Iterator[tuple[str, ...]]:
    """Paths to all values of a JSON object; of long lists and objects only the first ones."""
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in list(items)[: 40 if isinstance(value, dict) else 2]:
            yield (key,)
            if not isinstance(item, dict) or len(item) < 40:
                yield from ((key, *rest) for rest in places(item))


def put(value: Any, path: tuple[Any, ...]) -> Any:
    """A copy with the mark in one place."""
    if not path:
        return MARK
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = put(copy[path[0]], path[1:])
    return copy


def variants(good: dict[str, Any], *missing: str) -> list[str]:
    """The JSON object with the mark in each place, also behind keys that are missing in it."""
    full = {**{key: None for key in missing}, **good}
    return [MARK, *(json.dumps(put(full, path)) for path in places(full))]


def try_tokenizer(tokenizer: ChatTokenizer) -> None:
    """Uses it: what the file says must not come out later either."""
    with suppress(InvalidRequestError):
        tokenizer.decode(tokenizer.encode("Hello <|im_end|> 日本"))
    for tools in (None, [{"name": "f"}]):
        with suppress(InvalidRequestError):
            tokenizer.render_start(MESSAGES, tools)
        with suppress(InvalidRequestError):
            tokenizer.render_delta(MESSAGES, 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("model")
    reference = save_model("llama", folder)
    write_gguf(folder / "model.gguf", reference, "llama")
    return folder, folder / "model.gguf"


@pytest.fixture
def folder(model: tuple[Path, Path], tmp_path: Path) -> Path:
    for path in model[0].iterdir():
        if path.suffix in (".json", ".safetensors"):
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


def replace(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    path.write_text(text)


CONFIG_KEYS = (
    "rope_scaling",
    "partial_rotary_factor",
    "sliding_window",
    "layer_types",
    "use_sliding_window",
    "quantization_config",
    "head_dim",
)
ROPES = (
    {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 8, "partial_rotary_factor": 1, "rope_theta": 1e4},
    {"type": "linear", "factor": 2.0},
)


@pytest.mark.parametrize("case", ODD)
def test_config(case: str, folder: Path) -> None:
    path = folder / "config.json"
    good = json.loads(path.read_text())
    ropes = [{**good, "rope_parameters": rope} for rope in ROPES]
    window = {**good, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}
    for text in {text for raw in (good, *ropes, window) for text in variants(raw, *CONFIG_KEYS)}:
        replace(path, text.replace(f'"{MARK}"', ODD[case]).replace(MARK, ODD[case]))
        with suppress(ModelLoadError):
            check_config(hf_folder.read_config(folder), "here")
        with suppress(ModelLoadError):
            try_tokenizer(hf_folder.read_tokenizer(folder))


@pytest.mark.parametrize("case", ODD)
def test_whole_models(case: str, folder: Path) -> None:
    path = folder / "config.json"
    for text in variants(json.loads(path.read_text())):
        replace(path, text.replace(f'"{MARK}"', ODD[case]).replace(MARK, ODD[case]))
        with suppress(ModelLoadError, ModelNotFoundError):
            load_model(folder, "fp32")


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
def test_tokenizer(name: str, case: str, folder: Path) -> None:
    path = folder / name
    good = json.loads(path.read_text())
    named = {"chat_template": [{"name": "default", "template": tiny.CHATML}]}
    named["eos_token"] = {"content": "<|im_end|>"}
    raws = [good, {**good, **named}] if name == "tokenizer_config.json" else [good]
    for text in {text for raw in raws for text in variants(raw, "eos_token_id")}:
        replace(path, text.replace(f'"{MARK}"', ODD[case]).replace(MARK, ODD[case]))
        with suppress(ModelLoadError):
            try_tokenizer(hf_folder.read_tokenizer(folder))


@pytest.mark.parametrize("case", ODD)
def test_index_of_shards(case: str, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    path = folder / "model.safetensors.index.json"
    good = {"metadata": {"total_size": 1}, "weight_map": {"a": "a.safetensors", "b": "b"}}
    for text in variants(good):
        replace(path, text.replace(f'"{MARK}"', ODD[case]).replace(MARK, ODD[case]))
        with suppress(ModelLoadError):
            hf_folder.HFSource(folder)


@pytest.mark.parametrize("case", ODD)
def test_safetensors_header(case: str, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.unlink()
    good = {"__metadata__": {"a": "b"}}
    good["a"] = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}  # type: ignore[dict-item]
    for text in variants(good):
        text = text.replace(f'"{MARK}"', ODD[case]).replace(MARK, ODD[case])
        header = text.encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
        with suppress(ModelLoadError):
            hf_folder.HFSource(folder).dense("a", (2,))


@pytest.mark.parametrize(
    "kind", ["BOOL", "I64", "F64", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F4", "F6_E2M3", "C64", "F16"]
)
def test_kinds_of_safetensors(kind: str, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.unlink()
    for num_bytes in (1, 2, 4, 8, 16, 64):
        entry = {"dtype": kind, "shape": [2], "data_offsets": [0, num_bytes]}
        header = json.dumps({"model.norm.weight": entry}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(num_bytes))
        with suppress(ModelLoadError):
            hf_folder.HFSource(folder).dense("norm", (2,))


METADATA: list[Any] = [
    None,
    "",
    "odd",
    "{{ '\ud800' }}",
    0,
    -1,
    2**63,
    True,
    0.5,
    float("inf"),
    float("nan"),
    [],
    ["a", "b"],
    [""] * 400,
    ["a b"] * 400,
    ["é " * 300] * 400,
    [np.zeros(2, np.int32), np.zeros(0, np.int32)],
    [[[]]],
    np.zeros(0, np.uint8),
    np.array([True, False]),
    *(np.zeros(400, kind) for kind in ("u1", "i8", "f4", "f8", "?")),
    np.full(400, np.nan, np.float32),
    np.full(400, 3, np.int32),
    np.full(400, 2**64 - 1, np.uint64),
]
MORE_KEYS = (
    "general.alignment",
    "llama.rope.freq_base",
    "llama.rope.scaling.type",
    "llama.rope.scaling.factor",
    "llama.expert_count",
    "llama.attention.sliding_window",
    "tokenizer.ggml.add_space_prefix",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.scores",
)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_gguf_metadata(kind: str, model: tuple[Path, Path]) -> None:
    file = GGUFFile(model[1])
    file.metadata["tokenizer.ggml.model"] = kind
    if kind == "llama":
        num_tokens = len(file.metadata["tokenizer.ggml.tokens"])
        file.metadata["tokenizer.ggml.scores"] = np.zeros(num_tokens, np.float32)
    file.metadata["llama.rope.scaling.type"] = "linear"
    good = dict(file.metadata)
    check_config(gguf_model.read_config(file), "here")
    try_tokenizer(gguf_tokenizer.read_tokenizer(file))
    for key in {*good, *MORE_KEYS}:
        for value in METADATA:
            file.metadata = {**good, key: value}
            with suppress(ModelLoadError):
                check_config(gguf_model.read_config(file), "here")
            with suppress(ModelLoadError):
                try_tokenizer(gguf_tokenizer.read_tokenizer(file))


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "a\ud800b", "x" * 100_000, None, 5, []])
def test_odd_names(name: Any) -> None:
    with pytest.raises(ModelNotFoundError):
        load_model(name)
