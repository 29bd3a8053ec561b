"""Random models of each family: our forward pass against `transformers` in fp32."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from stateful_kv.errors import ModelLoadError
from stateful_kv.models.files.loading import LoadedModel, load_model
from tests.models import tiny

VOCAB = 416
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "linear-rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "mistral": ("Mistral", {"sliding_window": 24}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 64}),
}


def save_model(case: str, folder: Path, **save_options: Any) -> Any:
    """Writes a random model as a Hugging Face folder and returns transformers' own."""
    family, settings = CASES[case]
    config = getattr(transformers, f"{family}Config")(**{**COMMON, **settings})
    # Qwen2 derives its head size, whatever is said about it.
    if family == "Qwen2":
        config.hidden_size = 128
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    model.save_pretrained(folder, **save_options)
    tiny.save_tokenizer(folder, tiny.train_byte_level())
    return model


def logits_in_steps(loaded: LoadedModel, tokens: list[int], steps: list[int]) -> torch.Tensor:
    """Logits of all rows, the tokens fed in pieces of these sizes."""
    cache = tiny.plain_cache(loaded.config, num_pages=40)
    rows, start = [], 0
    for size in [*steps, len(tokens) - sum(steps)]:
        batch = tiny.plain_batch(cache, [tokens[start : start + size]], [start])
        rows.append(loaded.model.forward(batch, cache))
        start += size
    return torch.cat(rows)


def compare(loaded: LoadedModel, reference: Any) -> None:
    tokens = torch.randint(0, VOCAB, (150,)).tolist()
    with torch.no_grad():
        want = reference(torch.tensor([tokens])).logits[0]
    got = logits_in_steps(loaded, tokens, [])
    assert got.shape == want.shape and got.dtype == torch.float32
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
    # The same bits, whatever is computed together.
    for steps in ([149], [1, 70, 7, 1, 1], [16] * 9):
        assert torch.equal(logits_in_steps(loaded, tokens, steps), got)


@pytest.mark.parametrize("weight_format", ["fp32", "dense"])
@pytest.mark.parametrize("case", CASES)
def test_hf_folder_logits(case: str, weight_format: str, tmp_path: Path) -> None:
    reference = save_model(case, tmp_path)
    compare(load_model(tmp_path, weight_format), reference)


def test_sharded_bfloat16(tmp_path: Path) -> None:
    saved = save_model("qwen3", tmp_path / "whole").bfloat16()
    saved.save_pretrained(tmp_path, max_shard_size="100KB")
    reference = type(saved).from_pretrained(tmp_path, dtype=torch.float32).eval()
    tiny.save_tokenizer(tmp_path, tiny.train_byte_level())
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    compare(load_model(tmp_path, "fp32"), reference)
    compare(load_model(tmp_path, "dense"), reference)


@pytest.mark.parametrize(("weight_format", "tolerance"), [("auto", 0.05), ("int4", 0.8)])
def test_rounded_weights_stay_near(weight_format: str, tolerance: float, tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    exact, rounded = load_model(tmp_path, "fp32"), load_model(tmp_path, weight_format)
    tokens = torch.randint(0, VOCAB, (40,)).tolist()
    want, got = (logits_in_steps(m, tokens, []) for m in (exact, rounded))
    assert 0 < (want - got).std() < tolerance * want.std()
    assert rounded.fingerprint != exact.fingerprint
    assert rounded.fingerprint == load_model(tmp_path, weight_format).fingerprint


def test_only_wanted_rows_are_computed(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    loaded = load_model(tmp_path)
    tokens = [torch.randint(0, VOCAB, (n,)).tolist() for n in (5, 1, 33)]
    outputs = []
    for all_rows in (True, False):
        cache = tiny.plain_cache(loaded.config, num_pages=30)
        batch = tiny.plain_batch(cache, tokens, [0, 0, 0], all_rows)
        outputs.append(loaded.model.forward(batch, cache))
    assert outputs[1].shape == (3, VOCAB)
    assert torch.equal(outputs[1], outputs[0][[4, 5, 38]])
    alone = logits_in_steps(loaded, tokens[2], [])
    assert torch.equal(outputs[0][6:], alone)


@pytest.mark.parametrize("token", [-1, VOCAB, 2**31 - 1])
def test_token_outside_the_vocabulary(token: int, tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    loaded = load_model(tmp_path)
    cache = tiny.plain_cache(loaded.config, num_pages=4)
    with pytest.raises(IndexError):
        loaded.model.forward(tiny.plain_batch(cache, [[1, token]], [0]), cache)


def interleave(w: torch.Tensor, heads: int) -> torch.Tensor:
    """The row order llama.cpp's converter gives q and k."""
    return w.reshape(heads, 2, -1, *w.shape[1:]).transpose(1, 2).reshape(w.shape)


def write_gguf(path: Path, reference: Any, case: str, drop: tuple[str, ...] = ()) -> None:
    """Writes a transformers model as llama.cpp's converter would, weights as F32 and Q8_0."""
    config, architecture = reference.config, case if case.startswith("qwen") else "llama"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if case != "qwen2":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_dimension_count(config.head_dim)
    tiny.add_tokenizer_to_gguf(writer, tiny.train_byte_level(), "gpt-2")
    kind = getattr(gguf.MODEL_ARCH, architecture.upper())
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, w in reference.state_dict().items():
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target in drop or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        part = name.split(".")[-2]
        w = interleave(w, heads[part]) if part in heads and architecture == "llama" else w
        writer.add_tensor(target, w.numpy())
    if case == "llama3-rope":
        factors = reference.model.rotary_emb.inv_freq
        plain = 1 / 500000.0 ** (torch.arange(0, 32, 2) / 32)
        writer.add_rope_freq_base(500000.0)
        writer.add_tensor("rope_freqs.weight", (plain / factors).float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


GGUF_CASES = ["llama", "llama-tied", "llama-biases", "llama3-rope", "qwen2", "qwen3"]


@pytest.mark.parametrize("case", GGUF_CASES)
def test_gguf_logits(case: str, tmp_path: Path) -> None:
    reference = save_model(case, tmp_path)
    write_gguf(tmp_path / "model.gguf", reference, case)
    loaded = load_model(tmp_path / "model.gguf", "fp32")
    assert loaded.config.tie_word_embeddings == reference.config.tie_word_embeddings
    compare(loaded, reference)
    compare(load_model(tmp_path / "model.gguf", "dense"), reference)
    assert np.array_equal(
        loaded.tokenizer.render_start([{"role": "user", "content": "x"}]),
        load_model(tmp_path).tokenizer.render_start([{"role": "user", "content": "x"}]),
    )


def drop_tensor(path: Path, name: str) -> None:
    """Rewrites a safetensors file without one tensor."""
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})


HF_NEEDED = [
    ("qwen2", "self_attn.q_proj.bias"),
    ("qwen2", "self_attn.k_proj.bias"),
    ("qwen2", "self_attn.v_proj.bias"),
    ("llama-biases", "self_attn.k_proj.bias"),
    ("qwen3", "self_attn.q_norm.weight"),
    ("qwen3", "self_attn.k_norm.weight"),
]


@pytest.mark.parametrize(("case", "part"), HF_NEEDED)
def test_hf_folder_without_a_part_of_the_family(case: str, part: str, tmp_path: Path) -> None:
    save_model(case, tmp_path)
    name = f"model.layers.1.{part}"
    drop_tensor(tmp_path / "model.safetensors", name)
    with pytest.raises(ModelLoadError, match=f"'{re.escape(name)}' is missing"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("case", "changes", "flag"),
    [
        ("llama-biases", {"attention_bias": False}, "attention_bias"),
        ("qwen3", {"model_type": "mistral"}, "qk_norm"),
    ],
)
def test_hf_folder_with_tensors_its_config_denies(
    case: str, changes: dict[str, Any], flag: str, tmp_path: Path
) -> None:
    save_model(case, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ModelLoadError, match=f"'layers.0.*the config says {flag} = false"):
        load_model(tmp_path)


GGUF_NEEDED = [
    ("qwen2", ("attn_q.bias", "attn_k.bias", "attn_v.bias")),
    ("qwen3", ("attn_q_norm.weight", "attn_k_norm.weight")),
    ("llama-biases", ("attn_q.bias", "attn_k.bias", "attn_v.bias")),
]


@pytest.mark.parametrize(("case", "parts"), GGUF_NEEDED)
def test_gguf_without_a_part_of_the_family(
    case: str, parts: tuple[str, ...], tmp_path: Path
) -> None:
    reference = save_model(case, tmp_path)
    path = tmp_path / "model.gguf"
    for part in parts:
        # In layer 0 too: the file is no less a Qwen for lacking the tensors one looks at first.
        for name in (f"blk.0.{part}", f"blk.2.{part}"):
            write_gguf(path, reference, case, drop=(name,))
            with pytest.raises(ModelLoadError, match=f"'{re.escape(name)}' is missing"):
                load_model(path)
    if case != "llama-biases":
        write_gguf(path, reference, case, tuple(f"blk.{n}.{p}" for n in range(3) for p in parts))
        with pytest.raises(ModelLoadError, match=f"'{re.escape('blk.0.' + parts[0])}' is missing"):
            load_model(path)
