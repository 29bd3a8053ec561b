"""The default model against `transformers` in fp32 on weights dequantised from the same file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import gguf
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stateful_kv.models.files.loading import LoadedModel, load_model, resolve
from tests.models import tiny
from tests.models.prompts import PROMPTS
from tests.models.ties import TIE, Tie, check_ties


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("smollm2")


@pytest.fixture(scope="module")
def reference() -> Iterator[Any]:
    """Built with nothing of ours: reader, dequantiser and row order are done here again."""
    reader = gguf.GGUFReader(resolve("smollm2"))
    tensors = {
        t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy())
        for t in reader.tensors
    }
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        eos_token_id=2,
        bos_token_id=1,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
    state = {}
    for name in model.state_dict():
        source = "model.embed_tokens.weight" if name == "lm_head.weight" else name
        weight = tensors[names.get_name(source, try_suffixes=(".weight",))]
        if "q_proj" in name or "k_proj" in name:
            heads = 9 if "q_proj" in name else 3
            weight = weight.reshape(heads, 32, 2, 576).transpose(1, 2).reshape(weight.shape)
        state[name] = weight
    model.load_state_dict(state)
    yield model


def prompt_tokens(loaded: LoadedModel, prompt: str) -> list[int]:
    return loaded.tokenizer.render_start([{"role": "user", "content": prompt}]).tolist()


@torch.no_grad()
def greedy_ours(loaded: LoadedModel, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """Greedy replies of this length, all prompts in one ragged batch."""
    pages = (max(map(len, prompts)) + num_tokens) // 16 + 1
    cache = tiny.plain_cache(loaded.config, len(prompts) * pages)
    replies: list[list[int]] = [[] for _ in prompts]
    new, past = list(prompts), [0] * len(prompts)
    for _ in range(num_tokens):
        logits = loaded.model.forward(tiny.plain_batch(cache, new, past, all_rows=False), cache)
        past = [p + len(n) for p, n in zip(past, new, strict=True)]
        new = [[token] for token in logits.argmax(dim=1).tolist()]
        for reply, (token,) in zip(replies, new, strict=True):
            reply.append(token)
    return replies


@torch.no_grad()
def greedy_theirs(reference: Any, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """`generate` with its cache, past the end of the turn, in one left-padded batch."""
    width = max(map(len, prompts))
    ids = torch.tensor([[2] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    reference.generation_config.eos_token_id = None
    output = reference.generate(
        ids, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False, use_cache=True
    )
    replies: list[list[int]] = output[:, width:].tolist()
    return replies


def test_load_time() -> None:
    seconds = []
    for _ in range(2):
        began = time.monotonic()
        load_model("smollm2")
        seconds.append(time.monotonic() - began)
        if seconds[-1] < 5.0:
            break
    # The best of two: the page cache may be cold, and others may use the machine.
    assert min(seconds) < 5.0, seconds


def test_logits(loaded: LoadedModel, reference: Any) -> None:
    for prompt in (PROMPTS[0], PROMPTS[14], PROMPTS[1] * 12):
        tokens = prompt_tokens(loaded, prompt)
        with torch.no_grad():
            want = reference(torch.tensor([tokens])).logits[0]
        cache = tiny.plain_cache(loaded.config, num_pages=len(tokens) // 16 + 1)
        got = loaded.model.forward(tiny.plain_batch(cache, [tokens], [0]), cache)
        difference = (got - want).abs().max().item()
        print(
            f"{len(tokens)} tokens: logits differ by {difference:.2e} at most, "
            f"of {want.abs().max().item():.1f}"
        )
        assert difference < 1e-3


def check_greedy(loaded: LoadedModel, reference: Any, prompts: list[str], num_tokens: int) -> None:
    """Equal tokens for each of the first prompts, except from a known tie on."""
    starts = [prompt_tokens(loaded, prompt) for prompt in prompts]
    began = time.monotonic()
    ours = greedy_ours(loaded, starts, num_tokens)
    between = time.monotonic()
    theirs = greedy_theirs(reference, starts, num_tokens)
    print(f"ours {between - began:.0f} s, transformers {time.monotonic() - between:.0f} s")
    wrong, ties = [], []
    for index, (start, mine, other) in enumerate(zip(starts, ours, theirs, strict=True)):
        assert len(mine) == len(other) == num_tokens
        differing = [i for i in range(num_tokens) if mine[i] != other[i]]
        if not differing:
            assert loaded.tokenizer.decode(mine) == loaded.tokenizer.decode(other)
            continue
        at = differing[0]
        with torch.no_grad():
            logits = reference(torch.tensor([start + other[:at]])).logits[0, -1]
        best = logits.topk(2)
        gap = (best.values[0] - best.values[1]).item()
        is_tie = gap < TIE and {mine[at], other[at]} == set(best.indices.tolist())
        (ties if is_tie else wrong).append(Tie(index, at, gap))
    assert not wrong
    check_ties(ties)


def test_greedy_text_of_some_prompts(loaded: LoadedModel, reference: Any) -> None:
    check_greedy(loaded, reference, PROMPTS[:4], 40)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_greedy_text(loaded: LoadedModel, reference: Any) -> None:
    check_greedy(loaded, reference, PROMPTS, 200)
