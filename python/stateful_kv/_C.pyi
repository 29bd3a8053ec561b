"""The compiled state objects.

Array arguments are contiguous one-dimensional int32 or int64 torch tensors, numpy arrays or buffers
on the CPU (page ids and query lengths int32 only, sequence ids and counts int64 only); anything
else is a TypeError. They are copied, but for the tokens of RadixTree.match and pin. Bad values are
a ValueError, unknown ids an IndexError, a broken invariant is an InvariantError; in each case
nothing has changed. A second thread that enters an object during a call gets a StateBusyError. In a
forked child this is also what an object raises that another thread was changing at the fork.
"""

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch

IntArray = torch.Tensor | npt.NDArray[np.int32] | npt.NDArray[np.int64]
Int32Array = torch.Tensor | npt.NDArray[np.int32]
Int64Array = torch.Tensor | npt.NDArray[np.int64]

class PagePool:
    """Free list and reference counts of the pages of one KV pool."""

    def __init__(self, num_pages: int, page_size: int) -> None: ...
    def allocate(self, n: int) -> torch.Tensor | None:
        """n pages (int32[n]) with one reference each, or None when fewer are free."""

    def retain(self, pages: Int32Array) -> None:
        """One more reference for each entry."""

    def release(self, pages: Int32Array) -> None:
        """One reference less for each entry; the last one makes a page free."""

    def ref_count(self, page: int) -> int: ...
    def num_free(self) -> int: ...
    def num_pages(self) -> int: ...
    def page_size(self) -> int: ...
    def check_integrity(self) -> str | None:
        """The first violation found, or None."""

class SequenceTable:
    """Page list and length of every sequence."""

    def __init__(self, pool: PagePool) -> None: ...
    def create(self) -> int:
        """An empty sequence; ids are never reused."""

    def adopt(self, pages: Int32Array, num_tokens: int) -> int:
        """A sequence that already holds num_tokens committed tokens on shared pages."""

    def reserve(self, seq: int, n: int) -> torch.Tensor | None:
        """Reserves exactly n slots after the committed tokens.

        Returns the page copies to do before writing, int32[C, 2] (from, to), C = 0 or 1; None when
        the pool has too few free pages.
        """

    def reserve_batch(
        self, sequence_ids: Int64Array, num_tokens: Int64Array
    ) -> torch.Tensor | None:
        """`append` for each of the distinct sequences, in order, or for none of them.

        Returns the page copies to do before writing, int32[C, 2] (from, to), 0 <= C <= S; None when
        the pool has too few free pages, and nothing has changed.
        """

    def pages_needed(self, seq: int, n: int) -> int:
        """Fresh pages, copy-on-write included, that append would take."""

    def commit(self, seq: int, n: int) -> None:
        """The first n reserved tokens stay, the rest of the reservation is dropped."""

    def commit_batch(self, sequence_ids: Int64Array, num_tokens: Int64Array) -> None:
        """`commit` for each of the distinct sequences; all are checked before one changes."""

    def truncate(self, seq: int, length: int) -> None:
        """Drops the reservation and all tokens from length on."""

    def fork(self, seq: int) -> int:
        """A new sequence with the same tokens; the parent must have no reservation."""

    def release(self, seq: int) -> None: ...
    def replace_prefix(self, seq: int, pages: Int32Array) -> None:
        """Swaps the first full pages for pages of equal content."""

    def has(self, seq: int) -> bool:
        """Whether the sequence lives; False for one that was released or never made."""

    def length(self, seq: int) -> int: ...
    def lengths(self, sequence_ids: Int64Array) -> torch.Tensor:
        """int64[S], the committed tokens of each sequence; one may stand in the list twice."""

    def num_reserved(self, seq: int) -> int: ...
    def num_pages(self, seq: int) -> int: ...
    def page_table(self, seq: int) -> torch.Tensor:
        """A copy, int32[num_pages]."""

    def fill_batch(
        self, sequence_ids: Int64Array, query_lens: Int32Array
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Arrays of one step over reserved rows.

        Returns page_table int32[S, M] (-1 past the pages in use), seq_lens int32[S] (committed +
        query_len), query_offsets int32[S + 1], positions int32[N], slots int64[N].
        """

    def prepare_batch(
        self, sequence_ids: Int64Array, query_lens: Int32Array
    ) -> (
        tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
        | None
    ):
        """`reserve_batch` and then `fill_batch` for the reserved rows, in one call.

        Returns the page copies to do before writing, int32[C, 2] (from, to), and the five arrays of
        `fill_batch`; None when the pool has too few free pages, and nothing has changed.
        """

    def num_sequences(self) -> int: ...
    def sequence_ids(self) -> list[int]: ...
    def check_integrity(self) -> str | None: ...

class Match:
    """The longest cached prefix; `pages` are the tree's and not retained."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def pages(self) -> torch.Tensor: ...

class InsertResult:
    """What was there before, and the canonical pages of the whole path."""

    @property
    def num_matched(self) -> int: ...
    @property
    def pages(self) -> torch.Tensor: ...

class RadixTree:
    """Which token prefixes have KV in the pool, and on which pages."""

    def __init__(self, pool: PagePool) -> None: ...
    def match(self, root_key: int, tokens: IntArray) -> Match:
        """Longest cached prefix; changes nothing."""

    def touch(self, match: Match) -> None:
        """Marks the path of a match as just used.

        Nothing happens if the path was evicted since; a match of another tree is a ValueError.
        """

    def insert(self, root_key: int, tokens: IntArray, pages: Int32Array) -> InsertResult:
        """Makes tokens matchable; retains only the pages of new tokens. Idempotent."""

    def pin(self, root_key: int, tokens: IntArray) -> int:
        """Protects the longest cached prefix from eviction; pins nest."""

    def pinned_length(self, pin: int) -> int: ...
    def unpin(self, pin: int) -> None: ...
    def evict(self, num_pages: int) -> int:
        """Drops least recently used pages until that many became free; returns how many did."""

    def evict_all(self) -> int: ...
    def num_evictable_pages(self) -> int: ...
    def num_blocked_pages(self, kept: Int32Array) -> int:
        """Pages eviction would leave to the tree alone if only `kept` were held outside."""

    def num_pinned_pages(self) -> int: ...
    def num_tree_pages(self) -> int: ...
    def num_nodes(self) -> int: ...
    def check_integrity(self) -> str | None: ...

class NgramIndex:
    """Where the last few tokens occurred before, and what followed."""

    def __init__(self, min_n: int = 2, max_n: int = 8) -> None: ...
    def append(self, tokens: IntArray) -> None: ...
    def truncate(self, length: int) -> None: ...
    def size(self) -> int: ...
    def propose(self, max_tokens: int) -> tuple[torch.Tensor, int]:
        """The draft (int32) and the length of the suffix it was found by (0 = none)."""

    def fork(self) -> NgramIndex:
        """An independent index of the same text; copied when one of the two changes."""

    def check_integrity(self) -> str | None: ...

def propose_drafts(
    indexes: Sequence[NgramIndex], tokens: Sequence[IntArray], max_tokens: Int64Array
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Appends tokens[i] to each of the distinct indexes, then drafts up to max_tokens[i] tokens.

    Where max_tokens[i] is 0 the tokens are appended and nothing is looked up. All arguments are
    checked before any index changes.

    Returns draft_ids int32[sum of draft_lens], draft_lens int32[S] and match_lens int32[S], the
    length of the suffix each draft was found by (0 = none).
    """

class BuildInfo(TypedDict):
    """What was built."""

    version: str
    torch: str
    compiler: str
    cuda: bool
    cuda_archs: list[str]
    cpu_isas: list[str]

def build_info() -> BuildInfo: ...
def cpu_isa() -> str:
    """The instruction set of the CPU kernels in use."""

def cpu_isa_error() -> str:
    """Why STATEFUL_KV_CPU_ISA could not be honoured; empty if it was, or is not set."""

class LayerStack:
    """A Llama-family model with packed weights, checked once: one call is one forward pass.

    The bits are those of the ops composed one by one. It keeps the memory of the weights alive, and
    that of the largest pass so far. Any number of threads may be in a pass at once; the GIL is free
    during it. Passes that write the same slots must not overlap.
    """

    def __init__(
        self,
        layers: list[torch.Tensor | None],
        cos_sin: torch.Tensor,
        embedding: torch.Tensor,
        norm: torch.Tensor,
        head: list[torch.Tensor | None],
        num_logits: int,
        num_heads: int,
        num_kv_heads: int,
        norm_eps: float,
        scale: float,
        sliding_window: int,
    ) -> None:
        """Checks all of it.

        Args:
            layers: for each layer the tensors named in `ops.LAYER_TENSORS`, packed as
                `ops.decoder_layers` takes them.
            cos_sin: float32[max_pos, D], contiguous - rotary table.
            embedding: float32[V, E], contiguous.
            norm: float32[E], contiguous - the norm before the head.
            head: weight, scales, minimums and bias of the head, packed.
            num_logits: outputs of the head.
            num_heads: H, a multiple of num_kv_heads.
            num_kv_heads: Hk.
            norm_eps: of all norms.
            scale: of the attention scores.
            sliding_window: keys a row sees, 0 = all.
        """

    def run(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        page_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_offsets: torch.Tensor,
        logit_rows: torch.Tensor,
        k_pools: torch.Tensor,
        v_pools: torch.Tensor,
        k_scales: torch.Tensor | None,
        v_scales: torch.Tensor | None,
    ) -> torch.Tensor:
        """Embedding and layers: float32[R, E], before the last norm.

        Args:
            token_ids: int32|int64[N], contiguous - in [0, V), else an IndexError.
            positions: as in `ops.decoder_layers`, and so are all that follow.
        """

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        page_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_offsets: torch.Tensor,
        logit_rows: torch.Tensor,
        k_pools: torch.Tensor,
        v_pools: torch.Tensor,
        k_scales: torch.Tensor | None,
        v_scales: torch.Tensor | None,
    ) -> torch.Tensor:
        """As `run`, then norm and head: float32[R, num_logits]."""

    def forward_top_k(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        page_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_offsets: torch.Tensor,
        logit_rows: torch.Tensor,
        k_pools: torch.Tensor,
        v_pools: torch.Tensor,
        k_scales: torch.Tensor | None,
        v_scales: torch.Tensor | None,
        k: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `run`, then `ops.linear_top_k`: int64[R, k] and float32[R, k], k from 1 to 64."""

def check_references(
    pool: PagePool, table: SequenceTable | None, trees: list[RadixTree]
) -> str | None:
    """Recounts all holders of all pages; the first difference from the pool's counts, or None.

    The table and the distinct trees must be the pool's, else ValueError.
    """

def _set_error_types(types: dict[str, Any]) -> None: ...
