"""The demo: a short multi-agent workflow with state and without, shown live and saved."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from stateful_kv.apps import report
from stateful_kv.apps.output import OutputFile
from stateful_kv.apps.printable import printable, shorten
from stateful_kv.apps.terminal import SafeConsole
from stateful_kv.apps.workflow import ReplayOptions, TurnRow, WorkflowFile, replay

if TYPE_CHECKING:
    from stateful_kv.engine.engine import Engine

STATEFUL_STYLE = "bold cyan"
STATELESS_STYLE = "yellow"
REPORT_FILES = ("report.json", "latency.png", "index.html")


class _Screen:
    """What the reader sees while the two runs go on: both columns of times, and a progress bar."""

    def __init__(self, console: SafeConsole, messages: list[str], agents: list[str]) -> None:
        self._console = console
        self._messages = messages
        self._agents = agents
        self.stateful: list[TurnRow] = []
        self.stateless: list[TurnRow] = []
        # No refresh thread: it would take time from the turns that are measured.
        self._live = Live(console=console, auto_refresh=False, vertical_overflow="visible")

    def __enter__(self) -> _Screen:
        if self._console.is_terminal:
            self._live.start()
            self._refresh()
        return self

    def __exit__(self, *unused: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def show_stateful(self, row: TurnRow) -> None:
        index = len(self.stateful)
        self.stateful.append(row)
        number = f"{index + 1:>2}"
        numbers = (
            f"{row.prompt_tokens:,} tokens of context: {row.reused_tokens:,} reused, "
            f"{row.computed_tokens:,} computed; reply in {row.total_s:.2f} s"
        )
        # A file or a pipe has no width of its own to keep to.
        width = max(40, self._console.width - 18) if self._console.is_terminal else 100
        lines = Text()
        lines.append(f"{number} {shorten(row.agent, 10):<10}", style=STATEFUL_STYLE)
        lines.append(f" < {shorten(self._messages[index], width)}\n")
        lines.append(f"{'':14}> {shorten(row.text, width)}\n", style="green")
        lines.append(f"{'':16}{numbers}", style="dim")
        self._console.print(lines, soft_wrap=True)
        self._refresh()

    def show_stateless(self, row: TurnRow) -> None:
        index = len(self.stateless)
        self.stateless.append(row)
        if not self._console.is_terminal:
            before = self.stateful[index]
            agent = shorten(row.agent, 10)
            self._console.say(
                f"{index + 1:>2} {agent:<10} without state: {row.computed_tokens:,} computed, "
                f"{row.total_s:.2f} s ({row.total_s / before.total_s:.1f}x)"
            )
        self._refresh()

    def _refresh(self) -> None:
        if self._console.is_terminal:
            self._live.update(self._render(), refresh=True)

    def _render(self) -> RenderableType:
        done, total = len(self.stateful) + len(self.stateless), 2 * len(self._agents)
        if len(self.stateful) < len(self._agents):
            phase = "with state: only what is new"
        elif done < total:
            phase = "without state: all of it again"
        else:
            phase = "both runs done"
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            ProgressBar(total=total, completed=done, width=30), f"{done}/{total}", f"[dim]{phase}"
        )
        return Group(Text(""), self._table(), bar)

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 1), header_style="dim")
        table.add_column("turn", justify="right")
        table.add_column("agent")
        table.add_column("context", justify="right")
        table.add_column("computed", justify="right", style=STATEFUL_STYLE)
        table.add_column("seconds", justify="right", style=STATEFUL_STYLE)
        table.add_column("computed*", justify="right", style=STATELESS_STYLE)
        table.add_column("seconds*", justify="right", style=STATELESS_STYLE)
        table.add_column("speed-up", justify="right")
        table.add_column("same reply", justify="center")
        for i, agent in enumerate(self._agents):
            cells = [""] * 6
            a = self.stateful[i] if i < len(self.stateful) else None
            b = self.stateless[i] if i < len(self.stateless) else None
            if a is not None:
                cells[:3] = f"{a.prompt_tokens:,}", f"{a.computed_tokens:,}", f"{a.total_s:.2f}"
            if a is not None and b is not None:
                cells[3:5] = f"{b.computed_tokens:,}", f"{b.total_s:.2f}"
                cells[5] = f"{b.total_s / a.total_s:.1f}x"
            same = "" if a is None or b is None else "yes" if _same(a, b) else "[red]NO"
            table.add_row(str(i + 1), Text(shorten(agent, 20)), *cells, same)
        table.caption = "* without state"
        table.caption_justify = "left"
        return table


def _same(a: TurnRow, b: TurnRow) -> bool:
    return a.token_ids == b.token_ids


def run_demo(
    engine: Engine,
    file: WorkflowFile,
    files: Sequence[OutputFile],
    console: SafeConsole,
    *,
    max_tokens: int,
    meta: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """Play ``file`` with state, then without; show both live, save and return the report.

    ``files`` are the ones of `REPORT_FILES`, in that order; they are committed when all are
    written. ``meta`` describes model, build and machine; it is asked once both runs are done.
    """
    turns = [turn for workflow in file.workflows for turn in workflow.turns]
    messages = [turn.message for turn in turns]
    console.print(_introduction(file), soft_wrap=True, highlight=False)
    with _Screen(console, messages, [turn.agent for turn in turns]) as screen:
        # Stateful first: a warm machine then favours the baseline, never the claim.
        for stateless, show in ((False, screen.show_stateful), (True, screen.show_stateless)):
            engine.clear_cache()
            replay(engine, file, ReplayOptions(max_tokens, stateless=stateless), show)
    summary = report.compare(screen.stateful, screen.stateless)
    result = {
        "meta": meta(),
        "summary": summary,
        "stateful": [row.to_json() for row in screen.stateful],
        "stateless": [row.to_json() for row in screen.stateless],
    }
    data, image, page = files
    png = report.latency_png(screen.stateful, screen.stateless)
    data.file.write(json.dumps(result, indent=1) + "\n")
    image.write_bytes(png)
    page.file.write(report.html_page(result, png, messages))
    for made in files:
        made.commit()
    console.print(_summary_panel(summary, data.path.parent))
    return result


def _introduction(file: WorkflowFile) -> Text:
    names = list(dict.fromkeys(a.name for workflow in file.workflows for a in workflow.agents))
    who = f"{len(names)} agents share one engine" if len(names) > 1 else "One agent"
    text = Text("\n").append(who, style="bold")
    return text.append(
        f" ({shorten(', '.join(names), 200)}): {file.num_turns} turns, played first with the state "
        "of every session kept,\nthen with everything forgotten between turns. "
        "< is what the agent is told, > is its reply.\n"
    )


def _summary_panel(summary: dict[str, Any], output: Path) -> Panel:
    a, b = summary["stateful"], summary["stateless"]
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(justify="right", style=STATEFUL_STYLE)
    grid.add_column(justify="right", style=STATELESS_STYLE)
    grid.add_column(justify="right", style="bold")
    grid.add_row("", "with state", "without", "")
    if summary["speedup_later_turn"] is not None:
        grid.add_row(
            "median later turn",
            f"{a['median_later_turn_s']:.2f} s",
            f"{b['median_later_turn_s']:.2f} s",
            f"{summary['speedup_later_turn']:.1f}x faster",
        )
    grid.add_row(
        "all turns",
        f"{a['total_s']:.1f} s",
        f"{b['total_s']:.1f} s",
        f"{summary['speedup_total']:.1f}x faster",
    )
    share = a["computed_tokens"] / max(1, b["computed_tokens"])
    grid.add_row(
        "prompt tokens computed",
        f"{a['computed_tokens']:,}",
        f"{b['computed_tokens']:,}",
        f"{share:.0%} of them",
    )
    equal = f"{summary['num_equal_turns']} of {a['num_turns']}"
    verdict = "every reply" if summary["tokens_equal"] else f"[red]only {equal} replies"
    saved = Text(printable(f"Saved {output}/ ({', '.join(sorted(REPORT_FILES))})."))
    return Panel(
        Group(grid, Text(""), f"Same tokens both ways: {verdict}.", saved),
        title="stateful_kv",
        title_align="left",
        expand=False,
        padding=(1, 2),
    )
