"""The state objects of `_C`; public as `stateful_kv.state`, which has the rules for all of them.

No module of this name exists when the program runs: these are the types and the docstrings of what
`_C` holds. `scripts/make_state_docs.py` puts the texts into `csrc/bindings/state/docs.h`, so that
`help()` shows them.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

IntArray = torch.Tensor | npt.NDArray[np.int32] | npt.NDArray[np.int64]
Int32Array = torch.Tensor | npt.NDArray[np.int32]
Int64Array = torch.Tensor | npt.NDArray[np.int64]

class PagePool:
    """Free list and reference counts of the pages of one KV pool. Knows no tokens and no bytes.

    A page is free, or held with a count of at least 1. `allocate` gives pages with count 1,
    `retain` adds one, `release` takes one; the last release makes the page free. Tables and trees
    on the pool count their pages themselves. All calls are O(pages given).

    Args:
        num_pages: P, pages of the pool, from 0 to 2^31 - 1.
        page_size: B, tokens a page holds, from 1 to 2^31 - 1.

    Raises:
        ValueError: one of them is outside of its range.
    """

    def __init__(self, num_pages: int, page_size: int) -> None: ...
    def allocate(self, n: int) -> torch.Tensor | None:
        """Takes free pages.

        Args:
            n: how many, at least 0.

        Returns:
            int32[n], page ids with one reference each; None where fewer than n are free.
        """

    def retain(self, pages: Int32Array) -> None:
        """Adds a reference for each entry.

        Args:
            pages: int32[n], held pages; one may stand there more than once.

        Raises:
            IndexError: no page of the pool.
            ValueError: a free page.
        """

    def release(self, pages: Int32Array) -> None:
        """Takes a reference for each entry; the last one makes a page free.

        Args:
            pages: int32[n], held pages. Those that become free are given out again in this order.

        Raises:
            IndexError: no page of the pool.
            ValueError: a page released more often than it was retained.
        """

    def ref_count(self, page: int) -> int:
        """References of a page, 0 if it is free; IndexError if there is no such page."""

    def num_free(self) -> int:
        """Free pages."""

    def num_pages(self) -> int:
        """P, all pages."""

    def page_size(self) -> int:
        """B, tokens a page holds."""

    def check_integrity(self) -> str | None:
        """The first violation found, or None. O(P)."""

class SequenceTable:
    """Page list and length of every sequence on a pool.

    A step is: `reserve` (or `prepare_batch`), copy the pages it names, write keys and values into
    the slots, `commit` what is to stay. A fork shares all pages of its parent; the first
    reservation in a shared, partly filled page moves the writer to a fresh page, so no page with
    two holders is ever written. The slot of token i is page_table[i // B] * B + i % B.

    Ids are never reused. An id that was never given is an IndexError, a released one a ValueError,
    in every call but `has`.

    Args:
        pool: where the pages come from; kept alive. Sequences give their pages back when the table
            goes.
    """

    def __init__(self, pool: PagePool) -> None: ...
    def create(self) -> int:
        """Makes an empty sequence and returns its id."""

    def adopt(self, pages: Int32Array, num_tokens: int) -> int:
        """Makes a sequence of tokens that have keys and values already, as `RadixTree.match` finds.

        Args:
            pages: int32[ceil(num_tokens / B)], distinct held pages in order; retained.
            num_tokens: committed tokens of the new sequence.

        Returns:
            Its id.

        Raises:
            IndexError: no page of the pool.
            ValueError: a free page, a page twice, or not as many pages as the tokens need.
        """

    def reserve(self, seq: int, n: int) -> torch.Tensor | None:
        """Makes room for exactly n tokens behind the committed ones; an earlier reservation goes.

        Args:
            seq: a sequence.
            n: how many tokens, at least 0.

        Returns:
            int32[C, 2], page copies (from, to) to do before writing, C = 0 or 1: what
            `ops.copy_pages` takes. None where too few pages are free.
        """

    def reserve_batch(
        self, sequence_ids: Int64Array, num_tokens: Int64Array
    ) -> torch.Tensor | None:
        """`reserve` for each sequence in order, or for none of them.

        Args:
            sequence_ids: int64[S], distinct sequences.
            num_tokens: int64[S], tokens of each.

        Returns:
            int32[C, 2], page copies (from, to) to do before writing, 0 <= C <= S; None where too
            few pages are free.
        """

    def pages_needed(self, seq: int, n: int) -> int:
        """Free pages that `reserve` would take, the copy of a shared page included."""

    def commit(self, seq: int, n: int) -> None:
        """Makes the first n reserved tokens part of the sequence and drops the rest.

        Args:
            seq: a sequence.
            n: at most what is reserved, else ValueError.
        """

    def commit_batch(self, sequence_ids: Int64Array, num_tokens: Int64Array) -> None:
        """`commit` for each sequence; all are checked before one changes.

        Args:
            sequence_ids: int64[S], distinct sequences.
            num_tokens: int64[S], tokens of each.
        """

    def truncate(self, seq: int, length: int) -> None:
        """Drops the reservation and all tokens from `length` on.

        Args:
            seq: a sequence.
            length: from 0 to the committed length, else ValueError.
        """

    def fork(self, seq: int) -> int:
        """Makes a sequence with the same tokens on the same pages; O(pages), copies no KV.

        Args:
            seq: the parent; with a reservation it is a ValueError.

        Returns:
            The id of the new sequence.
        """

    def release(self, seq: int) -> None:
        """Ends the sequence; pages that nobody else holds become free."""

    def replace_prefix(self, seq: int, pages: Int32Array) -> None:
        """Swaps the first pages for pages of equal content, as `RadixTree.insert` returns them.

        Args:
            seq: a sequence.
            pages: int32[n], held pages for its first n pages, which must be full and committed.
        """

    def has(self, seq: int) -> bool:
        """Whether the sequence lives; False for one that was released or never made."""

    def length(self, seq: int) -> int:
        """Committed tokens."""

    def lengths(self, sequence_ids: Int64Array) -> torch.Tensor:
        """int64[S], the committed tokens of each sequence; one may stand in the list twice."""

    def num_reserved(self, seq: int) -> int:
        """Reserved tokens."""

    def num_pages(self, seq: int) -> int:
        """Pages of the sequence, shared and reserved ones included."""

    def page_table(self, seq: int) -> torch.Tensor:
        """int32[num_pages], a copy of the page list."""

    def fill_batch(
        self, sequence_ids: Int64Array, query_lens: Int32Array
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the ops take in a step over reserved rows.

        Args:
            sequence_ids: int64[S], distinct sequences.
            query_lens: int32[S], new tokens of each, at most what is reserved.

        Returns:
            page_table int32[S, M] (-1 past the pages in use), seq_lens int32[S] (committed +
            query_len), query_offsets int32[S + 1], positions int32[N] and slots int64[N], N being
            the sum of query_lens.
        """

    def prepare_batch(
        self, sequence_ids: Int64Array, query_lens: Int32Array
    ) -> (
        tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
        | None
    ):
        """`reserve_batch` and then `fill_batch` for the reserved rows, in one call.

        Args:
            sequence_ids: int64[S], distinct sequences.
            query_lens: int32[S], new tokens of each.

        Returns:
            The page copies to do before writing, int32[C, 2] (from, to), and the five arrays of
            `fill_batch`; None where too few pages are free.
        """

    def num_sequences(self) -> int:
        """Living sequences."""

    def sequence_ids(self) -> list[int]:
        """Ids of the living sequences, ascending."""

    def check_integrity(self) -> str | None:
        """The first violation found, or None. O(all pages)."""

class Match:
    """The longest cached prefix of some tokens, as it was when `RadixTree.match` looked."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the prefix; 0 if nothing is cached."""

    @property
    def pages(self) -> torch.Tensor:
        """int32[ceil(num_tokens / B)]. The tree's and not retained: adopt them before it evicts."""

class InsertResult:
    """What `RadixTree.insert` found and made."""

    @property
    def num_matched(self) -> int:
        """Tokens that were there before."""

    @property
    def pages(self) -> torch.Tensor:
        """int32[ceil(T / B)], the pages that the tree now has for all the tokens."""

class RadixTree:
    """Which token prefixes have keys and values in the pool, and on which pages.

    A compressed tree whose borders may lie inside of pages. Nothing is shared between root keys:
    take another one for each tenant, adapter or kind of KV. `match` and `insert` are O(tokens).

    Args:
        pool: whose pages the tree holds; kept alive. They are released when the tree goes.
    """

    def __init__(self, pool: PagePool) -> None: ...
    def match(self, root_key: int, tokens: IntArray) -> Match:
        """Finds the longest cached prefix; changes nothing.

        Args:
            root_key: from 0 to 2^64 - 1.
            tokens: int32|int64[T], read in place; what is no token id never matches.
        """

    def touch(self, match: Match) -> None:
        """Marks the path of a match as just used, so that it is evicted last.

        Nothing happens if the path was evicted since; a match of another tree is a ValueError.
        """

    def insert(self, root_key: int, tokens: IntArray, pages: Int32Array) -> InsertResult:
        """Makes tokens matchable, and their path the most recently used one. Idempotent.

        Only the pages of new tokens are retained. A sequence may go on behind a partly filled last
        page: it is shared now, so the next `reserve` moves the sequence to a copy.

        Args:
            root_key: from 0 to 2^64 - 1.
            tokens: int32|int64[T], token ids.
            pages: int32[ceil(T / B)], distinct held pages with the KV of all the tokens.

        Raises:
            IndexError: no page of the pool.
            ValueError: a free page, a page twice, not as many pages as the tokens need, or a value
                that is no token id.
        """

    def pin(self, root_key: int, tokens: IntArray) -> int:
        """Protects the longest cached prefix of `tokens` from eviction; pins nest.

        Args:
            root_key: from 0 to 2^64 - 1.
            tokens: int32|int64[T].

        Returns:
            The pin, for `unpin`.
        """

    def pinned_length(self, pin: int) -> int:
        """Tokens that a pin protects; errors as in `unpin`."""

    def unpin(self, pin: int) -> None:
        """Ends a pin; IndexError for an unknown one, ValueError for one that was ended."""

    def evict(self, num_pages: int) -> int:
        """Drops least recently used pages until that many more are free, or no more can be.

        Pages that are held outside of the tree, or pinned, stay.

        Args:
            num_pages: how many, at least 0.

        Returns:
            Pages that became free.
        """

    def evict_all(self) -> int:
        """`evict` as far as possible; returns the pages that became free."""

    def num_evictable_pages(self) -> int:
        """Pages that `evict_all` would free now. O(pages)."""

    def num_blocked_pages(self, kept: Int32Array) -> int:
        """Pages that `evict_all` would leave to the tree alone if only `kept` were held outside.

        They cover tokens before a kept page or a pin.

        Args:
            kept: int32[n], pages of the pool, else IndexError.
        """

    def num_pinned_pages(self) -> int:
        """Distinct pages of pinned prefixes. O(pages)."""

    def num_tree_pages(self) -> int:
        """Distinct pages that the tree holds."""

    def num_nodes(self) -> int:
        """Nodes that hold tokens."""

    def check_integrity(self) -> str | None:
        """The first violation found, or None. O(tokens + pages)."""

class NgramIndex:
    """Where the last few tokens of a text occurred before, and what followed: a source of drafts.

    Keeps the tokens itself. `append` and `truncate` cost O(max_n - min_n + 1) a token, `propose`
    O(max_n + draft).

    Args:
        min_n: shortest suffix that is looked up, at least 1.
        max_n: longest one, from min_n to 64.

    Raises:
        ValueError: one of them is outside of its range.
    """

    def __init__(self, min_n: int = 2, max_n: int = 8) -> None: ...
    def append(self, tokens: IntArray) -> None:
        """Adds tokens at the end of the text.

        Args:
            tokens: int32|int64[T], token ids; a value that is none is a ValueError.
        """

    def truncate(self, length: int) -> None:
        """Drops the tokens from `length` on, which is from 0 to `size`, else ValueError."""

    def size(self) -> int:
        """Tokens of the text."""

    def propose(self, max_tokens: int) -> tuple[torch.Tensor, int]:
        """Drafts what may follow: what followed where the longest suffix last occurred before.

        A text that repeats itself without end is continued so.

        Args:
            max_tokens: the longest draft, at least 0.

        Returns:
            The draft, int32[n] with n <= max_tokens, and the length of the suffix it was found by
            (0 = none, and no draft).
        """

    def fork(self) -> NgramIndex:
        """An independent index of the same text; O(1), copied when one of the two changes."""

    def check_integrity(self) -> str | None:
        """The first violation found, or None. O(size)."""

def propose_drafts(
    indexes: Sequence[NgramIndex], tokens: Sequence[IntArray], max_tokens: Int64Array
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Appends tokens[i] to indexes[i], then drafts up to max_tokens[i] tokens, for a whole batch.

    All arguments are checked before any index changes.

    Args:
        indexes: S distinct indexes.
        tokens: S arrays int32|int64[T], what is new in each text.
        max_tokens: int64[S], the longest draft of each; where it is 0 nothing is looked up.

    Returns:
        draft_ids int32[sum of draft_lens], draft_lens int32[S] and match_lens int32[S], the length
        of the suffix each draft was found by (0 = none).
    """

def check_references(
    pool: PagePool, table: SequenceTable | None, trees: list[RadixTree]
) -> str | None:
    """Recounts all holders of all pages: the first difference from the pool's counts, or None.

    Args:
        pool: whose counts.
        table: the pool's, else ValueError; None if it has none.
        trees: distinct trees of the pool, else ValueError.
    """
