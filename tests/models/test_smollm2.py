"""The default model against `transformers` in fp32 on weights dequantised from the same file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import gguf
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stateful_kv.models.loading import LoadedModel, load_model, resolve
from tests.models import tiny
from tests.models.prompts import PROMPTS

NEW_TOKENS = 200
# Where transformers' own best two logits are closer than this, either choice is right.
TIE = 1e-3


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
def greedy_ours(loaded: LoadedModel, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy replies, all prompts in one ragged batch; a reply ends at <|im_end|>."""
    pages = max(map(len, prompts)) + NEW_TOKENS
    cache = tiny.plain_cache(loaded.config, len(prompts) * (pages // 16 + 1))
    replies: list[list[int]] = [[] for _ in prompts]
    new, past = list(prompts), [0] * len(prompts)
    for _ in range(NEW_TOKENS):
        logits = loaded.model.forward(tiny.plain_batch(cache, new, past, all_rows=False), cache)
        past = [p + len(n) for p, n in zip(past, new, strict=True)]
        new = [[token] for token in logits.argmax(dim=1).tolist()]
        for reply, (token,) in zip(replies, new, strict=True):
            if not reply or reply[-1] != 2:
                reply.append(token)
    return replies


@torch.no_grad()
def greedy_theirs(reference: Any, prompts: list[list[int]]) -> list[list[int]]:
    """`generate` with its cache, all prompts in one left-padded batch."""
    width = max(map(len, prompts))
    ids = torch.tensor([[2] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    output = reference.generate(
        ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True
    )
    replies = output[:, width:].tolist()
    return [r[: r.index(2) + 1] if 2 in r else r for r in replies]


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


@pytest.mark.timeout(900)
def test_greedy_text(loaded: LoadedModel, reference: Any) -> None:
    prompts = [prompt_tokens(loaded, prompt) for prompt in PROMPTS]
    started = time.monotonic()
    ours = greedy_ours(loaded, prompts)
    between = time.monotonic()
    theirs = greedy_theirs(reference, prompts)
    print(
        f"ours {between - started:.0f} s, transformers {time.monotonic() - between:.0f} s, "
        f"{sum(map(len, ours))} tokens"
    )
    wrong = []
    for prompt, tokens, mine, other in zip(PROMPTS, prompts, ours, theirs, strict=True):
        if mine == other:
            assert loaded.tokenizer.decode(mine) == loaded.tokenizer.decode(other)
            continue
        at = next(i for i, pair in enumerate(zip(mine, other, strict=False)) if pair[0] != pair[1])
        with torch.no_grad():
            logits = reference(torch.tensor([tokens + other[:at]])).logits[0, -1]
        best = logits.topk(2)
        gap = (best.values[0] - best.values[1]).item()
        tie = gap < TIE and {mine[at], other[at]} == set(best.indices.tolist())
        print(f"{'tie' if tie else 'WRONG'} at token {at} of {prompt[:40]!r}: gap {gap:.1e}")
        if not tie:
            wrong.append(prompt)
    assert not wrong
