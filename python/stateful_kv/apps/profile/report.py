"""The tables of `stateful-kv profile`: what a step spends in kernels and what the engine adds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from stateful_kv.apps.profile.events import (
    HEAD,
    KERNEL_GROUPS,
    OTHER,
    STEP_KINDS,
    StepTimes,
    TurnTimes,
)
from stateful_kv.apps.profile.recorder import Profile

TORCH_OPS = "torch's own ops"
FORWARD = "forward, between ops"
BETWEEN = "between phases"
_GROUPS = tuple(dict.fromkeys([*(group for _, group in KERNEL_GROUPS if group != HEAD), HEAD]))
_TURN_PARTS = ("render", *STEP_KINDS)


def summarize_profile(profile: Profile) -> dict[str, Any]:
    """Everything the tables show, as plain JSON data; times in milliseconds."""
    turns, steps = [], []
    for name, first in (("first", True), ("later", False)):
        chosen = [turn for turn in profile.plain if turn.is_first is first]
        if chosen:
            turns.append({"turns": name, **summarize_turns(chosen)})
        for kind in STEP_KINDS:
            plain, recorded = profile.steps(kind, first=first)
            if plain and recorded:
                steps.append(
                    {
                        "turns": name,
                        "kind": kind,
                        **summarize_steps(plain, recorded, profile.op_cost_us),
                    }
                )
    return {
        "tokens_equal": profile.tokens_equal,
        "recorder_us_per_op": profile.op_cost_us,
        "turns": turns,
        "steps": steps,
    }


def summarize_turns(turns: Sequence[TurnTimes]) -> dict[str, Any]:
    """Means over turns: text work before the first step, steps by kind, and the rest."""
    parts = {"render": sum(turn.text["render"] for turn in turns)}
    for kind in STEP_KINDS:
        walls = (step.wall_us for turn in turns for step in turn.steps if step.kind == kind)
        parts[kind] = sum(walls)
    total = sum(turn.wall_us for turn in turns)
    parts["rest"] = total - sum(parts.values())
    num = len(turns)
    return {
        "num_turns": num,
        "ms_per_turn": total / num / 1e3,
        "parts_ms": {name: value / num / 1e3 for name, value in parts.items()},
        "detokenise_ms": sum(turn.text["detokenise"] for turn in turns) / num / 1e3,
    }


def summarize_steps(
    plain: Sequence[StepTimes], recorded: Sequence[StepTimes], op_cost_us: float
) -> dict[str, Any]:
    """One table: medians over the steps of a kind, and sums; the shares add up to 1.

    Time inside ops, and between them in the forward pass, is from the recorded steps; the latter
    less what the recorder costs for these ops. The time of all other phases is from the plain
    steps. So nothing is the difference of two runs that does not have to be.
    """
    rows: list[dict[str, Any]] = []

    def add(kind: str, name: str, times: _Times, num_calls: float | None = None) -> None:
        rows.append(
            {
                "kind": kind,
                "name": name,
                "ms_per_step": times.median / 1e3,
                "calls_per_step": num_calls,
                "total_ms": times.total / 1e3,
            }
        )

    for group in (*_GROUPS, OTHER):
        num_calls = sum(step.calls.get(group, 0) for step in recorded) / len(recorded)
        if num_calls:
            add("kernel", group, _times(recorded, _part("kernels", group)), num_calls)
    num_torch_ops = sum(step.num_torch_ops for step in recorded) / len(recorded)
    add("torch", TORCH_OPS, _times(recorded, lambda step: step.torch_ops), num_torch_ops)
    for phase in _phases(plain):
        if phase == "forward":
            add("engine", FORWARD, _times(recorded, lambda step: step.between_ops_us(op_cost_us)))
        else:
            ops = _times(recorded, _part("ops_in", phase))
            add("engine", phase, _times(plain, _part("phases", phase)) - ops)
    add("engine", BETWEEN, _times(plain, _part("phases", "step")))
    together = sum(row["ms_per_step"] for row in rows)
    for row in rows:
        row["share"] = row["ms_per_step"] / together
    overhead = sum(row["share"] for row in rows if row["kind"] != "kernel")
    return {
        "num_steps": len(plain),
        "num_recorded_steps": len(recorded),
        "median_rows": statistics.median(step.num_rows for step in plain),
        "ms_per_step": statistics.median(step.wall_us for step in plain) / 1e3,
        "recorded_ms_per_step": statistics.median(step.wall_us for step in recorded) / 1e3,
        "rows_together_ms": together,
        "overhead": overhead,
        "overhead_at_most": max(overhead, _overhead_at_most(recorded, op_cost_us)),
        "rows": rows,
    }


def _overhead_at_most(recorded: Sequence[StepTimes], op_cost_us: float) -> float:
    """The part of a recorded step outside kernels, with all that the recorder adds to it.

    Recorded kernels also look longer than they are. How much longer is not known, but not more
    than what the recorder costs for the events it sees while they run.
    """

    def kernels_at_least(step: StepTimes) -> float:
        return step.kernels_us - op_cost_us * step.num_recorded_in_kernels

    return statistics.median(1.0 - kernels_at_least(step) / step.wall_us for step in recorded)


class _Times(NamedTuple):
    """Median over steps and sum, of one part of a step; microseconds."""

    median: float
    total: float

    def __sub__(self, other: _Times) -> _Times:
        return _Times(self.median - other.median, self.total - other.total)


def _times(steps: Iterable[StepTimes], part: Callable[[StepTimes], float]) -> _Times:
    values = [part(step) for step in steps]
    return _Times(statistics.median(values), sum(values))


def _part(table: str, name: str) -> Callable[[StepTimes], float]:
    """Reads one entry of a table of StepTimes; a step without it spent nothing there."""

    def read(step: StepTimes) -> float:
        times: dict[str, float] = getattr(step, table)
        return times.get(name, 0.0)

    return read


def _phases(steps: Sequence[StepTimes]) -> list[str]:
    """Phases in the order they first ended, without the step itself."""
    names = dict.fromkeys(name for step in steps for name in step.phases)
    return [name for name in names if name != "step"]


def table_lines(summary: dict[str, Any]) -> list[str]:
    """The tables as text: turns, then steps; of first turns only what later turns do not show."""
    lines = _turn_lines(summary["turns"])
    has_later = any(turn["turns"] == "later" for turn in summary["turns"])
    for steps in summary["steps"]:
        if steps["turns"] == "later" or steps["kind"] == "prefill" or not has_later:
            lines += ["", *_step_lines(steps)]
    return lines


def _turn_lines(turns: Sequence[dict[str, Any]]) -> list[str]:
    names = (*_TURN_PARTS, "rest")
    cells = "".join(f"{name:>10}" for name in ("number", "ms a turn", *names))
    lines = [f"{'turns':<24}{cells}"]
    for turn in turns:
        times = (turn["ms_per_turn"], *(turn["parts_ms"][name] for name in names))
        cells = "".join(f"{value:>10.2f}" for value in times)
        lines.append(f"{turn['turns']:<24}{turn['num_turns']:>10}{cells}")
    return lines


def _step_lines(steps: dict[str, Any]) -> list[str]:
    lines = [
        f"{steps['kind']} steps of {steps['turns']} turns: {steps['num_steps']} of "
        f"{steps['median_rows']:g} rows, {steps['ms_per_step']:.3f} ms; "
        f"under the recorder {steps['recorded_ms_per_step']:.3f} ms (medians)",
        f"{'':<24}{'ms a step':>10}{'share':>10}{'calls':>10}{'total ms':>10}",
    ]
    for row in steps["rows"]:
        calls = "" if row["calls_per_step"] is None else f"{row['calls_per_step']:.1f}"
        lines.append(
            f"  {row['name']:<22}{row['ms_per_step']:>10.3f}{row['share']:>10.1%}"
            f"{calls:>10}{row['total_ms']:>10.1f}"
        )
    lines.append(f"  {'together':<22}{steps['rows_together_ms']:>10.3f}")
    if steps["num_steps"] != steps["num_recorded_steps"]:
        lines.append(f"  the recorded side took {steps['num_recorded_steps']} such steps")
    lines.append(
        f"  engine overhead above kernels: {steps['overhead']:.1%} "
        f"(at most {steps['overhead_at_most']:.1%})"
    )
    return lines
