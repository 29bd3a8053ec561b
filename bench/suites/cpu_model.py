"""Suite `cpu_model`: whole forward passes on a context against llama.cpp and `transformers`.

A call appends tokens of a real text to a sequence that already has KV for a context, and chooses
the likeliest next token: of one row (decode), of each row (verify), of the last row (prefill). KV
is cut back between calls. Both sides have the same file, tokens, threads and rows to choose for.
Ours returns the arg-max of those rows through `forward_top_k`, which writes no logits. llama.cpp
writes them, there is no other way to its answer, and numpy's arg-max over them is in its time.

llama.cpp rounds activations to 8 bits for its products; its logits are compared with a tolerance
that allows for it. Of its two settings, flash attention on and off, the quicker one is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import harness
from bench.harness import Case, Check, Missing, Settings, Trial, Work
from bench.selection import Row
from bench.suites import engine_step, real_model
from bench.suites.model_sides import Context, PeerContext, Sides, best_setting
from stateful_kv.errors import ModelNotFoundError
from stateful_kv.models.files.loading import resolve

CONTEXTS = (0, 2048, 6144)
WORK = (
    ("decode", 1),
    ("verify", 2),
    ("verify", 4),
    ("verify", 8),
    ("verify", 16),
    ("prefill", 64),
    ("prefill", 512),
)
SMOKE_CONTEXTS = (0, 100)
SMOKE_WORK = (("decode", 1), ("verify", 4), ("prefill", 16))
# Largest difference of logits over the largest logit, somewhat above what was seen. llama.cpp:
# activations of 8 bits. transformers: fp32 throughout, but our K and V are rounded to fp16.
TOLERANCES = {"llama_cpp": 0.06, "transformers": 2e-3}


def _num_weights(sides: Sides) -> tuple[int, int]:
    """Weights that each row meets, and those that only rows with logits meet (last layer, head)."""

    def count(linear: Any) -> int:
        return sum(part.out_features * part.in_features for part in linear.parts)

    weights = sides.loaded.model.weights
    qkv = sum(count(layer.qkv) for layer in weights.layers)
    others = [count(layer.o) + count(layer.gate_up) + count(layer.down) for layer in weights.layers]
    return qkv + sum(others[:-1]), others[-1] + count(weights.head)


def _work(sides: Sides, num_rows: int, num_logits: int, context: int) -> Work:
    """Every weight once, K and V of the context once; products and attention."""
    weights, config = sides.loaded.model.weights, sides.loaded.config
    linears = [weights.head]
    for layer in weights.layers:
        linears += [layer.qkv, layer.o, layer.gate_up, layer.down]
    num_bytes = sum(part.nbytes for linear in linears for part in linear.parts)
    kv_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 2
    each_row, logit_rows = _num_weights(sides)
    seen = num_rows * context + num_rows * (num_rows + 1) // 2
    attention = 4 * seen * config.num_layers * config.num_heads * config.head_dim
    flops = 2 * (num_rows * each_row + num_logits * logit_rows) + attention
    return Work(num_bytes + kv_bytes * (context + num_rows), flops)


def _compare(ours: Tensor, theirs: Tensor, tolerance: float, bits: bool) -> Check:
    """Logits of all asked rows; the last row's tokens must agree or be nearly as likely."""
    outcome = harness.compare(ours, theirs, tolerance, bits)
    our_id, their_id = int(ours[-1].argmax()), int(theirs[-1].argmax())
    gap = float(theirs[-1, their_id] - theirs[-1, our_id])
    close = gap <= tolerance * max(1.0, float(theirs.abs().max()))
    return Check(
        outcome.ok and close, outcome.max_error, tolerance, bits, same_token=our_id == their_id
    )


@dataclass
class _Peers:
    """The peers of a case, each at its better setting.

    Attributes:
        contexts: those that can run, filled up to the case's context.
        missing: those that cannot.
        details: of those that can, for the result file.
    """

    contexts: dict[str, PeerContext] = field(default_factory=dict)
    missing: dict[str, Missing] = field(default_factory=dict)
    details: dict[str, dict[str, Any]] = field(default_factory=dict)


def _choose_peers(
    sides: Sides, settings: Settings, context: int, call: Callable[[Context], Tensor]
) -> _Peers:
    peers = _Peers()
    for name in ("llama_cpp", "transformers"):
        if not (settings.asks_for(name) or (settings.peer is None and name == "llama_cpp")):
            continue
        found = sides.peer(name)
        if isinstance(found, Missing):
            peers.missing[name] = found
            continue
        for peer_context in found.values():
            sides.fill(peer_context, context)
        setting, seconds = best_setting(found, call, context)
        peers.contexts[name] = found[setting]
        peers.details[name] = {
            "peer_setting": setting,
            "seconds_by_setting": seconds,
            **found[setting].about,
        }
    return peers


def _setup(kind: str, num_rows: int, context: int, sides: Sides, settings: Settings) -> Trial:
    tokens = sides.tokens[context : context + num_rows]
    num_logits = 1 if kind == "prefill" else num_rows
    ours = sides.ours
    sides.fill(ours, context)

    def call(side: Context, _index: int = 0) -> Tensor:
        return side.run(tokens, num_logits)

    peers = _choose_peers(sides, settings, context, call)

    def reset() -> None:
        for side in (ours, *peers.contexts.values()):
            side.truncate(context)

    def check(peer: str) -> Check:
        call(ours)
        together = ours.logits()
        reset()
        # The last row once more, in a pass of its own after the others: the bits must be the same.
        if num_rows > 1:
            ours.run(tokens[:-1], 1)
        ours.run(tokens[-1:], 1)
        bits = torch.equal(ours.logits(), together[-1:])
        reset()
        if not peer:
            return Check(bits, bits_equal=bits)
        call(peers.contexts[peer])
        outcome = _compare(together, peers.contexts[peer].logits(), TOLERANCES[peer], bits)
        reset()
        return outcome

    return Trial(
        ours=partial(call, ours),
        peers={
            **{name: partial(call, theirs) for name, theirs in peers.contexts.items()},
            **peers.missing,
        },
        check=check,
        work=_work(sides, num_rows, num_logits, context),
        calls_per_sample=1,
        warm_up=True,
        reset=reset,
        units=num_rows,
        unit="row",
        details=lambda peer: peers.details.get(peer, {}),
    )


def cases(settings: Settings, sides: Any) -> Iterator[Case]:
    """Contexts ascending, so that each is computed once.

    Args:
        settings: of the run.
        sides: `Sides`; None where the cases are only listed.
    """
    contexts = SMOKE_CONTEXTS if settings.smoke else CONTEXTS
    for context in contexts:
        for kind, num_rows in SMOKE_WORK if settings.smoke else WORK:
            axes = {"rows": num_rows, "context": context}
            yield Case(kind, axes, partial(_setup, kind, num_rows, context, sides))
        with ExitStack() as stack:  # what the case opens is closed when the next one is asked for
            setup = partial(engine_step.setup, context, sides, stack)
            yield Case("engine_step", {"context": context}, setup)


def rows(settings: Settings) -> list[Row]:
    """Names and axes of all cases."""
    return harness.rows_of(cases(settings, None))


def run(settings: Settings, roofs: dict[str, Any], emit: Callable[[dict[str, Any]], None]) -> None:
    """Run the suite; without the weights there is nothing to run, and the file says so."""
    try:
        resolve(real_model.MODEL)
    except ModelNotFoundError as error:
        emit(harness.skipped("cpu_model", "all", {}, None, str(error)))
        return
    contexts = SMOKE_CONTEXTS if settings.smoke else CONTEXTS
    most_rows = max(rows for _, rows in (SMOKE_WORK if settings.smoke else WORK))
    sides = Sides(max(contexts) + most_rows + engine_step.MAX_TEMPLATE)
    try:
        with torch.inference_mode():
            harness.run_cases("cpu_model", cases(settings, sides), settings, roofs, emit)
    finally:
        sides.close()
