"""The commands of the command line, as `typer` reads them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from stateful_kv._native import build_info, check_device
from stateful_kv.apps import report
from stateful_kv.apps.cli import loading
from stateful_kv.apps.cli.faults import DIFFERENT, complain, report_fault
from stateful_kv.apps.cli.interrupts import STOPPED, say_stopped
from stateful_kv.apps.cli.options import (
    DEFAULT_KV_DTYPE,
    MAX_INT,
    DeviceOption,
    IgnoreEosOption,
    JsonOption,
    KvDtypeOption,
    KvTokensOption,
    MaxTokensOption,
    ModelOption,
    NoDraftOption,
    ThreadsOption,
    WorkflowArgument,
)
from stateful_kv.apps.cli.tables import replay_shown
from stateful_kv.apps.output import OutputFile, output_files
from stateful_kv.apps.printable import printable
from stateful_kv.apps.terminal import SafeConsole
from stateful_kv.apps.workflow import ReplayOptions, load_workflow, summarize
from stateful_kv.drafts import cost_file
from stateful_kv.errors import InvalidRequestError

app = typer.Typer(
    help="Stateful LLM inference: turns that compute only their delta.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_STDOUT = Path("-")


@contextmanager
def _user_errors() -> Iterator[None]:
    """Turns whatever ends a command into one line on stderr and an exit code."""
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        say_stopped()
        raise typer.Exit(STOPPED) from None
    except Exception as error:
        raise typer.Exit(report_fault(error)) from None


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
        options = ReplayOptions(max_tokens, ignore_eos, stateless, not no_draft)
        console = SafeConsole(stderr=json_out == _STDOUT)
        inputs = loading.inputs_of(workflow, model)
        with output_files(_path(json_out), inputs=inputs) as (out,):
            with console.waiting(f"loading {model}"):
                engine = loading.load_engine(
                    model, kv_tokens=kv_tokens, threads=threads, kv_dtype=kv_dtype, device=device
                )
            try:
                rows = replay_shown(engine, file, options, console)
                meta = loading.meta_data(file, model, options, kv_dtype, device)
            finally:
                engine.close()
            result = {
                "meta": meta,
                "summary": summarize(rows),
                "turns": [row.to_json() for row in rows],
            }
            _write_json(result, json_out, out, console)


def _path(option: Path | None) -> Path | None:
    return None if option == _STDOUT else option


def _write_json(
    result: dict[str, Any], option: Path | None, out: OutputFile | None, console: SafeConsole
) -> None:
    text = json.dumps(result, indent=1) + "\n"
    if option == _STDOUT:
        sys.stdout.write(text)
        sys.stdout.flush()
    elif out is not None:
        out.file.write(text)
        out.commit()
        console.say(f"wrote {option}", style="dim")


@app.command()
def profile(
    workflow: WorkflowArgument,
    model: ModelOption = "smollm2",
    max_tokens: MaxTokensOption = 48,
    turns: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_INT, help="Only the first turns of the file (default: all)."),
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
    with _user_errors():
        from stateful_kv.apps.profile.events import TraceWriter
        from stateful_kv.apps.profile.recorder import profile_workflow
        from stateful_kv.apps.profile.report import summarize_profile, table_lines

        file = load_workflow(workflow)
        if trace == _STDOUT:
            raise InvalidRequestError("--trace: expected the path of a file, got -")
        options = ReplayOptions(max_tokens, ignore_eos, draft=not no_draft)
        console = SafeConsole(stderr=json_out == _STDOUT)
        inputs = loading.inputs_of(workflow, model)
        with output_files(trace, _path(json_out), inputs=inputs) as (trace_file, out):
            with console.waiting(f"loading {model}"):
                engine = loading.load_engine(
                    model, kv_tokens=kv_tokens, threads=threads, kv_dtype=kv_dtype
                )
            try:
                opened = (
                    nullcontext() if trace_file is None else TraceWriter.into(trace_file, file.name)
                )
                with console.waiting("profiling") as status, opened as writer:
                    found = profile_workflow(
                        engine,
                        file,
                        options,
                        num_turns=turns,
                        trace=writer,
                        on_turn=lambda row: status.update(f"profiling: {row.turn + 1} turns done"),
                    )
                meta = loading.meta_data(file, model, options, kv_dtype)
            finally:
                engine.close()
            summary = summarize_profile(found)
            for line in table_lines(summary):
                console.say(line)
            if trace is not None:
                console.say(f"wrote {trace}", style="dim")
            result = {"meta": {**meta, "format": "stateful-kv-profile/1"}, **summary}
            _write_json(result, json_out, out, console)
        if not summary["tokens_equal"]:
            complain("error: the replies differ under the recorder")
            raise typer.Exit(DIFFERENT)


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
    with _user_errors():
        from stateful_kv.apps.demo import REPORT_FILES, run_demo

        report.require_matplotlib()
        file = load_workflow(workflow)
        options = ReplayOptions(max_tokens)
        console = SafeConsole()
        paths = [output / name for name in REPORT_FILES]
        with output_files(*paths, inputs=loading.inputs_of(workflow, model)) as files:
            with console.waiting(f"loading {model}"):
                engine = loading.load_engine(
                    model, kv_tokens=kv_tokens, threads=threads, device=device
                )
            try:
                result = run_demo(
                    engine,
                    file,
                    [made for made in files if made is not None],
                    console,
                    max_tokens=max_tokens,
                    meta=lambda: loading.meta_data(file, model, options, device=device),
                )
            finally:
                engine.close()
        if not result["summary"]["tokens_equal"]:
            complain("error: the replies differ with and without state")
            raise typer.Exit(DIFFERENT)


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

        def add(name: str, value: object) -> None:
            table.add_row(Text(printable(name)), Text(printable(str(value))))

        for section in (build_info(), report.machine_info()):
            for key, value in section.items():
                shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
                add(key.replace("_", " "), shown)
        for setup, curve in cost_file.stored_here():
            name = f"{setup.get('shape')}, {setup.get('kv_dtype')} KV"
            if setup.get("device", setup.get("cpu")) != setup.get("cpu"):
                name += f" on {setup['device']}"
            add("cost curve", f"{name}: {curve}")
        if model is not None:
            from stateful_kv.models.files.loading import load_model

            loaded = load_model(model, "dense", device=device)
            for shape, counts in loaded.model.row_counts.items():
                add(f"products with {shape}", f"rows {counts}")
        SafeConsole().print(table, highlight=False)
