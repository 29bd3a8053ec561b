"""The Llama family as a composition of the engine's ops.

One definition serves Llama 2 and 3, SmolLM2, Mistral (sliding window), Qwen2 (biases) and Qwen3
(normalised q and k): what differs is in the config and in which weights are there. A row of the
batch goes through ops that sum in one fixed order and through elementwise additions only, so its
logits do not depend on the rows computed with it. Weights are packed (on the CPU, float32
activations) or dense (on any device, activations in their dtype).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from stateful_kv import ops
from stateful_kv._native import _C
from stateful_kv.kv.batch import Batch
from stateful_kv.models.config import ModelConfig
from stateful_kv.models.dense import DenseLinear
from stateful_kv.models.packed import Linear
from stateful_kv.models.row_counts import RowCounts, common

Projection = Linear | DenseLinear


class LayeredCache(Protocol):
    """What a model needs of a KV cache: the pools, layer by layer."""

    @property
    def k(self) -> Tensor:
        """[num_layers, P, Hk, B, D], keys."""

    @property
    def v(self) -> Tensor:
        """[num_layers, P, Hk, B, D], values."""

    @property
    def k_scales(self) -> Tensor | None:
        """float32[num_layers, P, Hk, B], scales of the keys if the pools are int8, else None."""

    @property
    def v_scales(self) -> Tensor | None:
        """As k_scales, of the values."""

    def scales(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """float32[P, Hk, B] of the layer's keys and values if the pools are int8, else None."""


def _flat(linear: Projection) -> list[Tensor | None] | None:
    """Weight, scales, minimums and bias; None if it is dense or has several parts."""
    if isinstance(linear, DenseLinear) or len(linear.parts) > 1:
        return None
    (part,) = linear.parts
    return [part.weight, part.scales, part.minimums, linear.bias]


_Scales = Tensor | None
# Token ids to logit rows of a batch, K and V, their scales.
_PassTensors = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, _Scales, _Scales
]


def _pass_tensors(batch: Batch, cache: LayeredCache) -> _PassTensors:
    """What every method of `_C.LayerStack` takes, in its order."""
    return (
        batch.token_ids,
        batch.positions,
        batch.slots,
        batch.page_table,
        batch.seq_lens,
        batch.query_offsets,
        batch.logit_rows,
        cache.k,
        cache.v,
        cache.k_scales,
        cache.v_scales,
    )


@dataclass(frozen=True)
class LayerWeights:
    """Weights of one layer.

    Attributes:
        attn_norm: float32[E], before attention.
        qkv: E -> (H + 2 * Hk) * D.
        o: H * D -> E.
        ffn_norm: float32[E], before the feed-forward layer.
        gate_up: E -> F, silu(gate) * up.
        down: F -> E.
        q_norm: float32[D] of Qwen3, else None.
        k_norm: float32[D] of Qwen3, else None.
    """

    attn_norm: Tensor
    qkv: Projection
    o: Projection
    ffn_norm: Tensor
    gate_up: Projection
    down: Projection
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None

    def tensors(self) -> list[Tensor | None] | None:
        """The layer as `ops.LAYER_TENSORS`; None if a projection is not of one packed part."""
        projections = [_flat(linear) for linear in (self.qkv, self.o, self.gate_up, self.down)]
        if any(projection is None for projection in projections):
            return None
        qkv, o, gate_up, down = (projection or [] for projection in projections)
        head = [self.attn_norm, *qkv, self.q_norm, self.k_norm, *o]
        return [*head, self.ffn_norm, *gate_up, *down]


@dataclass(frozen=True)
class LlamaWeights:
    """Weights of a model.

    Attributes:
        embedding: [V, E], float32 beside packed weights, else in the dtype of the dense ones.
        layers: one entry per layer.
        norm: float32[E], before the head.
        head: E -> V; packed, of one part.
        cos_sin: float32[max_position, D], rotary table.
    """

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Projection
    cos_sin: Tensor


class LlamaModel:
    """A model ready to run; it owns weights and no state.

    Attributes:
        config: shape of the model.
        weights: packed or dense ones, all on one device.
    """

    def __init__(self, config: ModelConfig, weights: LlamaWeights) -> None:
        """Keeps the two; the loader has checked that they fit."""
        self.config = config
        self.weights = weights
        self._scale = config.head_dim**-0.5
        self._window = config.sliding_window or 0
        # None with packed weights, and where no row count suits all products.
        self._rows = common(list(self.row_counts.values()))

    @property
    def device(self) -> torch.device:
        """Where the weights lie and all is computed."""
        return self.weights.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return self.weights.embedding.dtype

    @property
    def row_counts(self) -> dict[str, RowCounts]:
        """The row counts of the products of dense weights, by shape of the weight; else empty."""
        found = {}
        for layer in self.weights.layers:
            for linear in (layer.qkv, layer.o, layer.gate_up, layer.down, self.weights.head):
                if isinstance(linear, DenseLinear):
                    found["x".join(map(str, linear.weight.shape))] = linear.rows
        return found

    @cached_property
    def _stack(self) -> _C.LayerStack | None:
        """The model in one object, if all its products are of one packed part, else None.

        A file may store projections of one input in several formats.
        """
        config, weights = self.config, self.weights
        layers = [layer.tensors() for layer in weights.layers]
        head = _flat(weights.head)
        if head is None or isinstance(weights.head, DenseLinear):
            return None
        flat: list[Tensor | None] = []
        for tensors in layers:
            if tensors is None:
                return None
            flat += tensors
        with torch.no_grad():
            return _C.LayerStack(
                flat,
                weights.cos_sin,
                weights.embedding,
                weights.norm,
                head,
                weights.head.out_features,
                config.num_heads,
                config.num_kv_heads,
                config.rms_norm_eps,
                self._scale,
                self._window,
            )

    def forward(self, batch: Batch, cache: LayeredCache) -> Tensor:
        """Writes the batch's keys and values into the cache and computes logits.

        Args:
            batch: new tokens of all sequences, with slots that are theirs.
            cache: pools that hold everything before them.

        Returns:
            float32[R, V], one row per entry of `batch.logit_rows`.

        Raises:
            IndexError: a token id outside [0, V); on the CPU only, elsewhere they are trusted.
        """
        if self._stack is not None:
            return self._stack.forward(*_pass_tensors(batch, cache))
        with torch.no_grad():
            hidden = self._run_layers(batch, cache)
            eps = self.config.rms_norm_eps
            logits = self.weights.head(hidden, norm_weight=self.weights.norm, norm_eps=eps)
            return logits[: batch.logit_rows.shape[0]].float()

    def forward_top_k(self, batch: Batch, cache: LayeredCache, k: int) -> tuple[Tensor, Tensor]:
        """As `forward`, but of each row of logits only the k largest, the others never written.

        Args:
            batch: as in `forward`.
            cache: as in `forward`.
            k: from 1 to 64, at most V.

        Returns:
            ids: int64[R, k], largest logit first, of equals the lowest id first, NaN before all.
            values: float32[R, k], the logits at those ids, with the bits that `forward` gives.

        Raises:
            IndexError: a token id outside [0, V); on the CPU only, elsewhere they are trusted.
        """
        if self._stack is not None:
            return self._stack.forward_top_k(*_pass_tensors(batch, cache), k)
        with torch.no_grad():
            hidden = self._run_layers(batch, cache)
            eps, num_rows = self.config.rms_norm_eps, batch.logit_rows.shape[0]
            ids, values = self.weights.head.top_k(hidden, k, self.weights.norm, eps)
            return ids[:num_rows], values[:num_rows]

    def padded_rows(self, num_rows: int) -> int:
        """Rows that are computed in all where `num_rows` are asked for; more with dense weights."""
        return num_rows if self._rows is None else self._rows.padded(num_rows)

    def _run_layers(self, batch: Batch, cache: LayeredCache) -> Tensor:
        """Embedding and layers, op by op: [R or more, E], before the last norm.

        Nothing here waits for a device, and all shapes follow from those of the arguments.
        """
        batch = self._padded(batch)
        x = self.weights.embedding.index_select(0, batch.token_ids)
        if isinstance(self.weights.head, DenseLinear):
            return self._run_dense(x, batch, cache)
        return self._run_ops(x, batch, cache)

    def _padded(self, batch: Batch) -> Batch:
        """The batch with rows of no sequence behind its own, as many as the products would add.

        Added once here they are not added again before each product. They write no KV.
        """
        num_tokens, num_rows = batch.num_tokens, batch.logit_rows.shape[0]
        more_tokens = self.padded_rows(num_tokens) - num_tokens
        more_rows = self.padded_rows(num_rows) - num_rows
        pad = torch.nn.functional.pad
        if more_tokens:
            batch = replace(
                batch,
                token_ids=pad(batch.token_ids, (0, more_tokens)),
                positions=pad(batch.positions, (0, more_tokens)),
                slots=pad(batch.slots, (0, more_tokens), value=-1),
            )
        if more_rows:
            batch = replace(batch, logit_rows=pad(batch.logit_rows, (0, more_rows)))
        return batch

    def _run_ops(self, x: Tensor, batch: Batch, cache: LayeredCache) -> Tensor:
        """All layers of packed weights: float32[N, E] -> float32[R, E]."""
        eps, last = self.config.rms_norm_eps, len(self.weights.layers) - 1
        for index, layer in enumerate(self.weights.layers):
            qkv = layer.qkv(x, norm_weight=layer.attn_norm, norm_eps=eps)
            attended = self._attend(layer, qkv, batch, cache, index)
            if index == last:
                # After the last KV write only the wanted rows matter, and rows are independent.
                x = x.index_select(0, batch.logit_rows)
                attended = attended.index_select(0, batch.logit_rows)
            x = layer.o(attended, residual=x)
            gated = layer.gate_up(x, norm_weight=layer.ffn_norm, norm_eps=eps)
            x = layer.down(gated, residual=x)
        return x

    def _run_dense(self, x: Tensor, batch: Batch, cache: LayeredCache) -> Tensor:
        """The same with dense weights: what a projection adds to x is added by the next norm."""
        last = len(self.weights.layers) - 1
        change: Tensor | None = None
        for index, layer in enumerate(self.weights.layers):
            normalised, x = self._add_and_norm(x, change, layer.attn_norm)
            qkv = layer.qkv(normalised)
            attended = self._attend(layer, qkv, batch, cache, index)
            if index == last:
                x = x.index_select(0, batch.logit_rows)
                attended = attended.index_select(0, batch.logit_rows)
            change = layer.o(attended)
            normalised, x = self._add_and_norm(x, change, layer.ffn_norm)
            change = layer.down(layer.gate_up(normalised))
        return x if change is None else x + change

    def _add_and_norm(
        self, x: Tensor, change: Tensor | None, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The norm of the sum of x and `change`, and that sum, in one pass."""
        eps = self.config.rms_norm_eps
        if change is None:
            return ops.rms_norm(x, weight, eps), x
        return ops.add_rms_norm(change, x, weight, eps)

    def _attend(
        self, layer: LayerWeights, qkv: Tensor, batch: Batch, cache: LayeredCache, index: int
    ) -> Tensor:
        """Rotates, writes K and V, attends: [N, (H + 2 * Hk) * D] -> [N, H * D]."""
        config = self.config
        num_heads, num_kv_heads = config.num_heads, config.num_kv_heads
        k_pool, v_pool = cache.k[index], cache.v[index]
        k_scales, v_scales = cache.scales(index)
        heads = qkv.view(-1, num_heads + 2 * num_kv_heads, config.head_dim)
        q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = self._normalise_heads(q, layer.q_norm)
            k = self._normalise_heads(k, layer.k_norm)
        ops.rope_append_kv(
            q,
            k,
            v,
            batch.positions,
            self.weights.cos_sin,
            batch.slots,
            k_pool,
            v_pool,
            k_scales,
            v_scales,
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
            k_scales=k_scales,
            v_scales=v_scales,
        )
        return attended.view(-1, num_heads * config.head_dim)

    def _normalise_heads(self, heads: Tensor, weight: Tensor) -> Tensor:
        """RMS norm of each head alone: [N, H, D] -> the same shape, contiguous."""
        rows = heads.reshape(-1, self.config.head_dim)
        return ops.rms_norm(rows, weight, self.config.rms_norm_eps).view(heads.shape)
