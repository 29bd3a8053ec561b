"""The extension module: state objects, and models that are checked once."""

from typing import Any, TypedDict

import torch

from stateful_kv._state import InsertResult as InsertResult
from stateful_kv._state import Match as Match
from stateful_kv._state import NgramIndex as NgramIndex
from stateful_kv._state import PagePool as PagePool
from stateful_kv._state import RadixTree as RadixTree
from stateful_kv._state import SequenceTable as SequenceTable
from stateful_kv._state import check_references as check_references
from stateful_kv._state import propose_drafts as propose_drafts

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

def _set_error_types(types: dict[str, Any]) -> None: ...
