"""Spans over the engine's phases, and the profile made of them, on a small random model."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from stateful_kv import ops
from stateful_kv.apps.profile.events import (
    CONTAINERS,
    HEAD,
    OTHER,
    Event,
    StepTimes,
    TraceWriter,
    add_up_turn,
    kernel_group,
    nest,
    read_chrome_trace,
)
from stateful_kv.apps.profile.recorder import Profile, profile_workflow
from stateful_kv.apps.profile.report import summarize_profile, summarize_steps, table_lines
from stateful_kv.apps.workflow import FORMAT as WORKFLOW_FORMAT
from stateful_kv.apps.workflow import ReplayOptions, parse_workflow, replay
from stateful_kv.engine.engine import Engine
from stateful_kv.errors import OutOfPagesError
from stateful_kv.system import tracing
from tests.e2e.conftest import MakeEngine
from tests.e2e.tiny import CountingUp

PHASES = ["plan", "reserve", "build_batch", "forward", "verify", "commit", "end_steps"]
OPTIONS = ReplayOptions(max_tokens=24, ignore_eos=True)
WORKFLOW = parse_workflow(
    {
        "format": WORKFLOW_FORMAT,
        "name": "two",
        "workflows": [
            {
                "agents": [{"name": "a", "system": "abcabcabc"}, {"name": 'b "\\', "system": ""}],
                "turns": [
                    {"agent": "a", "message": "abcabcabcabc"},
                    {"agent": 'b "\\', "message": "hello"},
                    {"agent": "a", "message": "abcabcabc"},
                    {"agent": "a", "message": "again"},
                ],
            }
        ],
    }
)


@pytest.fixture
def engine(make_engine: MakeEngine) -> Engine:
    return make_engine()


@pytest.fixture
def profiled(engine: Engine, tmp_path: Path) -> tuple[Profile, list[dict[str, Any]]]:
    """A profile and the events of its trace."""
    path = tmp_path / "trace.json"
    with TraceWriter.open(path, WORKFLOW.name) as trace:
        profile = profile_workflow(engine, WORKFLOW, OPTIONS, trace=trace)
    events = json.loads(path.read_text())["traceEvents"]
    return profile, [event for event in events if event["ph"] == "X"]


def test_a_failing_turn_leaves_no_recorder(make_engine: MakeEngine) -> None:
    agents, turns = [{"name": "a"}], [{"agent": "a", "message": "x" * 2000}]
    data = {"format": WORKFLOW_FORMAT, "name": "long"}
    file = parse_workflow({**data, "workflows": [{"agents": agents, "turns": turns}]})
    with pytest.raises(OutOfPagesError):
        profile_workflow(make_engine(kv_tokens=256), file, OPTIONS)
    assert tracing._recorder is None


def test_profiling_changes_no_token(engine: Engine, make_engine: MakeEngine) -> None:
    profile = profile_workflow(engine, WORKFLOW, OPTIONS)
    rows = replay(make_engine(), WORKFLOW, OPTIONS)
    assert profile.tokens_equal
    assert [row.token_ids for row in profile.rows] == [row.token_ids for row in rows]
    assert any(row.accepted_tokens for row in rows), "the workflow should make drafts"


def test_different_replies_are_noticed(make_engine: MakeEngine) -> None:
    class OneMoreForEachEngine(CountingUp):
        caches: tuple[object, ...] = ()

        def next_tokens(self, batch: Any, cache: Any) -> list[int | None]:
            if cache not in self.caches:
                self.caches = (*self.caches, cache)
            shift = self.caches.index(cache)
            return [token and token + shift for token in super().next_tokens(batch, cache)]

    profile = profile_workflow(make_engine(OneMoreForEachEngine()), WORKFLOW, OPTIONS)
    assert not profile.tokens_equal


def test_the_number_of_turns_is_limited(engine: Engine) -> None:
    profile = profile_workflow(engine, WORKFLOW, OPTIONS, num_turns=3)
    assert len(profile.rows) == len(profile.plain) == len(profile.recorded) == 3
    assert [turn.is_first for turn in profile.plain] == [True, True, False]


def test_steps_are_of_the_kind_they_computed(
    profiled: tuple[Profile, list[dict[str, Any]]],
) -> None:
    profile, _ = profiled
    for row, plain, recorded in zip(profile.rows, profile.plain, profile.recorded, strict=True):
        kinds = [(step.kind, step.num_rows) for step in plain.steps]
        assert kinds == [(step.kind, step.num_rows) for step in recorded.steps]
        assert row.computed_tokens == sum(rows for kind, rows in kinds if kind == "prefill")
        assert row.drafted_tokens == sum(rows - 1 for kind, rows in kinds if kind == "verify")
        assert all(rows == 1 for kind, rows in kinds if kind == "decode")
    assert {kind for turn in profile.plain for kind in (s.kind for s in turn.steps)} == {
        "prefill",
        "decode",
        "verify",
    }


def test_numbers_add_up(profiled: tuple[Profile, list[dict[str, Any]]]) -> None:
    profile, _ = profiled
    for turn in (*profile.plain, *profile.recorded):
        assert 0 < turn.text["render"] < turn.wall_us
        assert sum(step.wall_us for step in turn.steps) < turn.wall_us
        for step in turn.steps:
            assert sum(step.phases.values()) == pytest.approx(step.wall_us)
            assert min(step.phases.values()) >= -1e-6
    for turn in profile.recorded:
        for step in turn.steps:
            inside = step.kernels_us + step.torch_ops
            assert sum(step.ops_in.values()) == pytest.approx(inside)
            num_ops = sum(step.calls.values()) + step.num_torch_ops
            assert sum(step.num_ops_in.values()) == num_ops
            assert step.calls["attention"] == 2  # layers
            assert step.calls["linear layers"] == 2 * 4
            assert 0 < inside < step.wall_us
    assert not any(step.kernels for turn in profile.plain for step in turn.steps)


def test_the_report_adds_up(profiled: tuple[Profile, list[dict[str, Any]]]) -> None:
    profile, _ = profiled
    summary = summarize_profile(profile)
    assert summary["tokens_equal"]
    assert [turn["num_turns"] for turn in summary["turns"]] == [2, 2]
    for turn in summary["turns"]:
        assert sum(turn["parts_ms"].values()) == pytest.approx(turn["ms_per_turn"])
    assert {(steps["turns"], steps["kind"]) for steps in summary["steps"]} >= {
        ("first", "prefill"),
        ("later", "prefill"),
        ("later", "decode"),
        ("later", "verify"),
    }
    for steps in summary["steps"]:
        rows = steps["rows"]
        assert sum(row["share"] for row in rows) == pytest.approx(1.0)
        together = sum(row["ms_per_step"] for row in rows)
        assert together == pytest.approx(steps["rows_together_ms"])
        assert 0 < steps["overhead"] <= steps["overhead_at_most"]
    text = "\n".join(table_lines(summary))
    assert "engine overhead above kernels" in text
    assert "decode steps of later turns" in text and "prefill steps of first turns" in text
    assert "decode steps of first turns" not in text
    json.dumps(summary)


def _inside(outer: dict[str, Any], inner: dict[str, Any]) -> bool:
    end = outer["ts"] + outer["dur"] + 2e-3  # times are rounded to nanoseconds
    return outer["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= end


def test_trace_shows_phases_inside_steps_inside_turns(
    profiled: tuple[Profile, list[dict[str, Any]]],
) -> None:
    _, events = profiled
    turns = [event for event in events if event["name"].startswith("turn ")]
    assert [turn["name"] for turn in turns] == [
        "turn 1: a",
        'turn 2: b "\\',
        "turn 3: a",
        "turn 4: a",
    ]
    for turn, following in itertools.pairwise(turns):
        assert turn["ts"] + turn["dur"] < following["ts"]
    steps = [event for event in events if event["name"].startswith("step: ")]
    assert all(re.fullmatch(r"step: (decode|verify|prefill) \d+ rows?", s["name"]) for s in steps)
    for step in steps:
        assert any(_inside(turn, step) for turn in turns)
        names = [
            event["name"].partition(":")[0]
            for event in events
            if event["cat"] == "span" and event is not step and _inside(step, event)
        ]
        assert [name for name in names if name in PHASES] == PHASES
        forward = next(e for e in events if e["name"].startswith("forward") and _inside(step, e))
        assert forward["name"].partition(": ")[2] == step["name"].partition(": ")[2]
        computed = {event["name"] for event in events if _inside(forward, event)}
        assert {
            "stateful_kv::quantized_linear",
            "stateful_kv::paged_attention",
            "stateful_kv::rope_append_kv",
        } <= computed
    for outer, inner in (("turn", "render"), ("step: prefill", "admit"), ("commit", "detokenise")):
        around = [event for event in events if event["name"].startswith(outer)]
        found = [event for event in events if event["name"] == inner]
        assert found
        assert all(any(_inside(outer, event) for outer in around) for event in found)
    renders = [event for event in events if event["name"] == "render"]
    assert not any(_inside(step, event) for step in steps for event in renders)


def test_a_trace_is_valid_whatever_ends_it(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with pytest.raises(KeyboardInterrupt), TraceWriter.open(path, "w") as trace:
        trace.add("turn 1: a", [Event("turn", 5.0, 2.0), Event("step", 5.5, 1.0)])
        raise KeyboardInterrupt
    names = [event["name"] for event in json.loads(path.read_text())["traceEvents"]]
    assert names == ["process_name", "turn 1: a", "step: nothing"]


def _events(*items: tuple[str, float, float]) -> list[Event]:
    return [Event(name, begin, end - begin, "::" in name) for name, begin, end in items]


SYNTHETIC = _events(
    ("turn", 0, 130),
    ("render", 1, 4),
    ("step", 10, 110),
    ("plan", 11, 15),
    ("draft", 12, 14),
    ("forward: verify 3 rows", 20, 100),
    ("aten::index_select", 20, 22),
    ("stateful_kv::quantized_linear", 25, 45),
    ("aten::empty", 26, 27),
    ("stateful_kv::paged_attention", 50, 60),
    ("stateful_kv::quantized_linear", 65, 95),
    ("verify", 101, 106),
    ("stateful_kv::argmax", 102, 105),
)


def test_one_step_added_up_by_hand() -> None:
    turn = add_up_turn(SYNTHETIC[::-1], is_first=False)
    assert turn.wall_us == 130 and turn.text == {"render": 3, "detokenise": 0}
    (step,) = turn.steps
    assert (step.kind, step.num_rows, step.wall_us) == ("verify", 3, 100)
    assert step.phases == {"step": 11, "plan": 2, "draft": 2, "forward": 80, "verify": 5}
    assert step.kernels == {"linear layers": 20, "attention": 10, HEAD: 30 + 3}
    assert step.calls == {"linear layers": 1, "attention": 1, HEAD: 2}
    assert (step.torch_ops, step.num_torch_ops) == (2, 1)
    assert step.ops_in == {"forward": 62, "verify": 3}
    assert step.num_ops_in == {"forward": 4, "verify": 1}
    assert step.num_recorded_in_kernels == 5
    assert step.between_ops_us(1.5) == 80 - 62 - 4 * 1.5


def test_a_head_that_chooses_too() -> None:
    """With an op of its own for the head, all linear layers are layers."""
    events = [
        event._replace(name="stateful_kv::linear_top_k") if event.begin_us == 65 else event
        for event in SYNTHETIC
        if event.name not in ("verify", "stateful_kv::argmax")
    ]
    (step,) = add_up_turn(events, is_first=False).steps
    assert step.kernels == {"linear layers": 20, "attention": 10, HEAD: 30}
    assert step.calls == {"linear layers": 1, "attention": 1, HEAD: 1}


def test_overhead_by_hand() -> None:
    recorded = add_up_turn(SYNTHETIC, is_first=False).steps
    plain = [
        StepTimes(
            "verify", 3, 95.0, {"step": 10, "plan": 2, "draft": 1, "forward": 77, "verify": 5}
        )
    ]
    summary = summarize_steps(plain, recorded, 1.0)
    times = {row["name"]: round(row["ms_per_step"] * 1e3, 6) for row in summary["rows"]}
    assert times == {
        "linear layers": 20,
        "attention": 10,
        HEAD: 33,
        "torch's own ops": 2,
        "plan": 2,
        "draft": 1,
        "forward, between ops": 80 - 62 - 4,
        "verify": 2,
        "between phases": 10,
    }
    assert summary["overhead"] == pytest.approx(31 / 94)
    assert summary["overhead_at_most"] == pytest.approx(1 - (63 - 5) / 100)
    assert (summary["ms_per_step"], summary["recorded_ms_per_step"]) == (0.095, 0.1)


def test_nesting_by_time() -> None:
    first, second = nest(_events(("b", 5, 9), ("a", 0, 5), ("c", 5, 9), ("d", 5, 6)))
    assert first.event.name == "a" and not first.children
    assert [node.event.name for node in nest(_events(("x", 0, 9), ("y", 1, 2)))[0].children] == [
        "y"
    ]
    assert second.event.name == "b"  # of equal times the one that came first is outside
    assert [node.event.name for node in second.children] == ["c"]


def test_other_threads_are_left_out() -> None:
    item = {"ph": "X", "name": "turn", "cat": "user_annotation", "ts": 1.5, "dur": 2, "tid": 7}
    other = {**item, "name": "aten::add", "cat": "cpu_op"}
    data = {"traceEvents": [{**other, "tid": 8}, item, other, {"ph": "M", "name": "process_name"}]}
    assert read_chrome_trace(data) == [
        Event("turn", 1.5, 2.0),
        Event("aten::add", 1.5, 2.0, is_op=True),
    ]
    assert read_chrome_trace({"traceEvents": [other]}) == []


def test_ops_of_a_step_have_a_group() -> None:
    without = {
        name
        for name in ops.__all__
        if callable(getattr(ops, name)) and name.islower()
        if kernel_group(f"stateful_kv::{name}") == OTHER
        if f"stateful_kv::{name}" not in CONTAINERS
    }
    assert without == {"copy_pages"}
