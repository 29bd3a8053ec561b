"""KVCache: pool tensors, page pool, sequences and the prefix tree; the only owner of KV."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Sequence

import torch

from stateful_kv import ops
from stateful_kv._native import _C, check_device
from stateful_kv.errors import InvalidRequestError, OutOfPagesError
from stateful_kv.kv.batch import BatchPages
from stateful_kv.system.device import free_memory, to_device
from stateful_kv.system.memory import HUGE_PAGE_BYTES, huge_page_region
from stateful_kv.types import TokenArray

DTYPES = {
    "float16": torch.float16,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}

# Tenants, adapters and numerics get roots of their own once there are several of them.
DEFAULT_ROOT_KEY = 0


class KVCache:
    """Paged key/value storage with prefix sharing.

    Sequences hold unfinished pages, the radix tree holds finished ones. Lengths move only in
    `commit` and `truncate`; whatever a step wrote beyond them never happened.

    Attributes:
        k: [num_layers, P, Hk, B, D], keys; `cache.k[layer]` is what an op takes.
        v: [num_layers, P, Hk, B, D], values.
        k_scales: float32[num_layers, P, Hk, B], scales of the keys of int8 pools; else None.
        v_scales: float32[num_layers, P, Hk, B], scales of the values of int8 pools; else None.
        page_size: tokens a page holds (B).
        num_pages: pages of the pool (P).
        device: where the pools lie; page tables and lengths are kept on the host.
        relieve: called when eviction does not free enough; releases a sequence of something idle
            and returns True, or returns False when there is nothing left to release.
        holders: returns the sequences that `relieve` keeps and those that it may release; without
            it nothing counts as releasable.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype = torch.float16,
        device: str | torch.device = "cpu",
    ) -> None:
        self.device = check_device(device)
        shape = (num_layers, num_pages, num_kv_heads, page_size, head_dim)
        pools = _make_pools(shape, dtype, self.device)
        self.k, self.v, self.k_scales, self.v_scales = pools
        self.page_size = page_size
        self.num_pages = num_pages
        self.relieve: Callable[[], bool] | None = None
        self.holders: Callable[[], tuple[list[int], list[int]]] | None = None
        self._pool = _C.PagePool(num_pages, page_size)
        self._table = _C.SequenceTable(self._pool)
        self._tree = _C.RadixTree(self._pool)

    @property
    def num_free_pages(self) -> int:
        """Pages nobody holds."""
        return self._pool.num_free()

    @property
    def num_evictable_pages(self) -> int:
        """Pages only the tree holds, which `reserve` may take."""
        return self._tree.num_evictable_pages()

    @property
    def num_sequences(self) -> int:
        """Living sequences."""
        return self._table.num_sequences()

    def length(self, sequence_id: int) -> int:
        """Tokens of the sequence that have KV."""
        return self._table.length(sequence_id)

    def num_pages_of(self, sequence_id: int) -> int:
        """Pages the sequence holds, shared ones included."""
        return self._table.num_pages(sequence_id)

    def match_len(self, tokens: TokenArray) -> int:
        """How many of the first tokens have KV in the tree; changes nothing."""
        return self._tree.match(DEFAULT_ROOT_KEY, tokens).num_tokens

    def match_and_adopt(self, tokens: TokenArray) -> tuple[int, int]:
        """Makes a sequence that starts with the longest cached prefix of `tokens`.

        Returns:
            The sequence id and the number of tokens it already has KV for.
        """
        match = self._tree.match(DEFAULT_ROOT_KEY, tokens)
        if match.num_tokens == 0:
            return self._table.create(), 0
        sequence_id = self._table.adopt(match.pages, match.num_tokens)
        self._tree.touch(match)
        return sequence_id, match.num_tokens

    def reserve(self, sequence_id: int, num_tokens: int, *, can_relieve: bool = True) -> None:
        """Makes room for `num_tokens` more tokens, evicting cached prefixes where needed.

        If the next token goes to a page that is shared, the sequence gets a copy of its own.

        Args:
            sequence_id: where the tokens go.
            num_tokens: how many.
            can_relieve: release idle sequences too if eviction is not enough.

        Raises:
            OutOfPagesError: all that may be given up is not enough; nothing changed.
        """
        copies = self._table.append(sequence_id, num_tokens)
        if copies is None:
            self.check_room(sequence_id, num_tokens, can_relieve=can_relieve)
        while copies is None:
            wanted = self._table.pages_needed(sequence_id, num_tokens)
            short = max(1, wanted - self._pool.num_free())
            freed = self._tree.evict(short)
            if freed < short and not (can_relieve and self.relieve is not None and self.relieve()):
                raise self._out_of_pages(wanted)
            copies = self._table.append(sequence_id, num_tokens)
        if copies.shape[0]:
            self._copy_pages(copies)

    def scales(self, layer: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Scales of the layer's keys and values, what an op takes beside int8 pools; else None."""
        if self.k_scales is None or self.v_scales is None:
            return None, None
        return self.k_scales[layer], self.v_scales[layer]

    def _copy_pages(self, page_copies: torch.Tensor) -> None:
        (page_copies,) = to_device([page_copies], self.device)
        ops.copy_pages(page_copies, self.k, self.v, self.k_scales, self.v_scales)

    def check_room(self, sequence_id: int, num_tokens: int, *, can_relieve: bool = True) -> None:
        """Raises OutOfPagesError if `reserve` could not make room; changes nothing either way."""
        wanted = self._table.pages_needed(sequence_id, num_tokens)
        free = self._pool.num_free()
        if wanted <= free or wanted <= free + self._tree.num_evictable_pages():
            return
        if not can_relieve or self.relieve is None or self.holders is None:
            raise self._out_of_pages(wanted)
        kept, idle = self.holders()
        tables = [self._table.page_table(one) for one in {sequence_id, *kept}]
        pages = torch.unique(torch.cat(tables))
        room = self.num_pages - pages.numel() - self._tree.num_blocked_pages(pages)
        # A copy of the tail is not needed once the only others that share it are released.
        if wanted - self._is_tail_shared_with_idle_only(sequence_id, idle) > room:
            raise self._out_of_pages(wanted)

    def _is_tail_shared_with_idle_only(self, sequence_id: int, idle: Sequence[int]) -> bool:
        length = self._table.length(sequence_id)
        if length % self.page_size == 0:
            return False
        tail = int(self._table.page_table(sequence_id)[length // self.page_size])
        num_others = self._pool.ref_count(tail) - 1
        num_idle = sum(int((self._table.page_table(one) == tail).any()) for one in idle)
        return 0 < num_others == num_idle

    def check_fits(self, num_tokens: int) -> None:
        """Raises OutOfPagesError if a sequence of `num_tokens` can never fit into the pool."""
        wanted = -(-num_tokens // self.page_size)
        if wanted > self.num_pages:
            raise self._out_of_pages(wanted)

    def page_table(self, sequence_id: int) -> torch.Tensor:
        """int32[pages], the sequence's pages in order, those reserved included; on the host."""
        return self._table.page_table(sequence_id)

    def batch_pages(self, sequence_ids: Sequence[int], query_lens: Sequence[int]) -> BatchPages:
        """Where the reserved tokens of a step go: page tables, positions and slots."""
        return BatchPages(
            *self._table.fill_batch(
                torch.tensor(sequence_ids, dtype=torch.int64),
                torch.tensor(query_lens, dtype=torch.int32),
            )
        )

    def commit(self, sequence_id: int, num_tokens: int) -> None:
        """Makes the next `num_tokens` reserved tokens part of the sequence; trims the rest."""
        self._table.commit(sequence_id, num_tokens)

    def truncate(self, sequence_id: int, length: int) -> None:
        """Drops the tokens from `length` on, and every reservation."""
        self._table.truncate(sequence_id, length)

    def fork(self, sequence_id: int) -> int:
        """Returns a new sequence that shares all pages; O(pages)."""
        return self._table.fork(sequence_id)

    def release_others(self, held: Collection[int]) -> None:
        """Ends the sequences that are not `held`: those an interrupt left without an owner."""
        for sequence_id in self._table.sequence_ids():
            if sequence_id not in held:
                self._table.release(sequence_id)

    def release(self, sequence_id: int) -> None:
        """Ends the sequence; pages nobody else holds become free."""
        self._table.release(sequence_id)

    def insert(self, sequence_id: int, tokens: TokenArray, *, with_partial_page: bool) -> int:
        """Gives the sequence's pages to the tree, so other sequences can start from them.

        Pages whose content the tree already has are folded: the sequence moves to the tree's.

        Args:
            sequence_id: whose pages.
            tokens: the sequence's tokens; at least its length.
            with_partial_page: also the last page if it is not full. Only for a sequence that
                will be released, else its next token would have to copy that page.

        Returns:
            How many tokens the tree now has of this sequence.
        """
        length = self._table.length(sequence_id)
        num_full = length // self.page_size
        count = length if with_partial_page else num_full * self.page_size
        if count == 0:
            return 0
        pages = self._table.page_table(sequence_id)[: -(-count // self.page_size)]
        result = self._tree.insert(DEFAULT_ROOT_KEY, tokens[:count], pages)
        canonical = result.pages[:num_full]
        if not torch.equal(canonical, pages[:num_full]):
            self._table.replace_prefix(sequence_id, canonical)
        return count

    def insert_tail_copy(self, sequence_id: int, tokens: TokenArray) -> None:
        """Gives the tree a copy of the sequence's partly filled last page, and its full pages.

        The sequence goes on writing into its own page. The copy belongs to the tree alone, so it
        can be evicted at once; nothing happens where no page is free or evictable for it.
        """
        length = self._table.length(sequence_id)
        tokens = tokens[:length]
        if length % self.page_size == 0 or self.match_len(tokens) == length:
            return
        pages = self._table.page_table(sequence_id)[: length // self.page_size + 1]
        if self._pool.num_free() == 0:
            self._tree.evict(1)
        copy = self._pool.allocate(1)
        if copy is None:
            return
        try:
            self._copy_pages(torch.stack([pages[-1:], copy], dim=1))
            self._tree.insert(DEFAULT_ROOT_KEY, tokens, torch.cat([pages[:-1], copy]))
        finally:
            self._pool.release(copy)

    def evict_all(self) -> int:
        """Empties the tree; returns the number of pages that became free."""
        return self._tree.evict_all()

    def check_integrity(self) -> str | None:
        """Describes the first broken invariant of pool, sequences and tree, or returns None."""
        return (
            self._pool.check_integrity()
            or self._table.check_integrity()
            or self._tree.check_integrity()
            or _C.check_references(self._pool, self._table, [self._tree])
        )

    def _out_of_pages(self, wanted: int) -> OutOfPagesError:
        free, evictable = self._pool.num_free(), self._tree.num_evictable_pages()
        pinned = self.num_pages - free - evictable
        return OutOfPagesError(wanted, free, evictable, pinned)


def _make_pools(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Allocates pools of keys and values, and their scales where the dtype is int8.

    Raises:
        InvalidRequestError: that fails; it names the size.
    """
    num_pages, page_size = shape[1], shape[3]
    num_bytes = 2 * math.prod(shape) * dtype.itemsize
    if dtype == torch.int8:  # and a scale for each vector
        num_bytes += 2 * math.prod(shape[:-1]) * torch.float32.itemsize
    size = f"a KV pool of {num_pages} pages of {page_size} tokens ({num_bytes} bytes)"
    limit = _physical_memory() if device.type == "cpu" else free_memory(device)
    # Checked first: memory is promised freely, and the process killed when it is written to.
    if limit is not None and num_bytes > limit:
        where = "memory" if device.type == "cpu" else f"the free memory of {device}"
        raise InvalidRequestError(
            f"kv_tokens: expected a KV pool that fits into {where} ({limit} bytes), got {size}"
        )
    try:
        k, v = _zeros(shape, dtype, device), _zeros(shape, dtype, device)
        if dtype != torch.int8:
            return k, v, None, None
        k_scales, v_scales = (_zeros(shape[:-1], torch.float32, device) for _ in range(2))
        return k, v, k_scales, v_scales
    except (RuntimeError, MemoryError, OSError) as error:
        raise InvalidRequestError(f"kv_tokens: expected less, got {size}: {error}") from error


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """torch.zeros; on the CPU on huge pages, unless it is smaller than one."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or num_bytes < HUGE_PAGE_BYTES:
        return torch.zeros(shape, dtype=dtype, device=device)
    return huge_page_region(num_bytes).view(dtype).view(shape)


def _physical_memory() -> int | None:
    """Bytes of memory of this machine; None where that cannot be asked."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
