"""The rows that ``stateful-kv run`` shows while it replays a workflow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stateful_kv.apps.printable import shorten
from stateful_kv.apps.terminal import SafeConsole
from stateful_kv.apps.workflow import ReplayOptions, TurnRow, WorkflowFile, replay, summarize

if TYPE_CHECKING:
    from stateful_kv.engine.engine import Engine

_COLUMNS = (
    ("turn", 4),
    ("agent", -10),
    ("context", 7),
    ("reused", 6),
    ("computed", 8),
    ("drafts", 7),
    ("reply", 5),
    ("first s", 7),
    ("total s", 7),
)


def replay_shown(
    engine: Engine, file: WorkflowFile, options: ReplayOptions, console: SafeConsole
) -> list[TurnRow]:
    """Replays a workflow and shows a row for each turn, then a summary."""
    mode = "without state" if options.stateless else "with state"
    console.say(f"{shorten(file.name, 100)} {mode}, {file.num_turns} turns", style="bold")
    console.say(_line([name for name, _ in _COLUMNS]) + "  text", style="dim")

    def show(row: TurnRow) -> None:
        cells = [
            f"{row.turn + 1}",
            shorten(row.agent, 10),
            f"{row.prompt_tokens}",
            f"{row.reused_tokens}",
            f"{row.computed_tokens}",
            f"{row.accepted_tokens}/{row.drafted_tokens}",
            f"{row.output_tokens}",
            f"{row.ttft_s:.3f}",
            f"{row.total_s:.3f}",
        ]
        line = _line(cells)
        # A file or a pipe has no width of its own to keep to.
        room = console.width - len(line) - 2 if console.is_terminal else 80
        console.say(f"{line}  {shorten(row.text, max(16, room))}")

    rows = replay(engine, file, options, show)
    _say_summary(summarize(rows), console)
    return rows


def _line(cells: list[str]) -> str:
    widths = [width for _, width in _COLUMNS]
    return " ".join(
        cell.rjust(width) if width > 0 else cell.ljust(-width)
        for cell, width in zip(cells, widths, strict=True)
    )


def _say_summary(summary: dict[str, Any], console: SafeConsole) -> None:
    parts = [f"{summary['total_s']:.2f} s in all"]
    if summary["median_later_turn_s"] is not None:
        parts.insert(0, f"median later turn {summary['median_later_turn_s']:.3f} s")
    parts.append(
        f"{summary['computed_tokens']:,} of {summary['prompt_tokens']:,} prompt tokens computed"
    )
    if summary["drafted_tokens"]:
        parts.append(
            f"{summary['accepted_tokens']:,} of {summary['drafted_tokens']:,} drafts accepted"
        )
    console.say("; ".join(parts), style="bold")
