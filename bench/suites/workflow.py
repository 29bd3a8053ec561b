"""Suite `workflow`: real agent workflows, stateful against stateless, turn by turn.

Three runs of the same workflow step side by side, each on an engine of its own over the same
weights: with state, with everything forgotten between turns, and with state but without drafts. So
each turn of one run is timed next to the same turn of the others, and their tokens can be compared.

Other programs take part only where `--peer` names them: the server of llama.cpp, plain and with two
of its drafters, and `transformers`. They answer with their own tokens, which stay in their history
as ours do in ours, so after the first replies the conversations differ; replies are equally long.
Where no run of ours is named the one without drafts runs all the same: tokens must be equal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from typing import Any

from bench import harness
from bench.harness import PeerMissingError, Settings
from bench.peers.workflow_peers import PEERS, Start, Turns
from bench.selection import Row
from bench.suites import on_device
from stateful_kv.apps.workflow import (
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
NAME = "later_turn"
MAX_TOKENS, SMOKE_MAX_TOKENS = 48, 8


def _shortened(file: WorkflowFile, num_turns: int) -> WorkflowFile:
    first = file.workflows[0]
    return replace(file, workflows=(Workflow(first.agents, first.turns[:num_turns]),))


@dataclass
class Played:
    """Rows of all runs of one workflow file, and what is known of the peers.

    Attributes:
        rows: by run; those of a peer may end early.
        settings: how each peer was set up.
        missing: peers that cannot run here, with the reason.
    """

    rows: dict[str, list[TurnRow]] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def play(
    file: WorkflowFile,
    max_tokens: int,
    runs: Sequence[str],
    peers: Mapping[str, Start],
    device: str = "cpu",
) -> Played:
    """Plays the file with our runs and the peers side by side, turn by turn."""
    loaded = on_device.load(device)
    played = Played()
    with ExitStack() as stack:
        players: dict[str, Turns] = {}
        for name in runs:
            engine = on_device.make_engine(loaded, KV_TOKENS, device)
            stack.callback(engine.close)
            player = Player(engine, replace(RUNS[name], max_tokens=max_tokens))
            players[name] = stack.enter_context(closing(player.play(file)))
        for name, start in peers.items():
            try:
                turns, played.settings[name] = start(stack, loaded, file, max_tokens)
            except PeerMissingError as error:
                played.missing[name] = str(error)
                continue
            players[name] = stack.enter_context(closing(turns))
        played.rows = {name: [] for name in players}
        for _ in range(file.num_turns):
            for name, turns in players.items():
                # Wait until the previous player's threads sleep, as the harness does.
                time.sleep(harness.SETTLE_S)
                played.rows[name].extend(row for row in [next(turns, None)] if row is not None)
    return played


def checks(rows: dict[str, list[TurnRow]]) -> dict[str, bool]:
    """What must hold of our own runs before a time means anything."""
    ours = {name: rows[name] for name in RUNS if name in rows}
    tokens = {name: [row.token_ids for row in run] for name, run in ours.items()}
    excess = [extra for name in ours if name != "stateless" for extra in delta_excess(ours[name])]
    held = {
        "computed_is_delta_or_one_more": all(0 <= extra <= 1 for extra in excess),
        "counts_add_up": all(
            row.reused_tokens + row.computed_tokens == row.prompt_tokens
            for run in ours.values()
            for row in run
        ),
    }
    if "stateless" in ours:
        held["same_tokens_without_state"] = tokens["stateful"] == tokens["stateless"]
        held["stateless_reuses_nothing"] = all(row.reused_tokens == 0 for row in ours["stateless"])
    if "no_draft" in ours:
        held["same_tokens_without_drafts"] = tokens["stateful"] == tokens["no_draft"]
    return held


def peer_checks(ours: list[TurnRow], theirs: list[TurnRow]) -> dict[str, bool]:
    """What must hold of a peer's turns before they may be paired with ours."""
    first_prompts = {
        (a.workflow, a.agent): a.prompt_tokens == b.prompt_tokens
        for a, b in reversed(list(zip(ours, theirs, strict=True)))
    }
    return {
        "first_prompts_are_as_long": all(first_prompts.values()),
        "replies_are_as_long": all(
            a.output_tokens == b.output_tokens for a, b in zip(ours, theirs, strict=True)
        ),
    }


def result_of(
    name: str, peer: str, max_tokens: int, played: Played, suite: str = "workflow"
) -> dict[str, Any]:
    """One result: later turns of the stateful run, paired with those of `peer`."""
    theirs_all = played.rows[peer]
    rows = {"stateful": played.rows["stateful"][: len(theirs_all)], peer: theirs_all}
    later = {run: [row.total_s for row in later_turns(rows[run])] for run in ("stateful", peer)}
    ours, theirs = harness.statistics_of(later["stateful"]), harness.statistics_of(later[peer])
    target = TARGETS.get(name) if (suite, peer) == ("workflow", "stateless") else None
    held = checks(played.rows)
    if peer not in RUNS:
        held |= peer_checks(rows["stateful"], rows[peer])
    ratio_of_medians = theirs["median"] / ours["median"]
    return {
        "suite": suite,
        "name": NAME,
        "axes": {"workflow": name, "max_tokens": max_tokens},
        "peer_name": peer,
        "model": on_device.MODEL,
        "kv_tokens": KV_TOKENS,
        "peer_setting": played.settings.get(peer),
        "checks": held,
        "num_equal_replies": sum(
            a.text == b.text for a, b in zip(rows["stateful"], rows[peer], strict=True)
        ),
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


def _chosen(settings: Settings) -> tuple[list[str], list[str], list[str]]:
    """Our runs, those of them that are compared, and the peers."""
    peers = [name for name in PEERS if settings.asks_for(name)]
    compared = [
        name
        for name in RUNS
        if name != "stateful" and (settings.peer is None or settings.asks_for(name))
    ]
    # If any of our runs is compared, all runs take part and check each other; otherwise only
    # no_draft, the cheaper one, checks the stateful run.
    return list(RUNS) if compared else ["stateful", "no_draft"], compared, peers


def rows(settings: Settings) -> list[Row]:
    """A row for each workflow; `--only` goes by the name of the workflow."""
    names, max_tokens = ("demo",) if settings.smoke else WORKFLOWS, MAX_TOKENS
    if settings.smoke:
        max_tokens = SMOKE_MAX_TOKENS
    return [Row(NAME, {"workflow": name, "max_tokens": max_tokens}, label=name) for name in names]


def run(settings: Settings, _roofs: dict[str, Any], emit: Callable[[dict[str, Any]], None]) -> None:
    """Run the suite; a broken check is an error, as no timing counts then."""
    runs, compared, peers = _chosen(settings)
    if not compared and not peers:
        return
    for row in rows(settings):
        name, max_tokens = str(row.label), int(row.axes["max_tokens"])
        if not settings.selection.takes(name, row.axes):
            continue
        file = load_workflow(name)
        if settings.smoke:
            file = _shortened(file, 5)
        played = play(file, max_tokens, runs, {peer: PEERS[peer] for peer in peers})
        for peer, reason in played.missing.items():
            emit(harness.skipped("workflow", NAME, {"workflow": name}, peer, reason))
        started = [peer for peer in peers if peer in played.rows]
        for peer in (*compared, *started):
            result = result_of(name, peer, max_tokens, played)
            broken = [check for check, holds in result["checks"].items() if not holds]
            if broken:
                raise harness.CheckFailedError(f"workflow: {name}: {peer}: {', '.join(broken)}")
            emit(result)
