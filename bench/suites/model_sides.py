"""Our model on our cache, and the same model in peers: one sequence each, on the same tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bench.harness import Missing, PeerMissingError
from bench.peers import llama_cpp_model, transformers_model
from bench.suites import real_model
from stateful_kv.kv.batch import Batch
from stateful_kv.kv.cache import KVCache
from stateful_kv.models.files.loading import LoadedModel, resolve

PAGE_SIZE = 64
MAX_BATCH = 512
LONG_CALL_S = 0.5


class Context(Protocol):
    """One sequence of one side.

    Attributes:
        length: tokens that have KV.
    """

    length: int

    def run(self, tokens: Tensor, num_logits: int) -> Tensor:
        """Appends int64[N]; returns int64[num_logits], the next token after each last row."""

    def logits(self) -> Tensor:
        """float32[num_logits, V] of the last call."""

    def truncate(self, length: int) -> None:
        """Drops the tokens from `length` on."""


class PeerContext(Context, Protocol):
    """One sequence of a peer.

    Attributes:
        about: what the peer is: versions, instruction sets.
    """

    about: dict[str, str]


class OurContext:
    """Batch, forward and arg-max in one, as in a step of the engine; no session around them."""

    def __init__(self, loaded: LoadedModel, capacity: int) -> None:
        config = loaded.config
        self.cache = KVCache(
            config.num_layers,
            config.num_kv_heads,
            config.head_dim,
            -(-capacity // PAGE_SIZE),
            PAGE_SIZE,
        )
        self._model = loaded.model
        self._sequence, self.length = self.cache.match_and_adopt(np.zeros(0, dtype=np.int32))
        self._batch: Batch | None = None

    def run(self, tokens: Tensor, num_logits: int) -> Tensor:
        """Appends int64[N]; returns int64[num_logits]."""
        for part in tokens.split(MAX_BATCH):
            result = self._forward(part, num_logits)
        return result

    def _forward(self, tokens: Tensor, num_logits: int) -> Tensor:
        count = len(tokens)
        self.cache.reserve(self._sequence, count)
        pages = self.cache.batch_pages([self._sequence], [count])
        batch = Batch(
            token_ids=tokens,
            positions=pages.positions,
            query_offsets=pages.query_offsets,
            page_table=pages.page_table,
            seq_lens=pages.seq_lens,
            slots=pages.slots,
            logit_rows=torch.arange(max(0, count - num_logits), count),
        )
        ids, _ = self._model.forward_top_k(batch, self.cache, 1)
        self.cache.commit([self._sequence], [count])
        self.length += count
        self._batch = batch
        return ids[:, 0]

    def logits(self) -> Tensor:
        """float32[num_logits, V] of the last call, whose pass is computed anew for them."""
        assert self._batch is not None
        return self._model.forward(self._batch, self.cache)

    def truncate(self, length: int) -> None:
        """Drops the tokens from `length` on."""
        self.cache.truncate(self._sequence, length)
        self.length = length


class Sides:
    """All sides of the suite; a peer is made when it is first asked for.

    Attributes:
        loaded: our model.
        tokens: int64[capacity], the text of all sides.
        ours: our sequence.
    """

    def __init__(self, capacity: int) -> None:
        self.loaded = real_model.load()
        self.tokens = real_model.text_ids(self.loaded, capacity)
        self.ours = OurContext(self.loaded, capacity)
        self._capacity = capacity
        self._peers: dict[str, dict[str, PeerContext] | Missing] = {}
        self._stack = ExitStack()

    def close(self) -> None:
        """Frees what the peers hold outside of Python."""
        self._stack.close()

    def peer(self, name: str) -> dict[str, PeerContext] | Missing:
        """The contexts of a peer by setting, or why there are none."""
        if name not in self._peers:
            try:
                make = self._make_llama_cpp if name == "llama_cpp" else self._make_transformers
                self._peers[name] = make()
            except PeerMissingError as error:
                self._peers[name] = Missing(str(error))
        return self._peers[name]

    def _make_llama_cpp(self) -> dict[str, PeerContext]:
        path = resolve(real_model.MODEL)
        llama_cpp_model.check_runs(path)
        model = llama_cpp_model.LlamaCppModel(path)
        self._stack.callback(model.close)
        contexts: dict[str, PeerContext] = {}
        for flash_attention in (True, False):
            context = llama_cpp_model.LlamaCppContext(
                model,
                self._capacity,
                torch.get_num_threads(),
                flash_attention=flash_attention,
            )
            self._stack.callback(context.close)
            contexts[f"flash attention {'on' if flash_attention else 'off'}, f16 KV"] = context
        return contexts

    def _make_transformers(self) -> dict[str, PeerContext]:
        model = transformers_model.load(resolve(real_model.MODEL))
        return {"float32, DynamicCache, sdpa": transformers_model.TransformersContext(model)}

    def fill(self, context: Context, length: int) -> None:
        """Brings a context to the first `length` tokens of the text."""
        if context.length > length:
            context.truncate(length)
        elif context.length < length:
            context.run(self.tokens[context.length : length], 1)


def best_setting(
    contexts: dict[str, PeerContext], call: Callable[[Context], Any], length: int
) -> tuple[str, dict[str, float]]:
    """The setting whose quickest call is quickest, and the seconds of each."""
    if len(contexts) == 1:
        return next(iter(contexts)), {}
    seconds = {}
    for setting, context in contexts.items():
        times: list[float] = []
        while len(times) < 4 and sum(times) < LONG_CALL_S:
            start = time.perf_counter()
            call(context)
            times.append(time.perf_counter() - start)
            context.truncate(length)
        seconds[setting] = min(times)
    return min(seconds, key=seconds.__getitem__), seconds
