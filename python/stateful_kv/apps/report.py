"""Reports of replays: what machine and build they ran on, a plot, and a self-contained page."""

from __future__ import annotations

import base64
import html
import io
import os
import platform
import sys
import warnings
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from stateful_kv._extras import needs
from stateful_kv.apps.printable import printable, shorten
from stateful_kv.apps.workflow import TurnRow, summarize
from stateful_kv.system.machine import cpu_name, cpuinfo, num_cores

STATEFUL_COLOR = "#0b6e99"
STATELESS_COLOR = "#c2703d"
CPU_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimd")


def relative_argv(argv: Sequence[str] | None = None) -> list[str]:
    """The command line without absolute paths, so that a report can be published."""
    args = list(sys.argv if argv is None else argv)
    return [_relative(arg, is_program=i == 0) for i, arg in enumerate(args)]


def _relative(arg: str, *, is_program: bool) -> str:
    head, separator, value = arg.partition("=") if arg.startswith("-") else ("", "", arg)
    if not os.path.isabs(value):
        return arg
    if is_program:
        return Path(value).name
    try:
        inside = os.path.relpath(value)
    except OSError:  # the working folder was removed
        return head + separator + Path(value).name
    return head + separator + (Path(value).name if inside.startswith("..") else inside)


def machine_info() -> dict[str, Any]:
    """CPU, threads, load and versions, as plain JSON data; no host name, user or path."""
    import torch

    fields = cpuinfo()
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return {
        "cpu": cpu_name(),
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in flags],
        "cores": num_cores(),
        "threads": torch.get_num_threads(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def device_info(device: str) -> dict[str, Any]:
    """What computed, as plain JSON data: on the CPU `machine_info` says more."""
    import torch

    from stateful_kv._native import check_device
    from stateful_kv.system.device import device_name

    found = check_device(device)
    info: dict[str, Any] = {"name": str(found), "model": device_name(found)}
    if found.type == "cuda":
        info["memory"] = torch.cuda.get_device_properties(found).total_memory
        info["cuda"] = torch.version.cuda
    return info


def compare(stateful: list[TurnRow], stateless: list[TurnRow]) -> dict[str, Any]:
    """Summary of a workflow run both ways: speed-ups, tokens computed, equality of the replies."""
    with_state, without = summarize(stateful), summarize(stateless)
    ratio = None
    if with_state["median_later_turn_s"] and without["median_later_turn_s"]:
        ratio = without["median_later_turn_s"] / with_state["median_later_turn_s"]
    equal = sum(a.token_ids == b.token_ids for a, b in zip(stateful, stateless, strict=True))
    return {
        "stateful": with_state,
        "stateless": without,
        "speedup_later_turn": ratio,
        "speedup_total": without["total_s"] / with_state["total_s"],
        "num_equal_turns": equal,
        "tokens_equal": equal == len(stateful),
    }


def require_matplotlib() -> None:
    """Raises ImportError, with what to install, where the plot could not be drawn."""
    with needs("cli", "the plot of the demo"):
        import matplotlib.figure  # noqa: F401


def latency_png(stateful: list[TurnRow], stateless: list[TurnRow]) -> bytes:
    """A plot of the seconds of each turn against its number, for both runs."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 4.2), dpi=160, layout="constrained")
    axes = figure.subplots()
    turns = range(1, len(stateful) + 1)
    for rows, color, label, marker in (
        (stateless, STATELESS_COLOR, "stateless: everything recomputed", "s"),
        (stateful, STATEFUL_COLOR, "stateful: only the delta computed", "o"),
    ):
        seconds = [row.total_s for row in rows]
        axes.plot(turns, seconds, color=color, marker=marker, linewidth=2, label=label)
    agents = [row.agent for row in stateful]
    labels = [f"{t}\n{shorten(a, 16)}" for t, a in zip(turns, agents, strict=True)]
    # A name is no formula: matplotlib would read what is between two dollar signs as one.
    axes.set_xticks(list(turns), labels, parse_math=False)
    axes.tick_params(axis="x", labelsize=7.5, length=0)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("seconds per turn (lower is better)")
    axes.set_xlabel("turn and agent")
    axes.set_title("Latency of each turn, same messages in both runs", loc="left", fontsize=11)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False)
    image = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font lacks are drawn as boxes
        figure.savefig(image, format="png")
    return image.getvalue()


_STYLE = """
:root { --ink: #1d2429; --soft: #5d6a73; --line: #dfe5e8; --card: #f5f8f9; --blue: #0b6e99; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.2rem 4rem; color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; background: #fff; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p.lead { color: var(--soft); margin: 0 0 1.4rem; max-width: 46rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; }
.tile { flex: 1 1 12rem; background: var(--card); border-radius: .5rem; padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.55rem; color: var(--blue); }
.tile span { color: var(--soft); font-size: .88rem; }
img { width: 100%; height: auto; margin-top: 1.4rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } td:nth-child(2), th:nth-child(2) { text-align: left; }
details { border-bottom: 1px solid var(--line); padding: .4rem 0; }
summary { cursor: pointer; } summary span { color: var(--soft); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--card);
  padding: .6rem .8rem; border-radius: .4rem; margin: .4rem 0; font-size: .85rem; }
footer { color: var(--soft); font-size: .82rem; margin-top: 2.5rem; }
"""


def _safe(text: str) -> str:
    """Text of files and models as text of a page; line breaks and tabs stay."""
    return html.escape(printable(text, keep="\n\t"))


def html_page(report: dict[str, Any], png: bytes, messages: list[str]) -> str:
    """The report as one page that needs no other file and no network."""
    summary, meta = report["summary"], report["meta"]
    stateful, stateless = report["stateful"], report["stateless"]
    speedup = summary["speedup_later_turn"]
    computed = (summary["stateful"]["computed_tokens"], summary["stateless"]["computed_tokens"])
    medians = (
        summary["stateful"]["median_later_turn_s"],
        summary["stateless"]["median_later_turn_s"],
    )
    tiles = [
        ("-" if speedup is None else f"{speedup:.1f}x", "faster median later turn"),
        (" / ".join("-" if m is None else f"{m:.2f} s" for m in medians), "with / without state"),
        (f"{computed[0]:,} / {computed[1]:,}", "prompt tokens computed with / without state"),
        (f"{summary['num_equal_turns']} of {len(stateful)}", "replies equal token for token"),
    ]
    image = base64.b64encode(png).decode("ascii")
    page = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>stateful_kv: {_safe(meta['workflow'])}</title><style>{_STYLE}</style>",
        "</head><body><h1>Turns that compute only their delta</h1>",
        f'<p class="lead">Workflow <i>{_safe(meta["workflow"])}</i>: '
        f"{len(set(r['agent'] for r in stateful))} agents share one engine "
        f"({_safe(meta['model'])}). The same messages were played twice: once with the "
        "state of every session kept, once with everything forgotten between turns.</p>",
        '<div class="tiles">',
        *(f'<div class="tile"><b>{value}</b><span>{label}</span></div>' for value, label in tiles),
        f'</div><img alt="Seconds of each turn, with and without state" '
        f'src="data:image/png;base64,{image}">',
        "<h2>Turn by turn</h2>",
        _html_table(stateful, stateless),
        "<h2>What was said</h2>",
        *(
            f"<details><summary>{i} &middot; {_safe(row['agent'])} "
            f"<span>{_safe(shorten(message, 90))}</span></summary>"
            f"<pre>{_safe(message)}</pre><pre>{_safe(row['text'])}</pre></details>"
            for i, (row, message) in enumerate(zip(stateful, messages, strict=True), start=1)
        ),
        _html_footer(meta),
        "</body></html>",
    ]
    return "\n".join(page) + "\n"


def _html_table(stateful: list[dict[str, Any]], stateless: list[dict[str, Any]]) -> str:
    heads = (
        "turn",
        "agent",
        "context",
        "reused",
        "computed",
        "seconds",
        "computed, stateless",
        "seconds, stateless",
        "speed-up",
    )
    cells = "".join(f"<th>{head}</th>" for head in heads)
    body = []
    for i, (a, b) in enumerate(zip(stateful, stateless, strict=True), start=1):
        values = (
            str(i),
            _safe(a["agent"]),
            f"{a['prompt_tokens']:,}",
            f"{a['reused_tokens']:,}",
            f"{a['computed_tokens']:,}",
            f"{a['total_s']:.2f}",
            f"{b['computed_tokens']:,}",
            f"{b['total_s']:.2f}",
            f"{b['total_s'] / a['total_s']:.1f}x",
        )
        body.append("<tr>" + "".join(f"<td>{value}</td>" for value in values) + "</tr>")
    return f'<div class="scroll"><table><tr>{cells}</tr>{"".join(body)}</table></div>'


def _html_footer(meta: dict[str, Any]) -> str:
    machine = meta["machine"]
    parts = [
        f"{machine['cpu']}, {machine['threads']} threads",
        f"instruction set {meta['build'].get('cpu_isa', 'unknown')}",
        f"torch {machine['torch']}",
        f"stateful_kv {meta['build'].get('version', 'unknown')}",
        f"up to {meta['max_tokens']} tokens a reply, greedy",
        machine["date"],
    ]
    lines = [_safe(" · ".join(parts)), f"Messages: {_safe(meta['source'])}"]
    return f"<footer>{'<br>'.join(lines)}</footer>"
