"""A decode step of the engine, against the forward pass alone and against its kernels alone.

The step has everything: planning, page reservation, the batch, the forward pass, sampling, commit,
detokenising. Its peer `forward` is batch, forward pass and arg-max on the same context.

The time in kernels is what the profiler counts inside our ops. An op that the model calls from
Python has the checks of its arguments and the allocation of its result in its time. With packed
weights the forward pass is one call: only the kernels it runs count, each under the name of the op
it belongs to; its checks and what `decoder_layers` does around them are the engine's time. Most of
the profiler's cost lies between the kernels, some of it inside them: `overhead_over_kernels` sets
plain steps against kernels that look that much longer, `overhead_at_most` counts all of the cost as
the engine's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
from torch.autograd.profiler import profile

from bench.harness import Check, Settings, Trial, Work
from bench.suites.model_sides import PAGE_SIZE, Sides
from stateful_kv.apps.profile.events import CONTAINERS
from stateful_kv.apps.profile.recorder import OpRecorder
from stateful_kv.engine.config import EngineConfig
from stateful_kv.engine.engine import Engine

NAMESPACE = "stateful_kv::"
MAX_TEMPLATE = 64  # tokens that the chat template puts around the text, and then some


class _ProfiledStep(NamedTuple):
    """A step under the profiler: seconds of all of it and in each op, and events recorded."""

    seconds: float
    kernels: dict[str, float]
    num_events: int


class _DecodingTurn:
    """An engine in the middle of a turn: each step appends one token.

    Attributes:
        session: its prompt is computed, its first tokens are chosen.
    """

    def __init__(self, sides: Sides, context: int, max_steps: int) -> None:
        capacity = context + MAX_TEMPLATE + max_steps
        config = EngineConfig(kv_tokens=-(-capacity // PAGE_SIZE) * PAGE_SIZE, page_size=PAGE_SIZE)
        self._engine = Engine(sides.loaded.model, sides.loaded.tokenizer, config)
        self.session = self._engine.session(system="", draft=False)
        text = sides.loaded.tokenizer.decode(sides.tokens[: max(1, context)].tolist())
        # Kept: to drop the stream would end the turn.
        self._stream = self.session.stream(text, max_tokens=max_steps, ignore_eos=True)
        next(self._stream)

    def step(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        self._engine.step()
        return time.perf_counter() - start

    def profiled_step(self) -> _ProfiledStep:
        """One more step, under the profiler."""
        with _quiet_stderr(), profile() as profiled:
            seconds = self.step()
        events = profiled.key_averages()
        kernels = {
            event.key.removeprefix(NAMESPACE): event.cpu_time_total * 1e-6
            for event in events
            if event.key.startswith(NAMESPACE) and event.key not in CONTAINERS
        }
        return _ProfiledStep(seconds, kernels, sum(event.count for event in events))

    def close(self) -> None:
        """Ends the turn and frees the KV."""
        self._stream.close()
        self._engine.close()


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Some builds of the profiler write a line to stderr at each start and stop."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def _overhead(turn: _DecodingTurn, num_pairs: int) -> dict[str, Any]:
    """Plain steps and profiled steps in turns: the share of a step that is not in kernels."""
    by_op: dict[str, list[float]] = {}
    steps, totals, ratios, bounds = [], [], [], []
    with _quiet_stderr():
        op_cost = OpRecorder().op_cost_us() * 1e-6
    for _ in range(num_pairs):
        step, profiled = turn.step(), turn.profiled_step()
        total = sum(profiled.kernels.values())
        # A lower bound of the kernels' time: takes away the cost of recording every event, though
        # few events are recorded inside kernels.
        least = total - profiled.num_events * op_cost
        steps.append(step)
        totals.append(total)
        ratios.append(step / total - 1)
        bounds.append(profiled.seconds / least - 1)
        for name, seconds in profiled.kernels.items():
            by_op.setdefault(name, []).append(seconds)
    return {
        "step_s": float(np.median(steps)),
        "kernel_s": float(np.median(totals)),
        "kernel_s_by_op": {name: float(np.median(values)) for name, values in by_op.items()},
        "overhead_over_kernels": float(np.median(ratios)),
        "overhead_at_most": float(np.median(bounds)),
        "num_events": profiled.num_events,
        "num_pairs": num_pairs,
    }


def setup(context: int, sides: Sides, stack: ExitStack, settings: Settings) -> Trial:
    """A case of the suite `cpu_model`; `stack` closes what it opens."""
    # Each pair takes two steps, here and in the measure of the overhead; 50 more for the warm-up.
    turn = _DecodingTurn(sides, context, 4 * settings.num_pairs + 50)
    stack.callback(turn.close)
    length = turn.session.num_tokens

    def forward(_index: int) -> None:
        sides.ours.run(sides.tokens[length : length + 1], 1)

    def check(_peer: str) -> Check:
        sides.fill(sides.ours, length)
        before = turn.session.num_tokens
        turn.step()
        return Check(turn.session.num_tokens == before + 1 and turn.session.is_busy)

    def details(_peer: str) -> dict[str, Any]:
        return {"context_at_start": length, **_overhead(turn, settings.num_pairs)}

    return Trial(
        ours=lambda _index: turn.step(),
        peers={"forward": forward},
        check=check,
        work=Work(0),
        calls_per_sample=1,
        warm_up=True,
        reset=lambda: sides.ours.truncate(length),
        details=details,
    )
