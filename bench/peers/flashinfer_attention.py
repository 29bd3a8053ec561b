"""FlashInfer on the same pages: its plan is made beforehand, only the run is timed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.gpu_shapes import AttentionInputs
from bench.harness import PeerMissingError

INSTALL = "pip install flashinfer-python"
WORKSPACE_BYTES = 256 << 20


def _load() -> Any:
    try:
        return importlib.import_module("flashinfer")
    except ImportError as error:
        raise PeerMissingError(f"{error.name} cannot be imported: {INSTALL}") from error


def page_lists(inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Borders int32[S + 1] of the page ids of each sequence, the ids, tokens on each last page."""
    shape, device = inputs.shape, inputs.q.device
    pages = inputs.page_table.shape[1]
    borders = torch.arange(shape.sequences + 1, dtype=torch.int32, device=device) * pages
    last = shape.kv_len - (pages - 1) * shape.page_size
    return borders, inputs.page_table.flatten(), torch.full_like(inputs.seq_lens, last)


def prepare(inputs: AttentionInputs) -> Callable[[int], Tensor]:
    """A call on one of the copies; results [N, H, D].

    Raises:
        PeerMissingError: it is not installed or does not take these shapes.
    """
    flashinfer = _load()
    shape, q = inputs.shape, inputs.q
    borders, ids, last = page_lists(inputs)
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
    sizes = (shape.heads, shape.kv_heads, shape.head_dim, shape.page_size)
    dtypes = {"q_data_type": q.dtype, "kv_data_type": inputs.pools[0][0].dtype}
    try:
        if shape.rows == 1:
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                workspace, "HND", use_tensor_cores=shape.heads // shape.kv_heads >= 4
            )
            wrapper.plan(borders, ids, last, *sizes, sm_scale=shape.scale, **dtypes)
        else:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
            wrapper.plan(
                inputs.query_offsets, borders, ids, last, *sizes,
                causal=True, sm_scale=shape.scale, **dtypes,
            )  # fmt: skip
        wrapper.run(q, inputs.pools[0])
    except Exception as error:
        # Its kernels are compiled at the first call; whatever goes wrong there, it cannot run here.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise PeerMissingError(f"flashinfer does not run this case: {reason}") from error

    def call(index: int) -> Tensor:
        result: Tensor = wrapper.run(q, inputs.pools[index])
        return result

    return call
