"""Runs every CUDA op once on small, odd shapes: what compute-sanitizer looks at in gpu_check.sh.

Each op gets the arguments of its row in tests/ops/cases.py; attention, which has a few keys of
float32 there, runs as decode, verify and extend over several chunks, in 16 bits and in float32.
Results are only looked at for NaN: right values are the tests' business.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from bench.gpu_shapes import AttentionShape, make_inputs
from bench.suites.gpu_attention import attend, attend_shared
from stateful_kv import ops
from tests.ops import cases

SHAPES = (
    AttentionShape(3, 1100, heads=8, kv_heads=2, head_dim=64),
    AttentionShape(2, 1100, rows=8, heads=8, kv_heads=2),
    AttentionShape(1, 700, rows=67, heads=4, kv_heads=2, page_size=16),
    AttentionShape(4, 1024 + 77, shared=1024, heads=8, kv_heads=2, head_dim=64),
)
ATTENTION = ("paged_attention", "shared_prefix_attention")
# Of queries and of pools.
DTYPES = {
    "cuda": ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)),
    "cpu": ((torch.float32, torch.bfloat16),),
}


def has_kernel(op: str, device: str) -> bool:
    """Whether the op has a kernel of its own on the device."""
    key = device.upper()
    if not hasattr(ops, op):
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"stateful_kv::{op}", key)


def _on(device: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_on(device, item) for item in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value


def calls(device: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names and calls of everything to run."""
    for op in cases.CASES:
        if op not in ATTENTION and has_kernel(op, device):
            arguments = {k: _on(device, v) for k, v in cases.valid_arguments(op).items()}
            yield op, partial(getattr(ops, op), **arguments)
    for (q_dtype, kv_dtype), shape in itertools.product(DTYPES[device], SHAPES):
        inputs = make_inputs(shape, 1, device, q_dtype, kv_dtype)
        title = f"attention of {shape.rows} rows, {shape.kv_len} tokens, {kv_dtype}"
        yield title, partial(attend, inputs, 0)
        if shape.shared and has_kernel("shared_prefix_attention", device):
            yield f"{title}, shared prefix", partial(attend_shared, inputs, 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    device = parser.parse_args().device
    torch.manual_seed(0)
    bad = 0
    for name, call in calls(device):
        result = call()
        if device == "cuda":
            torch.cuda.synchronize()
        results = result if isinstance(result, tuple) else (result,)
        ok = all(not tensor.isnan().any() for tensor in results if tensor is not None)
        bad += not ok
        print(f"{name}: {'ran' if ok else 'gave NaN'}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
