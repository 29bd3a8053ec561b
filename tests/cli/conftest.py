"""Fixtures of the command-line tests: a fake engine behind the real commands."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from stateful_kv.apps.cli import commands, loading
from tests.cli.fake_engine import FakeEngine


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """A fake engine that the commands load instead of a model."""
    fake = FakeEngine()
    monkeypatch.setattr(loading, "load_engine", lambda model, **unused: fake)
    monkeypatch.setattr(loading, "build_info", lambda: {"version": "0", "cpu_isa": "generic"})
    return fake


@pytest.fixture
def invoke():
    """Run the command line in process; the result has exit_code, stdout and stderr."""
    runner = CliRunner()
    return lambda *args: runner.invoke(commands.app, [str(arg) for arg in args])


@pytest.fixture
def workflow_data() -> dict:
    """A small valid workflow file: two agents, four turns, and a second workflow."""
    agents = [{"name": "a", "system": "Be a."}, {"name": "b", "system": ""}]
    turns = [{"agent": name, "message": f"message {i}"} for i, name in enumerate("abab")]
    return {
        "format": "stateful-kv-workflow/1",
        "name": "tiny",
        "source": "made for this test",
        "workflows": [
            {"agents": agents, "turns": turns},
            {"agents": agents[:1], "turns": turns[:1]},
        ],
    }
