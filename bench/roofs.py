"""The limits of this machine, measured at the start of a run and stored with it.

Both roofs are what plain torch reaches with the threads of the run, not data-sheet figures:

- read bandwidth: the fastest of a few reductions over a float32 buffer that is larger than the
  last-level cache where memory allows (`buffer_exceeds_l3` says whether it was). Median of the
  repeats of each, then the best method.
- fp32 arithmetic: a square `torch.mm` (the BLAS of this torch). A BLAS does not reach the peak of
  the units, so this is a lower bound of it; a kernel above 100 % of it is faster than that BLAS,
  not faster than the machine.

On a CUDA device:

- copy bandwidth: a device-to-device copy of a buffer far larger than L2, bytes read and written.
- bf16 matrix rate: a square `torch.mm` of random values (zeros run faster) by cuBLAS.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import cuda_timing

REPEATS = 7
MAX_BUFFER_BYTES = 1 << 30
MAX_COPY_BYTES = 1 << 32
MATRIX_REPEATS = 11


def cache_sizes() -> dict[str, int | None]:
    """Bytes of L2 (one core) and L3 (as the system reports it, which may be shared or partial)."""
    sizes: dict[str, int | None] = {"l2_bytes": None, "l3_bytes": None}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level = (index / "level").read_text().strip()
            size = (index / "size").read_text().strip()
        except OSError:
            continue
        if f"l{level}_bytes" in sizes:
            unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(size[-1])
            sizes[f"l{level}_bytes"] = int(size[:-1]) * unit if unit else int(size)
    return sizes


def cold_bytes(device: str = "cpu") -> int:
    """How much rotating data counts as cold: five times L2, or 128 MB when L3 is large.

    On a CUDA device three times its L2.
    """
    if device == "cuda":
        return cuda_timing.cold_bytes()
    sizes = cache_sizes()
    l2 = (sizes["l2_bytes"] or (1 << 20)) * torch.get_num_threads()
    large_l3 = (sizes["l3_bytes"] or 0) > (16 << 20)
    return max(5 * l2, 128_000_000 if large_l3 else 0)


def _median_seconds(call: Callable[[], object], repeats: int) -> float:
    call()
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def limits(roof: dict[str, Any]) -> tuple[float, float]:
    """Bytes and floating-point operations a second that work is held against."""
    if "copy_bytes_per_s" in roof:
        return roof["copy_bytes_per_s"], roof["bf16_flops_per_s"]
    return roof["read_bytes_per_s"], roof["fp32_flops_per_s"]


def describe(roof: dict[str, Any]) -> str:
    """Both roofs in a few words."""
    bytes_per_s, flops_per_s = limits(roof)
    if "copy_bytes_per_s" in roof:
        return f"copy {bytes_per_s / 1e12:.2f} TB/s, bf16 {flops_per_s / 1e12:.0f} TFLOP/s (cuBLAS)"
    return (
        f"read {bytes_per_s / 1e9:.1f} GB/s"
        f"{'' if roof['buffer_exceeds_l3'] else ' (buffer fits L3)'}, "
        f"fp32 {flops_per_s / 1e9:.0f} GFLOP/s (BLAS)"
    )


def measure(smoke: bool = False, device: str = "cpu") -> dict[str, Any]:
    """Both roofs of the device, with the methods and every method's figure."""
    return _measure_cuda(smoke) if device == "cuda" else _measure_cpu(smoke)


def _measure_cuda(smoke: bool, device: str = "cuda") -> dict[str, Any]:
    copy_bytes = 1 << 26 if smoke else MAX_COPY_BYTES
    source = torch.randint(256, (copy_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = cuda_timing.quick_seconds(lambda: target.copy_(source), MATRIX_REPEATS)
    size = 512 if smoke else 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    cuda_timing.quick_seconds(lambda: torch.mm(a, b), MATRIX_REPEATS)  # until the clocks are up
    mm_s = cuda_timing.quick_seconds(lambda: torch.mm(a, b), MATRIX_REPEATS)
    return {
        "copy_bytes_per_s": 2 * copy_bytes / copy_s,
        "copy_method": f"device-to-device copy of {copy_bytes} bytes, read and written counted",
        "bf16_flops_per_s": 2 * size**3 / mm_s,
        "bf16_method": f"torch.mm {size} x {size} bfloat16 of random values",
    }


def _measure_cpu(smoke: bool) -> dict[str, Any]:
    l3 = cache_sizes()["l3_bytes"] or 0
    buffer_bytes = 1 << 24 if smoke else min(MAX_BUFFER_BYTES, max(1 << 28, 2 * l3))
    repeats = 2 if smoke else REPEATS
    buffer = torch.ones(buffer_bytes // 4)
    reads: dict[str, Callable[[], object]] = {
        "torch.sum": buffer.sum,
        "torch.dot(x, x)": lambda: torch.dot(buffer, buffer),
        "torch.mv": lambda: torch.mv(buffer.view(-1, 4096), buffer[:4096]),
    }
    bandwidth = {
        name: buffer_bytes / _median_seconds(call, repeats) for name, call in reads.items()
    }
    size = 256 if smoke else 2048
    a, b = torch.rand(size, size), torch.rand(size, size)
    flops = 2 * size**3 / _median_seconds(lambda: torch.mm(a, b), repeats)
    return {
        "read_bytes_per_s": max(bandwidth.values()),
        "read_method": "best median of reductions over one float32 buffer",
        "read_by_method": bandwidth,
        "read_buffer_bytes": buffer_bytes,
        "buffer_exceeds_l3": buffer_bytes > l3,
        "fp32_flops_per_s": flops,
        "fp32_method": f"torch.mm {size} x {size} float32: what this BLAS reaches, not the peak",
        "threads": torch.get_num_threads(),
    }
