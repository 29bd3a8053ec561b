"""A batch of texts with padding, on pages of a pool: what an adapter keeps for its caller.

The caller counts columns: all rows of its batch have the same number of them, some of them padding.
Only tokens have KV.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from stateful_kv.errors import require
from stateful_kv.kv.batch import BatchPages
from stateful_kv.kv.cache import KVCache
from stateful_kv.system.device import to_device

_NO_TOKENS = np.empty(0, dtype=np.int32)


class SharedKV:
    """KV of a batch and of its forks, made by the first keys: they say heads, dtype and device.

    Attributes:
        num_layers: layers of the model.
    """

    def __init__(
        self, num_layers: int, kv_tokens: int, page_size: int, dtype: torch.dtype | None
    ) -> None:
        self.num_layers = num_layers
        self._page_size, self._num_pages = page_size, -(-kv_tokens // page_size)
        self._dtype = dtype
        self._kv: KVCache | None = None
        # Sequences of batches that are gone. A finalizer can run inside of any call, so it only
        # adds them here, and the next pass releases them.
        self._unused: deque[int] = deque()

    def made_for(self, key: Tensor) -> KVCache:
        """The cache; key [S, Hk, T, D] is what its first pass brings."""
        if self._kv is None:
            sizes = (self.num_layers, key.shape[1], key.shape[3], self._num_pages, self._page_size)
            with torch.inference_mode(False):  # else passes outside of it could not write the pools
                self._kv = KVCache(*sizes, self._dtype or key.dtype, key.device)
        while self._unused:
            self._kv.release(self._unused.popleft())
        return self._kv

    @property
    def kv(self) -> KVCache:
        """The cache that the first pass made."""
        assert self._kv is not None
        return self._kv

    def release_with(self, owner: object, sequence_ids: list[int]) -> None:
        """The sequences that are in this list when the owner goes are released then."""
        weakref.finalize(owner, self._unused.extend, sequence_ids).atexit = False


class PaddedBatch:
    """The sequences of a batch, and the pass that is under way.

    Lengths move with the last layer: a pass that is cut off leaves them as they were.

    Attributes:
        shared: where the KV is.
        pages: where the tokens of the pass go; on the device.
        num_layers_done: of the pass.
    """

    def __init__(self, shared: SharedKV) -> None:
        self.shared = shared
        self.pages: BatchPages
        self.num_layers_done = 0
        self._new: Tensor | None = None  # bool[S, T], tokens of the pass; None = all
        self._ids: list[int] = []
        self._is_token = torch.ones(0, 0, dtype=torch.bool)  # [S, columns]
        self._next: tuple[list[int], Tensor]  # tokens of each sequence; _is_token after the pass
        shared.release_with(self, self._ids)

    @property
    def num_columns(self) -> int:
        """Tokens of each row so far, padding included."""
        return self._is_token.shape[1]

    @property
    def num_sequences(self) -> int:
        """Rows of the batch; 0 before the first pass."""
        return len(self._ids)

    def begin(self, key: Tensor, mask: Tensor | None) -> None:
        """Makes room for the tokens of a pass.

        Args:
            key: [S, Hk, T, D].
            mask: [S, columns + T], not 0 where a token is; None = all are.

        Raises:
            ValueError: another batch size, or a mask that differs from that of earlier passes.
            OutOfPagesError: the pool is full; nothing changed.
        """
        num_seqs, num_new, past = key.shape[0], key.shape[2], self.num_columns
        kv = self.shared.made_for(key)
        if past == 0:
            self.drop()
            self._ids += [kv.match_and_adopt(_NO_TOKENS)[0] for _ in range(num_seqs)]
            self._is_token = torch.ones(num_seqs, 0, dtype=torch.bool)
        require(num_seqs == len(self._ids), "batch size", f"expected {len(self._ids)}", num_seqs)
        shape = (num_seqs, past + num_new)
        is_token = torch.ones(shape, dtype=torch.bool) if mask is None else mask.bool().cpu()
        if is_token.shape != shape or not torch.equal(is_token[:, :past], self._is_token):
            rule = f"expected {list(shape)}, for the {past} cached columns with the earlier values"
            got = "None, all ones" if mask is None else f"{list(mask.shape)}"
            raise ValueError(f"attention_mask: {rule}, got {got}")
        new = is_token[:, past:]
        lens = new.sum(1).tolist()
        self._settle()
        pages = kv.prepare(self._ids, lens) or self._reserve_singly(lens)
        self.pages = BatchPages(*to_device(list(pages), key.device))
        self._new = None if bool(new.all()) else new.to(key.device)
        self._next = lens, is_token
        self.num_layers_done = 0

    def tokens_of(self, x: Tensor) -> Tensor:
        """[N, ...], the tokens of the pass in x [S, T, ...], without a copy where all are."""
        return x.flatten(0, 1) if self._new is None else x[self._new]

    def with_padding(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `tokens_of`: [S, T, ...], with zeros for padding."""
        if self._new is None:
            return rows.view(shape)
        padded = rows.new_zeros(shape)
        padded[self._new] = rows
        return padded

    def end_layer(self) -> None:
        """A layer is done; after the last one the tokens of the pass count."""
        self.num_layers_done += 1
        if self.num_layers_done == self.shared.num_layers:
            lens, self._is_token = self._next
            self.shared.kv.commit(self._ids, lens)

    def crop(self, num_columns: int) -> None:
        """Drops the columns from `num_columns` on."""
        lens = self._is_token[:, :num_columns].sum(1).tolist()
        for sequence_id, length in zip(self._ids, lens, strict=True):
            self.shared.kv.truncate(sequence_id, length)
        self._is_token = self._is_token[:, :num_columns]

    def drop(self) -> None:
        """Drops all."""
        for sequence_id in self._ids:
            self.shared.kv.release(sequence_id)
        self._ids.clear()
        self._is_token = self._is_token[:0, :0]

    def fork(self, rows: Sequence[int] | None = None) -> PaddedBatch:
        """A batch of these rows, None = all, on the same pages; who writes to one copies it."""
        self._settle()
        chosen = range(len(self._ids)) if rows is None else rows
        other = PaddedBatch(self.shared)
        other._ids += [self.shared.kv.fork(self._ids[row]) for row in chosen]
        other._is_token = self._is_token[list(chosen)]
        return other

    def select(self, rows: Sequence[int]) -> None:
        """Becomes the fork of these rows; one may stand there more than once."""
        other = self.fork(rows)
        self._ids[:], other._ids[:] = list(other._ids), list(self._ids)
        self._is_token = other._is_token
        other.drop()

    def _reserve_singly(self, lens: list[int]) -> BatchPages:
        """Raises an OutOfPagesError that says how much is missing, as `prepare` does not."""
        try:
            for sequence_id, num_tokens in zip(self._ids, lens, strict=True):
                self.shared.kv.reserve(sequence_id, num_tokens)
        except Exception:
            self._settle()
            raise
        return self.shared.kv.batch_pages(self._ids, lens)

    def _settle(self) -> None:
        """Gives back what a pass that was cut off had reserved."""
        for sequence_id in self._ids:
            self.shared.kv.truncate(sequence_id, self.shared.kv.committed_len(sequence_id))
