"""Loading, validating and replaying workflow files."""

from __future__ import annotations

import json

import pytest

from stateful_kv.apps.workflow import (
    ReplayOptions,
    WorkflowError,
    delta_excess,
    later_turns,
    load_workflow,
    parse_workflow,
    replay,
    shipped_workflows,
    summarize,
)
from tests.cli.fake_engine import FakeEngine

ROW_FIELDS = [
    "workflow",
    "agent",
    "turn",
    "prompt_tokens",
    "reused_tokens",
    "computed_tokens",
    "drafted_tokens",
    "accepted_tokens",
    "output_tokens",
    "ttft_s",
    "total_s",
    "text",
    "token_ids",
]


def test_shipped_workflows_are_valid_and_name_their_source():
    assert {"demo", "six", "interleaved", "thirtyfive", "coding35"} <= set(shipped_workflows())
    for name in shipped_workflows():
        file = load_workflow(name)
        assert file.name == name
        assert "licence" in file.source or "Apache" in file.source
        assert file.num_turns > 0


def test_demo_is_three_agents_with_one_preamble():
    (workflow,) = load_workflow("demo").workflows
    assert [agent.name for agent in workflow.agents] == ["planner", "coder", "reviewer"]
    first_lines = {agent.system.rsplit("\n", 1)[0] for agent in workflow.agents}
    assert len(first_lines) == 1
    for agent in workflow.agents:
        assert sum(turn.agent == agent.name for turn in workflow.turns) >= 4


def _set(data, path, value):
    *parents, last = path
    for key in parents:
        data = data[key]
    if value is None:
        del data[last]
    else:
        data[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format"], "stateful-kv-workflow/9", "format: expected 'stateful-kv-workflow/1'"),
        (["format"], None, "format: expected 'stateful-kv-workflow/1', got None"),
        (["name"], 3, "name: expected a string, got int"),
        (["workflows"], [], "workflows: expected a non-empty list, got an empty list"),
        (["workflows"], None, "workflows: expected a non-empty list, got nothing"),
        (["workflows", 0], "x", "workflows[0]: expected an object, got str"),
        (["workflows", 0, "turns"], {}, "workflows[0].turns: expected a non-empty list"),
        (["workflows", 0, "agents", 1], 1, "workflows[0].agents[1]: expected an object, got int"),
        (["workflows", 0, "agents", 1, "name"], "a", "agents[1].name: duplicate agent 'a'"),
        (["workflows", 0, "agents", 0, "system"], 7, "agents[0].system: expected a string"),
        (["workflows", 0, "turns", 2, "agent"], "z", "turns[2].agent: unknown agent 'z'"),
        (["workflows", 0, "turns", 1, "message"], " \n", "turns[1].message: must not be empty"),
        (["workflows", 0, "turns", 1, "message"], None, "turns[1].message: expected a string"),
    ],
)
def test_broken_rules_name_the_place(workflow_data, path, value, message):
    _set(workflow_data, path, value)
    with pytest.raises(WorkflowError) as caught:
        parse_workflow(workflow_data)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [None, 1, "text", [], {}])
def test_other_json_is_refused(data):
    with pytest.raises(WorkflowError):
        parse_workflow(data)


def test_system_may_be_missing(workflow_data):
    del workflow_data["workflows"][0]["agents"][0]["system"]
    assert parse_workflow(workflow_data).workflows[0].agents[0].system == ""


@pytest.mark.parametrize("stateless", [False, True])
def test_replay_rows(workflow_data, stateless):
    engine = FakeEngine()
    seen = []
    rows = replay(
        engine, parse_workflow(workflow_data), ReplayOptions(stateless=stateless), seen.append
    )
    assert rows == seen
    assert [(row.workflow, row.agent, row.turn) for row in rows] == [
        (0, "a", 0),
        (0, "b", 1),
        (0, "a", 2),
        (0, "b", 3),
        (1, "a", 0),
    ]
    for row in rows:
        assert list(row.to_json()) == ROW_FIELDS
        json.dumps(row.to_json())
        assert row.reused_tokens + row.computed_tokens == row.prompt_tokens
        assert row.total_s > 0
    assert len(later_turns(rows)) == 2
    if stateless:
        assert [row.reused_tokens for row in rows] == [0] * 5
        assert engine.num_clears == 5
    else:
        assert delta_excess(rows) == [1, 1]
        assert engine.num_clears == 0
    assert all(session.closed for session in engine.sessions)


def test_sessions_are_closed_when_a_turn_fails(workflow_data):
    engine = FakeEngine()

    def fail(row):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        replay(engine, parse_workflow(workflow_data), ReplayOptions(), fail)
    assert len(engine.sessions) == 2
    assert all(session.closed for session in engine.sessions)


def test_system_and_draft_reach_the_session(workflow_data):
    engine = FakeEngine()
    rows = replay(engine, parse_workflow(workflow_data), ReplayOptions(draft=False))
    assert [session.system for session in engine.sessions] == ["Be a.", None, "Be a."]
    assert all(session.draft is False for session in engine.sessions)
    assert summarize(rows)["drafted_tokens"] == 0


def test_summary_without_later_turns(workflow_data):
    workflow_data["workflows"] = workflow_data["workflows"][1:]
    rows = replay(FakeEngine(), parse_workflow(workflow_data), ReplayOptions())
    assert summarize(rows)["median_later_turn_s"] is None
