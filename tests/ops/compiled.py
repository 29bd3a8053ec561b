"""Ops as modules, and calls of two sizes, for torch.compile, torch.export and AOTInductor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stateful_kv import ops
from tests.ops.cases import WRITTEN, valid_arguments

Arguments = dict[str, Any]

# Of each op, what a batch of twice the size has twice, and the offsets that go on.
BATCHED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "append_kv": (("k", "v", "slots"), ()),
    "copy_pages": (("page_copies",), ()),
    "paged_attention": (("q", "page_table", "seq_lens"), ("query_offsets",)),
    "shared_prefix_attention": (
        ("q", "page_table", "seq_lens", "prefix_lens"),
        ("query_offsets", "group_offsets"),
    ),
    "rms_norm": (("x",), ()),
    "add_rms_norm": (("x", "residual"), ()),
    "rope_append_kv": (("q", "k", "v", "positions", "slots"), ()),
    "silu_mul": (("gate_up",), ()),
    "quantized_linear": (("x", "residual"), ()),
    "linear_top_k": (("x",), ()),
    "decoder_layers": (
        ("x", "positions", "slots", "page_table", "seq_lens", "logit_rows", "output"),
        ("query_offsets",),
    ),
    "argmax": (("logits",), ()),
    "sample": (
        ("logits", "seeds", "positions", "temperatures", "top_k", "top_p", "min_p"),
        (),
    ),
    "ngram_lookup": (("tokens", "lengths"), ("offsets",)),
    "verify_draft": (("draft_ids", "target_ids"), ("draft_offsets",)),
    "fill_rows": (
        (
            *("history", "lengths", "num_left", "kv_limits", "draft_ids", "num_draft"),
            "page_table",
        ),
        (),
    ),
    "advance_sequences": (
        (
            *("token_ids", "target_ids", "target_values", "stop_ids", "history", "lengths"),
            *("num_left", "counts"),
        ),
        ("query_offsets",),
    ),
}


def doubled(op: str, arguments: Arguments) -> Arguments:
    """The same batch twice, one behind the other."""
    batched, offsets = BATCHED[op]
    larger = dict(arguments)
    for name in batched:
        if arguments[name] is not None:
            larger[name] = torch.cat([arguments[name], arguments[name]])
    for name in offsets:
        values = arguments[name]
        larger[name] = torch.cat([values, values[1:] + values[-1]])
    return larger


class OpModule(torch.nn.Module):
    """Calls one op; its tensors are the inputs, all other arguments are fixed."""

    def __init__(self, op: str, arguments: Arguments) -> None:
        super().__init__()
        self.op = op
        self.names = [name for name, value in arguments.items() if isinstance(value, Tensor)]
        self.rest = {name: v for name, v in arguments.items() if not isinstance(v, Tensor)}

    def inputs(self, arguments: Arguments) -> tuple[Tensor, ...]:
        """Copies, which the op may write."""
        return tuple(arguments[name].clone() for name in self.names)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What the op returns; what it writes is seen in the inputs."""
        result = getattr(ops, self.op)(**dict(zip(self.names, inputs, strict=True)), **self.rest)
        if result is None:
            return ()
        return tuple(result) if isinstance(result, tuple) else (result,)

    def written(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Those of the inputs that the op writes."""
        given = dict(zip(self.names, inputs, strict=True))
        return [given[name] for name in WRITTEN.get(self.op, ())]


def two_sizes(op: str) -> tuple[Arguments, Arguments]:
    """Valid arguments of an op, and a batch of twice the size."""
    arguments = valid_arguments(op)
    return arguments, doubled(op, arguments)


class DecoderBlock(torch.nn.Module):
    """A layer of a Llama-like model; q, k and v are views of one fused projection."""

    def __init__(self, num_heads: int = 4, num_kv_heads: int = 2, head_dim: int = 32) -> None:
        super().__init__()
        self.heads = num_heads, num_kv_heads, num_kv_heads
        self.head_dim = head_dim
        hidden, inner = num_heads * head_dim, 192
        width = sum(self.heads) * head_dim

        def weight(out_features: int, in_features: int) -> Tensor:
            return torch.randn(out_features // 16, in_features, 16) / in_features**0.5

        self.register_buffer("attn_norm", torch.rand(hidden) + 0.5)
        self.register_buffer("ffn_norm", torch.rand(hidden) + 0.5)
        self.register_buffer("qkv", weight(width, hidden))
        self.register_buffer("o", weight(hidden, hidden))
        self.register_buffer("gate_up", weight(2 * inner, hidden))
        self.register_buffer("down", weight(hidden, inner))
        self.sizes = {"qkv": width, "o": hidden, "gate_up": 2 * inner, "down": hidden}

    def linear(self, x: Tensor, name: str) -> Tensor:
        """x times a packed weight."""
        weight = getattr(self, name)
        return ops.quantized_linear(x, weight, None, None, None, self.sizes[name])

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        slots: Tensor,
        page_table: Tensor,
        seq_lens: Tensor,
        query_offsets: Tensor,
        k_pool: Tensor,
        v_pool: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The norm of the next layer's input, and its token ids as a stand-in for a head."""
        fused = self.linear(ops.rms_norm(x, self.attn_norm, 1e-5), "qkv")
        heads = fused.view(-1, sum(self.heads), self.head_dim)
        q, k, v = torch.split(heads, self.heads, dim=1)
        ops.rope_append_kv(q, k, v, positions, cos_sin, slots, k_pool, v_pool)
        attended = ops.paged_attention(
            q, k_pool, v_pool, page_table, seq_lens, query_offsets, self.head_dim**-0.5
        )
        change = self.linear(attended.flatten(1), "o")
        normalised, x = ops.add_rms_norm(change, x, self.ffn_norm, 1e-5)
        x = x + self.linear(ops.silu_mul(self.linear(normalised, "gate_up")), "down")
        return x, ops.argmax(x)[0]


def block_inputs(num_sequences: int) -> tuple[Tensor, ...]:
    """Two new tokens of each sequence, which has a page of its own and some tokens before."""
    rows = 2 * num_sequences
    past = torch.arange(num_sequences) % 5
    positions = (past[:, None] + torch.arange(2)).flatten()
    pages = torch.arange(1, num_sequences + 1)
    angles = torch.arange(16)[:, None] * torch.logspace(0, -2, 16)
    generator = torch.Generator().manual_seed(num_sequences)
    k_pool, v_pool = (torch.randn(12, 2, 16, 32, generator=generator) for _ in range(2))
    return (
        torch.randn(rows, 128, generator=generator),
        positions.int(),
        torch.cat([angles.cos(), angles.sin()], dim=1),
        pages.repeat_interleave(2) * 16 + positions,
        pages[:, None].int(),
        (past + 2).int(),
        (torch.arange(num_sequences + 1) * 2).int(),
        k_pool,
        v_pool,
    )
