"""The command `profile`: tables, trace, JSON, and its mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stateful_kv.apps.cli import commands, loading
from stateful_kv.engine.config import EngineConfig
from stateful_kv.engine.engine import Engine
from tests.cli.fake_engine import FakeEngine
from tests.e2e.tiny import ByteTokenizer, CountingUp, tiny_llama


@pytest.fixture
def workflow_path(tmp_path: Path, workflow_data: dict[str, Any]) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(workflow_data))
    return path


@pytest.fixture
def tiny_engine(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    """A small random model behind the command; the list gets each engine that is loaded."""
    engines: list[Engine] = []

    def load(model: str, **unused: Any) -> Engine:
        config = EngineConfig(kv_tokens=4096, page_size=16)
        engines.append(Engine(tiny_llama(), ByteTokenizer(), config))
        return engines[-1]

    monkeypatch.setattr(loading, "load_engine", load)
    return engines


def _assert_error(result: Any, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("stateful-kv: error: ")
    for part in parts:
        assert part in line


def test_profile_writes_table_trace_and_json(
    tiny_engine: list[Engine], invoke: Any, workflow_path: Path, tmp_path: Path
) -> None:
    trace, out = tmp_path / "new folder" / "trace.json", tmp_path / "out.json"
    options = ("--max-tokens", 6, "--ignore-eos", "--trace", trace, "--json", out)
    result = invoke("profile", workflow_path, *options)
    assert result.exit_code == 0, result.output
    for text in ("decode steps of later turns", "attention", "engine overhead above kernels"):
        assert text in result.stdout
    data = json.loads(out.read_text())
    assert data["meta"]["format"] == "stateful-kv-profile/1"
    assert data["meta"]["max_tokens"] == 6 and data["meta"]["ignore_eos"]
    assert data["tokens_equal"] is True
    assert sum(turn["num_turns"] for turn in data["turns"]) == 5
    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"turn 1: a", "stateful_kv::paged_attention", "plan", "commit"} <= names
    for path in (trace, out):
        assert str(tmp_path) not in path.read_text()
        assert str(Path(commands.__file__).parent) not in path.read_text()
    assert tiny_engine[0].is_closed


def test_options_reach_the_replay(
    tiny_engine: list[Engine], invoke: Any, workflow_path: Path
) -> None:
    result = invoke("profile", workflow_path, "--turns", 3, "--no-draft", "--json", "-")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert sum(turn["num_turns"] for turn in data["turns"]) == 3
    assert data["meta"]["draft"] is False
    assert not any(steps["kind"] == "verify" for steps in data["steps"])
    assert "engine overhead above kernels" in result.stderr


@pytest.mark.parametrize("option", ["--trace", "--json"])
def test_unwritable_output_is_found_before_the_run(
    engine: FakeEngine, invoke: Any, workflow_path: Path, tmp_path: Path, option: str
) -> None:
    (tmp_path / "file").write_text("")
    _assert_error(invoke("profile", workflow_path, option, tmp_path / "file" / "out.json"), "file")
    _assert_error(invoke("profile", workflow_path, option, tmp_path), "Is a directory")
    assert engine.sessions == [] and not engine.closed  # not even loaded


def test_one_file_for_two_outputs(
    engine: FakeEngine, invoke: Any, workflow_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    result = invoke("profile", workflow_path, "--trace", out, "--json", tmp_path / "." / "out.json")
    _assert_error(result, "a file for each output", "out.json twice")
    _assert_error(invoke("profile", workflow_path, "--trace", "-"), "--trace: expected the path")


def test_bad_workflow_and_bad_number(engine: FakeEngine, invoke: Any) -> None:
    _assert_error(invoke("profile", "missing.json"), "no such workflow file", "coding35")
    assert invoke("profile", "six", "--turns", 0).exit_code == 2


def test_an_error_of_the_engine_is_one_line_and_the_trace_is_whole(
    monkeypatch: pytest.MonkeyPatch, invoke: Any, workflow_path: Path, tmp_path: Path
) -> None:
    def load(model: str, **unused: Any) -> Engine:
        return Engine(CountingUp(max_position=32), ByteTokenizer(), EngineConfig(kv_tokens=256))

    monkeypatch.setattr(loading, "load_engine", load)
    trace = tmp_path / "trace.json"
    _assert_error(invoke("profile", workflow_path, "--trace", trace), "no room for a reply")
    json.loads(trace.read_text())


def test_it_fails_when_replies_differ(
    tiny_engine: list[Engine], monkeypatch: pytest.MonkeyPatch, invoke: Any, workflow_path: Path
) -> None:
    from stateful_kv.apps.profile import recorder

    original = recorder.profile_workflow

    def differ(*args: Any, **kwargs: Any) -> recorder.Profile:
        profile = original(*args, **kwargs)
        profile.tokens_equal = False
        return profile

    monkeypatch.setattr(recorder, "profile_workflow", differ)
    result = invoke("profile", workflow_path, "--turns", 1)
    assert result.exit_code == 1
    assert "the replies differ under the recorder" in result.stderr


@pytest.mark.slow
def test_profile_of_the_default_model(tmp_path: Path) -> None:
    trace, out = tmp_path / "trace.json", tmp_path / "out.json"
    arguments = ["profile", "six", "--turns", "2", "--max-tokens", "6", "--no-draft"]
    arguments += ["--kv-tokens", "8192", "--trace", str(trace), "--json", str(out)]
    result = CliRunner().invoke(commands.app, arguments)
    assert result.exit_code == 0, result.output
    data = json.loads(out.read_text())
    steps = next(s for s in data["steps"] if (s["turns"], s["kind"]) == ("later", "decode"))
    rows = {row["name"]: row for row in steps["rows"]}
    assert steps["num_steps"] == 5 and rows["attention"]["calls_per_step"] == 30
    assert rows["linear layers"]["ms_per_step"] > rows["rope, append"]["ms_per_step"] > 0
    assert 0 < steps["overhead"] <= steps["overhead_at_most"] < 1
    # The two measurements of a step agree, unless the machine had much else to do meanwhile.
    assert 0.3 < steps["rows_together_ms"] / steps["ms_per_step"] < 3
    assert len(json.loads(trace.read_text())["traceEvents"]) > 10 * 30 * 6
