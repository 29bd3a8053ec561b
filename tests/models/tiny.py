"""Small models and tokenizers made on the spot, and a bare way to run a model without an engine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from stateful_kv.kv.batch import Batch
from stateful_kv.models.config import ModelConfig

CHATML = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog 1234567 times, it's said.",
    "def read_file(path):\n    return open(path).read()\n\nprint(read_file('a.txt'))",
    "Grüße aus München, naïve café, 日本語のテキスト, emoji 🙂🚀 and tabs\t\there.",
    "user assistant system tool {'name': 'list_files', 'arguments': {}} 42 + 58 = 100",
] * 4
TEXTS = [
    "",
    " ",
    "Hello world",
    "  leading and trailing  ",
    "it's 12345 o'clock, isn't it?\n\n\n  indented\tTabbed",
    "naïve café \u2013 日本語 🙂🚀‍🚀 \u0301 combining, Ⅳ ½ ٣",
    "x" * 300,
    "\x00 nul and \x7f",
    "A<|im|>B < |im_start| > </s>",
]


def train_byte_level(
    pre: Any = None, vocab_size: int = 400, ignore_merges: bool = False
) -> Tokenizer:
    """Trains a byte-level BPE with ChatML specials."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(s, special=True, normalized=False) for s in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def save_tokenizer(folder: Path, tokenizer: Tokenizer, template: str | None = CHATML) -> None:
    """Writes tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "bos_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def add_tokenizer_to_gguf(writer: gguf.GGUFWriter, tokenizer: Tokenizer, pre: str) -> None:
    """Puts a byte-level tokenizer into GGUF metadata as llama.cpp's converter does."""
    data = json.loads(tokenizer.to_str())
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special = {t["content"] for t in data["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in data["model"]["merges"]])
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_chat_template(CHATML)


@dataclass
class PlainCache:
    """Pools only: pages in order, one after another for each sequence."""

    k: torch.Tensor
    v: torch.Tensor
    k_scales: None = None
    v_scales: None = None

    def scales(self, layer: int) -> tuple[None, None]:
        """The pools hold floats."""
        return None, None


def plain_cache(
    config: ModelConfig, num_pages: int, page_size: int = 16, **options: Any
) -> PlainCache:
    """Pools of NaN; `options` are the dtype and device of a tensor."""
    shape = (config.num_layers, num_pages, config.num_kv_heads, page_size, config.head_dim)
    k, v = (torch.full(shape, float("nan"), **options) for _ in range(2))
    return PlainCache(k, v)


def plain_batch(
    cache: PlainCache, tokens: Sequence[Sequence[int]], past: Sequence[int], all_rows: bool = True
) -> Batch:
    """Batch of new tokens; sequence s owns every len(tokens)-th page starting at page s."""
    num_sequences, page_size = len(tokens), cache.k.shape[3]
    lengths = [len(new) for new in tokens]
    positions = torch.cat([torch.arange(p, p + n) for p, n in zip(past, lengths, strict=True)])
    sequence = torch.repeat_interleave(torch.arange(num_sequences), torch.tensor(lengths))
    offsets = torch.tensor([0, *np.cumsum(lengths)])
    pages = torch.arange(cache.k.shape[1] // num_sequences * num_sequences)
    table = pages.reshape(-1, num_sequences).T.contiguous()
    slots = table[sequence, positions // page_size] * page_size + positions % page_size
    return Batch(
        token_ids=torch.tensor([t for new in tokens for t in new], dtype=torch.int64),
        positions=positions.int(),
        query_offsets=offsets.int(),
        page_table=table.int(),
        seq_lens=(torch.tensor(past) + torch.tensor(lengths)).int(),
        slots=slots,
        logit_rows=torch.arange(len(sequence)) if all_rows else offsets[1:] - 1,
    )
