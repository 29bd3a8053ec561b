"""The small ops of a layer against torch: norms, activation, rotary embedding, pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import harness
from bench.harness import Case, Settings, Trial, Work
from bench.peers import (
    torch_composites,
)
from bench.suites import peer_ways, shapes
from stateful_kv import ops

EPS = 1e-5
TOLERANCE = 1e-4


def _rms_norm(num_rows: int, settings: Settings) -> Trial:
    inputs, rotation_bytes = shapes.rows(num_rows, shapes.HIDDEN, settings.cold_bytes)
    weight = torch.rand(shapes.HIDDEN)

    def check(_peer: str) -> harness.Check:
        together = ops.rms_norm(inputs[0], weight, EPS)
        bits = torch.equal(ops.rms_norm(inputs[0][-1:], weight, EPS), together[-1:])
        expected = torch_composites.rms_norm(inputs[0], weight, EPS)
        return harness.compare(together, expected, TOLERANCE, bits)

    return Trial(
        ours=lambda i: ops.rms_norm(inputs[i], weight, EPS),
        peers={
            "torch": peer_ways.ways(
                torch_composites.RMS_NORM,
                lambda norm: lambda i: norm(inputs[i], weight, EPS),
                lambda norm: norm(inputs[0], weight, EPS),
                TOLERANCE,
                compiles=not settings.smoke,
            )
        },
        check=check,
        work=Work(
            2 * 4 * num_rows * shapes.HIDDEN,
            4 * num_rows * shapes.HIDDEN,
            hot_bytes=4 * num_rows * shapes.HIDDEN,
        ),
        rotations=len(inputs),
        rotation_bytes=rotation_bytes,
    )


def _add_rms_norm(num_rows: int, settings: Settings) -> Trial:
    inputs, rotation_bytes = shapes.rows(num_rows, shapes.HIDDEN, settings.cold_bytes)
    residuals = [torch.randn_like(x) for x in inputs]
    weight = torch.rand(shapes.HIDDEN)
    functions = {
        name: torch_composites.adding(norm) for name, norm in torch_composites.RMS_NORM.items()
    }

    def check(_peer: str) -> harness.Check:
        x, residual = inputs[0], residuals[0]
        together = ops.add_rms_norm(x, residual, weight, EPS)
        last = ops.add_rms_norm(x[-1:], residual[-1:], weight, EPS)
        bits = all(torch.equal(a, b[-1:]) for a, b in zip(last, together, strict=True))
        expected = next(iter(functions.values()))(x, residual, weight, EPS)
        return harness.compare(together, expected, TOLERANCE, bits)

    return Trial(
        ours=lambda i: ops.add_rms_norm(inputs[i], residuals[i], weight, EPS),
        peers={
            "torch": peer_ways.ways(
                functions,
                lambda add_norm: lambda i: add_norm(inputs[i], residuals[i], weight, EPS),
                lambda add_norm: add_norm(inputs[0], residuals[0], weight, EPS),
                TOLERANCE,
                compiles=not settings.smoke,
            )
        },
        check=check,
        work=Work(
            4 * 4 * num_rows * shapes.HIDDEN,
            5 * num_rows * shapes.HIDDEN,
            hot_bytes=2 * 4 * num_rows * shapes.HIDDEN,
        ),
        rotations=len(inputs),
        rotation_bytes=2 * rotation_bytes,
    )


def _silu_mul(num_rows: int, settings: Settings) -> Trial:
    inputs, rotation_bytes = shapes.rows(num_rows, 2 * shapes.INTERMEDIATE, settings.cold_bytes)

    def check(_peer: str) -> harness.Check:
        together = ops.silu_mul(inputs[0])
        bits = torch.equal(ops.silu_mul(inputs[0][-1:]), together[-1:])
        return harness.compare(together, torch_composites.silu_mul(inputs[0]), TOLERANCE, bits)

    return Trial(
        ours=lambda i: ops.silu_mul(inputs[i]),
        peers={
            "torch": peer_ways.ways(
                torch_composites.SILU_MUL,
                lambda silu_mul: lambda i: silu_mul(inputs[i]),
                lambda silu_mul: silu_mul(inputs[0]),
                TOLERANCE,
                compiles=not settings.smoke,
            )
        },
        check=check,
        work=Work(
            3 * 4 * num_rows * shapes.INTERMEDIATE,
            4 * num_rows * shapes.INTERMEDIATE,
            hot_bytes=4 * num_rows * shapes.INTERMEDIATE,
        ),
        rotations=len(inputs),
        rotation_bytes=rotation_bytes,
    )


class _Fused(NamedTuple):
    """Views of rows that hold q, k and v side by side, as the model hands them over."""

    q: Tensor
    k: Tensor
    v: Tensor
    qk: Tensor


def _qkv(num_rows: int, settings: Settings) -> tuple[list[_Fused], int]:
    """Rotating fused rows and their bytes."""
    heads = shapes.NUM_HEADS, shapes.NUM_KV_HEADS, shapes.NUM_KV_HEADS
    rows, num_bytes = shapes.rows(num_rows, sum(heads) * shapes.HEAD_DIM, settings.cold_bytes)
    views = []
    for row in rows:
        fused = row.view(num_rows, sum(heads), shapes.HEAD_DIM)
        views.append(_Fused(*fused.split(heads, dim=1), fused[:, : sum(heads[:2])]))
    return views, num_bytes


def _pools(settings: Settings) -> tuple[Tensor, Tensor]:
    num_pages = 16 if settings.smoke else 1024
    pool = shapes.kv_pool(1, num_pages, torch.float16)[0]
    return pool, pool.clone()


def _slots(num_rows: int, k_pool: Tensor) -> Tensor:
    return torch.randperm(k_pool.shape[0] * shapes.PAGE_SIZE)[:num_rows].contiguous()


def _append_kv(num_rows: int, settings: Settings) -> Trial:
    inputs, rotation_bytes = _qkv(num_rows, settings)
    k_pool, v_pool = _pools(settings)
    slots = _slots(num_rows, k_pool)
    at = torch_composites.places_of(slots, k_pool)

    def result(append: Callable[..., None]) -> tuple[Tensor, Tensor]:
        pools = k_pool.clone(), v_pool.clone()
        append(inputs[0].k, inputs[0].v, at, *pools)
        return pools

    def check(_peer: str) -> harness.Check:
        expected = result(torch_composites.append_kv)
        ops.append_kv(inputs[0].k, inputs[0].v, slots, k_pool, v_pool)
        return harness.compare((k_pool, v_pool), expected, 0.0)

    row_bytes = 2 * shapes.NUM_KV_HEADS * shapes.HEAD_DIM

    def call(append: Callable[..., None], where: Any, index: int) -> None:
        append(inputs[index].k, inputs[index].v, where, k_pool, v_pool)

    return Trial(
        ours=partial(call, ops.append_kv, slots),
        peers={
            "torch": peer_ways.ways(
                torch_composites.append_ways(num_rows),
                lambda append: partial(call, append, at),
                result,
                0.0,
                compiles=not settings.smoke,
            )
        },
        check=check,
        work=Work(num_rows * row_bytes * (4 + 2), hot_bytes=num_rows * row_bytes * 2),
        rotations=len(inputs),
        rotation_bytes=rotation_bytes,
    )


def _rope_append_kv(num_rows: int, settings: Settings) -> Trial:
    inputs, rotation_bytes = _qkv(num_rows, settings)
    k_pool, v_pool = _pools(settings)
    slots = _slots(num_rows, k_pool)
    positions = torch.arange(100, 100 + num_rows, dtype=torch.int32)
    table = shapes.rope_table(2048)
    at = torch_composites.places_of(slots, k_pool)
    cos, sin = torch_composites.cos_and_sin(positions, table)

    def call(index: int) -> None:
        q, k, v, _ = inputs[index]
        ops.rope_append_kv(q, k, v, positions, table, slots, k_pool, v_pool)

    def peer(rope: Callable[..., None], index: int) -> None:
        rope(inputs[index].qk, shapes.NUM_HEADS, inputs[index].v, cos, sin, at, k_pool, v_pool)

    def result(rope: Callable[..., None]) -> tuple[Tensor, Tensor, Tensor]:
        qk, pools = inputs[0].qk.clone(), (k_pool.clone(), v_pool.clone())
        rope(qk, shapes.NUM_HEADS, inputs[0].v, cos, sin, at, *pools)
        return qk[:, : shapes.NUM_HEADS], *pools

    # Half-precision pools: one unit in the last place where the float32 values round apart.
    tolerance = 1e-3

    def check(_peer: str) -> harness.Check:
        q, k, v, _ = inputs[0]
        ours = q.clone(), k_pool.clone(), v_pool.clone()
        ops.rope_append_kv(ours[0], k, v, positions, table, slots, *ours[1:])
        return harness.compare(ours, result(torch_composites.rope_append_kv), tolerance)

    heads = 2 * shapes.NUM_HEADS + 2 * shapes.NUM_KV_HEADS
    stored = 2 * shapes.NUM_KV_HEADS * 2
    rotated = shapes.NUM_HEADS + shapes.NUM_KV_HEADS
    return Trial(
        ours=call,
        peers={
            "torch": peer_ways.ways(
                torch_composites.rope_ways(num_rows),
                # Not compiled: torch.compile (2.13) fails where views of one tensor are written.
                lambda rope: partial(peer, rope),
                result,
                tolerance,
            )
        },
        check=check,
        work=Work(
            num_rows * shapes.HEAD_DIM * (4 * heads + stored),
            3 * num_rows * shapes.HEAD_DIM * rotated,
            hot_bytes=num_rows * shapes.HEAD_DIM * stored,
        ),
        rotations=len(inputs),
        rotation_bytes=rotation_bytes,
    )


def _copy_pages(num_copies: int, settings: Settings) -> Trial:
    layers = 2 if settings.smoke else shapes.NUM_LAYERS
    groups = 4 if settings.smoke else 48
    k_pool = shapes.kv_pool(layers, 2 * num_copies * groups, torch.float16)
    v_pool = k_pool.clone()
    copies = torch.randperm(2 * num_copies * groups).to(torch.int32).view(groups, num_copies, 2)
    pairs = list(copies.unbind(0))

    def result(copy: Callable[..., None]) -> tuple[Tensor, Tensor]:
        pools = k_pool.clone(), v_pool.clone()
        copy(pairs[0], *pools)
        return pools

    def check(_peer: str) -> harness.Check:
        expected = result(torch_composites.copy_pages)
        ops.copy_pages(pairs[0], k_pool, v_pool)
        return harness.compare((k_pool, v_pool), expected, 0.0)

    page_bytes = 2 * 2 * layers * shapes.NUM_KV_HEADS * shapes.PAGE_SIZE * shapes.HEAD_DIM
    return Trial(
        ours=lambda i: ops.copy_pages(pairs[i], k_pool, v_pool),
        peers={
            "torch": peer_ways.ways(
                torch_composites.COPY_PAGES,
                lambda copy: lambda i: copy(pairs[i], k_pool, v_pool),
                result,
                0.0,
            )
        },
        check=check,
        work=Work(2 * num_copies * page_bytes),
        rotations=groups,
        rotation_bytes=2 * groups * num_copies * page_bytes,
        units=num_copies,
        unit="page",
    )


def cases(settings: Settings) -> Iterator[Case]:
    """Rows of a decode, a verify and a prefill chunk for each op."""
    rows = (1, 8) if settings.smoke else (1, 8, 512)
    for name, setup in (
        ("rms_norm", _rms_norm),
        ("add_rms_norm", _add_rms_norm),
        ("silu_mul", _silu_mul),
        ("rope_append_kv", _rope_append_kv),
        ("append_kv", _append_kv),
    ):
        for num_rows in rows:
            yield Case(name, {"N": num_rows}, partial(setup, num_rows))
    for num_copies in (1, 8):
        yield Case("copy_pages", {"pages": num_copies}, partial(_copy_pages, num_copies))
