"""Spans and ops of a profiled turn: nested, added up per step, and written as a Chrome trace."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from stateful_kv.apps.output import OutputFile, output_files

# What the name of an op of ours contains, and the group it is shown in; the first hit counts.
KERNEL_GROUPS = (
    ("argmax", "head, arg-max"),
    ("sample", "head, arg-max"),
    ("top_k", "head, arg-max"),
    ("verify_draft", "head, arg-max"),
    ("ngram_lookup", "token loop"),
    ("fill_rows", "token loop"),
    ("advance_sequences", "token loop"),
    ("linear", "linear layers"),
    ("attention", "attention"),
    ("rope", "rope, append"),
    ("append", "rope, append"),
    ("norm", "norms"),
    ("silu", "silu"),
)
LINEAR, HEAD, OTHER = "linear layers", "head, arg-max", "other kernels"
OUR_OPS = "stateful_kv::"
HEAD_OP = OUR_OPS + "linear_top_k"
# Ops that only run others of ours: what they add is the engine's time, not a kernel's.
CONTAINERS = (OUR_OPS + "decoder_layers",)
STEP_KINDS = ("decode", "verify", "prefill")


class Event(NamedTuple):
    """A span or an op, in microseconds of the clock of its recorder."""

    name: str
    begin_us: float
    duration_us: float
    is_op: bool = False

    @property
    def kind(self) -> str:
        """The name of a span without its label."""
        return self.name.partition(": ")[0]

    @property
    def label(self) -> str:
        """What `tracing.span` was told about this one span."""
        return self.name.partition(": ")[2]


@dataclass
class Node:
    """An event and what it encloses."""

    event: Event
    children: list[Node] = field(default_factory=list)

    def find(self, kind: str) -> Iterator[Node]:
        """Yields the spans of a kind below this one, in order."""
        for child in self.children:
            if child.event.kind == kind and not child.event.is_op:
                yield child
            yield from child.find(kind)


@dataclass
class StepTimes:
    """One step, added up; times in microseconds.

    Attributes:
        kind: "decode", "verify" or "prefill".
        num_rows: rows of its forward pass.
        wall_us: from its begin to its end.
        phases: time in each span outside the spans in it; "step" is the step itself.
        kernels: time inside ops of ours, by group.
        calls: their number.
        torch_ops: time inside torch's own ops (not those that an op of ours calls).
        num_torch_ops: their number.
        ops_in: time inside all these ops, by the innermost span around them.
        num_ops_in: their number, by that span.
        num_recorded_in_kernels: events recorded while kernels ran, the kernels among them.
    """

    kind: str
    num_rows: int
    wall_us: float
    phases: dict[str, float] = field(default_factory=dict)
    kernels: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    torch_ops: float = 0.0
    num_torch_ops: int = 0
    ops_in: dict[str, float] = field(default_factory=dict)
    num_ops_in: dict[str, int] = field(default_factory=dict)
    num_recorded_in_kernels: int = 0

    @property
    def kernels_us(self) -> float:
        """Time inside ops of ours."""
        return sum(self.kernels.values())

    def between_ops_us(self, op_cost_us: float) -> float:
        """Time of a recorded forward pass outside ops, less the recorder's cost for each op."""
        outside = self.phases.get("forward", 0.0) - self.ops_in.get("forward", 0.0)
        return max(0.0, outside - op_cost_us * self.num_ops_in.get("forward", 0))


@dataclass
class TurnTimes:
    """One turn of one side.

    Attributes:
        is_first: whether it is the first of its agent, which has no history.
        wall_us: from the call to the reply.
        text: time in the spans of text work, "render" and "detokenise".
        steps: its steps.
    """

    is_first: bool
    wall_us: float
    text: dict[str, float]
    steps: list[StepTimes]


def read_chrome_trace(data: dict[str, Any]) -> list[Event]:
    """The ops and spans of an exported trace, those of the thread with the first span."""
    kinds = {"cpu_op": True, "user_annotation": False}
    found = [item for item in data["traceEvents"] if item.get("cat") in kinds]
    threads = [item["tid"] for item in found if item["cat"] == "user_annotation"]
    return [
        Event(item["name"], float(item["ts"]), float(item["dur"]), kinds[item["cat"]])
        for item in found
        if threads and item["tid"] == threads[0]
    ]


def nest(events: Sequence[Event]) -> list[Node]:
    """The events of one thread as trees, by begin and end."""
    roots: list[Node] = []
    stack: list[Node] = []
    for event in sorted(events, key=lambda event: (event.begin_us, -event.duration_us)):
        while stack:
            outer = stack[-1].event
            if event.begin_us < outer.begin_us + outer.duration_us:
                break
            stack.pop()
        node = Node(event)
        (stack[-1].children if stack else roots).append(node)
        stack.append(node)
    return roots


def kernel_group(op: str) -> str:
    """The group that an op of ours is shown in."""
    return next((group for part, group in KERNEL_GROUPS if part in op), OTHER)


def add_up_turn(events: Sequence[Event], *, is_first: bool) -> TurnTimes:
    """Adds up the events of one turn; those outside it (sessions opened and closed) are ignored."""
    turn = next(root for root in nest(events) if root.event.kind == "turn")
    text = {
        kind: sum(node.event.duration_us for node in turn.find(kind))
        for kind in ("render", "detokenise")
    }
    steps = [step for node in turn.find("step") if (step := add_up_step(node)) is not None]
    return TurnTimes(is_first, turn.event.duration_us, text, steps)


def add_up_step(node: Node) -> StepTimes | None:
    """Adds up one step; None if it computed nothing."""
    passes = list(node.find("forward"))
    if not passes:
        return None
    kind, num_rows, _ = passes[0].event.label.split()
    step = StepTimes(kind, int(num_rows), node.event.duration_us)
    _add_span(step, node)
    return step


def _add_span(step: StepTimes, node: Node) -> None:
    phase = node.event.kind
    inside = sum(child.event.duration_us for child in node.children if not child.event.is_op)
    step.phases[phase] = step.phases.get(phase, 0.0) + node.event.duration_us - inside
    ops = list(_ops_in(node))
    linear = [op for op in ops if kernel_group(op.event.name) == LINEAR]
    # A model ends with its head: the last linear layer, unless there is an op of its own for it.
    has_head_op = any(op.event.name == HEAD_OP for op in ops)
    head = linear[-1] if phase == "forward" and linear and not has_head_op else None
    for op in ops:
        took = op.event.duration_us
        step.ops_in[phase] = step.ops_in.get(phase, 0.0) + took
        step.num_ops_in[phase] = step.num_ops_in.get(phase, 0) + 1
        if op.event.name.startswith(OUR_OPS):
            group = HEAD if op is head else kernel_group(op.event.name)
            step.kernels[group] = step.kernels.get(group, 0.0) + took
            step.calls[group] = step.calls.get(group, 0) + 1
            step.num_recorded_in_kernels += _size(op)
        else:
            step.torch_ops += took
            step.num_torch_ops += 1
    for child in node.children:
        if not child.event.is_op:
            _add_span(step, child)


def _ops_in(node: Node) -> Iterator[Node]:
    """The ops right below a span; those of a container in its place."""
    for child in node.children:
        if child.event.name in CONTAINERS:
            yield from _ops_in(child)
        elif child.event.is_op:
            yield child


def _size(node: Node) -> int:
    return 1 + sum(map(_size, node.children))


class TraceWriter:
    """Writes turns as Chrome trace events, one behind the other; what lies between is left out."""

    GAP_US = 1000.0

    def __init__(self, file: IO[str], title: str) -> None:
        """Begins the trace; see `open`."""
        self._file = file
        self._end_us = 0.0
        name = {"name": "process_name", "ph": "M", "pid": 1, "tid": 1, "args": {"name": title}}
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n' + json.dumps(name))

    def add(self, title: str, events: Sequence[Event]) -> None:
        """Appends a turn and names it; steps are named by what they computed."""
        turn = next(root for root in nest(events) if root.event.kind == "turn")
        shift = self._end_us - turn.event.begin_us
        self._end_us += turn.event.duration_us + self.GAP_US
        turn.event = turn.event._replace(name=title)
        for step in turn.find("step"):
            label = next((node.event.label for node in step.find("forward")), "nothing")
            step.event = step.event._replace(name=f"step: {label}")
        self._write(turn, shift)

    def _write(self, node: Node, shift: float) -> None:
        event = node.event
        entry = {
            "name": event.name,
            "cat": "op" if event.is_op else "span",
            "ph": "X",
            "pid": 1,
            "tid": 1,
            "ts": round(event.begin_us + shift, 3),
            "dur": round(event.duration_us, 3),
        }
        self._file.write(",\n" + json.dumps(entry))
        for child in node.children:
            self._write(child, shift)

    @classmethod
    @contextmanager
    def open(cls, path: Path, title: str) -> Iterator[TraceWriter]:
        """Writes a trace into a file; see `into`."""
        with output_files(path) as (output,):
            assert output is not None
            with cls.into(output, title) as writer:
                yield writer

    @classmethod
    @contextmanager
    def into(cls, output: OutputFile, title: str) -> Iterator[TraceWriter]:
        """Writes a trace and puts it in its place as valid JSON, whatever ends the block.

        A block that fails leaves what it has recorded, but never in place of an older file.
        """
        writer = cls(output.file, title)
        try:
            yield writer
        except BaseException:
            if not output.replaces:
                with suppress(OSError):  # the error of the block is the one to tell
                    writer._end(output)
            raise
        writer._end(output)

    def _end(self, output: OutputFile) -> None:
        self._file.write("\n]}\n")
        output.commit()
