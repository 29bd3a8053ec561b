"""`transformers` on paged KV: a cache for `generate`, and the attention that reads it.

    model.set_attn_implementation("stateful_kv")
    cache = PagedCache(model.config, kv_tokens=8192)
    model.generate(ids, past_key_values=cache)

Importing this module registers the attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stateful_kv import ops
from stateful_kv.adapters.padded_batch import PaddedBatch, SharedKV
from stateful_kv.errors import require, require_int

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.cache_utils import Cache, CacheLayerMixin
except ImportError as error:
    message = "needs transformers 4.57 or later: pip install 'stateful-kv[hf]'"
    raise ImportError(f"stateful_kv.adapters.hf {message}") from error

NAME = "stateful_kv"  # of the attention, for `model.set_attn_implementation`
_SWITCH = f"call model.set_attn_implementation({NAME!r})"
_LAYER_TYPES = ("full_attention", "sliding_attention")
# Arguments by which models ask for what `paged_attention` does not compute.
_REFUSED = ("s_aux", "sinks", "position_bias", "block_indices")


class _PagedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer. The attention appends its keys: it knows the mask, and so which are tokens."""

    is_croppable = True

    def __init__(self, batch: PaddedBatch, index: int) -> None:
        super().__init__()
        self.batch, self.index = batch, index

    def lazy_initialization(self, *_: Any) -> None: ...

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        done = self.batch.num_layers_done
        if self.index > 0 and self.index != done:  # another attention has read the keys alone
            raise ValueError(f"layer {self.index}: expected {NAME!r} in {done} layers ({_SWITCH})")
        key.paged_layer = self  # type: ignore[attr-defined]  # so that the attention finds it
        return key, value

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, **how: Any
    ) -> Tensor:
        """Appends k and v [S, Hk, T, D]; what q [S, H, T, D] sees comes as [S, T, H, D]."""
        batch = self.batch
        if self.index == 0:
            batch.begin(k, mask)
        kv, pages = batch.shared.kv, batch.pages
        pools, scales = (kv.k[self.index], kv.v[self.index]), kv.scales(self.index)
        q_rows, k_rows, v_rows = (batch.tokens_of(x.transpose(1, 2)) for x in (q, k, v))
        ops.append_kv(k_rows, v_rows, pages.slots, *pools, *scales)
        table = (pages.page_table, pages.seq_lens, pages.query_offsets)
        how |= {"k_scales": scales[0], "v_scales": scales[1]}
        seen = ops.paged_attention(q_rows, *pools, *table, scale, **how)
        batch.end_layer()
        return batch.with_padding(seen, q.transpose(1, 2).shape)

    def get_seq_length(self, *_: Any) -> int:
        return self.batch.num_columns

    def get_max_length(self) -> int:
        return -1  # none

    get_max_cache_shape = get_max_length  # transformers 4

    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        num_new = query if isinstance(query, int) else query.shape[0]  # Tensor: transformers 4
        return self.batch.num_columns + num_new, 0


class PagedCache(Cache):  # type: ignore[misc]
    """Keys and values on pages of a pool; forks share pages and copy those that they write to.

    Padding has no place in the pool. Layers with a sliding window see only that, but tokens behind
    it stay in the pool. Beams are forks; drafts that `generate` takes back are cropped.

    Args:
        config: of a model whose attention is "stateful_kv".
        kv_tokens: tokens that the pool holds, for this cache and all its forks; each sequence takes
            whole pages.
        page_size: tokens of a page.
        dtype: of the pool: float32, float16, bfloat16 or int8; None = that of the keys.

    Raises:
        ValueError: the model has an attention that `paged_attention` does not compute.
        OutOfPagesError: from a pass that finds the pool full; the cache is as it was before it.
    """

    def __init__(
        self, config: Any, kv_tokens: int, page_size: int = 64, dtype: torch.dtype | None = None
    ) -> None:
        config = config.get_text_config(decoder=True)
        require_int("kv_tokens", kv_tokens, 1)
        require_int("page_size", page_size, 1)
        used = config._attn_implementation
        require(used == NAME, "config", f"expected the attention {NAME!r} ({_SWITCH})", used)
        others = set(getattr(config, "layer_types", None) or ()).difference(_LAYER_TYPES)
        require(not others, "config.layer_types", f"expected {_LAYER_TYPES}", sorted(others))
        num_shared = getattr(config, "num_kv_shared_layers", None) or 0
        require(num_shared == 0, "config.num_kv_shared_layers", "expected 0", num_shared)
        shared = SharedKV(config.num_hidden_layers, kv_tokens, page_size, dtype)
        self._use(PaddedBatch(shared))

    def _use(self, batch: PaddedBatch) -> None:
        layers = [_PagedLayer(batch, index) for index in range(batch.shared.num_layers)]
        super().__init__(layers=layers)
        self._batch = batch

    def fork(self) -> PagedCache:
        """A cache with the same content that goes on by itself; copies no KV."""
        other = type(self).__new__(type(self))
        other._use(self._batch.fork())
        return other

    def __deepcopy__(self, memo: object) -> PagedCache:
        return self.fork()

    def crop(self, num: int) -> None:
        """Drops the last -num tokens of each row, or if num > 0 all but the first num; 0: none."""
        length = self._batch.num_columns
        if num != 0:
            self._batch.crop(max(0, length + num) if num < 0 else min(num, length))

    def reset(self) -> None:
        """Drops all tokens; the next pass may have another batch size."""
        self._batch.drop()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes a fork of row beam_idx[i]."""
        self._batch.select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows."""
        self._batch.select(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes `repeats` rows."""
        rows = range(self._batch.num_sequences)
        self._batch.select([row for row in rows for _ in range(repeats)])


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """What `transformers` calls in each layer; the arguments are its own."""
    layer = getattr(key, "paged_layer", None)
    if layer is None:
        fix = "pass past_key_values=PagedCache(model.config, kv_tokens=...)"
        raise ValueError(f"attention {NAME!r}: expected keys of a PagedCache ({fix}), got others")
    require(dropout == 0, "dropout", "expected 0 (call model.eval())", dropout)
    is_causal = more.get("is_causal", getattr(module, "is_causal", True))
    require(is_causal is not False, "is_causal", "expected causal attention", is_causal)
    for name in _REFUSED:
        require(more.get(name) is None, name, "expected None", "a tensor")
    shape = [0, 0] if attention_mask is None else list(attention_mask.shape)
    require(len(shape) == 2, "attention_mask", "expected [batch, tokens], 0 for padding", shape)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    how = {"sliding_window": sliding_window or 0, "soft_cap": softcap or 0.0}
    return layer.attend(query, key, value, attention_mask, scale, **how), None


def _mask(
    *_: Any, attention_mask: Tensor | None = None, allow_is_causal_skip: bool = True, **more: Any
) -> Tensor | None:
    """What `attention` gets as its mask: [batch, tokens] as the caller gave it."""
    if more.get("use_vmap") or not allow_is_causal_skip:
        raise ValueError(f"attention {NAME!r}: expected a causal mask, the model makes another one")
    return attention_mask


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, _mask)

__all__ = ["NAME", "PagedCache", "attention"]
