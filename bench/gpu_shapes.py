"""Shapes of the attention cases for GPUs, their inputs, and the work they cannot do without."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from bench.harness import Work


@dataclass(frozen=True)
class AttentionShape:
    """One layer's attention of several sequences that are equally long.

    Attributes:
        sequences: S.
        context: tokens before the new rows, those of `shared` among them.
        rows: new rows of each sequence.
        shared: tokens that all sequences begin with, on the same pages; whole pages.
        heads: H.
        kv_heads: Hk.
        head_dim: D.
        page_size: B.
    """

    sequences: int
    context: int
    rows: int = 1
    shared: int = 0
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 64

    def small(self) -> AttentionShape:
        """The same kind of case in little, for smoke runs."""
        return replace(
            self,
            sequences=min(self.sequences, 3),
            context=(128 if self.shared else 0) + 70,
            rows=self.rows if self.rows <= 16 else 20,
            shared=128 if self.shared else 0,
            heads=4,
            kv_heads=2,
            head_dim=64,
        )

    @property
    def kv_len(self) -> int:
        """KV length of each sequence, its new rows included."""
        return self.context + self.rows

    @property
    def kv_tokens(self) -> int:
        """Tokens whose K and V must be read, each once."""
        return self.shared + self.sequences * (self.kv_len - self.shared)

    @property
    def scale(self) -> float:
        """Factor of the scores."""
        return float(self.head_dim**-0.5)

    def kv_bytes(self, item_bytes: int) -> int:
        """Bytes of the K and V of one copy of the inputs."""
        return 2 * self.kv_tokens * self.kv_heads * self.head_dim * item_bytes

    def work(self, item_bytes: int) -> Work:
        """K and V once, queries and results; two products for each key that a row sees."""
        rows = self.sequences * self.rows
        row_bytes = 2 * rows * self.heads * self.head_dim * item_bytes
        seen = self.rows * self.context + self.rows * (self.rows + 1) // 2
        flops = 4 * self.sequences * seen * self.heads * self.head_dim
        return Work(self.kv_bytes(item_bytes) + row_bytes, flops)


@dataclass(frozen=True)
class AttentionInputs:
    """Tensors of a shape; pools of several copies, on permuted pages.

    Attributes:
        shape: whose they are.
        q: [N, H, D].
        pools: K and V of each copy, [P, Hk, B, D].
        page_table: int32[S, M].
        seq_lens: int32[S].
        query_offsets: int32[S + 1].
        group_offsets: int32[2], one group of all sequences.
        prefix_lens: int32[1], what they share.
    """

    shape: AttentionShape
    q: Tensor
    pools: list[tuple[Tensor, Tensor]]
    page_table: Tensor
    seq_lens: Tensor
    query_offsets: Tensor
    group_offsets: Tensor
    prefix_lens: Tensor

    @cached_property
    def contiguous(self) -> list[tuple[Tensor, Tensor]]:
        """K and V of each copy in sequence order, [S, Hk, L, D], in the dtype of q."""
        return [(self._gather(k), self._gather(v)) for k, v in self.pools]

    def _gather(self, pool: Tensor) -> Tensor:
        pages = pool.to(self.q.dtype)[self.page_table.long()]  # [S, M, Hk, B, D]
        merged = pages.transpose(1, 2).flatten(2, 3)[:, :, : self.shape.kv_len]
        return merged.contiguous()

    def last_rows(self, rows: int) -> AttentionInputs:
        """The same sequences, of each only the last `rows` query rows."""
        shape = self.shape
        per_sequence = self.q.view(shape.sequences, shape.rows, shape.heads, shape.head_dim)
        less = replace(shape, rows=rows, context=shape.kv_len - rows)
        q = per_sequence[:, shape.rows - rows :].flatten(0, 1).contiguous()
        return replace(self, shape=less, q=q, query_offsets=_offsets(less, q.device))


def make_inputs(
    shape: AttentionShape, copies: int, device: str, q_dtype: torch.dtype, kv_dtype: torch.dtype
) -> AttentionInputs:
    """Random inputs of a shape on a device."""
    size = shape.page_size
    shared_pages = shape.shared // size
    own_pages = -(-(shape.kv_len - shape.shared) // size)
    num_pages = shared_pages + shape.sequences * own_pages
    ids = torch.randperm(num_pages, dtype=torch.int32)
    own = ids[shared_pages:].view(shape.sequences, own_pages)
    shared = ids[:shared_pages].expand(shape.sequences, shared_pages)
    page_table = torch.cat([shared, own], dim=1).contiguous()
    pool_shape = (num_pages, shape.kv_heads, size, shape.head_dim)

    def pool() -> Tensor:
        return torch.randn(pool_shape, device=device).to(kv_dtype)

    num_rows = shape.sequences * shape.rows
    q = torch.randn(num_rows, shape.heads, shape.head_dim, device=device).to(q_dtype)

    def int32(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return AttentionInputs(
        shape=shape,
        q=q,
        pools=[(pool(), pool()) for _ in range(copies)],
        page_table=page_table.to(device),
        seq_lens=int32(*[shape.kv_len] * shape.sequences),
        query_offsets=_offsets(shape, q.device),
        group_offsets=int32(0, shape.sequences),
        prefix_lens=int32(shape.shared),
    )


def _offsets(shape: AttentionShape, device: torch.device) -> Tensor:
    steps = torch.arange(shape.sequences + 1, dtype=torch.int32)
    return (steps * shape.rows).to(device)
