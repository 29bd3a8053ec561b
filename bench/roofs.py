"""The limits of this machine, measured at the start of a run and stored with it.

The roofs are what plain torch reaches with the threads of the run, not data-sheet figures. Each is
the best of its repeats and methods, for a roof must not be too low:

- read bandwidth: reductions over a float32 buffer that is larger than the last-level cache where
  memory allows (`buffer_exceeds_l3` says whether it was).
- cache bandwidth: the same for a buffer of the size that a case's inputs have together, and a copy
  within it, by the threads of the run and by one; measured where a case asks for it (`cache` lists
  the sizes). Reads go over the buffer many times in one call, else the call itself would be what is
  measured.
- fp32 arithmetic: square `torch.mm` of a few sizes (the BLAS of this torch). A BLAS does not quite
  reach the peak of the units, so this is a lower bound of it.

On a CUDA device:

- copy bandwidth: a device-to-device copy of a buffer far larger than L2, bytes read and written.
- cache bandwidth: copies within a buffer of the size asked for, many in one CUDA graph.
- bf16 matrix rate: a square `torch.mm` of random values (zeros run faster) by cuBLAS.
"""

from __future__ import annotations

import os
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
MATRIX_SIZES = (1024, 1536, 2048)
# Below this size nobody's working set is distinguishable from its call.
MIN_CACHE_BYTES = 1 << 14
# How much is read in one call, so that starting threads does not count.
CACHE_READ_BYTES = 1 << 26
# Rotating inputs are at least this many times the last-level cache, so that none is left in it.
COLD_TIMES = 2
COLD_MEMORY_SHARE = 16  # but at most this part of the memory


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


def last_level_bytes(device: str = "cpu") -> int | None:
    """Size of the cache that is nearest to memory; None where the system does not tell."""
    if device == "cuda":
        return cuda_timing.l2_bytes()
    sizes = cache_sizes()
    if sizes["l3_bytes"] is not None or sizes["l2_bytes"] is None:
        return sizes["l3_bytes"]
    return sizes["l2_bytes"] * torch.get_num_threads()


def cold_bytes(device: str = "cpu") -> int:
    """How much rotating data counts as cold: a multiple of the last-level cache.

    At most a part of the memory: what remains below the size of the cache is reported as warm. On
    a CUDA device three times its L2.
    """
    if device == "cuda":
        return cuda_timing.cold_bytes()
    l2 = (cache_sizes()["l2_bytes"] or (1 << 20)) * torch.get_num_threads()
    wanted = max(5 * l2, COLD_TIMES * (last_level_bytes() or 0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(wanted, memory // COLD_MEMORY_SHARE)


def _least_seconds(call: Callable[[], object], repeats: int) -> float:
    call()
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return min(samples)


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
        "llc_bytes": last_level_bytes(device),
        "cache_method": "copies within one buffer, many in one CUDA graph",
        "cache": [],
        "repeats": 2 if smoke else REPEATS,
    }


def _measure_cpu(smoke: bool) -> dict[str, Any]:
    l3 = cache_sizes()["l3_bytes"] or 0
    buffer_bytes = 1 << 24 if smoke else min(MAX_BUFFER_BYTES, max(1 << 28, 2 * l3))
    repeats = 2 if smoke else REPEATS
    bandwidth = _read_bandwidth(buffer_bytes, repeats)
    sizes = (256,) if smoke else MATRIX_SIZES
    by_size = _matrix_rates(sizes, repeats)
    return {
        "read_bytes_per_s": max(bandwidth.values()),
        "read_method": "best of reductions over one float32 buffer",
        "read_by_method": bandwidth,
        "read_buffer_bytes": buffer_bytes,
        "buffer_exceeds_l3": buffer_bytes > l3,
        "llc_bytes": last_level_bytes(),
        "cache_method": "best of reductions over, and copies within, one float32 buffer",
        "cache": [],
        "fp32_flops_per_s": max(by_size.values()),
        "fp32_method": f"best torch.mm of {list(sizes)} square float32: what this BLAS reaches",
        "fp32_by_size": by_size,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
    }


def _read_bandwidth(num_bytes: int, repeats: int) -> dict[str, float]:
    """Bytes a second by method, from a buffer that is read once a call."""
    buffer = torch.ones(num_bytes // 4)
    reads: dict[str, Callable[[], object]] = {
        "torch.sum": buffer.sum,
        "torch.dot(x, x)": lambda: torch.dot(buffer, buffer),
        "torch.mv": lambda: torch.mv(buffer.view(-1, 4096), buffer[:4096]),
    }
    return {name: num_bytes / _least_seconds(call, repeats) for name, call in reads.items()}


def _matrix_rates(sizes: tuple[int, ...], repeats: int) -> dict[str, float]:
    """Floating-point operations a second by size of the matrices."""
    rates = {}
    for size in sizes:
        a, b = torch.rand(size, size), torch.rand(size, size)
        seconds = _least_seconds(lambda a=a, b=b: torch.mm(a, b), repeats)
        rates[str(size)] = 2 * size**3 / seconds
    return rates


def _cpu_cache(num_bytes: int, repeats: int) -> dict[str, float]:
    """Bytes a second by method, from a buffer of this size that stays where it is."""
    buffer = torch.ones(num_bytes // 4)
    passes = max(1, CACHE_READ_BYTES // num_bytes)
    many = buffer.expand(passes, len(buffer))  # the same bytes again and again
    half = len(buffer) // 2
    source, target = buffer[:half], buffer[half : 2 * half]
    moved: dict[str, tuple[int, Callable[[], object]]] = {
        "torch.sum of all passes": (passes * num_bytes, many.sum),
        "torch.sum of each pass": (passes * num_bytes, lambda: many.sum(1)),
        "torch.dot(x, x)": (num_bytes, lambda: torch.dot(buffer, buffer)),
        "copy of one half to the other": (num_bytes, lambda: target.copy_(source)),
    }
    rates = {name: size / _least_seconds(call, repeats) for name, (size, call) in moved.items()}
    threads = torch.get_num_threads()
    if threads > 1:
        # A small buffer may be read faster by one thread; on a busy machine it waits for nobody.
        torch.set_num_threads(1)
        try:
            for name, (size, call) in moved.items():
                rates[f"{name}, one thread"] = size / _least_seconds(call, repeats)
        finally:
            torch.set_num_threads(threads)
    return rates


def _cuda_cache(num_bytes: int, repeats: int) -> dict[str, float]:
    buffer = torch.zeros(num_bytes, dtype=torch.uint8, device="cuda")
    source, target = buffer.chunk(2)
    seconds = cuda_timing.graph_seconds(lambda _: target.copy_(source), 1, repeats)
    return {"copy of one half to the other": num_bytes / seconds}


def _size_of(num_bytes: int) -> int:
    """The power of two that is measured for so many bytes: not above, or it would be too slow."""
    return max(MIN_CACHE_BYTES, 1 << (num_bytes.bit_length() - 1))


def cache_bandwidth(roof: dict[str, Any], num_bytes: int) -> float:
    """Bytes a second from a buffer of about this size; measured once a run and kept in `roof`."""
    size = _size_of(num_bytes)
    for known in roof["cache"]:
        if known["buffer_bytes"] == size:
            return float(known["bytes_per_s"])
    by_method = _cache(roof, size)
    roof["cache"].append(
        {"buffer_bytes": size, "bytes_per_s": max(by_method.values()), "by_method": by_method}
    )
    return max(by_method.values())


def _cache(roof: dict[str, Any], size: int) -> dict[str, float]:
    measure_it = _cuda_cache if "copy_bytes_per_s" in roof else _cpu_cache
    return measure_it(size, roof["repeats"])


def can_measure_again(roof: dict[str, Any]) -> bool:
    """Whether the roofs were measured by this module, so that doing it again means the same."""
    return "repeats" in roof and "cache" in roof


def measure_again(roof: dict[str, Any], kind: str, num_bytes: int) -> None:
    """Once more, next to the result that exceeds it; the roof is raised, never lowered.

    Args:
        roof: of the run.
        kind: "bandwidth", "cache bandwidth" or "flops".
        num_bytes: for the cache, the size of the buffer.
    """
    on_cuda = "copy_bytes_per_s" in roof
    if kind == "cache bandwidth":
        size = _size_of(num_bytes)
        (known,) = (entry for entry in roof["cache"] if entry["buffer_bytes"] == size)
        known["bytes_per_s"] = max(known["bytes_per_s"], *_cache(roof, size).values())
    elif on_cuda:
        again = _measure_cuda(False)
        for key in ("copy_bytes_per_s", "bf16_flops_per_s"):
            roof[key] = max(roof[key], again[key])
    elif kind == "bandwidth":
        rates = _read_bandwidth(roof["read_buffer_bytes"], roof["repeats"])
        roof["read_bytes_per_s"] = max(roof["read_bytes_per_s"], *rates.values())
    else:
        sizes = tuple(int(size) for size in roof["fp32_by_size"])
        rates = _matrix_rates(sizes, roof["repeats"])
        roof["fp32_flops_per_s"] = max(roof["fp32_flops_per_s"], *rates.values())
    roof["measured_again"] = roof.get("measured_again", 0) + 1
