"""The Llama family as a composition of the engine's ops.

One definition serves Llama 2 and 3, SmolLM2, Mistral (sliding window), Qwen2 (biases) and Qwen3
(normalised q and k): what differs is in the config and in which weights are there. A row of the
batch goes through ops that sum in one fixed order and through elementwise additions only, so its
logits do not depend on the rows computed with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from stateful_kv import ops
from stateful_kv.batch import Batch
from stateful_kv.config import ModelConfig
from stateful_kv.host_memory import HugePageArena
from stateful_kv.quantize import PANEL, PackedWeight


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


@dataclass(frozen=True)
class Linear:
    """y = x @ w.T + bias over packed weights, or silu(gate) * up of such a product.

    Attributes:
        parts: weights whose outputs follow each other; more than one only where a file stores
            projections that belong together in different formats.
        bias: float32[out] of all parts together, or None.
        has_silu_mul: the product is a gate and what it opens; the result is half as wide. With
            one part their panels alternate, with several the gate comes first.
    """

    parts: tuple[PackedWeight, ...]
    bias: Tensor | None = None
    has_silu_mul: bool = False

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
        parts = tuple(PackedWeight.concat(run) for run in runs)
        return Linear(parts, _join_biases(weights, biases))

    @staticmethod
    def gate_up(
        gate: PackedWeight, up: PackedWeight, biases: Sequence[Tensor | None] = (None, None)
    ) -> Linear:
        """Joins the two projections of a gated feed-forward layer.

        Args:
            gate: E -> F.
            up: E -> F.
            biases: float32[F] or None for each.
        """
        bias = _join_biases((gate, up), biases)
        if not gate.can_precede(up) or gate.out_features != up.out_features:
            return Linear((gate, up), bias, has_silu_mul=True)
        if bias is not None:
            bias = bias.view(2, -1, PANEL).transpose(0, 1).flatten()
        return Linear((PackedWeight.interleave(gate, up),), bias, has_silu_mul=True)

    @property
    def out_features(self) -> int:
        """Width of the result."""
        width = sum(part.out_features for part in self.parts)
        return width // 2 if self.has_silu_mul else width

    def placed_in(self, arena: HugePageArena) -> Linear:
        """Returns the same with its weights copied into `arena`."""
        return replace(self, parts=tuple(part.placed_in(arena) for part in self.parts))

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        norm_weight: Tensor | None = None,
        norm_eps: float = 0.0,
    ) -> Tensor:
        """Computes float32[N, out] from float32[N, K].

        Args:
            x: the input.
            residual: float32[N, out] to add, or None.
            norm_weight: float32[K] where x is to be normalised first, or None.
            norm_eps: for that norm.
        """
        if len(self.parts) == 1:
            w = self.parts[0]
            return ops.quantized_linear(
                x,
                w.weight,
                w.scales,
                w.minimums,
                self.bias,
                w.out_features,
                residual,
                norm_weight,
                norm_eps,
                self.has_silu_mul,
            )
        if norm_weight is not None:
            x = ops.rms_norm(x, norm_weight, norm_eps)
        biases: Sequence[Tensor | None] = (None,) * len(self.parts)
        if self.bias is not None:
            biases = torch.split(self.bias, [part.out_features for part in self.parts])
        results = [
            ops.quantized_linear(x, w.weight, w.scales, w.minimums, bias, w.out_features)
            for w, bias in zip(self.parts, biases, strict=True)
        ]
        joined = torch.cat(results, dim=1)
        if self.has_silu_mul:
            joined = ops.silu_mul(joined)
        return joined if residual is None else joined.add_(residual)

    def top_k(
        self, x: Tensor, k: int, norm_weight: Tensor, norm_eps: float
    ) -> tuple[Tensor, Tensor]:
        """The k largest of each row that a call would give; for a product of one part.

        Args:
            x: float32[N, K], the input.
            k: from 1 to 64, at most out.
            norm_weight: float32[K], x is normalised first.
            norm_eps: for that norm.

        Returns:
            ids: int64[N, k], largest first, of equals the lowest first.
            values: float32[N, k].
        """
        (w,) = self.parts
        return ops.linear_top_k(
            x, w.weight, w.scales, w.minimums, self.bias, w.out_features, k, norm_weight, norm_eps
        )


def _flat(linear: Linear) -> list[Tensor | None] | None:
    """Weight, scales, minimums and bias; None if there are several parts."""
    if len(linear.parts) > 1:
        return None
    (part,) = linear.parts
    return [part.weight, part.scales, part.minimums, linear.bias]


def _join_biases(weights: Sequence[PackedWeight], biases: Sequence[Tensor | None]) -> Tensor | None:
    """float32[out of all], zeros where a weight has none; None if no weight has one."""
    if all(bias is None for bias in biases):
        return None
    pairs = zip(weights, biases, strict=True)
    return torch.cat([torch.zeros(w.out_features) if b is None else b for w, b in pairs])


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
    qkv: Linear
    o: Linear
    ffn_norm: Tensor
    gate_up: Linear
    down: Linear
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None

    def tensors(self) -> list[Tensor | None] | None:
        """What `ops.decoder_layers` takes of a layer; None if a projection has several parts."""
        projections = [_flat(linear) for linear in (self.qkv, self.o, self.gate_up, self.down)]
        if any(projection is None for projection in projections):
            return None
        qkv, o, gate_up, down = (projection or [] for projection in projections)
        head = [self.attn_norm, *qkv, self.q_norm, self.k_norm, *o]
        return [*head, self.ffn_norm, *gate_up, *down]

    def placed_in(self, arena: HugePageArena) -> LayerWeights:
        """Returns the same with its weights copied into `arena` in the order a step reads them."""
        return replace(
            self,
            qkv=self.qkv.placed_in(arena),
            o=self.o.placed_in(arena),
            gate_up=self.gate_up.placed_in(arena),
            down=self.down.placed_in(arena),
        )


@dataclass(frozen=True)
class LlamaWeights:
    """Weights of a model.

    Attributes:
        embedding: float32[V, E].
        layers: one entry per layer.
        norm: float32[E], before the head.
        head: E -> V, of one part.
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
        parts = [layer.tensors() for layer in weights.layers]
        # None where a file stores projections of one input in several formats.
        self._flat = None if None in parts else [t for part in parts if part for t in part]

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
        hidden = self._run_layers(batch, cache)
        eps = self.config.rms_norm_eps
        return self.weights.head(hidden, norm_weight=self.weights.norm, norm_eps=eps)

    @torch.no_grad()
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
            IndexError: a token id outside [0, V).
        """
        hidden = self._run_layers(batch, cache)
        return self.weights.head.top_k(hidden, k, self.weights.norm, self.config.rms_norm_eps)

    def _run_layers(self, batch: Batch, cache: LayeredCache) -> Tensor:
        """Embedding and layers: float32[R, E], before the last norm."""
        x = self.weights.embedding.index_select(0, batch.token_ids)
        run = self._run_ops if self._flat is None else self._run_fused
        return run(x, batch, cache)

    def _run_fused(self, x: Tensor, batch: Batch, cache: LayeredCache) -> Tensor:
        """All layers in one op: float32[N, E] -> float32[R, E]."""
        assert self._flat is not None
        output = x.new_empty(batch.logit_rows.shape[0], x.shape[1])
        ops.decoder_layers(
            x,
            self._flat,
            batch.positions,
            self.weights.cos_sin,
            batch.slots,
            batch.page_table,
            batch.seq_lens,
            batch.query_offsets,
            batch.logit_rows,
            self.config.num_heads,
            self.config.rms_norm_eps,
            self._scale,
            self._window,
            cache.k,
            cache.v,
            output,
            cache.k_scales,
            cache.v_scales,
        )
        return output

    def _run_ops(self, x: Tensor, batch: Batch, cache: LayeredCache) -> Tensor:
        """The same, op by op."""
        eps, last = self.config.rms_norm_eps, len(self.weights.layers) - 1
        for index, layer in enumerate(self.weights.layers):
            attended = self._attend(
                layer, x, batch, cache.k[index], cache.v[index], *cache.scales(index)
            )
            if index == last:
                # After the last KV write only the wanted rows matter, and rows are independent.
                x = x.index_select(0, batch.logit_rows)
                attended = attended.index_select(0, batch.logit_rows)
            x = layer.o(attended, residual=x)
            gated = layer.gate_up(x, norm_weight=layer.ffn_norm, norm_eps=eps)
            x = layer.down(gated, residual=x)
        return x

    def _attend(
        self,
        layer: LayerWeights,
        x: Tensor,
        batch: Batch,
        k_pool: Tensor,
        v_pool: Tensor,
        k_scales: Tensor | None,
        v_scales: Tensor | None,
    ) -> Tensor:
        """Normalises, projects, rotates, writes K and V, attends.

        Takes float32[N, E] and returns float32[N, H * D].
        """
        config = self.config
        num_heads, num_kv_heads = config.num_heads, config.num_kv_heads
        qkv = layer.qkv(x, norm_weight=layer.attn_norm, norm_eps=config.rms_norm_eps)
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
        """RMS norm of each head alone: float32[N, H, D] -> the same shape, contiguous."""
        rows = heads.reshape(-1, self.config.head_dim)
        return ops.rms_norm(rows, weight, self.config.rms_norm_eps).view(heads.shape)
