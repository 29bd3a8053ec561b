"""Shows results: lines while a run goes on, a Markdown table and an SVG plot afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import targets
from bench.harness import noise_percent
from bench.roofs import describe
from bench.targets import NOT_JUDGED

COLORS = {"FASTER": "#0b6e99", "SLOWER": "#b3402e", "SAME": "#6b7780", "UNCLEAR": "#c9a227"}


class ReportError(Exception):
    """A result file that cannot be read."""


def seconds(value: float) -> str:
    """A time with a unit that keeps three digits readable."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def title(result: dict[str, Any]) -> str:
    """Name and axes of a case."""
    return " ".join([result["name"], *(f"{k}={v}" for k, v in result["axes"].items())])


def _comparison(result: dict[str, Any]) -> str:
    ratio = result.get("ratio")
    if ratio is None:
        return "-"
    return f"{ratio['median']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def _fraction(result: dict[str, Any]) -> str:
    floor = result.get("floor")
    if floor is None or floor["seconds"] == 0:
        return "-"
    # Files of earlier versions held what lay in the cache against the memory, and knew no faults.
    most = 1 + (_noise_of(result, "ours") or 0.0) / 100
    if "fault" in floor or floor["fraction"] > most:
        return f"FAULT: {floor.get('fault') or 'above the roof of ' + floor['kind']}"
    return f"{floor['fraction']:.0%} of {floor['kind']}"


def _noise_of(result: dict[str, Any], side: str) -> float | None:
    """Spread of the times of a side or of the ratios, in percent; None where it is unknown."""
    samples = result.get(side, {}).get("samples", ())
    return noise_percent(samples) if len(samples) > 1 else None


def _noise(result: dict[str, Any]) -> str:
    """Spread of the paired ratios, or of our times where there is no peer."""
    noise = _noise_of(result, "ratio" if "ratio" in result else "ours")
    return "-" if noise is None else f"{noise:.1f} %"


def _inputs(result: dict[str, Any]) -> str:
    """Where the inputs lie; nothing of files that do not say it."""
    return {True: "warm", False: "cold"}.get(result.get("warm"), "")


def _peer(result: dict[str, Any]) -> str:
    """The peer, and which of its ways was the quickest."""
    setting = result.get("details", {}).get("peer_setting")
    return f"{result['peer_name'] or ''}{f' ({setting})' if setting else ''}"


def line(result: dict[str, Any], is_judged: bool = True) -> str:
    """One result on one line, for the terminal."""
    if "skipped" in result:
        return f"{title(result)}: {result['peer_name']} skipped: {result['skipped']}"
    if "failed" in result:
        return f"{title(result)}: FAILED: {result['failed']}"
    if not is_judged:
        peer = f", {result['peer_name']} too" if result.get("peer_name") else ""
        return f"{title(result)}: ran{peer}, {_checks(result) or 'check holds'}"
    parts = [f"{title(result)}: {seconds(result['ours']['median'])}"]
    if result.get("unit", "call") != "call":
        parts.append(f"{result['ns_per_unit']:.3g} ns per {result['unit']}")
    if "ratio" in result:
        verdict = result["ratio"]["verdict"]
        parts.append(f"{_comparison(result)} vs {_peer(result)} {verdict}")
    if _noise(result) != "-":
        parts.append(f"noise {_noise(result)}")
    if _inputs(result):
        parts.append(_inputs(result))
    if _fraction(result) != "-":
        parts.append(_fraction(result))
    if "headline" in result:
        parts.append(targets.words(result["headline"]))
    if "note" in result:
        parts.append(result["note"])
    if "checks" in result:
        parts.append(_checks(result))
    return ", ".join(parts)


def _checks(result: dict[str, Any]) -> str:
    """Whether the checks of a result hold; nothing where it has none of its own."""
    if "checks" not in result:
        return ""
    failed = [name for name, ok in result["checks"].items() if ok is False]
    return "checks failed: " + ", ".join(failed) if failed else "all checks hold"


def load(path: Path) -> dict[str, Any]:
    """Read a result file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: cannot be read: {error}") from error
    if not isinstance(data, dict) or not str(data.get("schema")).startswith("stateful-kv-bench/1"):
        raise ReportError(f"{path}: not a stateful-kv-bench/1 file")
    return data


def _device(machine: dict[str, Any]) -> str:
    gpu = machine.get("gpu")
    return machine["cpu"] if gpu is None else f"{gpu['name']} beside {machine['cpu']}"


def markdown(document: dict[str, Any]) -> str:
    """Heading with machine, build and roofs, then one table row a result."""
    machine, roofs, git = document["machine"], document["roofs"], document["git"]
    sha = (git["sha"] or "unknown")[:10] + (" (dirty)" if git["dirty"] else "")
    rows = [
        f"## {', '.join(document['suites'])}" + (f" ({NOT_JUDGED})" if document["smoke"] else ""),
        "",
        f"{_device(machine)}, {machine['threads']} threads, {document['build']['cpu_isa']}; torch "
        f"{machine['torch']}; {machine['date']}; commit {sha}; load at start "
        f"{machine['load_average'][0]}.",
        f"Roofs measured in this run: {describe(roofs)}. "
        f"Inputs rotate through up to {document['cold_bytes'] / 1e6:.0f} MB" + _cache_words(roofs),
        "",
        f"    {document['command']}",
        "",
    ]
    if document["smoke"]:
        rows += ["| case |", "|---|"]
        rows += [f"| {line(r, is_judged=False)} |" for r in document["results"]]
        return "\n".join(rows + _remarks(document)) + "\n"
    rows += [
        "| case | ours (median) | p10 - p90 | per unit | peer | speed-up [95 %] | verdict | noise "
        "| inputs | roof |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in document["results"]:
        ours = result["ours"]
        unit = result.get("unit", "call")
        note = f": {result['note']}" if "note" in result else ""
        cells = (
            title(result) + note,
            seconds(ours["median"]),
            f"{seconds(ours['p10'])} - {seconds(ours['p90'])}",
            "" if unit == "call" else f"{result['ns_per_unit']:.3g} ns/{unit}",
            _peer(result),
            _comparison(result),
            result["ratio"]["verdict"] if "ratio" in result else "",
            _noise(result),
            _inputs(result),
            _fraction(result),
        )
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows + _remarks(document)) + "\n"


def _cache_words(roofs: dict[str, Any]) -> str:
    """What warm means in this run; older files do not know it."""
    size = roofs.get("llc_bytes")
    if size is None:
        return "."
    return f"; what fits into the last-level cache of {size / 1e6:.0f} MB is warm."


def _remarks(document: dict[str, Any]) -> list[str]:
    """What stands below the table."""
    # Files of earlier versions have no such list.
    reasons = dict.fromkeys((r["peer_name"], r["skipped"]) for r in document.get("skipped", ()))
    rows = [f"\nNot run: {peer}: {reason}" for peer, reason in reasons]
    rows += [f"\nAsked: {line}" for line in targets.lines(document)]
    if "ended_early" in document:
        rows.append(f"\nThe run ended early: {document['ended_early']}")
    return rows


def write_svg(path: Path, documents: list[dict[str, Any]]) -> None:
    """Speed-up of each case over its peer with its interval, on a log axis."""
    from matplotlib.figure import Figure

    results = [r for document in documents for r in document["results"] if "ratio" in r]
    figure = Figure(figsize=(9, 1.2 + 0.26 * max(1, len(results))), layout="constrained")
    axes = figure.subplots()
    for y, result in enumerate(results):
        ratio = result["ratio"]
        color = COLORS[ratio["verdict"]]
        axes.plot([ratio["low"], ratio["high"]], [y, y], color=color, linewidth=3, alpha=0.5)
        axes.plot(ratio["median"], y, marker="o", color=color, markersize=5)
    labels = [f"{title(r)} vs {r['peer_name']}" for r in results]
    axes.set_yticks(range(len(results)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="#1d2429", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.tick_params(axis="x", which="both", labelsize=8)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("peer time / our time (right of 1: ours is faster), 95 % interval")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, format="svg", metadata={"Date": None})


def main(files: list[Path], out: Path | None) -> int:
    """Write OUT.md and OUT.svg (default: beside the first file) and print the tables."""
    documents = [load(path) for path in files]
    base = out if out is not None else files[0].with_suffix("")
    base.parent.mkdir(parents=True, exist_ok=True)
    plot = base.with_name(base.name + ".svg")
    write_svg(plot, documents)
    text = "\n".join(markdown(document) for document in documents)
    text += f"\n![Speed-up of each case over its peer]({plot.name})\n"
    base.with_name(base.name + ".md").write_text(text, encoding="utf-8")
    print(text)
    return 0
