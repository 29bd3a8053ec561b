"""The command line on the default model: what the fake engine of the other tests cannot show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stateful_kv.apps.cli import commands
from stateful_kv.apps.workflow import TurnRow, delta_excess, load_workflow

Runs = tuple[list[TurnRow], list[TurnRow]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Rows of the shipped demo, with state and without; each run loads the model."""
    rows = []
    for options in ([], ["--stateless"]):
        out = tmp_path_factory.mktemp("run") / "rows.json"
        arguments = ["run", "demo", "--max-tokens", "2", "--json", str(out), *options]
        result = CliRunner().invoke(commands.app, arguments)
        assert result.exit_code == 0, result.output
        data = json.loads(out.read_text())
        assert data["meta"]["stateless"] is bool(options)
        rows.append([TurnRow(**row) for row in data["turns"]])
    return rows[0], rows[1]


@pytest.mark.slow
def test_state_changes_no_token(runs: Runs) -> None:
    stateful, stateless = runs
    assert len(stateful) == len(stateless) == load_workflow("demo").num_turns
    for mine, other in zip(stateful, stateless, strict=True):
        assert (mine.agent, mine.prompt_tokens) == (other.agent, other.prompt_tokens)
        assert mine.token_ids == other.token_ids and mine.text == other.text
        assert 1 <= len(mine.token_ids) == mine.output_tokens <= 2


@pytest.mark.slow
def test_counts_add_up(runs: Runs) -> None:
    stateful, stateless = runs
    for row in (*stateful, *stateless):
        assert row.reused_tokens + row.computed_tokens == row.prompt_tokens
    assert all(row.reused_tokens == 0 for row in stateless)
    # A later turn computes its delta, and at most the last token of the reply before.
    excess = delta_excess(stateful)
    assert excess and all(0 <= tokens <= 1 for tokens in excess)
    assert sum(row.computed_tokens for row in stateful) < sum(
        row.computed_tokens for row in stateless
    )


@pytest.mark.slow
def test_demo_report(tmp_path: Path) -> None:
    """The whole demo of a small workflow: replies equal, report written."""
    workflow = tmp_path / "small.json"
    agents = [{"name": "a", "system": "Answer with one word."}]
    turns = [{"agent": "a", "message": text} for text in ("Name a colour.", "Another one.")]
    workflow.write_text(
        json.dumps(
            {
                "format": "stateful-kv-workflow/1",
                "name": "small",
                "source": "made for this test",
                "workflows": [{"agents": agents, "turns": turns}],
            }
        )
    )
    out = tmp_path / "report"
    arguments = ["demo", "--workflow", str(workflow), "--output", str(out), "--max-tokens", "2"]
    result = CliRunner().invoke(commands.app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads((out / "report.json").read_text())["summary"]["tokens_equal"] is True
    assert (out / "index.html").is_file() and (out / "latency.png").is_file()
