"""Suite `workflow`: real agent workflows, stateful against stateless, turn by turn.

Three runs of the same workflow step side by side, each on an engine of its own over the same
weights: with state, with everything forgotten between turns, and with state but without drafts. So
each turn of one run is timed next to the same turn of the others, and their tokens can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

from bench import harness
from bench.harness import Settings
from stateful_kv.config import EngineConfig
from stateful_kv.engine import Engine
from stateful_kv.models.loading import load_model
from stateful_kv.workflow import (
    Player,
    ReplayOptions,
    TurnRow,
    Workflow,
    WorkflowFile,
    delta_excess,
    later_turns,
    load_workflow,
    summarize,
)

MODEL = "smollm2"
KV_TOKENS = 16384
WORKFLOWS = ("six", "interleaved", "thirtyfive", "coding35")
# Median later turn, stateless over stateful, that the project asks of itself.
TARGETS = {"six": 2.1, "coding35": 4.2}
RUNS = {
    "stateful": ReplayOptions(ignore_eos=True),
    "stateless": ReplayOptions(ignore_eos=True, stateless=True),
    "no_draft": ReplayOptions(ignore_eos=True, draft=False),
}
NOT_KEPT = ("text", "token_ids")


def _shortened(file: WorkflowFile, num_turns: int) -> WorkflowFile:
    first = file.workflows[0]
    return replace(file, workflows=(Workflow(first.agents, first.turns[:num_turns]),))


def _play(file: WorkflowFile, max_tokens: int) -> dict[str, list[TurnRow]]:
    loaded = load_model(MODEL)
    config = EngineConfig(kv_tokens=KV_TOKENS)
    rows: dict[str, list[TurnRow]] = {name: [] for name in RUNS}
    with ExitStack() as stack:
        players = {}
        for name, options in RUNS.items():
            engine = Engine(loaded.model, loaded.tokenizer, config)
            stack.callback(engine.close)
            player = Player(engine, replace(options, max_tokens=max_tokens))
            players[name] = stack.enter_context(closing(player.play(file)))
        for _ in range(file.num_turns):
            for name, turns in players.items():
                rows[name].append(next(turns))
    return rows


def checks(rows: dict[str, list[TurnRow]]) -> dict[str, bool]:
    """What must hold before a time means anything."""
    tokens = {name: [row.token_ids for row in run] for name, run in rows.items()}
    excess = delta_excess(rows["stateful"]) + delta_excess(rows["no_draft"])
    return {
        "same_tokens_without_state": tokens["stateful"] == tokens["stateless"],
        "same_tokens_without_drafts": tokens["stateful"] == tokens["no_draft"],
        "computed_is_delta_or_one_more": all(0 <= extra <= 1 for extra in excess),
        "stateless_reuses_nothing": all(row.reused_tokens == 0 for row in rows["stateless"]),
        "counts_add_up": all(
            row.reused_tokens + row.computed_tokens == row.prompt_tokens
            for run in rows.values()
            for row in run
        ),
    }


def _result(
    name: str, peer: str, max_tokens: int, rows: dict[str, list[TurnRow]]
) -> dict[str, Any]:
    """One result: later turns of the stateful run, paired with those of `peer`."""
    later = {run: [row.total_s for row in later_turns(rows[run])] for run in ("stateful", peer)}
    ours, theirs = harness.statistics_of(later["stateful"]), harness.statistics_of(later[peer])
    target = TARGETS.get(name) if peer == "stateless" else None
    held = checks(rows)
    ratio_of_medians = theirs["median"] / ours["median"]
    return {
        "suite": "workflow",
        "name": "later_turn",
        "axes": {"workflow": name, "max_tokens": max_tokens},
        "peer_name": peer,
        "model": MODEL,
        "kv_tokens": KV_TOKENS,
        "checks": held,
        "ours": ours,
        "peer": theirs,
        "ratio": harness.ratio_of(later["stateful"], later[peer]),
        "ratio_of_medians": ratio_of_medians,
        "target": target,
        "target_met": None if target is None else ratio_of_medians >= target,
        "summaries": {run: summarize(rows[run]) for run in ("stateful", peer)},
        "turns": {
            run: [
                {key: value for key, value in row.to_json().items() if key not in NOT_KEPT}
                for row in rows[run]
            ]
            for run in ("stateful", peer)
        },
    }


def run(settings: Settings, _roofs: dict[str, Any], emit: Callable[[dict[str, Any]], None]) -> None:
    """Run the suite; a broken check is an error, as no timing counts then."""
    for name in ("demo",) if settings.smoke else WORKFLOWS:
        if settings.only is not None and settings.only not in name:
            continue
        file = load_workflow(name)
        max_tokens = 48
        if settings.smoke:
            file, max_tokens = _shortened(file, 5), 8
        rows = _play(file, max_tokens)
        broken = [check for check, holds in checks(rows).items() if not holds]
        if broken:
            raise harness.CheckFailedError(f"workflow: {name}: {', '.join(broken)}")
        for peer in ("stateless", "no_draft"):
            if settings.peer in (None, "all", peer):
                emit(_result(name, peer, max_tokens, rows))
