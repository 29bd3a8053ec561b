"""The ragged batch: the only thing a model sees of the sessions it computes for."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch

from stateful_kv.system.device import to_device


class BatchPages(NamedTuple):
    """The part of a batch that says where KV lies; fields as in Batch."""

    page_table: torch.Tensor
    seq_lens: torch.Tensor
    query_offsets: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """One forward pass over new tokens of several sequences, as tensors only.

    Decode is a sequence with one new token, verify one with 1 + draft tokens, extend one with a
    chunk; nothing here tells them apart. S sequences, N new tokens in all, M page-table columns,
    R rows whose logits are wanted.

    Attributes:
        token_ids: int64[N], the new tokens, sequence after sequence.
        positions: int32[N], absolute position of each new token in its sequence.
        query_offsets: int32[S+1], row of the first new token of each sequence, then N.
        page_table: int32[S, M], pages of each sequence in order (short rows are padded).
        seq_lens: int32[S], KV length of each sequence including its new tokens.
        slots: int64[N], where in the pool the KV of each new token goes.
        logit_rows: int64[R], rows of token_ids whose logits are computed, ascending.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    query_offsets: torch.Tensor
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    slots: torch.Tensor
    logit_rows: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """New tokens N."""
        return self.token_ids.shape[0]

    @property
    def num_sequences(self) -> int:
        """Sequences S."""
        return self.seq_lens.shape[0]

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device, all tensors in one copy; on the CPU the batch itself."""
        if device.type == "cpu":
            return self
        tensors = [getattr(self, field.name) for field in fields(self)]
        return Batch(*to_device(tensors, device))
