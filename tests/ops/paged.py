"""Builds paged batches that punish a kernel for reading what it should not.

Page ids are permuted, the first and last page of a pool belong to nobody, every slot that holds
no token is NaN, and unused page table entries hold a huge id.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

HUGE_PAGE_ID = 2**31 - 1


@dataclass(frozen=True)
class PagedBatch:
    """Arguments of `paged_attention` and the dense keys and values they stand for."""

    query: Tensor
    k_pool: Tensor
    v_pool: Tensor
    page_table: Tensor
    seq_lens: Tensor
    query_offsets: Tensor
    keys: list[Tensor]
    values: list[Tensor]

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """The tensors in the order of the schema."""
        return (
            self.query,
            self.k_pool,
            self.v_pool,
            self.page_table,
            self.seq_lens,
            self.query_offsets,
        )

    @property
    def scale(self) -> float:
        """The usual 1 / sqrt(D)."""
        return float(self.query.shape[-1] ** -0.5)

    def rows_of(self, sequence: int) -> slice:
        """Rows of one sequence in query and output."""
        begin, end = self.query_offsets[sequence : sequence + 2].tolist()
        return slice(begin, end)

    def with_layout(self, page_size: int) -> PagedBatch:
        """The same content on other pages."""
        k_pool, v_pool, page_table = lay_out(self.keys, self.values, page_size)
        return replace(self, k_pool=k_pool, v_pool=v_pool, page_table=page_table)


def offsets(lengths: list[int], device: torch.device | str = "cpu") -> Tensor:
    """int32[S + 1] running sum that starts at 0."""
    running = torch.tensor([0, *lengths]).cumsum(0)
    return running.to(dtype=torch.int32, device=device)


def lay_out(
    keys: list[Tensor], values: list[Tensor], page_size: int, spare: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes sequences [L, Hk, D] to random pages; returns k_pool, v_pool, page_table."""
    _, num_kv_heads, head_dim = keys[0].shape
    counts = [-(-k.shape[0] // page_size) for k in keys]
    num_used = sum(counts)
    num_pages = num_used + spare + 2  # a guard page at each end
    free = (torch.randperm(num_used + spare) + 1).tolist()
    shape = (num_pages, num_kv_heads, page_size, head_dim)
    k_pool = torch.full(shape, float("nan"), dtype=keys[0].dtype, device=keys[0].device)
    v_pool = torch.full_like(k_pool, float("nan"))
    width = max([*counts, 1]) + 2
    page_table = torch.full((len(keys), width), HUGE_PAGE_ID, dtype=torch.int32)
    for sequence, count in enumerate(counts):
        for index in range(count):
            page = free.pop()
            page_table[sequence, index] = page
            part = slice(index * page_size, (index + 1) * page_size)
            size = keys[sequence][part].shape[0]
            k_pool[page, :, :size] = keys[sequence][part].transpose(0, 1)
            v_pool[page, :, :size] = values[sequence][part].transpose(0, 1)
    return k_pool, v_pool, page_table.to(keys[0].device)


def make_batch(
    kv_lens: list[int],
    query_lens: list[int],
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    page_size: int = 16,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cpu",
) -> PagedBatch:
    """A ragged batch of random content."""
    shape = (num_kv_heads, head_dim)
    keys = [torch.randn(n, *shape, device=device).to(dtype) for n in kv_lens]
    values = [torch.randn(n, *shape, device=device).to(dtype) for n in kv_lens]
    k_pool, v_pool, page_table = lay_out(keys, values, page_size)
    return PagedBatch(
        query=torch.randn(sum(query_lens), num_heads, head_dim, device=device),
        k_pool=k_pool,
        v_pool=v_pool,
        page_table=page_table,
        seq_lens=torch.tensor(kv_lens, dtype=torch.int32, device=device),
        query_offsets=offsets(query_lens, device),
        keys=keys,
        values=values,
    )


def make_pools(
    num_pages: int,
    num_kv_heads: int,
    page_size: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Two empty pools, all NaN."""
    shape = (num_pages, num_kv_heads, page_size, head_dim)
    k_pool = torch.full(shape, float("nan"), dtype=dtype, device=device)
    return k_pool, k_pool.clone()


def quantized(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """int8 vectors and float32 scales (no last dimension) that stand for float32 vectors.

    A vector with NaN, such as a slot without a token, gets the scale NaN and zeros.
    """
    scales = vectors.float().abs().amax(-1) / 127
    steps = vectors.float() / scales[..., None]
    is_number = torch.isfinite(scales) & (scales > 0)
    steps = torch.where(is_number[..., None], steps, torch.zeros_like(steps))
    scales = torch.where(torch.isfinite(scales), scales, torch.full_like(scales, float("nan")))
    return steps.round().clamp(-127, 127).to(torch.int8), scales


def random_slots(count: int, num_pages: int, page_size: int) -> Tensor:
    """Distinct slots that leave the first and the last page alone."""
    usable = torch.randperm((num_pages - 2) * page_size)[:count] + page_size
    return usable.to(torch.int64)
