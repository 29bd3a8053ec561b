"""paged_attention of one layer over a permuted page table, rotating over layers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bench import harness
from bench.harness import Case, Settings, Trial, Work
from bench.peers import torch_sdpa
from bench.suites import shapes
from stateful_kv import ops


def _contiguous(pool: Tensor, pages: Tensor, seq_len: int, dtype: torch.dtype) -> list[Tensor]:
    """K or V of each layer as [1, Hk, L, D], in sequence order."""
    layers = []
    for layer in pool:
        rows = layer[pages.long()].transpose(0, 1).flatten(1, 2)[:, :seq_len]
        layers.append(rows.to(dtype).contiguous()[None])
    return layers


def _setup(num_rows: int, seq_len: int, settings: Settings) -> Trial:
    kv_bytes = 2 * seq_len * shapes.NUM_KV_HEADS * shapes.HEAD_DIM * 2
    copies = shapes.rotations(kv_bytes, settings.cold_bytes)
    num_pages = -(-seq_len // shapes.PAGE_SIZE)
    k_pool = shapes.kv_pool(copies, num_pages, torch.float16)
    v_pool = shapes.kv_pool(copies, num_pages, torch.float16)
    pages = torch.randperm(num_pages).to(torch.int32)
    q = torch.randn(num_rows, shapes.NUM_HEADS, shapes.HEAD_DIM)
    scale = shapes.HEAD_DIM**-0.5
    table = pages[None].contiguous()
    seq_lens = torch.tensor([seq_len], dtype=torch.int32)

    def attend(query: Tensor, layer: int, length: Tensor) -> Tensor:
        offsets = torch.tensor([0, len(query)], dtype=torch.int32)
        return ops.paged_attention(
            query, k_pool[layer], v_pool[layer], table, length, offsets, scale
        )

    query_offsets = torch.tensor([0, num_rows], dtype=torch.int32)
    layers = [(k_pool[i], v_pool[i]) for i in range(copies)]

    def ours(index: int) -> Tensor:
        k, v = layers[index]
        return ops.paged_attention(q, k, v, table, seq_lens, query_offsets, scale)

    dtypes = {"torch_sdpa_fp32": torch.float32}
    for name, dtype in (("torch_sdpa_fp16", torch.float16), ("torch_sdpa_bf16", torch.bfloat16)):
        if settings.peer in ("all", name):
            dtypes[name] = dtype
    mask = torch_sdpa.causal_mask(num_rows, seq_len)
    peers = {}
    for name, dtype in dtypes.items():
        keys = _contiguous(k_pool, pages, seq_len, dtype)
        values = _contiguous(v_pool, pages, seq_len, dtype)
        query = q.transpose(0, 1)[None].to(dtype).contiguous()
        peers[name] = partial(_run_sdpa, query, keys, values, mask, scale)

    def check(peer: str) -> harness.Check:
        result = ours(0)
        # The first row as a decode step of its own, at its own position.
        first = attend(q[:1], 0, seq_lens - num_rows + 1)
        bits = torch.equal(first, result[:1])
        expected = peers[peer](0)[0].transpose(0, 1).float()
        tolerance = 1e-4 if peer == "torch_sdpa_fp32" else 2e-2
        return harness.compare(result, expected, tolerance, bits)

    seen = num_rows * seq_len - num_rows * (num_rows - 1) // 2
    return Trial(
        ours=ours,
        peers=peers,
        check=check,
        work=Work(kv_bytes, 4 * seen * shapes.NUM_HEADS * shapes.HEAD_DIM),
        rotations=copies,
        rotation_bytes=copies * kv_bytes,
        units=seq_len,
        unit="context token",
    )


def _run_sdpa(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    mask: Tensor | None,
    scale: float,
    index: int,
) -> Tensor:
    return torch_sdpa.sdpa(query, keys[index], values[index], mask, scale)


def cases(settings: Settings) -> Iterator[Case]:
    """Rows of a decode, a verify and a delta, by context."""
    contexts = (256,) if settings.smoke else (1024, 4096, 8192)
    for num_rows in (1, 4, 64):
        for seq_len in contexts:
            axes = {"rows": num_rows, "L": seq_len}
            yield Case("paged_attention", axes, partial(_setup, num_rows, seq_len))
