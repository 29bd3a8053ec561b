"""Workflow files: load and validate them, and replay them turn by turn on an engine.

A workflow file (format ``stateful-kv-workflow/1``, see ``data/README.md``) holds independent
workflows, each with agents (name and system prompt) and turns (agent and message). A replay opens
one session an agent, appends each message to the session of its agent and generates a reply, which
stays in the history as generated.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stateful_kv.apps.printable import shorten
from stateful_kv.errors import WorkflowError

if TYPE_CHECKING:
    from stateful_kv.engine.engine import Engine
    from stateful_kv.session.session import Session

FORMAT = "stateful-kv-workflow/1"
# More than any workflow needs; a device or a pipe may have no end.
_MAX_BYTES = 1 << 26
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Agent:
    """One agent of a workflow: its name and system prompt (may be empty)."""

    name: str
    system: str


@dataclass(frozen=True)
class WorkflowTurn:
    """One message to one agent."""

    agent: str
    message: str


@dataclass(frozen=True)
class Workflow:
    """Agents that work beside each other, and their turns in order."""

    agents: tuple[Agent, ...]
    turns: tuple[WorkflowTurn, ...]


@dataclass(frozen=True)
class WorkflowFile:
    """A validated workflow file; ``source`` names origin and licence."""

    name: str
    source: str
    workflows: tuple[Workflow, ...]

    @property
    def num_turns(self) -> int:
        """Number of turns of all workflows of the file."""
        return sum(len(workflow.turns) for workflow in self.workflows)


@dataclass(frozen=True)
class TurnRow:
    """What one turn did; one row of the JSON output.

    ``workflow`` and ``turn`` count from 0 (``turn`` within its workflow, over all agents).
    ``prompt_tokens`` is the whole context before the reply; ``reused_tokens`` of it came from the
    cache and ``computed_tokens`` went through the model. ``ttft_s`` runs from the call of the turn
    to its first token, ``total_s`` to its last.
    """

    workflow: int
    agent: str
    turn: int
    prompt_tokens: int
    reused_tokens: int
    computed_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    output_tokens: int
    ttft_s: float
    total_s: float
    text: str
    token_ids: list[int]

    def to_json(self) -> dict[str, Any]:
        """The row as plain JSON data."""
        return asdict(self)


@dataclass(frozen=True)
class ReplayOptions:
    """How to replay: reply length, and whether state and drafts are used."""

    max_tokens: int = 48
    ignore_eos: bool = False
    stateless: bool = False
    draft: bool = True


def shipped_workflows() -> list[str]:
    """Names of the workflow files that come with the package."""
    folder = resources.files("stateful_kv") / "data"
    return sorted(f.name[: -len(".json")] for f in folder.iterdir() if f.name.endswith(".json"))


def workflow_path(name_or_path: str) -> Path:
    """The file that a path or the name of a shipped workflow stands for; it need not exist."""
    path = Path(name_or_path)
    if not os.path.exists(path) and name_or_path in shipped_workflows():
        return Path(str(resources.files("stateful_kv") / "data" / f"{name_or_path}.json"))
    return path


def load_workflow(name_or_path: str) -> WorkflowFile:
    """Read and validate a workflow file, by path or by the name of a shipped one.

    Raises:
        WorkflowError: missing or unreadable file, bad JSON, or a broken rule of the format; the
            message is one line and names the file and the place in it.
    """
    path = workflow_path(name_or_path)
    label = shorten(name_or_path, 200) if os.path.exists(name_or_path) else path.name
    if not name_or_path or not os.path.exists(path):
        names = ", ".join(shipped_workflows())
        raise WorkflowError(
            f"{shorten(name_or_path, 200)}: no such workflow file (shipped ones: {names})"
        )
    try:
        data = _read_json(path)
        return parse_workflow(data)
    except WorkflowError as error:
        raise WorkflowError(f"{label}: {error}") from error


def _read_json(path: Path) -> object:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise WorkflowError(f"cannot be read: {error.strerror}") from error
    if len(content) > _MAX_BYTES:
        raise WorkflowError(f"cannot be read: more than {_MAX_BYTES >> 20} MiB")
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise WorkflowError("cannot be read: not UTF-8 text") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise WorkflowError(f"not valid JSON: {error.msg} ({place})") from error
    except RecursionError as error:
        raise WorkflowError("not valid JSON: nested too deeply") from error
    except ValueError as error:  # what else there is: numbers of thousands of digits
        raise WorkflowError("not valid JSON: a number has too many digits") from error


def parse_workflow(data: object) -> WorkflowFile:
    """Validate the decoded JSON of a workflow file; raises WorkflowError naming the place."""
    top = _object(data, "top level")
    if top.get("format") != FORMAT:
        got = shorten(repr(top.get("format")), 100)
        raise WorkflowError(f"format: expected {FORMAT!r}, got {got}")
    workflows = tuple(
        _parse_workflow(item, f"workflows[{i}]")
        for i, item in enumerate(_items(top, "workflows", ""))
    )
    return WorkflowFile(
        name=_text(top, "name", ""),
        source=_text(top, "source", "", default=""),
        workflows=workflows,
    )


def _parse_workflow(data: object, where: str) -> Workflow:
    item = _object(data, where)
    agents: dict[str, Agent] = {}
    for i, raw in enumerate(_items(item, "agents", where)):
        place = f"{where}.agents[{i}]"
        entry = _object(raw, place)
        name = _text(entry, "name", place)
        if name in agents:
            raise WorkflowError(f"{place}.name: duplicate agent {shorten(repr(name), 100)}")
        agents[name] = Agent(name, _text(entry, "system", place, default=""))
    turns = []
    for i, raw in enumerate(_items(item, "turns", where)):
        place = f"{where}.turns[{i}]"
        entry = _object(raw, place)
        agent = _text(entry, "agent", place)
        if agent not in agents:
            known = shorten(", ".join(agents), 300)
            got = shorten(repr(agent), 100)
            raise WorkflowError(f"{place}.agent: unknown agent {got} (agents: {known})")
        turns.append(WorkflowTurn(agent, _text(entry, "message", place)))
    return Workflow(tuple(agents.values()), tuple(turns))


def _object(data: object, where: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise WorkflowError(f"{where}: expected an object, got {type(data).__name__}")
    return data


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _items(data: dict[str, Any], key: str, where: str) -> list[object]:
    value = data.get(key)
    if not isinstance(value, list) or not value:
        got = "nothing" if value is None else "an empty list" if value == [] else repr(type(value))
        raise WorkflowError(f"{_join(where, key)}: expected a non-empty list, got {got}")
    return value


def _text(data: dict[str, Any], key: str, where: str, default: str | None = None) -> str:
    value = data.get(key, default)
    if not isinstance(value, str):
        got = "nothing" if value is None else type(value).__name__
        raise WorkflowError(f"{_join(where, key)}: expected a string, got {got}")
    if default is None and not value.strip():
        raise WorkflowError(f"{_join(where, key)}: must not be empty")
    if not value.isascii() and _LONE_SURROGATE.search(value):
        raise WorkflowError(f"{_join(where, key)}: half a surrogate pair, which is no character")
    return value


class Player:
    """Plays the workflows of one file on one engine, one turn at a time.

    Benches step several players side by side, so that both sides of a pair see the same machine.
    """

    def __init__(self, engine: Engine, options: ReplayOptions) -> None:
        """Use ``engine`` for all sessions; nothing is opened yet."""
        self._engine = engine
        self._options = options

    def play(self, file: WorkflowFile) -> Generator[TurnRow, None, None]:
        """Yield one row a turn; the sessions of a workflow are closed when it ends."""
        for index, workflow in enumerate(file.workflows):
            sessions: dict[str, Session] = {}
            try:
                for agent in workflow.agents:
                    sessions[agent.name] = self._engine.session(
                        agent.name, system=agent.system or None, draft=self._options.draft
                    )
                for number, turn in enumerate(workflow.turns):
                    if self._options.stateless:
                        self._forget(sessions.values())
                    yield self._turn(index, number, turn, sessions[turn.agent])
            finally:
                for session in sessions.values():
                    session.close()

    def _turn(self, workflow: int, number: int, turn: WorkflowTurn, session: Session) -> TurnRow:
        options = self._options
        start = time.perf_counter()
        reply = session.turn(
            turn.message, max_tokens=options.max_tokens, ignore_eos=options.ignore_eos
        )
        total_s = time.perf_counter() - start
        receipt = reply.receipt
        return TurnRow(
            workflow=workflow,
            agent=turn.agent,
            turn=number,
            prompt_tokens=receipt.prompt_tokens,
            reused_tokens=receipt.reused_tokens,
            computed_tokens=receipt.computed_tokens,
            drafted_tokens=receipt.drafted_tokens,
            accepted_tokens=receipt.accepted_tokens,
            output_tokens=receipt.output_tokens,
            ttft_s=receipt.ttft_s,
            total_s=total_s,
            text=reply.text,
            token_ids=[int(token) for token in reply.token_ids],
        )

    def _forget(self, sessions: Iterable[Session]) -> None:
        # Before the turn and outside its time: the baseline pays for recomputing, not for the drop.
        for session in sessions:
            session.suspend()
        self._engine.clear_cache()


def replay(
    engine: Engine,
    file: WorkflowFile,
    options: ReplayOptions,
    on_turn: Callable[[TurnRow], None] | None = None,
) -> list[TurnRow]:
    """Replay a whole file and return its rows; ``on_turn`` sees each row as it is made."""
    rows = []
    # Closed here also when `on_turn` raises: the sessions must not outlive their engine.
    with closing(Player(engine, options).play(file)) as turns:
        for row in turns:
            rows.append(row)
            if on_turn is not None:
                on_turn(row)
    return rows


def later_turns(rows: Iterable[TurnRow]) -> list[TurnRow]:
    """The rows that are not the first turn of their agent: those that have a history."""
    seen: set[tuple[int, str]] = set()
    later = []
    for row in rows:
        key = (row.workflow, row.agent)
        if key in seen:
            later.append(row)
        seen.add(key)
    return later


def delta_excess(rows: Iterable[TurnRow]) -> list[int]:
    """For each later turn, computed tokens beyond its delta.

    The delta is what this turn added: its prompt less the context at the end of the agent's turn
    before. A stateful run computes it and at most one token more, the last one of the reply before.
    """
    context: dict[tuple[int, str], int] = defaultdict(int)
    excess = []
    for row in rows:
        key = (row.workflow, row.agent)
        if key in context:
            excess.append(row.computed_tokens - (row.prompt_tokens - context[key]))
        context[key] = row.prompt_tokens + row.output_tokens
    return excess


def summarize(rows: list[TurnRow]) -> dict[str, Any]:
    """Totals and medians of a run, as plain JSON data; medians are null without later turns."""
    later = later_turns(rows)
    return {
        "num_turns": len(rows),
        "num_later_turns": len(later),
        "median_later_turn_s": statistics.median(r.total_s for r in later) if later else None,
        "median_later_ttft_s": statistics.median(r.ttft_s for r in later) if later else None,
        "total_s": sum(r.total_s for r in rows),
        "prompt_tokens": sum(r.prompt_tokens for r in rows),
        "reused_tokens": sum(r.reused_tokens for r in rows),
        "computed_tokens": sum(r.computed_tokens for r in rows),
        "drafted_tokens": sum(r.drafted_tokens for r in rows),
        "accepted_tokens": sum(r.accepted_tokens for r in rows),
        "output_tokens": sum(r.output_tokens for r in rows),
    }
