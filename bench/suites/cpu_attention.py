"""Suite `cpu_attention`: paged_attention of one layer over a permuted page table.

Calls go round more layers than the caches hold, so K and V come from memory. The peer is torch's
scaled dot product attention over the same values (those that the bytes of int8 pools stand for),
contiguous: the quickest of its formulations and of the dtypes, or the quickest formulation in the
dtype asked for. It goes round as many bytes as ours, which are fewer layers where its are larger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import harness
from bench.harness import Case, Settings, Trial, Work
from bench.peers.torch_attention import formulations
from bench.selection import Row
from bench.suites import peer_ways, shapes
from bench.ways import Ways
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
BEST = "torch_sdpa"  # the quickest of the others
PEERS = {
    "torch_sdpa_fp32": torch.float32,
    "torch_sdpa_fp16": torch.float16,
    "torch_sdpa_bf16": torch.bfloat16,
}
# Of the peers' ways beside their plain one.
TOLERANCES = {
    BEST: 2e-2,
    "torch_sdpa_fp32": 1e-4,
    "torch_sdpa_fp16": 2e-2,
    "torch_sdpa_bf16": 2e-2,
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


Attend = Callable[[int], Tensor]


def _torch_ways(
    q: Tensor,
    layers: list[_Layer],
    pages: Tensor,
    seq_len: int,
    settings: Settings,
    dtype: torch.dtype,
) -> dict[str, Attend]:
    """Formulations of torch in one dtype; calls give [1, H, N, D]."""
    each = 2 * seq_len * shapes.NUM_KV_HEADS * shapes.HEAD_DIM * dtype.itemsize
    own = layers[: shapes.rotations(each, settings.cold_bytes)]
    keys = [_contiguous(layer.k, layer.k_scales, pages, seq_len, dtype) for layer in own]
    values = [_contiguous(layer.v, layer.v_scales, pages, seq_len, dtype) for layer in own]
    query = q.transpose(0, 1)[None].to(dtype).contiguous()
    ways = formulations(query, shapes.NUM_KV_HEADS, seq_len, SCALE)

    def bind(way: Callable[[Tensor, Tensor], Tensor]) -> Attend:
        return lambda index: way(keys[index % len(keys)], values[index % len(keys)])

    return {f"{name}, {str(dtype).removeprefix('torch.')}": bind(way) for name, way in ways.items()}


def _peers(
    q: Tensor, layers: list[_Layer], pages: Tensor, seq_len: int, settings: Settings
) -> dict[str, Ways]:
    """The default peer and those asked for; each dtype has its ways."""
    is_best = settings.peer is None or settings.asks_for(BEST)
    by_peer = {
        name: _torch_ways(q, layers, pages, seq_len, settings, dtype)
        for name, dtype in PEERS.items()
        if is_best or settings.asks_for(name)
    }
    everything = {name: call for ways in by_peer.values() for name, call in ways.items()}
    chosen = {BEST: everything} if is_best else {}
    chosen |= {name: ways for name, ways in by_peer.items() if settings.asks_for(name)}
    return {
        name: peer_ways.ways(
            ways, lambda call: call, lambda call: call(0).float(), TOLERANCES[name]
        )
        for name, ways in chosen.items()
    }


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
        expected = peers[peer].plain(0)[0].transpose(0, 1).float()
        # K and V are the pool's rounded values on both sides; the peer rounds all it computes. The
        # plain way of the best one is float32.
        return harness.compare(result, expected, 1e-4 if peer == BEST else TOLERANCES[peer], bits)

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


def _all_cases(settings: Settings) -> list[Case]:
    """The full grid in float16, its corners in the other dtypes."""
    corners = cases(settings, (1, 16, 512), (2048, 8192), CORNERS)
    return [*cases(settings, kv_dtypes=("float16",)), *corners]


def rows(settings: Settings) -> list[Row]:
    """Names and axes of all cases."""
    return harness.rows_of(_all_cases(settings))


def run(settings: Settings, roofs: dict[str, Any], emit: Callable[[dict[str, Any]], None]) -> None:
    """Run the suite."""
    torch.manual_seed(0)
    with torch.inference_mode():
        harness.run_cases("cpu_attention", _all_cases(settings), settings, roofs, emit)
