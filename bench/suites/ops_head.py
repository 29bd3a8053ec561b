"""What follows the last layer against torch: the head, the arg-max, sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import harness
from bench.harness import Case, Settings, Trial, Work
from bench.peers import torch_composites, torch_linear, torch_sampling
from bench.suites import peer_ways, shapes
from stateful_kv import ops
from stateful_kv.models import packing

TOLERANCE = 1e-4


def _argmax(num_rows: int, settings: Settings) -> Trial:
    inputs, rotation_bytes = shapes.rows(num_rows, shapes.VOCAB, settings.cold_bytes)

    def check(_peer: str) -> harness.Check:
        ids, values = ops.argmax(inputs[0])
        bits = torch.equal(ops.argmax(inputs[0][-1:])[1], values[-1:])
        largest = torch.max(inputs[0], dim=-1).values
        # A tie may go to another index in torch: the value there is what counts.
        bits = bits and torch.equal(inputs[0].gather(1, ids[:, None])[:, 0], values)
        return harness.compare(values, largest, 0.0, bits)

    return Trial(
        ours=lambda i: ops.argmax(inputs[i]),
        peers={
            "torch": peer_ways.ways(
                torch_composites.ARGMAX,
                lambda argmax: lambda i: argmax(inputs[i]),
                lambda argmax: argmax(inputs[0])[1],  # ids of equal values may differ
                0.0,
                compiles=not settings.smoke,
            )
        },
        check=check,
        work=Work(4 * num_rows * shapes.VOCAB),
        rotations=len(inputs),
        rotation_bytes=rotation_bytes,
    )


SAMPLE_TEMPERATURE = 0.7


def _sample(num_rows: int, k: int, p: float, settings: Settings) -> Trial:
    inputs, rotation_bytes = shapes.rows(num_rows, shapes.VOCAB, settings.cold_bytes)
    seeds, positions = torch.arange(num_rows), torch.arange(num_rows) + 100
    rest = (
        torch.full((num_rows,), SAMPLE_TEMPERATURE),
        torch.full((num_rows,), k, dtype=torch.int32),
        torch.full((num_rows,), p),
        torch.zeros(num_rows),
    )

    functions = torch_sampling.TOP_K if k else torch_sampling.TOP_P
    # Random numbers differ: a token must be one of those that may be drawn.
    kept = torch_sampling.kept_mask(inputs[0], SAMPLE_TEMPERATURE, k, p)

    def check(_peer: str) -> harness.Check:
        ids, values = ops.sample(inputs[0], seeds, positions, *rest)
        alone = ops.sample(
            inputs[0][-1:], seeds[-1:], positions[-1:], *(tensor[-1:] for tensor in rest)
        )
        bits = torch.equal(alone[0], ids[-1:]) and torch.equal(alone[1], values[-1:])
        bits = bits and bool(kept.gather(1, ids.long()[:, None]).all())
        return harness.compare(values, torch.max(inputs[0], dim=-1).values, 0.0, bits)

    return Trial(
        ours=lambda i: ops.sample(inputs[i], seeds, positions, *rest),
        peers={
            "torch": peer_ways.ways(
                functions,
                lambda draw: lambda i: draw(inputs[i], SAMPLE_TEMPERATURE, k, p),
                lambda draw: kept.gather(1, draw(inputs[0], SAMPLE_TEMPERATURE, k, p)[:, None]),
                0.0,
            )
        },
        check=check,
        work=Work(4 * num_rows * shapes.VOCAB),
        rotations=len(inputs),
        rotation_bytes=rotation_bytes,
    )


TOP_K = 5


def _top_of(
    multiply: Callable[[Tensor], Tensor], search: Callable[..., Any], k: int, x: Tensor
) -> Tensor:
    """Values of the k largest products, the largest first; ids are found beside them."""
    if k == 1:
        return search(multiply(x))[1][:, None]
    return search(multiply(x), k)[0]


def _linear_top_k(num_rows: int, k: int, settings: Settings) -> Trial:
    """The head of the model, int8: larger than a cache, so one weight is all it needs."""
    vocab = 4096 if settings.smoke else shapes.VOCAB
    inputs, rotation_bytes = shapes.rows(num_rows, shapes.HIDDEN, settings.cold_bytes)
    packed = packing.pack_int8(*packing.quantize_int8(torch.randn(vocab, shapes.HIDDEN)))
    parts = packed.weight, packed.scales, packed.minimums, None, vocab
    plain = packing.unpack(packed)
    num_bytes = packed.weight.nbytes + (0 if packed.scales is None else packed.scales.nbytes)

    products = torch_linear.head_ways(plain)
    find = torch_composites.ARGMAX if k == 1 else torch_sampling.FIND_TOP_K
    functions = {
        f"{product}, {way}": partial(_top_of, multiply, search, k)
        for product, multiply in products.items()
        for way, search in find.items()
    }

    def check(_peer: str) -> harness.Check:
        ids, values = ops.linear_top_k(inputs[0], *parts, k)
        full = ops.quantized_linear(inputs[0], *parts)
        bits = torch.equal(full.gather(1, ids), values)
        bits = bits and torch.equal(torch.topk(full, k).values, values)
        expected = torch.topk(torch.nn.functional.linear(inputs[0], plain), k).values
        return harness.compare(values, expected, TOLERANCE, bits)

    return Trial(
        ours=lambda i: ops.linear_top_k(inputs[i], *parts, k),
        peers={
            "torch": peer_ways.ways(
                functions,
                lambda top: lambda i: top(inputs[i]),
                lambda top: top(inputs[0]),
                torch_linear.TOLERANCE,
            )
        },
        check=check,
        work=Work(num_bytes, 2 * num_rows * vocab * shapes.HIDDEN),
        rotations=len(inputs),
        rotation_bytes=rotation_bytes + num_bytes,
    )


def cases(settings: Settings) -> Iterator[Case]:
    """Decode, verify and a full batch of decodes: a prefill chunk has one row of logits each."""
    for num_rows in (1, 8) if settings.smoke else (1, 8, 32):
        yield Case("argmax", {"R": num_rows}, partial(_argmax, num_rows))
        for k, p in ((0, 0.9), (50, 1.0)):
            labels = {"R": num_rows, "k": k, "p": p}
            yield Case("sample", labels, partial(_sample, num_rows, k, p))
        for k in (1, TOP_K):
            yield Case("linear_top_k", {"N": num_rows, "k": k}, partial(_linear_top_k, num_rows, k))
