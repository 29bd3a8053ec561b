"""python -m tests.ops.digests: one line a result of each op that has a CUDA kernel.

Two processes that print the same lines computed the same bits. With `SKV_EMULATED_CUDA` the
kernels are the emulated ones, else those of the CPU.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from stateful_kv import ops
from tests.ops.cases import INT8_OPS, WRITTEN, int8_arguments, valid_arguments
from tests.ops.paged import make_batch
from tests.ops.test_cuda_build import CUDA_OPS


def digest(tensor: Tensor) -> str:
    """Of the bytes of a tensor."""
    content = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(content).hexdigest()[:16]


def results(op: str, arguments: dict[str, Any]) -> Iterator[Tensor]:
    """What the op returns, then what it wrote."""
    result = getattr(ops, op)(**arguments)
    if result is not None:
        yield from result if isinstance(result, tuple) else (result,)
    yield from (arguments[name] for name in WRITTEN.get(op, ()) if arguments[name] is not None)
    yield from (
        arguments[name] for name in ("k_scales", "v_scales") if arguments.get(name) is not None
    )


def calls() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Each op with small arguments, and attention over enough keys to be divided."""
    for op in sorted(CUDA_OPS):
        yield op, "", valid_arguments(op)
    for op in INT8_OPS:
        yield op, "int8", int8_arguments(op)
    names = ("q", "k_pool", "v_pool", "page_table", "seq_lens", "query_offsets")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for head_dim in (64, 128):
            batch = make_batch(
                [1300, 70, 0, 600], [2, 70, 0, 1], num_heads=6, head_dim=head_dim, dtype=dtype
            )
            tensors = dict(zip(names, batch.arguments, strict=True))
            if dtype != torch.float32:
                tensors["q"] = tensors["q"].to(dtype)
            label = f"{dtype} {head_dim}"
            yield "paged_attention", label, {**tensors, "scale": batch.scale}


def main() -> None:
    if library := os.environ.get("SKV_EMULATED_CUDA"):
        torch.ops.load_library(library)
    torch.manual_seed(0)
    for op, label, arguments in calls():
        for number, result in enumerate(results(op, arguments)):
            print(op, label, number, digest(result))


if __name__ == "__main__":
    main()
