"""The ops of `torch.ops.stateful_kv`: one documented function each.

Symbols: S sequences, N new tokens of all sequences together, H query heads, Hk KV heads, D head
dimension, P pages in the pool, B page_size, M pages a sequence has at most, K input features,
V vocabulary. A slot is page * B + offset: one token position in the pool.

Rules that hold for every op:

- A wrong dtype is a TypeError; a wrong device, shape, stride or value is a ValueError. The message
  reads "op: argument: expected ..., got ...". Nothing is written if an argument is refused.
- No op copies or converts an argument behind your back: a layout it cannot read is an error.
- Values of ids, offsets and lengths are checked on the CPU only; on CUDA they are trusted.
- The ops are for inference: a tensor that requires grad is refused unless grad mode is off.
- An op that writes into its arguments returns None; the others return fresh tensors.
- While torch.compile or torch.export trace an op, the same code checks dtypes, shapes and strides:
  a wrong call fails there, with the same message.
"""

from __future__ import annotations

import stateful_kv._native  # noqa: F401  (loads the library that registers the ops)
from stateful_kv.ops.attention import paged_attention, shared_prefix_attention
from stateful_kv.ops.choose import argmax, sample, verify_draft
from stateful_kv.ops.kv import append_kv, copy_pages, rope_append_kv
from stateful_kv.ops.linear import LAYER_TENSORS, decoder_layers, linear_top_k, quantized_linear
from stateful_kv.ops.loop import FilledRows, advance_sequences, fill_rows, ngram_lookup
from stateful_kv.ops.rows import add_rms_norm, rms_norm, silu_mul

__all__ = [
    "LAYER_TENSORS",
    "FilledRows",
    "add_rms_norm",
    "advance_sequences",
    "append_kv",
    "argmax",
    "copy_pages",
    "decoder_layers",
    "fill_rows",
    "linear_top_k",
    "ngram_lookup",
    "paged_attention",
    "quantized_linear",
    "rms_norm",
    "rope_append_kv",
    "sample",
    "shared_prefix_attention",
    "silu_mul",
    "verify_draft",
]
