"""What every op with integer arguments has to give, from plain loops, for integer_extremes.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from stateful_kv import ops
from tests.ops.cases import Arguments
from tests.ops.comparing import to_numpy64
from tests.ops.paged import quantized
from tests.reference import attention, elementwise, linear, sampling
from tests.reference import tokens as token_loops

MOST = 2**31 - 1

# What an op has to give for arguments that it accepts, by the name of the output or argument.
Expected = dict[str, Any]


def _pool(arguments: Arguments, name: str) -> np.ndarray:
    """A pool in float64, of int8 times its scales."""
    pool = to_numpy64(arguments[f"{name}_pool"])
    scales = arguments[f"{name}_scales"]
    return pool if scales is None else pool * to_numpy64(scales)[..., None]


def _appended(arguments: Arguments, name: str, rows: np.ndarray) -> Expected:
    pool, scales = arguments[f"{name}_pool"], arguments[f"{name}_scales"]
    slots = arguments["slots"].numpy()
    if scales is None:
        return {f"{name}_pool": elementwise.append(to_numpy64(pool), rows, slots)}
    elements, row_scales = quantized(torch.from_numpy(rows.astype(np.float32)))
    return {
        f"{name}_pool": elementwise.append(pool.numpy(), elements.numpy(), slots),
        f"{name}_scales": elementwise.append(
            to_numpy64(scales)[..., None], to_numpy64(row_scales)[..., None], slots
        )[..., 0],
    }


def _append_kv(a: Arguments) -> Expected:
    return _appended(a, "k", to_numpy64(a["k"])) | _appended(a, "v", to_numpy64(a["v"]))


def _copy_pages(a: Arguments) -> Expected:
    copies = a["page_copies"].numpy()
    return {
        name: elementwise.copy_pages(a[name].numpy(), copies)
        for name in ("k_pool", "v_pool", "k_scales", "v_scales")
        if a[name] is not None and a[name].dim() == 4
    }


def _attention(a: Arguments) -> Expected:
    tables = [a[name].numpy() for name in ("page_table", "seq_lens", "query_offsets")]
    pools = _pool(a, "k"), _pool(a, "v")
    settings = a["scale"], a["sliding_window"], a["soft_cap"]
    output = attention.paged_attention(to_numpy64(a["q"]), *pools, *tables, *settings)
    output[a["query_offsets"][-1] :] = 0.0  # rows of no sequence
    return {"output 0": output}


def _rope_append_kv(a: Arguments) -> Expected:
    positions, table = a["positions"].numpy(), to_numpy64(a["cos_sin"])
    if a["k_scales"] is None:
        rows = elementwise.rotate(to_numpy64(a["k"]), positions, table)
        pools = _appended(a, "k", rows) | _appended(a, "v", to_numpy64(a["v"]))
    else:  # whose rounding to int8 is for test_int8_kv.py to compare
        pools = _appended(a, "v", to_numpy64(a["v"]))
    return {"q": elementwise.rotate(to_numpy64(a["q"]), positions, table), **pools}


def _linear_sums(a: Arguments) -> np.ndarray:
    parts = [a[name].numpy() for name in ("weight", "scales", "minimums")]
    weight = linear.unpack(*parts, a["out_features"])
    x = elementwise.rms_norm(to_numpy64(a["x"]), to_numpy64(a["norm_weight"]), a["norm_eps"])
    return linear.linear(x, weight, a["bias"].numpy())


def _quantized_linear(a: Arguments) -> Expected:
    return {"output 0": _linear_sums(a) + to_numpy64(a["residual"])}


def _linear_top_k(a: Arguments) -> Expected:
    sums = _linear_sums(a)
    ids = np.argsort(-sums, axis=1, kind="stable")[:, : a["k"]]
    return {"output 0": ids, "output 1": np.take_along_axis(sums, ids, axis=1)}


def _decoder_layers(a: Arguments) -> Expected:
    """The layers by the ops one after the other, each of which has a reference here."""
    heads, kv_heads, dim = a["num_heads"], a["k_pools"].shape[2], a["k_pools"].shape[4]
    pools = {name: a[name].clone() for name in ("k_pools", "v_pools")}
    scales = {n: a[n].clone() if n in a else None for n in ("k_scales", "v_scales")}
    hidden, rows = a["x"], a["logit_rows"]
    for number in range(len(a["weights"]) // 20):
        w = a["weights"][20 * number : 20 * (number + 1)]
        layer_scales = [None if s is None else s[number] for s in scales.values()]
        layer_pools = [pool[number] for pool in pools.values()]
        norm = {"norm_eps": a["norm_eps"]}
        width = (heads + 2 * kv_heads) * dim
        fused = ops.quantized_linear(hidden, *w[1:5], width, norm_weight=w[0], **norm)
        q, k, v = fused.view(-1, heads + 2 * kv_heads, dim).split([heads, kv_heads, kv_heads], 1)
        q, k = ops.rms_norm(q, w[5], a["norm_eps"]), ops.rms_norm(k, w[6], a["norm_eps"])
        ops.rope_append_kv(
            *(q, k, v, a["positions"], a["cos_sin"], a["slots"], *layer_pools, *layer_scales)
        )
        tables = a["page_table"], a["seq_lens"], a["query_offsets"]
        window = a["sliding_window"]
        attended = ops.paged_attention(
            q, *layer_pools, *tables, a["scale"], window, 0.0, *layer_scales
        )
        attended = attended.flatten(1)
        if 20 * (number + 1) == len(a["weights"]):
            hidden, attended = hidden[rows], attended[rows]
        hidden = ops.quantized_linear(attended, *w[7:11], hidden.shape[1], hidden.contiguous())
        inner = 2 * 32 * w[17].shape[1]
        gated = ops.quantized_linear(
            hidden, *w[12:16], inner, norm_weight=w[11], silu_mul=True, **norm
        )
        hidden = ops.quantized_linear(gated, *w[16:20], hidden.shape[1], hidden)
    written = pools | {name: s for name, s in scales.items() if s is not None}
    floats = {name: to_numpy64(tensor) for name, tensor in written.items()}
    exact = {name: written[name].numpy() for name in written if not a[name].is_floating_point()}
    return floats | exact | {"output": to_numpy64(hidden)}


def _sample(a: Arguments) -> Expected:
    rows = a["logits"].numpy()
    settings = [a[n].tolist() for n in ("temperatures", "top_k", "top_p", "min_p")]
    keys = zip(a["seeds"].tolist(), a["positions"].tolist(), strict=True)
    ids = [
        sampling.draw(row, *key, *values)
        for row, key, values in zip(rows, keys, zip(*settings, strict=True), strict=True)
    ]
    return {"output 0": np.array(ids), "output 1": rows.max(1).astype(np.float64)}


def _ngram_lookup(a: Arguments) -> Expected:
    borders, most = a["offsets"].tolist(), a["max_draft"]
    longest = min(a["max_n"], a["tokens"].numel())
    drafts = [
        token_loops.ngram_lookup(
            a["tokens"][begin : begin + length].tolist(), a["min_n"], longest, most
        )
        for begin, length in zip(borders, a["lengths"].tolist(), strict=False)
    ]
    padded = [draft + [-1] * (most - len(draft)) for draft in drafts]
    shape = len(drafts), most
    return {
        "output 0": np.array(padded, dtype=np.int64).reshape(shape),
        "output 1": np.array([len(draft) for draft in drafts]),
    }


def _verify_draft(a: Arguments) -> Expected:
    drafts, targets, borders = (a[n].tolist() for n in ("draft_ids", "target_ids", "draft_offsets"))
    pairs = [
        token_loops.verify_draft(drafts[begin:end], targets[begin + s : end + s + 1])
        for s, (begin, end) in enumerate(itertools.pairwise(borders))
    ]
    return {f"output {i}": np.array([pair[i] for pair in pairs]) for i in range(2)}


def _states(a: Arguments, running: list[bool]) -> list[token_loops.LoopState]:
    """The sequences of a loop; of one that does not run nothing is read."""
    states = []
    for s, runs in enumerate(running):
        length = int(a["lengths"][s]) if runs else 0
        states.append(
            token_loops.LoopState(
                history=a["history"][s, :length].tolist(),
                num_left=int(a["num_left"][s]) if runs else 0,
                kv_limit=int(a["kv_limits"][s]) if "kv_limits" in a else 0,
                pages=a["page_table"][s].tolist() if "page_table" in a else [],
                stops=a["stop_ids"][s].tolist() if "stop_ids" in a else [],
                counts=a["counts"][s].tolist() if "counts" in a else [0, 0, 0],
            )
        )
    return states


def _fill_rows(a: Arguments) -> Expected:
    num, most = a["draft_ids"].shape
    running = [left > 0 for left in a["num_left"].tolist()]
    states = _states(a, running)
    counts = a["num_draft"].tolist()
    drafts = [a["draft_ids"][s, : max(counts[s], 0)].tolist() for s in range(num)]
    rows = token_loops.fill_rows(states, drafts, a["page_size"])
    rest = num * (most + 1) - len(rows)
    per_sequence = [sum(row.sequence == s for row in rows) for s in range(num)]
    lens = [len(t.history) - 1 + n if n else 0 for t, n in zip(states, per_sequence, strict=True)]
    columns = [
        [row.token for row in rows] + [0] * rest,
        [row.position for row in rows] + [0] * rest,
        [row.slot for row in rows] + [-1] * rest,
        lens,
        [0, *itertools.accumulate(per_sequence)],
        [row.sequence for row in rows] + [0] * rest,
    ]
    return {f"output {i}": np.array(column) for i, column in enumerate(columns)}


def _advance_sequences(a: Arguments) -> Expected:
    borders = a["query_offsets"].tolist()
    ranges = list(itertools.pairwise(borders))
    states = _states(a, [begin < end for begin, end in ranges])
    fed = [a[name].tolist() for name in ("token_ids", "target_ids", "target_values")]
    wanted = {n: a[n].numpy().copy() for n in ("history", "lengths", "num_left", "counts")}
    for s, (state, (begin, end)) in enumerate(zip(states, ranges, strict=True)):
        if begin == end:
            continue
        token_loops.advance_sequence(state, *(column[begin:end] for column in fed))
        wanted["history"][s, : len(state.history)] = state.history
        wanted["lengths"][s] = len(state.history)
        wanted["num_left"][s] = state.num_left
        wanted["counts"][s] = [min(count, MOST) for count in state.counts]
    return wanted


EXPECTED: dict[str, Callable[[Arguments], Expected]] = {
    "append_kv": _append_kv,
    "copy_pages": _copy_pages,
    "paged_attention": _attention,
    "shared_prefix_attention": _attention,
    "rope_append_kv": _rope_append_kv,
    "quantized_linear": _quantized_linear,
    "linear_top_k": _linear_top_k,
    "decoder_layers": _decoder_layers,
    "sample": _sample,
    "ngram_lookup": _ngram_lookup,
    "verify_draft": _verify_draft,
    "fill_rows": _fill_rows,
    "advance_sequences": _advance_sequences,
}
