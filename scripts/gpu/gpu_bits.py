"""Experiment: does the library's matrix product give a row the same bits for every row count?

A library chooses kernels by shape, so the sum of one output may be done in another order when the
batch grows. For each weight shape and row count the rows are compared, bit for bit, with those of
the product of 64 rows; several random inputs, rows at several places of the batch. The answer
decides which row counts a model on CUDA may use as they are. With both libraries of torch, and with
and without sums in reduced precision.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

REFERENCE_ROWS = 64
ROW_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SEEDS = 3
# (out, in) of fused projections.
SHAPES = {
    "smollm2": ((960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576)),
    "llama-1b": ((3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192), (128256, 2048)),
    "llama-8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)),
}
SMALL = {"small": ((96, 64), (64, 160))}


@contextmanager
def _settings(library: str, reduced: bool, device: str) -> Iterator[None]:
    """cuBLAS or cuBLASLt, sums in reduced precision or not; the old settings return afterwards."""
    if device == "cpu":
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = (
        torch.backends.cuda.preferred_blas_library(),
        (matmul.allow_bf16_reduced_precision_reduction),
    )
    torch.backends.cuda.preferred_blas_library(library)
    matmul.allow_bf16_reduced_precision_reduction = reduced
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before[0])
        matmul.allow_bf16_reduced_precision_reduction = before[1]


def multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[M, in] x [out, in] -> [M, out], as the engine calls the library."""
    return torch.mm(x, weight.t())


def equal_share(
    weight: torch.Tensor,
    rows: int,
    seed: int,
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = multiply,
) -> float:
    """Share of outputs with the bits of the 64-row product; rows in blocks of 64 or fewer.

    Args:
        weight: [out, in].
        rows: of the product that is looked at; 64 rows of the reference begin at every place that
            is a multiple of 64, or `rows` of them are taken from inside.
        seed: of the inputs.
        product: what is looked at.
    """
    generator = torch.Generator(weight.device).manual_seed(seed)
    count = max(rows, REFERENCE_ROWS)
    shape = (count, weight.shape[1])
    x = torch.randn(shape, generator=generator, device=weight.device, dtype=weight.dtype)
    blocks = [product(block, weight) for block in x.split(REFERENCE_ROWS)]
    expected = torch.cat(blocks)
    if rows >= REFERENCE_ROWS:
        pairs = [(product(x, weight), expected)]
    else:
        starts = sorted({0, 1, (REFERENCE_ROWS - rows) // 2, REFERENCE_ROWS - rows})
        pairs = [(product(x[s : s + rows], weight), expected[s : s + rows]) for s in starts]
    same = [(a == b).float().mean() for a, b in pairs]
    return float(torch.stack(same).mean())


def study(device: str, smoke: bool) -> list[dict[str, Any]]:
    """One entry for each setting and shape: row counts and their share of equal outputs."""
    found = []
    shapes = SMALL if smoke else SHAPES
    row_counts = ROW_COUNTS[:8] if smoke else ROW_COUNTS
    settings = itertools.product(("cublas", "cublaslt"), (False, True))
    for library, reduced in settings if device == "cuda" else [("torch", False)]:
        for model, (out, width) in ((m, s) for m, many in shapes.items() for s in many):
            weight = torch.randn(out, width, device=device).to(torch.bfloat16) * width**-0.5
            with _settings(library, reduced, device):
                shares = {
                    rows: min(equal_share(weight, rows, seed) for seed in range(SEEDS))
                    for rows in row_counts
                }
            found.append(
                {
                    "library": library,
                    "reduced_precision": reduced,
                    "model": model,
                    "out": out,
                    "in": width,
                    "equal_rows": [rows for rows, share in shares.items() if share == 1.0],
                    "least_equal_share": {str(rows): share for rows, share in shares.items()},
                }
            )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--smoke", action="store_true", help="small shapes: shows that it runs")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    with torch.inference_mode():
        found = study(args.device, args.smoke)
    document = {
        "question": f"row counts whose rows have the bits of {REFERENCE_ROWS} rows, bfloat16",
        "device": name,
        "torch": torch.__version__,
        "smoke": args.smoke,
        "shapes": found,
    }
    args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for entry in found:
        setting = f"{entry['library']}{', reduced' if entry['reduced_precision'] else ''}"
        rows = " ".join(map(str, entry["equal_rows"]))
        print(f"{setting}: {entry['model']} {entry['out']}x{entry['in']}: equal for {rows} rows")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
