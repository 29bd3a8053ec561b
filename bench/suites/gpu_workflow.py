"""Suite `gpu_workflow`: agent workflows on a CUDA device, turn by turn, side by side.

The same runs as in `workflow`, with state, without, and without drafts, each on an engine of its
own; their tokens must be equal. Beside them `transformers` in bf16 that keeps its cache between
turns, as good a client as it allows: one cache for each agent, cut back to the tokens that the next
prompt still has. The clock is the host's, from the call of a turn to its text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from bench import harness
from bench.harness import Settings
from bench.peers.workflow_peers import Start, start_cached_transformers
from bench.selection import Row
from bench.suites import on_device, workflow
from stateful_kv.apps.workflow import Workflow, WorkflowFile, load_workflow
from stateful_kv.errors import ModelNotFoundError
from stateful_kv.models.files.loading import resolve

SUITE = "gpu_workflow"
# The workflow that has a target comes first, because a run may be cut short.
WORKFLOWS = ("coding35", "six", "interleaved", "thirtyfive")


def little(file: WorkflowFile) -> WorkflowFile:
    """Three turns of one agent with short messages, for smoke runs."""
    first = file.workflows[0]
    agent = replace(first.agents[0], system=first.agents[0].system[:80])
    own = [turn for turn in first.turns if turn.agent == agent.name][:3]
    turns = tuple(replace(turn, message=turn.message[:120]) for turn in own)
    return replace(file, workflows=(Workflow((agent,), turns),))


def rows(settings: Settings) -> list[Row]:
    """A row for each workflow; `--only` goes by the name of the workflow."""
    names, max_tokens = (("demo",), 4) if settings.smoke else (WORKFLOWS, workflow.MAX_TOKENS)
    return [
        Row(workflow.NAME, {"workflow": name, "max_tokens": max_tokens}, label=name)
        for name in names
    ]


def _run_one(
    name: str, max_tokens: int, settings: Settings, emit: Callable[[dict[str, Any]], None]
) -> None:
    file = load_workflow(name)
    if settings.smoke:
        file = little(file)
    peers: dict[str, Start] = {"transformers": partial(start_cached_transformers, settings.device)}
    played = workflow.play(file, max_tokens, list(workflow.RUNS), peers, settings.device)
    for peer, reason in played.missing.items():
        emit(harness.skipped(SUITE, "later_turn", {"workflow": name}, peer, reason))
    for peer in ("stateless", "transformers", "no_draft"):
        if peer not in played.rows or not (settings.peer is None or settings.asks_for(peer)):
            continue
        result = workflow.result_of(name, peer, max_tokens, played, SUITE)
        broken = [check for check, holds in result["checks"].items() if not holds]
        if broken:
            raise harness.CheckFailedError(f"{name}: {peer}: {', '.join(broken)}")
        emit(harness.with_headline({**result, "device": settings.device}, settings))


def run(settings: Settings, _roofs: dict[str, Any], emit: Callable[[dict[str, Any]], None]) -> None:
    """Run the suite; a workflow that fails does not keep the others from running."""
    try:
        resolve(on_device.MODEL)
    except ModelNotFoundError as error:
        emit(harness.skipped(SUITE, "all", {}, None, str(error)))
        return
    for row in rows(settings):
        name = str(row.label)
        if settings.selection.takes(name, row.axes):
            try:
                _run_one(name, int(row.axes["max_tokens"]), settings, emit)
            except Exception as error:
                emit(harness.failed(SUITE, "later_turn", {"workflow": name}, error))
