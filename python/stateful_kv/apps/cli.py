"""The command line: ``stateful-kv run``, ``profile``, ``demo`` and ``info``."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stateful_kv._native import build_info, check_device
from stateful_kv.apps import report
from stateful_kv.apps.workflow import (
    ReplayOptions,
    TurnRow,
    WorkflowFile,
    load_workflow,
    replay,
    shorten,
    summarize,
)
from stateful_kv.drafts import cost_file
from stateful_kv.engine.config import EngineConfig
from stateful_kv.errors import InvalidRequestError, StatefulKVError

if TYPE_CHECKING:
    from stateful_kv.engine.engine import Engine

app = typer.Typer(
    help="Stateful LLM inference: turns that compute only their delta.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DEFAULT_KV_DTYPE = "auto"
ModelOption = Annotated[
    str, typer.Option(help="smollm2 (the default), a GGUF file, a model folder, or a Hub id.")
]
MaxTokensOption = Annotated[int, typer.Option(min=1, help="Longest reply of a turn, in tokens.")]
ThreadsOption = Annotated[
    int | None,
    typer.Option(min=1, max=1024, help="CPU threads (default: what torch chooses)."),
]
KvTokensOption = Annotated[int, typer.Option(min=64, help="Capacity of the KV pool, in tokens.")]
KvDtypeOption = Annotated[
    str,
    typer.Option(
        metavar="DTYPE",
        help="KV stored as float16 (auto on the CPU), bfloat16 (auto on CUDA), float32 or int8.",
    ),
]
DeviceOption = Annotated[
    str, typer.Option(metavar="DEVICE", help="Where to compute: cpu, cuda or cuda:N.")
]
WorkflowArgument = Annotated[
    str, typer.Argument(metavar="WORKFLOW.json|NAME", help="A file, or a shipped workflow.")
]
IgnoreEosOption = Annotated[
    bool, typer.Option("--ignore-eos", help="Always generate --max-tokens tokens.")
]
NoDraftOption = Annotated[
    bool, typer.Option("--no-draft", help="Generate without drafts (same tokens, other time).")
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", metavar="OUT", help="Write the result as JSON; - prints.")
]


@contextmanager
def _user_errors() -> Iterator[None]:
    """Turn what a user can cause into one line on stderr and exit code 2."""
    try:
        yield
    except (StatefulKVError, OSError, ImportError) as error:
        _fail(" ".join(str(error).split()) or type(error).__name__)
    except KeyboardInterrupt:
        typer.echo("stateful-kv: stopped", err=True)
        raise typer.Exit(130) from None


def _fail(message: str) -> None:
    typer.echo(f"stateful-kv: error: {message}", err=True)
    raise typer.Exit(2)


def _load_engine(
    model: str,
    *,
    kv_tokens: int,
    threads: int | None,
    kv_dtype: str = DEFAULT_KV_DTYPE,
    device: str = "cpu",
) -> Engine:
    import torch

    from stateful_kv.engine.engine import Engine

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        return Engine.load(model, kv_tokens=kv_tokens, kv_dtype=kv_dtype, device=device)
    except ValueError as error:
        # Settings check themselves with ValueError; elsewhere one would be a bug and is not hidden.
        raise InvalidRequestError(str(error)) from error


def _meta(
    file: WorkflowFile,
    model: str,
    options: ReplayOptions,
    kv_dtype: str = DEFAULT_KV_DTYPE,
    device: str = "cpu",
) -> dict[str, Any]:
    return {
        "format": "stateful-kv-run/1",
        "workflow": file.name,
        "source": file.source,
        "model": Path(model).name if Path(model).is_absolute() else model,
        "max_tokens": options.max_tokens,
        "ignore_eos": options.ignore_eos,
        "stateless": options.stateless,
        "draft": options.draft,
        "kv_dtype": EngineConfig(kv_dtype=kv_dtype, device=device).kv_dtype,
        "device": report.device_info(device),
        "argv": report.relative_argv(),
        "build": build_info(),
        "machine": report.machine_info(),
    }


@app.command()
def run(
    workflow: WorkflowArgument,
    model: ModelOption = "smollm2",
    max_tokens: MaxTokensOption = 48,
    ignore_eos: IgnoreEosOption = False,
    stateless: Annotated[
        bool, typer.Option("--stateless", help="Forget everything between turns (the baseline).")
    ] = False,
    no_draft: NoDraftOption = False,
    json_out: JsonOption = None,
    threads: ThreadsOption = None,
    kv_tokens: KvTokensOption = 65536,
    kv_dtype: KvDtypeOption = DEFAULT_KV_DTYPE,
    device: DeviceOption = "cpu",
) -> None:
    """Replay a workflow file and show one row per turn."""
    with _user_errors():
        file = load_workflow(workflow)
        _require_writable(json_out)
        console = Console(stderr=json_out == Path("-"))
        with console.status(f"loading {escape(model)}"):
            engine = _load_engine(
                model, kv_tokens=kv_tokens, threads=threads, kv_dtype=kv_dtype, device=device
            )
        options = ReplayOptions(max_tokens, ignore_eos, stateless, not no_draft)
        try:
            rows = _replay_shown(engine, file, options, console)
            meta = _meta(file, model, options, kv_dtype, device)
        finally:
            engine.close()
        result = {
            "meta": meta,
            "summary": summarize(rows),
            "turns": [row.to_json() for row in rows],
        }
        _write_json(result, json_out, console)


def _require_writable(*outputs: Path | None) -> None:
    """Opens the files before the run, so that a bad path is found before minutes are spent."""
    paths = [path for path in outputs if path is not None and path != Path("-")]
    for index, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a", encoding="utf-8").close()
        if any(path.samefile(other) for other in paths[:index]):
            raise InvalidRequestError(f"expected a file for each output, got {path} twice")


def _write_json(result: dict[str, Any], out: Path | None, console: Console) -> None:
    if out == Path("-"):
        json.dump(result, sys.stdout, indent=1)
        sys.stdout.write("\n")
    elif out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        console.print(f"[dim]wrote {escape(str(out))}")


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


def _replay_shown(
    engine: Engine, file: WorkflowFile, options: ReplayOptions, console: Console
) -> list[TurnRow]:
    mode = "without state" if options.stateless else "with state"
    console.print(f"[bold]{escape(file.name)}[/] {mode}, {file.num_turns} turns", highlight=False)
    console.print(_line([name for name, _ in _COLUMNS]) + "  text", style="dim", highlight=False)

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
        text = shorten(row.text, max(16, room))
        console.print(f"{line}  {text}", markup=False, highlight=False, soft_wrap=True)

    rows = replay(engine, file, options, show)
    _print_summary(summarize(rows), console)
    return rows


def _line(cells: list[str]) -> str:
    widths = [width for _, width in _COLUMNS]
    return " ".join(
        cell.rjust(width) if width > 0 else cell.ljust(-width)
        for cell, width in zip(cells, widths, strict=True)
    )


def _print_summary(summary: dict[str, Any], console: Console) -> None:
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
    console.print("; ".join(parts), style="bold", highlight=False, soft_wrap=True)


@app.command()
def profile(
    workflow: WorkflowArgument,
    model: ModelOption = "smollm2",
    max_tokens: MaxTokensOption = 48,
    turns: Annotated[
        int | None, typer.Option(min=1, help="Only the first turns of the file (default: all).")
    ] = None,
    ignore_eos: IgnoreEosOption = False,
    no_draft: NoDraftOption = False,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a Chrome trace (chrome://tracing, Perfetto)."),
    ] = None,
    json_out: JsonOption = None,
    threads: ThreadsOption = None,
    kv_tokens: KvTokensOption = 65536,
    kv_dtype: KvDtypeOption = DEFAULT_KV_DTYPE,
) -> None:
    """Replay a workflow file and show where each millisecond of its steps goes.

    Each turn runs twice, recorded op by op and not: on two engines that share the weights and have
    a KV pool each.
    """
    from stateful_kv.apps.profile.events import TraceWriter
    from stateful_kv.apps.profile.recorder import profile_workflow
    from stateful_kv.apps.profile.report import summarize_profile, table_lines

    with _user_errors():
        file = load_workflow(workflow)
        if trace == Path("-"):
            raise InvalidRequestError("--trace: expected the path of a file, got -")
        _require_writable(trace, json_out)
        console = Console(stderr=json_out == Path("-"))
        with console.status(f"loading {escape(model)}"):
            engine = _load_engine(model, kv_tokens=kv_tokens, threads=threads, kv_dtype=kv_dtype)
        options = ReplayOptions(max_tokens, ignore_eos, draft=not no_draft)
        try:
            opened = nullcontext() if trace is None else TraceWriter.open(trace, file.name)
            with console.status("profiling") as status, opened as writer:
                found = profile_workflow(
                    engine,
                    file,
                    options,
                    num_turns=turns,
                    trace=writer,
                    on_turn=lambda row: status.update(f"profiling: {row.turn + 1} turns done"),
                )
            meta = {**_meta(file, model, options, kv_dtype), "format": "stateful-kv-profile/1"}
        finally:
            engine.close()
        summary = summarize_profile(found)
        for line in table_lines(summary):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        if trace is not None:
            console.print(f"[dim]wrote {escape(str(trace))}")
        _write_json({"meta": meta, **summary}, json_out, console)
    if not summary["tokens_equal"]:
        typer.echo("stateful-kv: error: the replies differ under the recorder", err=True)
        raise typer.Exit(1)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("demo-report"),
    max_tokens: MaxTokensOption = 48,
    model: ModelOption = "smollm2",
    workflow: Annotated[
        str, typer.Option(metavar="FILE|NAME", help="Another workflow to show.")
    ] = "demo",
    threads: ThreadsOption = None,
    kv_tokens: KvTokensOption = 32768,
    device: DeviceOption = "cpu",
) -> None:
    """Three agents share one engine: the same workflow with state and without, side by side."""
    from stateful_kv.apps.demo import run_demo

    with _user_errors():
        file = load_workflow(workflow)
        output.mkdir(parents=True, exist_ok=True)
        console = Console()
        with console.status(f"loading {escape(model)}"):
            engine = _load_engine(model, kv_tokens=kv_tokens, threads=threads, device=device)
        options = ReplayOptions(max_tokens)
        try:
            result = run_demo(
                engine,
                file,
                output,
                console,
                max_tokens=max_tokens,
                meta=lambda: _meta(file, model, options, device=device),
            )
        finally:
            engine.close()
    if not result["summary"]["tokens_equal"]:
        typer.echo("stateful-kv: error: the replies differ with and without state", err=True)
        raise typer.Exit(1)


@app.command()
def info(
    model: Annotated[
        str | None,
        typer.Option(help="Also load this model dense and show the row counts of its products."),
    ] = None,
    device: DeviceOption = "cpu",
) -> None:
    """Show the version, how the extension was built, the machine, and cost curves stored for it."""
    with _user_errors():
        check_device(device)
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        for section in (build_info(), report.machine_info()):
            for key, value in section.items():
                shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
                table.add_row(key.replace("_", " "), str(shown))
        for setup, curve in cost_file.stored_here():
            name = f"{setup.get('shape')}, {setup.get('kv_dtype')} KV"
            if setup.get("device", setup.get("cpu")) != setup.get("cpu"):
                name += f" on {setup['device']}"
            table.add_row("cost curve", f"{name}: {curve}")
        if model is not None:
            from stateful_kv.models.files.loading import load_model

            loaded = load_model(model, "dense", device=device)
            for shape, counts in loaded.model.row_counts.items():
                table.add_row(f"products with {shape}", f"rows {counts}")
        Console().print(table, highlight=False)


def main() -> None:
    """Entry point of the ``stateful-kv`` script."""
    # Asked to end, it closes files and engines on the way out, as after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    app(prog_name="stateful-kv")


if __name__ == "__main__":
    main()
