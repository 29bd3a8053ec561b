"""What an engine asks of a model."""

from __future__ import annotations

from typing import Protocol

import torch

from stateful_kv.kv.batch import Batch
from stateful_kv.kv.cache import KVCache
from stateful_kv.models.config import ModelConfig


class Model(Protocol):
    """A pure function of a batch and the cache; see `models.llama.LlamaModel`."""

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        ...

    def forward(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        """Writes KV of all rows of the batch; returns float32[R, V], logits of logit_rows."""
        ...

    def forward_top_k(
        self, batch: Batch, cache: KVCache, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As forward; returns ids int64[R, k] and values float32[R, k] of the largest logits.

        Largest first, NaN before every number, of equals the lowest id first.
        """
        ...
