"""`python -m bench run SUITE...` measures; `report` and `targets FILE.json...` show.

`run --list` says what there is to measure and runs nothing.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from bench import device, harness, report, selection, targets
from bench.document import document as make_document

SUITES = (*device.CPU_SUITES, *device.GPU_SUITES)
RESULTS = ("bench", "results")  # the folder of the figures that documents refer to


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run suites and write one JSON file")
    run.add_argument(
        "suites", nargs="*", type=_suite, default=[], metavar="SUITE", help=", ".join(SUITES)
    )
    run.add_argument(
        "--list", action="store_true", help="show suites, rows and axes (default: all) and stop"
    )
    run.add_argument(
        "--smoke", action="store_true", help="tiny and quick: shows that it runs, judges nothing"
    )
    run.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: the one that the suites are made for"
    )
    run.add_argument(
        "--peer",
        help="compare with this peer only (or A,B,...); all: with every peer",
    )
    run.add_argument("--only", help="only cases whose name contains this (or one of A,B,...)")
    run.add_argument(
        "--where",
        nargs="+",
        action="extend",
        type=_where,
        default=[],
        metavar="AXIS=VALUE,...",
        help="only cases with these values of their axes; all that are named must match",
    )
    run.add_argument("--pairs", type=_positive, default=harness.MIN_PAIRS, help="pairs a case")
    run.add_argument("--threads", type=_positive, help="CPU threads")
    run.add_argument("--quiet-machine", action="store_true", help="refuse to run on a busy machine")
    run.add_argument("--out", type=Path, metavar="FILE.json")
    asked = commands.add_parser("targets", help="what the project asks of results, and whether met")
    asked.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    show = commands.add_parser("report", help="write a Markdown table and an SVG plot")
    show.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    show.add_argument("--out", type=Path, help="path of the outputs without suffix")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number >= 1, got {number}")
    return number


def _suite(text: str) -> str:
    if text not in SUITES:
        raise argparse.ArgumentTypeError(f"no suite {text!r}; there are {', '.join(SUITES)}")
    return text


def _where(text: str) -> tuple[str, tuple[str, ...]]:
    try:
        return selection.parse_where(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _is_result(path: Path) -> bool:
    """Whether the file would lie among the results that documents refer to."""
    parts = path.resolve().parent.parts
    return RESULTS in itertools.pairwise(parts)


def _rows(suites: list[str], settings: harness.Settings) -> dict[str, list[selection.Row]]:
    """The rows of each suite, before any filter."""
    modules = {suite: importlib.import_module(f"bench.suites.{suite}") for suite in suites}
    return {suite: module.rows(settings) for suite, module in modules.items()}


def _list(rows: dict[str, list[selection.Row]], chosen: selection.Selection) -> None:
    for suite, all_rows in rows.items():
        left = [row for row in all_rows if chosen.takes(row.label or row.name, row.axes)]
        print(f"{suite}: {len(left)} rows")
        for line in selection.lines(left):
            print(f"  {line}")


def _require_writable(path: Path) -> None:
    """OSError if the file could not be written; before the run, so that no result is lost."""
    path.parent.mkdir(parents=True, exist_ok=True)
    existed = path.exists()
    path.open("a").close()
    if not existed:
        path.unlink()


def _run(args: argparse.Namespace, argv: list[str]) -> int:
    import torch

    chosen = selection.Selection(args.only, _merged(args.where))
    # The device matters to no row, so rows are listed where the device is missing, too.
    rows = _rows(args.suites or list(SUITES), harness.Settings(args.smoke))
    chosen.check([row for some in rows.values() for row in some])
    if args.list:
        _list(rows, chosen)
        return 0
    if not args.suites:
        print(f"bench: name a suite: {', '.join(SUITES)}", file=sys.stderr)
        return 2
    if args.out is not None:
        if args.smoke and _is_result(args.out):
            print(
                "bench: --out: a smoke run is no result; write it to another folder than "
                f"{'/'.join(RESULTS)}",
                file=sys.stderr,
            )
            return 2
        try:
            _require_writable(args.out)
        except OSError as error:
            print(f"bench: --out: {error}", file=sys.stderr)
            return 2
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    where = device.choose(args.suites, args.device, args.smoke)
    settings = harness.Settings(args.smoke, where, args.peer, args.pairs, selection=chosen)
    document = make_document(args.suites, settings, argv)
    if document["busy_at_start"]:
        load = document["machine"]["load_average"][0]
        print(f"bench: load average {load}: timings are doubtful", file=sys.stderr)
        if args.quiet_machine:
            return 3
    try:
        _run_suites(args.suites, settings, document)
    except (harness.CheckFailedError, harness.PeerFailedError):
        raise
    except BaseException as error:
        # A run that is cut short keeps what it has, and says so.
        document["ended_early"] = f"{type(error).__name__}: {error}".splitlines()[0]
        raise
    finally:
        document["load_average_at_end"] = [round(value, 2) for value in os.getloadavg()]
        failed = isinstance(sys.exc_info()[1], harness.CheckFailedError | harness.PeerFailedError)
        has_any = document["results"] or document["skipped"] or document.get("failed")
        if args.out is not None and has_any and not failed:
            args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if not has_any:
        print(f"bench: no case has a peer {args.peer}", file=sys.stderr)
        return 2
    _sum_up(document)
    return 1 if document.get("failed") else 0


def _merged(where: list[tuple[str, tuple[str, ...]]]) -> dict[str, tuple[str, ...]]:
    """Filters by axis; an axis that is named twice has all its values."""
    merged: dict[str, tuple[str, ...]] = {}
    for axis, values in where:
        merged[axis] = (*merged.get(axis, ()), *values)
    return merged


def _sum_up(document: dict[str, Any]) -> None:
    """What must be known of all results together."""
    if document["smoke"]:
        print(targets.NOT_JUDGED)
    faults = sum("fault" in result.get("floor", {}) for result in document["results"])
    if faults:
        print(f"bench: {faults} results are above their roof: measured wrong", file=sys.stderr)


def _run_suites(suites: list[str], settings: harness.Settings, document: dict[str, Any]) -> None:
    """Adds results, and what was skipped or failed, to the document as they come."""

    def emit(result: dict[str, Any]) -> None:
        kind = next((kind for kind in ("skipped", "failed") if kind in result), "results")
        if settings.smoke:
            result = harness.unjudged(result)
        document.setdefault(kind, []).append(result)
        print(report.line(result, is_judged=not settings.smoke), flush=True)

    for suite in suites:
        module = importlib.import_module(f"bench.suites.{suite}")
        module.run(settings, document["roofs"], emit)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
    try:
        if args.command == "run":
            return _run(args, argv)
        if args.command == "targets":
            return targets.main([report.load(path) for path in args.files])
        return report.main(args.files, args.out)
    except selection.SelectionError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except device.DeviceError as error:
        print(f"bench: {error}", file=sys.stderr)
        return error.status
    except harness.CheckFailedError as error:
        print(f"bench: check failed: {error}", file=sys.stderr)
        return 1
    except harness.PeerFailedError as error:
        print(f"bench: peer failed: {error}", file=sys.stderr)
        return 1
    except report.ReportError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    # So that peers in processes of their own are ended with the bench.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
