"""KVCache: pool tensors, page pool, sequences and the prefix tree; the only owner of KV."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch

from stateful_kv import ops
from stateful_kv._native import _C, check_device
from stateful_kv.errors import OutOfPagesError
from stateful_kv.kv.batch import BatchPages
from stateful_kv.kv.eviction import Eviction, EvictionPolicy
from stateful_kv.kv.pools import make_pools
from stateful_kv.kv.roots import DEFAULT_ROOT, RootIds, RootKey
from stateful_kv.system.device import to_device
from stateful_kv.types import TokenArray


class KVCache:
    """Paged key/value storage with prefix sharing.

    Sequences hold unfinished pages, the radix tree holds finished ones. Lengths move only in
    `commit` and `truncate`; whatever a step wrote beyond them never happened.

    A sequence is at work from its making on, until `rest` says that no turn needs it now. One at
    rest may be released at any time to make room: `has` tells whether it is still there.

    Attributes:
        k: [num_layers, P, Hk, B, D], keys; `cache.k[layer]` is what an op takes.
        v: [num_layers, P, Hk, B, D], values.
        k_scales: float32[num_layers, P, Hk, B], scales of the keys of int8 pools; else None.
        v_scales: float32[num_layers, P, Hk, B], scales of the values of int8 pools; else None.
        page_size: tokens a page holds (B).
        num_pages: pages of the pool (P).
        device: where the pools lie; page tables and lengths are kept on the host.
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
        policy: EvictionPolicy | None = None,
    ) -> None:
        self.device = check_device(device)
        shape = (num_layers, num_pages, num_kv_heads, page_size, head_dim)
        self.k, self.v, self.k_scales, self.v_scales = make_pools(shape, dtype, self.device)
        self.page_size = page_size
        self.num_pages = num_pages
        self._pool = _C.PagePool(num_pages, page_size)
        self._table = _C.SequenceTable(self._pool)
        self._tree = _C.RadixTree(self._pool)
        self._eviction = Eviction(self._pool, self._table, self._tree, policy)
        self._roots = RootIds()
        # What the table says too; asked several times for every row of a step.
        self._lengths: dict[int, int] = {}
        # Sequences whose next page may be planned but not yet copied; see `recover`.
        self._copying: tuple[int, ...] = ()

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

    def has(self, sequence_id: int) -> bool:
        """Whether the sequence was neither released nor evicted."""
        return sequence_id in self._lengths

    def committed_len(self, sequence_id: int) -> int:
        """Tokens of the sequence that have KV; 0 if it is gone."""
        return self._lengths.get(sequence_id, 0)

    def num_pages_of(self, sequence_id: int) -> int:
        """Pages the sequence holds, shared ones included; 0 if it is gone."""
        return self._table.num_pages(sequence_id) if self.has(sequence_id) else 0

    def match_len(self, tokens: TokenArray, root: RootKey = DEFAULT_ROOT) -> int:
        """How many of the first tokens have KV in the tree; changes nothing."""
        return self._tree.match(self._roots[root], tokens).num_tokens

    def match_and_adopt(self, tokens: TokenArray, root: RootKey = DEFAULT_ROOT) -> tuple[int, int]:
        """Makes a sequence that starts with the longest cached prefix of `tokens`.

        Returns:
            The sequence id and the number of tokens it already has KV for.
        """
        match = self._tree.match(self._roots[root], tokens)
        if match.num_tokens == 0:
            sequence_id = self._table.create()
        else:
            sequence_id = self._table.adopt(match.pages, match.num_tokens)
            self._tree.touch(match)
        self._lengths[sequence_id] = match.num_tokens
        return sequence_id, match.num_tokens

    def rest(self, sequence_id: int) -> None:
        """No turn works on the sequence now: it may be released to make room for others."""
        if self.has(sequence_id):
            self._eviction.policy.rest(sequence_id)

    def wake(self, sequence_id: int) -> None:
        """A turn works on the sequence again: it stays."""
        self._eviction.policy.wake(sequence_id)

    def prepare(self, sequence_ids: Sequence[int], query_lens: Sequence[int]) -> BatchPages | None:
        """Makes room for the next tokens of several sequences where enough pages are free.

        Args:
            sequence_ids: S distinct sequences.
            query_lens: how many tokens of each.

        Returns:
            Where these tokens go; None if too few pages are free, then nothing changed. Where
            something else fails, a sequence whose page could not be copied is gone.
        """
        ids = np.array(sequence_ids, dtype=np.int64)
        lens = np.array(query_lens, dtype=np.int32)
        self._copying = tuple(sequence_ids)
        prepared = self._table.prepare_batch(ids, lens)
        if prepared is not None:
            self._copy(prepared[0])
        self._copying = ()
        return None if prepared is None else BatchPages(*prepared[1:])

    def reserve(self, sequence_id: int, num_tokens: int, *, from_resting: bool = True) -> None:
        """Makes room for `num_tokens` more tokens, evicting cached prefixes where needed.

        If the next token goes to a page that is shared, the sequence gets a copy of its own.

        Args:
            sequence_id: where the tokens go.
            num_tokens: how many.
            from_resting: release sequences at rest too if eviction is not enough.

        Raises:
            OutOfPagesError: all that may be given up is not enough; nothing changed.
        """
        if self._reserve_if_free(sequence_id, num_tokens):
            return
        self.check_room(sequence_id, num_tokens, from_resting=from_resting)
        while not self._reserve_if_free(sequence_id, num_tokens):
            wanted = self._table.pages_needed(sequence_id, num_tokens)
            short = max(1, wanted - self._pool.num_free())
            if self._eviction.evict_prefixes(short) < short:
                resting = self._eviction.next_at_rest() if from_resting else None
                if resting is None:
                    raise self._out_of_pages(wanted)
                self.release(resting)

    def scales(self, layer: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Scales of the layer's keys and values, what an op takes beside int8 pools; else None."""
        if self.k_scales is None or self.v_scales is None:
            return None, None
        return self.k_scales[layer], self.v_scales[layer]

    def check_room(self, sequence_id: int, num_tokens: int, *, from_resting: bool = True) -> None:
        """Raises OutOfPagesError if `reserve` could not make room; changes nothing either way."""
        wanted = self._table.pages_needed(sequence_id, num_tokens)
        if not self._eviction.could_free(sequence_id, wanted, from_resting=from_resting):
            raise self._out_of_pages(wanted)

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
                np.array(sequence_ids, dtype=np.int64), np.array(query_lens, dtype=np.int32)
            )
        )

    def commit(self, sequence_ids: Sequence[int], num_tokens: Sequence[int]) -> None:
        """Makes the next reserved tokens part of their sequences; trims the rest of each.

        Args:
            sequence_ids: S distinct sequences.
            num_tokens: how many of each.
        """
        self._table.commit_batch(
            np.array(sequence_ids, dtype=np.int64), np.array(num_tokens, dtype=np.int64)
        )
        for sequence_id, num in zip(sequence_ids, num_tokens, strict=True):
            self._lengths[sequence_id] += num

    def truncate(self, sequence_id: int, length: int) -> None:
        """Drops the tokens from `length` on, and every reservation."""
        self._table.truncate(sequence_id, length)
        self._lengths[sequence_id] = length

    def fork(self, sequence_id: int) -> int:
        """Returns a new sequence that shares all pages; O(pages)."""
        child = self._table.fork(sequence_id)
        self._lengths[child] = self._lengths[sequence_id]
        return child

    def release(self, sequence_id: int) -> None:
        """Ends the sequence, if it is still there; pages nobody else holds become free."""
        if self.has(sequence_id):
            self._eviction.policy.wake(sequence_id)
            # In this order no interrupt can come between the two.
            del self._lengths[sequence_id]
            self._table.release(sequence_id)

    def recount(self) -> None:
        """Takes the lengths from the table: after an interrupt they may differ."""
        living = self._table.sequence_ids()
        lengths = self._table.lengths(np.array(living, dtype=np.int64)).tolist()
        self._lengths = dict(zip(living, lengths, strict=True))

    def recover(self, held: Collection[int]) -> None:
        """Makes state whole after an interrupt, which can come between any two operations.

        Sequences that are not `held` go: nobody came to own them. So do those whose next page was
        planned and perhaps not copied: it has no content. Reservations are given up. May itself be
        interrupted and called again.
        """
        self.recount()
        for sequence_id, length in tuple(self._lengths.items()):
            if sequence_id not in held or sequence_id in self._copying:
                self.release(sequence_id)
            else:
                self._table.truncate(sequence_id, length)
        for sequence_id in self._eviction.policy.candidates():
            if not self.has(sequence_id):
                self._eviction.policy.wake(sequence_id)
        self._copying = ()

    def insert(
        self,
        sequence_id: int,
        tokens: TokenArray,
        root: RootKey = DEFAULT_ROOT,
        *,
        with_partial_page: bool,
    ) -> int:
        """Gives the sequence's pages to the tree, so other sequences can start from them.

        Pages whose content the tree already has are folded: the sequence moves to the tree's.

        Args:
            sequence_id: whose pages.
            tokens: the sequence's tokens; at least its length.
            root: under which root.
            with_partial_page: also the last page if it is not full. Only for a sequence that
                will be released, else its next token would have to copy that page.

        Returns:
            How many tokens the tree now has of this sequence.
        """
        length = self.committed_len(sequence_id)
        num_full = length // self.page_size
        count = length if with_partial_page else num_full * self.page_size
        if count == 0:
            return 0
        pages = self._table.page_table(sequence_id)[: -(-count // self.page_size)]
        result = self._tree.insert(self._roots[root], tokens[:count], pages)
        canonical = result.pages[:num_full]
        if not torch.equal(canonical, pages[:num_full]):
            self._table.replace_prefix(sequence_id, canonical)
        return count

    def insert_tail_copy(
        self, sequence_id: int, tokens: TokenArray, root: RootKey = DEFAULT_ROOT
    ) -> None:
        """Gives the tree a copy of the sequence's partly filled last page, and its full pages.

        The sequence goes on writing into its own page. The copy belongs to the tree alone, so it
        can be evicted at once; nothing happens where no page is free or evictable for it.
        """
        length = self.committed_len(sequence_id)
        tokens = tokens[:length]
        if length % self.page_size == 0 or self.match_len(tokens, root) == length:
            return
        if self._pool.num_free() == 0 and self._eviction.evict_prefixes(1) == 0:
            return
        # The first write of a fork copies the shared page; the fork itself is not kept.
        fork = self.fork(sequence_id)
        try:
            if self._reserve_if_free(fork, 1):
                pages = self._table.page_table(fork)[: length // self.page_size + 1]
                self._tree.insert(self._roots[root], tokens, pages)
        finally:
            self.release(fork)

    def evict_all(self) -> int:
        """Empties the tree; returns the number of pages that became free."""
        return self._tree.evict_all()

    def check_integrity(self) -> str | None:
        """Describes the first broken invariant of pool, sequences and tree, or returns None."""
        living = self._table.sequence_ids()
        lengths = self._table.lengths(np.array(living, dtype=np.int64)).tolist()
        if self._lengths != dict(zip(living, lengths, strict=True)):
            return f"lengths: the cache knows {self._lengths}, the table has {living}, {lengths}"
        for sequence_id in self._eviction.policy.candidates():
            if not self.has(sequence_id):
                return f"sequence {sequence_id} is at rest and gone"
        return (
            self._pool.check_integrity()
            or self._table.check_integrity()
            or self._tree.check_integrity()
            or _C.check_references(self._pool, self._table, [self._tree])
        )

    def _reserve_if_free(self, sequence_id: int, num_tokens: int) -> bool:
        """Reserves tokens where enough pages are free."""
        self._copying = (sequence_id,)
        copies = self._table.reserve(sequence_id, num_tokens)
        if copies is not None:
            self._copy(copies)
        self._copying = ()
        return copies is not None

    def _copy(self, page_copies: torch.Tensor) -> None:
        """Copies pages (int32[n, 2], from and to): until then the new ones have no content."""
        if page_copies.shape[0] == 0:
            return
        try:
            (copies,) = to_device([page_copies], self.device)
            ops.copy_pages(copies, self.k, self.v, self.k_scales, self.v_scales)
        except Exception:
            without_content = set(page_copies[:, 1].tolist())
            for sequence_id in self._copying:
                if without_content.intersection(self._table.page_table(sequence_id).tolist()):
                    self.release(sequence_id)
            self._copying = ()
            raise

    def _out_of_pages(self, wanted: int) -> OutOfPagesError:
        free, evictable = self._pool.num_free(), self._tree.num_evictable_pages()
        pinned = self.num_pages - free - evictable
        return OutOfPagesError(wanted, free, evictable, pinned)
