"""Suite `hf_adapter`: `transformers` generating on our pages, against its own `DynamicCache`.

A conversation of three turns: a context, then two short messages; each turn ends with a greedy
reply. Both sides are the same model (the shape of SmolLM2-135M with random weights, float32) with
the attention that belongs to the cache: ours, and `sdpa`, the default of `transformers`. The turns
are timed side by side, and the tokens must be equal.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import harness
from bench.harness import CheckFailedError, Settings
from bench.selection import Row

PEER = "dynamic_cache"
SHAPE: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 16384,
    "tie_word_embeddings": True,
}
SMOKE_SHAPE = {**SHAPE, "vocab_size": 512, "num_hidden_layers": 2, "max_position_embeddings": 512}
# Tokens of the first message, and how often the conversation is played: a first turn of 8k tokens
# takes the better part of a minute.
CONTEXTS = {1024: 3, 5120: 1, 8192: 1}
SMOKE_CONTEXTS = {64: 2}
NUM_TURNS, MESSAGE, REPLY = 3, 64, 32


class _Side:
    """One of the two caches, and the conversation that it holds."""

    def __init__(self, model: Any, attention: str, cache: Any) -> None:
        self._model, self._attention, self._cache = model, attention, cache
        self._ids = torch.empty(1, 0, dtype=torch.long)

    def turn(self, message: Tensor, reply: int) -> tuple[float, list[int]]:
        """Seconds and tokens of a reply to a message int64[1, T]."""
        self._model.set_attn_implementation(self._attention)
        self._ids = torch.cat([self._ids, message], dim=1)
        time.sleep(harness.SETTLE_S)
        start = time.perf_counter()
        with torch.inference_mode():
            ids = self._model.generate(
                self._ids,
                attention_mask=torch.ones_like(self._ids),
                past_key_values=self._cache,
                max_new_tokens=reply,
                do_sample=False,
            )
        seconds = time.perf_counter() - start
        self._ids = ids.clone()
        return seconds, ids[0, -reply:].tolist()


def _model(transformers: Any, shape: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).float().eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def _sides(model: Any, transformers: Any, context: int) -> tuple[_Side, _Side]:
    adapter = importlib.import_module("stateful_kv.adapters.hf")
    capacity = context + NUM_TURNS * (MESSAGE + REPLY)
    model.set_attn_implementation(adapter.NAME)
    ours = _Side(model, adapter.NAME, adapter.PagedCache(model.config, kv_tokens=capacity))
    theirs = _Side(model, "sdpa", transformers.DynamicCache(config=model.config))
    return ours, theirs


def _messages(context: int, vocab: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(context)
    lengths = [context, *[MESSAGE] * (NUM_TURNS - 1)]
    return [torch.randint(vocab, (1, length), generator=generator) for length in lengths]


def play(
    model: Any, transformers: Any, context: int, rounds: int, reply: int
) -> list[tuple[list[float], list[float]]]:
    """For each turn the seconds of ours and of the peer, a pair for each round.

    Raises:
        CheckFailedError: the replies differ.
    """
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in range(NUM_TURNS)]
    for _ in range(rounds):
        ours, theirs = _sides(model, transformers, context)
        messages = _messages(context, model.config.vocab_size)
        for number, message in enumerate(messages):
            pair = ours.turn(message, reply), theirs.turn(message, reply)
            if pair[0][1] != pair[1][1]:
                raise CheckFailedError(
                    f"hf_adapter: context {context}: turn {number + 1}: replies differ"
                )
            for seconds, (taken, _) in zip(times[number], pair, strict=True):
                seconds.append(taken)
    return times


def _name(context: int) -> str:
    return f"turn_{context // 1024}k" if context >= 1024 else "turn"


def rows(settings: Settings) -> list[Row]:
    """A row for each turn of each conversation; a conversation is played whole."""
    contexts = SMOKE_CONTEXTS if settings.smoke else CONTEXTS
    return [
        Row(_name(context), {"context": context, "turn": turn})
        for context in contexts
        for turn in range(1, NUM_TURNS + 1)
    ]


def run(settings: Settings, _roofs: dict[str, Any], emit: Callable[[dict[str, Any]], None]) -> None:
    """Run the suite."""
    shape, contexts, reply = SHAPE, CONTEXTS, REPLY
    if settings.smoke:
        shape, contexts, reply = SMOKE_SHAPE, SMOKE_CONTEXTS, 8
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        reason = f"{error.name} cannot be imported: pip install transformers"
        emit(harness.skipped("hf_adapter", "turn", {}, PEER, reason))
        return
    model = _model(transformers, shape)
    for context, rounds in contexts.items():
        wanted = [
            row.axes["turn"]
            for row in rows(settings)
            if row.axes["context"] == context and settings.selection.takes(row.name, row.axes)
        ]
        if not wanted:
            continue
        times = play(model, transformers, context, rounds, reply)
        for number, (ours, theirs) in enumerate(times, 1):
            if number not in wanted:
                continue
            emit(
                {
                    "suite": "hf_adapter",
                    "name": _name(context),
                    "axes": {"context": context, "turn": number},
                    "peer_name": PEER,
                    "model": "SmolLM2-135M in shape, random weights, float32",
                    "transformers": str(transformers.__version__),
                    "message_tokens": context if number == 1 else MESSAGE,
                    "reply_tokens": reply,
                    "checks": {"same_tokens": True},
                    "ours": harness.statistics_of(ours),
                    "peer": harness.statistics_of(theirs),
                    "ratio": harness.ratio_of(ours, theirs),
                }
            )
