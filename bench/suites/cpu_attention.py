"""Suite `cpu_attention`: paged_attention of one layer over a permuted page table.

Calls go round more layers than the caches hold, so K and V come from memory. The peer is torch's
scaled dot product attention over the same values (those that the bytes of int8 pools stand for),
contiguous and in float32, or in the dtype asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import harness
from bench.harness import Case, Settings, Trial, Work
from bench.peers import torch_sdpa
from bench.suites import shapes
from stateful_kv import ops

ROWS = (1, 4, 16, 64, 512)
CONTEXTS = (1024, 2048, 6144, 8192)
KV_DTYPES = {
    "float16": torch.float16,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
CORNERS = ("float32", "bfloat16", "int8")  # dtypes measured on the corners of the grid only
SCALE = shapes.HEAD_DIM**-0.5
PEERS = {
    "torch_sdpa_fp32": torch.float32,
    "torch_sdpa_fp16": torch.float16,
    "torch_sdpa_bf16": torch.bfloat16,
}


class _Layer(NamedTuple):
    """KV of one layer, [P, Hk, B, D]; scales float32[P, Hk, B] where it is int8."""

    k: Tensor
    v: Tensor
    k_scales: Tensor | None = None
    v_scales: Tensor | None = None


def _layers(count: int, num_pages: int, dtype: torch.dtype) -> list[_Layer]:
    """Layers of random KV."""
    if dtype != torch.int8:
        pools = (shapes.kv_pool(count, num_pages, dtype) for _ in range(2))
        return list(map(_Layer, *pools))
    slots = torch.arange(num_pages * shapes.PAGE_SIZE)
    shape = (num_pages, shapes.NUM_KV_HEADS, shapes.PAGE_SIZE, shapes.HEAD_DIM)
    layers = []
    for _ in range(count):
        k, v = torch.randn(2, len(slots), shapes.NUM_KV_HEADS, shapes.HEAD_DIM)
        layer = _Layer(
            *(torch.zeros(shape, dtype=dtype) for _ in range(2)),
            *(torch.zeros(shape[:-1]) for _ in range(2)),
        )
        ops.append_kv(k, v, slots, *layer)
        layers.append(layer)
    return layers


def _contiguous(
    pool: Tensor, scales: Tensor | None, pages: Tensor, seq_len: int, dtype: torch.dtype
) -> Tensor:
    """K or V of a layer as [1, Hk, L, D], in sequence order."""
    values = pool if scales is None else pool * scales[..., None]
    rows = values[pages.long()].transpose(0, 1).flatten(1, 2)[:, :seq_len]
    return rows.to(dtype).contiguous()[None]


def _peers(
    q: Tensor, layers: list[_Layer], pages: Tensor, seq_len: int, settings: Settings
) -> dict[str, Callable[[int], Tensor]]:
    """Calls of the default peer and of those asked for."""
    mask = torch_sdpa.causal_mask(len(q), seq_len)
    peers = {}
    for name, dtype in PEERS.items():
        if name != "torch_sdpa_fp32" and not settings.asks_for(name):
            continue
        keys = [_contiguous(layer.k, layer.k_scales, pages, seq_len, dtype) for layer in layers]
        values = [_contiguous(layer.v, layer.v_scales, pages, seq_len, dtype) for layer in layers]
        query = q.transpose(0, 1)[None].to(dtype).contiguous()
        peers[name] = partial(_run_sdpa, query, keys, values, mask, SCALE)
    return peers


def _setup(num_rows: int, seq_len: int, kv_dtype: str, settings: Settings) -> Trial:
    dtype = KV_DTYPES[kv_dtype]
    vector_bytes = shapes.HEAD_DIM * dtype.itemsize + (4 if dtype == torch.int8 else 0)
    kv_bytes = 2 * seq_len * shapes.NUM_KV_HEADS * vector_bytes
    copies = shapes.rotations(kv_bytes, settings.cold_bytes)
    num_pages = -(-seq_len // shapes.PAGE_SIZE)
    layers = _layers(copies, num_pages, dtype)
    pages = torch.randperm(num_pages).to(torch.int32)
    q = torch.randn(num_rows, shapes.NUM_HEADS, shapes.HEAD_DIM)
    table = pages[None].contiguous()
    seq_lens = torch.tensor([seq_len], dtype=torch.int32)

    query_offsets = torch.tensor([0, num_rows], dtype=torch.int32)
    one_row = torch.tensor([0, 1], dtype=torch.int32)

    def attend(query: Tensor, layer: _Layer, length: Tensor, offsets: Tensor) -> Tensor:
        k, v, k_scales, v_scales = layer
        return ops.paged_attention(
            query, k, v, table, length, offsets, SCALE, k_scales=k_scales, v_scales=v_scales
        )

    def ours(index: int) -> Tensor:
        return attend(q, layers[index], seq_lens, query_offsets)

    peers = _peers(q, layers, pages, seq_len, settings)

    def check(peer: str) -> harness.Check:
        result = ours(0)
        # The first row once more, as a decode step at its position: the bits must be the same.
        first = attend(q[:1], layers[0], seq_lens - num_rows + 1, one_row)
        bits = torch.equal(first, result[:1])
        expected = peers[peer](0)[0].transpose(0, 1).float()
        # K and V are the pool's rounded values on both sides; the peer rounds all it computes.
        tolerance = 1e-4 if peer == "torch_sdpa_fp32" else 2e-2
        return harness.compare(result, expected, tolerance, bits)

    seen = num_rows * seq_len - num_rows * (num_rows - 1) // 2
    return Trial(
        ours=ours,
        peers={**peers},
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


def cases(
    settings: Settings,
    row_counts: Sequence[int] = ROWS,
    contexts: Sequence[int] = CONTEXTS,
    kv_dtypes: Sequence[str] = tuple(KV_DTYPES),
) -> Iterator[Case]:
    """Rows of a decode, a verify and a delta, by context; float16 first, the default."""
    if settings.smoke:
        row_counts, contexts = row_counts[:3], (512,)
    for kv_dtype in kv_dtypes:
        for num_rows in row_counts:
            for seq_len in contexts:
                axes = {"kv": kv_dtype, "rows": num_rows, "L": seq_len}
                setup = partial(_setup, num_rows, seq_len, kv_dtype)
                yield Case("paged_attention", axes, setup)


def run(settings: Settings, roofs: dict[str, Any], emit: Callable[[dict[str, Any]], None]) -> None:
    """Run the suite; the full grid in float16, its corners in the other dtypes."""
    torch.manual_seed(0)
    corners = cases(settings, (1, 16, 512), (2048, 8192), CORNERS)
    with torch.inference_mode():
        grid = cases(settings, kv_dtypes=("float16",))
        harness.run_cases("cpu_attention", [*grid, *corners], settings, roofs, emit)
