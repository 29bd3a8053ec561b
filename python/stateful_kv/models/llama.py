"""The Llama family as a composition of the engine's ops.

One definition serves Llama 2 and 3, SmolLM2, Mistral (sliding window), Qwen2 (biases) and Qwen3
(normalised q and k): what differs is in the config and in which weights are there. A row of the
batch goes through ops that sum in one fixed order and through elementwise additions only, so its
logits do not depend on the rows computed with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stateful_kv import ops
from stateful_kv.batch import Batch
from stateful_kv.config import ModelConfig
from stateful_kv.quantize import PackedWeight


class LayeredCache(Protocol):
    """What a model needs of a KV cache: the pools, layer by layer."""

    @property
    def k(self) -> Tensor:
        """[num_layers, P, Hk, B, D], keys."""

    @property
    def v(self) -> Tensor:
        """[num_layers, P, Hk, B, D], values."""


@dataclass(frozen=True)
class Linear:
    """y = x @ w.T + bias over packed weights.

    Attributes:
        parts: weights whose outputs follow each other; more than one only where a file stores
            projections that belong together in different formats.
        bias: float32[out] of all parts together, or None.
    """

    parts: tuple[PackedWeight, ...]
    bias: Tensor | None = None

    @staticmethod
    def fuse(weights: Sequence[PackedWeight], biases: Sequence[Tensor | None]) -> Linear:
        """Joins projections of one input; neighbours of one format become one product.

        Args:
            weights: in the order of their outputs.
            biases: float32[out] or None for each weight.
        """
        runs: list[list[PackedWeight]] = []
        for weight in weights:
            if runs and runs[-1][-1].can_precede(weight):
                runs[-1].append(weight)
            else:
                runs.append([weight])
        bias = None
        if any(b is not None for b in biases):
            pairs = zip(weights, biases, strict=True)
            bias = torch.cat([torch.zeros(w.out_features) if b is None else b for w, b in pairs])
        return Linear(tuple(PackedWeight.concat(run) for run in runs), bias)

    @property
    def out_features(self) -> int:
        """Width of the result."""
        return sum(part.out_features for part in self.parts)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Computes float32[N, out] from float32[N, K]; adds `residual` of that shape, if any."""
        biases: Sequence[Tensor | None] = (None,) * len(self.parts)
        if self.bias is not None:
            biases = torch.split(self.bias, [part.out_features for part in self.parts])
        if len(self.parts) == 1:
            w = self.parts[0]
            return ops.quantized_linear(
                x, w.weight, w.scales, w.minimums, biases[0], w.out_features, residual
            )
        results = [
            ops.quantized_linear(x, w.weight, w.scales, w.minimums, bias, w.out_features)
            for w, bias in zip(self.parts, biases, strict=True)
        ]
        joined = torch.cat(results, dim=1)
        return joined if residual is None else joined.add_(residual)


@dataclass(frozen=True)
class LayerWeights:
    """Weights of one layer.

    Attributes:
        attn_norm: float32[E], before attention.
        qkv: E -> (H + 2 * Hk) * D.
        o: H * D -> E.
        ffn_norm: float32[E], before the feed-forward layer.
        gate_up: E -> 2 * F, gate first.
        down: F -> E.
        q_norm: float32[D] of Qwen3, else None.
        k_norm: float32[D] of Qwen3, else None.
    """

    attn_norm: Tensor
    qkv: Linear
    o: Linear
    ffn_norm: Tensor
    gate_up: Linear
    down: Linear
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


@dataclass(frozen=True)
class LlamaWeights:
    """Weights of a model.

    Attributes:
        embedding: float32[V, E].
        layers: one entry per layer.
        norm: float32[E], before the head.
        head: E -> V.
        cos_sin: float32[max_position, D], rotary table.
    """

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Linear
    cos_sin: Tensor


class LlamaModel:
    """A model ready to run; it owns weights and no state.

    Attributes:
        config: shape of the model.
        weights: packed weights.
    """

    def __init__(self, config: ModelConfig, weights: LlamaWeights) -> None:
        """Keeps the two; the loader has checked that they fit."""
        self.config = config
        self.weights = weights
        self._scale = config.head_dim**-0.5
        self._window = config.sliding_window or 0

    @torch.no_grad()
    def forward(self, batch: Batch, cache: LayeredCache) -> Tensor:
        """Writes the batch's keys and values into the cache and computes logits.

        Args:
            batch: new tokens of all sequences, with slots that are theirs.
            cache: pools that hold everything before them.

        Returns:
            float32[R, V], one row per entry of `batch.logit_rows`.

        Raises:
            IndexError: a token id outside [0, V).
        """
        config, last = self.config, len(self.weights.layers) - 1
        x = self.weights.embedding.index_select(0, batch.token_ids)
        for index, layer in enumerate(self.weights.layers):
            hidden = ops.rms_norm(x, layer.attn_norm, config.rms_norm_eps)
            attended = self._attend(layer, hidden, batch, cache.k[index], cache.v[index])
            if index == last:
                # After the last KV write only the wanted rows matter, and rows are independent.
                x = x.index_select(0, batch.logit_rows)
                attended = attended.index_select(0, batch.logit_rows)
            x = layer.o(attended, residual=x)
            hidden = ops.rms_norm(x, layer.ffn_norm, config.rms_norm_eps)
            x = layer.down(ops.silu_mul(layer.gate_up(hidden)), residual=x)
        return self.weights.head(ops.rms_norm(x, self.weights.norm, config.rms_norm_eps))

    def _attend(
        self, layer: LayerWeights, hidden: Tensor, batch: Batch, k_pool: Tensor, v_pool: Tensor
    ) -> Tensor:
        """Projects, rotates, writes K and V, attends: float32[N, E] -> float32[N, H * D]."""
        config = self.config
        num_heads, num_kv_heads = config.num_heads, config.num_kv_heads
        heads = layer.qkv(hidden).view(-1, num_heads + 2 * num_kv_heads, config.head_dim)
        q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = self._normalise_heads(q, layer.q_norm)
            k = self._normalise_heads(k, layer.k_norm)
        ops.rope_append_kv(
            q, k, v, batch.positions, self.weights.cos_sin, batch.slots, k_pool, v_pool
        )
        attended = ops.paged_attention(
            q,
            k_pool,
            v_pool,
            batch.page_table,
            batch.seq_lens,
            batch.query_offsets,
            self._scale,
            self._window,
        )
        return attended.view(-1, num_heads * config.head_dim)

    def _normalise_heads(self, heads: Tensor, weight: Tensor) -> Tensor:
        """RMS norm of each head alone: float32[N, H, D] -> the same shape, contiguous."""
        rows = heads.reshape(-1, self.config.head_dim)
        return ops.rms_norm(rows, weight, self.config.rms_norm_eps).view(heads.shape)
