"""How well a model predicts a text: perplexity, and the distance of its logits from others.

Teacher-forced: every token of the text but the first is predicted from all tokens before it. The
model is fed in chunks, whose size changes no bit of our logits. Logits go by in chunks too, side by
side for all models, since those of a whole text would fill a gigabyte or two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stateful_kv.kv.batch import Batch
from stateful_kv.kv.cache import KVCache
from stateful_kv.models.llama import LlamaModel

TEXT = Path(__file__).resolve().parent.parent / "tests" / "data" / "quality.txt"
CHUNK = 256
PAGE_SIZE = 64


def make_cache(model: LlamaModel, num_tokens: int, kv_dtype: torch.dtype) -> KVCache:
    """A cache with room for one text, and for a copy of its last page."""
    config, num_pages = model.config, -(-num_tokens // PAGE_SIZE) + 1
    shape = config.num_layers, config.num_kv_heads, config.head_dim, num_pages, PAGE_SIZE
    return KVCache(*shape, dtype=kv_dtype)


def extend(model: LlamaModel, cache: KVCache, sequence_id: int, tokens: Sequence[int]) -> Tensor:
    """Feeds tokens to a sequence; float32[N, V], the logits of each of them."""
    cache.reserve(sequence_id, len(tokens))
    pages = cache.batch_pages([sequence_id], [len(tokens)])
    batch = Batch(
        token_ids=torch.tensor(tokens, dtype=torch.int64),
        positions=pages.positions,
        query_offsets=pages.query_offsets,
        page_table=pages.page_table,
        seq_lens=pages.seq_lens,
        slots=pages.slots,
        logit_rows=torch.arange(len(tokens)),
    )
    with torch.inference_mode():
        logits = model.forward(batch, cache)
    cache.commit([sequence_id], [len(tokens)])
    return logits


def chunks_of(
    model: LlamaModel, tokens: Sequence[int], kv_dtype: torch.dtype, chunk: int = CHUNK
) -> Iterator[Tensor]:
    """Yields the logits of a text, float32[up to chunk, V] at a time."""
    cache = make_cache(model, len(tokens), kv_dtype)
    sequence_id, _ = cache.match_and_adopt(np.empty(0, dtype=np.int32))
    for start in range(0, len(tokens), chunk):
        yield extend(model, cache, sequence_id, tokens[start : start + chunk])


def losses(logits: Tensor, next_tokens: Sequence[int]) -> Tensor:
    """float64[N]: minus the log-probability of the token that follows each row.

    The last row of a text has no next token, so there may be one fewer of them than rows.
    """
    # Row by row in numpy: torch may sum in another order for other numbers of rows or threads.
    found = np.empty(len(next_tokens))
    for row, wanted in enumerate(next_tokens):
        values = logits[row].numpy().astype(np.float64)
        values -= values[wanted]
        largest = values.max()
        found[row] = largest + np.log(np.exp(values - largest).sum())
    return torch.from_numpy(found)


def perplexity(losses: Sequence[Tensor]) -> float:
    """The exponential of the mean loss."""
    return math.exp(float(torch.cat(list(losses)).mean()))


@dataclass
class Distance:
    """How far logits are from those of a reference, over all rows added."""

    max_logit_error: float = 0.0
    _divergences: list[Tensor] = field(default_factory=list)
    _agrees: list[Tensor] = field(default_factory=list)

    def add(self, logits: Tensor, reference: Tensor) -> None:
        """Takes in rows of both, float32[N, V]."""
        self.max_logit_error = max(self.max_logit_error, float((logits - reference).abs().max()))
        log_q, log_p = logits.double().log_softmax(1), reference.double().log_softmax(1)
        self._divergences.append((log_p.exp() * (log_p - log_q)).sum(1))
        self._agrees.append(logits.argmax(1) == reference.argmax(1))

    def to_json(self) -> dict[str, float]:
        """Kullback-Leibler divergence from the reference in nats, largest logit error, top-1."""
        divergences = torch.cat(self._divergences)
        return {
            "kl_mean": float(divergences.mean()),
            "kl_max": float(divergences.max()),
            "max_logit_error": self.max_logit_error,
            "same_top_token": float(torch.cat(self._agrees).double().mean()),
        }
