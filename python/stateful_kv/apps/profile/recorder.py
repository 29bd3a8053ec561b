"""Where the time of a replay goes: the same turns side by side, recorded op by op and not.

The recorder (`torch.profiler`) takes time for every op it sees, so no step time is taken under it.
Of two engines that share one model, one replays each turn under the recorder: that gives the time
inside ops, and the trace. The other replays it with a stopwatch on the spans of `tracing.py`
alone: that gives the time of steps and phases. Both make the same tokens.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stateful_kv.apps.profile.events import (
    Event,
    StepTimes,
    TraceWriter,
    TurnTimes,
    add_up_turn,
    read_chrome_trace,
)
from stateful_kv.apps.workflow import Player, ReplayOptions, TurnRow, WorkflowFile
from stateful_kv.drafts.calibrate import CostChoice
from stateful_kv.engine.engine import Engine
from stateful_kv.system import tracing


@dataclass
class Profile:
    """Both sides of a replay, turn by turn.

    Attributes:
        rows: what the turns did (times of the side that was not recorded).
        plain: turns with a stopwatch on the spans.
        recorded: the same turns with every op recorded.
        tokens_equal: whether the two sides gave the same replies.
        op_cost_us: what the recorder costs for an op, measured beforehand.
    """

    rows: list[TurnRow] = field(default_factory=list)
    plain: list[TurnTimes] = field(default_factory=list)
    recorded: list[TurnTimes] = field(default_factory=list)
    tokens_equal: bool = True
    op_cost_us: float = 0.0

    def steps(self, kind: str, *, first: bool) -> tuple[list[StepTimes], list[StepTimes]]:
        """Steps of one kind in first or in later turns: plain ones, recorded ones."""
        plain, recorded = (
            [
                step
                for turn in side
                if turn.is_first is first
                for step in turn.steps
                if step.kind == kind
            ]
            for side in (self.plain, self.recorded)
        )
        return plain, recorded


class Stopwatch:
    """Notes when spans begin and end; well below a microsecond each."""

    def __init__(self) -> None:
        self._laps: list[tuple[str, int, int]] = []

    def open(self, name: str, label: str) -> _Lap:
        """Returns a span that begins when it is entered."""
        return _Lap(self._laps, f"{name}: {label}" if label else name)

    def events(self) -> list[Event]:
        """The spans that have ended."""
        return [Event(name, begin / 1e3, (end - begin) / 1e3) for name, begin, end in self._laps]


class _Lap:
    __slots__ = ("_begin", "_laps", "_name")

    def __init__(self, laps: list[tuple[str, int, int]], name: str) -> None:
        self._laps = laps
        self._name = name

    def __enter__(self) -> None:
        self._begin = time.perf_counter_ns()

    def __exit__(self, *_: object) -> None:
        self._laps.append((self._name, self._begin, time.perf_counter_ns()))


class OpRecorder:
    """Records spans and every op of this thread with `torch.profiler`."""

    _NUM_BLOCKS = 9
    _OPS_A_BLOCK = 1000

    def __init__(self) -> None:
        # The library writes a line to stderr at each start and stop unless told to be quiet.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        import torch

        self._torch = torch.profiler
        self._tensor = torch.zeros(4)
        self.last_events: list[Event] = []
        with self.record():  # the first start is slow
            pass

    def open(self, name: str, label: str) -> Any:
        """Returns a span that begins when it is entered."""
        return self._torch.record_function(f"{name}: {label}" if label else name)

    def op_cost_us(self) -> float:
        """Measures what recording adds to an op, in a loop of ops that do nothing.

        In a step, where kernels have emptied the caches, it is rather more.
        """
        plain, recorded = [], []
        for _ in range(self._NUM_BLOCKS):
            plain.append(self._seconds_per_op())
            with self._start():
                recorded.append(self._seconds_per_op())
        return max(0.0, statistics.median(recorded) - statistics.median(plain)) * 1e6

    def _seconds_per_op(self) -> float:
        tensor = self._tensor
        began_at = time.thread_time()
        for _ in range(self._OPS_A_BLOCK):
            tensor.view(2, 2)
        return (time.thread_time() - began_at) / self._OPS_A_BLOCK

    def _start(self) -> Any:
        return self._torch.profile(activities=[self._torch.ProfilerActivity.CPU])

    @contextmanager
    def record(self) -> Iterator[None]:
        """Records what happens inside the block; afterwards it is in `last_events`."""
        profile = self._start()
        with profile, tracing.recording(self):
            yield
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(path))
            self.last_events = read_chrome_trace(json.loads(path.read_text(encoding="utf-8")))


def profile_workflow(
    engine: Engine,
    file: WorkflowFile,
    options: ReplayOptions,
    *,
    num_turns: int | None = None,
    trace: TraceWriter | None = None,
    on_turn: Callable[[TurnRow], None] = lambda row: None,
) -> Profile:
    """Replays the turns of a workflow on two engines, which take turns in going first.

    Args:
        engine: the side that is not recorded; the other one shares its model.
        file: the workflow.
        options: how to replay.
        num_turns: only the first of them.
        trace: gets the recorded turns.
        on_turn: sees each row of the side that is not recorded.
    """
    recorder = OpRecorder()
    profile = Profile(op_cost_us=recorder.op_cost_us())
    seen: set[tuple[int, str]] = set()
    # Measured once: two curves of one machine differ a little, and so would the drafts.
    curve: CostChoice = engine.costs.curve() if options.draft else "auto"
    with Engine(engine.model, engine.tokenizer, engine.config, cost_curve=curve) as twin:
        plain_side = Player(engine, options).play(file)
        recorded_side = Player(twin, options).play(file)
        with closing(plain_side), closing(recorded_side):
            for number in range(min(file.num_turns, num_turns or file.num_turns)):
                events, others = Stopwatch(), None
                if number % 2:
                    others = _record(recorder, recorded_side)
                with tracing.recording(events):
                    row = next(plain_side)
                if others is None:
                    others = _record(recorder, recorded_side)
                is_first = (row.workflow, row.agent) not in seen
                seen.add((row.workflow, row.agent))
                profile.rows.append(row)
                profile.plain.append(add_up_turn(events.events(), is_first=is_first))
                profile.recorded.append(add_up_turn(recorder.last_events, is_first=is_first))
                profile.tokens_equal &= row.token_ids == others.token_ids
                if trace is not None:
                    trace.add(f"turn {row.turn + 1}: {row.agent}", recorder.last_events)
                on_turn(row)
    return profile


def _record(recorder: OpRecorder, side: Iterator[TurnRow]) -> TurnRow:
    with recorder.record():
        return next(side)
