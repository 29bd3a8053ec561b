"""Whatever a user gives to a command: a result, or one line and an exit code; never a traceback."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stateful_kv.apps import report
from stateful_kv.apps.cli import commands, loading, process
from stateful_kv.apps.printable import printable, shorten
from stateful_kv.apps.workflow import parse_workflow
from stateful_kv.drafts import cost_file
from stateful_kv.errors import WorkflowError
from tests.cli.fake_engine import FakeEngine, FakeSession

Command = Callable[..., tuple[int, str, str]]
# Colours, a cleared screen, a new title, a line of its own, reversed text, half a character.
HOSTILE = (
    "x\x1b[31m\x1b[2J\x1b]0;t\x07\x9b1m\r\ny\u202ez\u2066\u2028\ud800 [/x] [red] :smile: $\\frac{$"
)
ENGLISH = set(map(chr, range(32, 127))) | {"\n"}


@pytest.fixture
def command(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Command]:
    """Runs one command as the script would; gives exit code, stdout and stderr."""
    before = {number: signal.getsignal(number) for number in (1, 2, 15)}
    hook, handlers = sys.unraisablehook, logging.root.handlers[:]
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        logging.root.handlers[:] = []  # those of the tests
        code = process.run_process([str(argument) for argument in arguments])
        logging.root.handlers[:] = handlers
        out, err = capfd.readouterr()
        return code, out, err

    yield run
    sys.unraisablehook = hook
    for number, handler in before.items():
        signal.signal(number, handler)


def _assert_one_line(result: tuple[int, str, str], code: int = 2) -> str:
    assert result[0] == code, result
    assert "Traceback" not in result[1] + result[2]
    (line,) = result[2].splitlines()
    assert line.startswith("stateful-kv: error: ")
    assert line.isprintable() and len(line) < 1100
    return line


NUMBERS = (
    "0",
    "-1",
    "x",
    "",
    "1e9",
    "0x10",
    "\u0661",
    "9" * 400,
    "9" * 5000,
    "nan",
    "1\x1b[31m",
    "\udcff",
)
PATHS = ("", "\udcff", "no\nsuch", "x" * 5000, "a/" * 3000, "/proc/self/mem", "/", ".", "\x1b[2J")


@pytest.mark.parametrize("value", NUMBERS, ids=lambda value: ascii(value)[:12])
@pytest.mark.parametrize(
    "option", ["--max-tokens", "--threads", "--kv-tokens", "--turns"], ids=lambda option: option
)
def test_numbers(engine: FakeEngine, command: Command, option: str, value: str) -> None:
    names = ("profile",) if option == "--turns" else ("run", "profile", "demo")
    for name in names:
        where = ("--workflow", "six") if name == "demo" else ("six",)
        line = _assert_one_line(command(name, *where, option, value))
        assert option in line
    assert engine.sessions == []


@pytest.mark.parametrize("value", PATHS, ids=lambda value: ascii(value)[:12])
def test_workflows(engine: FakeEngine, command: Command, value: str) -> None:
    for name in (("run",), ("profile",), ("demo", "--workflow")):
        _assert_one_line(command(*name, value))


@pytest.mark.parametrize("value", PATHS, ids=lambda value: ascii(value)[:12])
def test_models(command: Command, value: str) -> None:
    for name in (("run", "six"), ("profile", "six"), ("demo",), ("info",)):
        _assert_one_line(command(*name, "--model", value))


@pytest.mark.parametrize("value", ["", "x" * 5000, "a/" * 3000, "/", ".", "/proc/x"])
def test_outputs(engine: FakeEngine, command: Command, value: str) -> None:
    for name in (("run", "six", "--json"), ("profile", "six", "--trace")):
        _assert_one_line(command(*name, value))
    if value.strip("./"):
        _assert_one_line(command("demo", "--output", value))


@pytest.mark.parametrize("value", ["", "\udcff", "tpu", "cuda:", "cuda:-1", "cuda:" + "9" * 5000])
def test_devices(command: Command, value: str) -> None:
    for name in (("run", "six"), ("demo",), ("info",)):
        _assert_one_line(command(*name, "--device", value))


@pytest.mark.parametrize("value", ["", "\udcff", "int4", "x" * 5000])
def test_kv_dtypes(command: Command, value: str) -> None:
    for name in (("run", "six"), ("profile", "six")):
        _assert_one_line(command(*name, "--kv-dtype", value))


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["\udcff"],
        ["run"],
        ["run", "six", "--x\x1b[2J"],
        ["run", "six", "more"],
        ["--x"],
    ],
    ids=ascii,
)
def test_arguments(command: Command, arguments: list[str]) -> None:
    assert "--help" in _assert_one_line(command(*arguments))


def test_help(command: Command) -> None:
    for arguments in (
        [],
        ["--help"],
        *([name, "-h"] for name in ("run", "profile", "demo", "info")),
    ):
        code, out, err = command(*arguments)
        assert code == (0 if arguments else 2)
        assert "Usage" in out + err


@pytest.mark.parametrize(
    "text",
    [
        '{"format": ' + "9" * 5000 + "}",
        '{"format": "' + "x" * 5000 + '"}',
        '{"format": "\\ud800"}',
        '{"format": "stateful-kv-workflow/1", "workflows": ' + "[" * 200_000,
        "\ufeff{}",
        "",
        "NaN",
        "[1e400]",
    ],
    ids=lambda text: text[:20],
)
def test_files(engine: FakeEngine, command: Command, tmp_path: Path, text: str) -> None:
    path = tmp_path / "w.json"
    path.write_text(text)
    assert "w.json: " in _assert_one_line(command("run", path))


def test_a_file_without_end(engine: FakeEngine, command: Command) -> None:
    assert "more than 64 MiB" in _assert_one_line(command("run", "/dev/zero"))


@pytest.mark.parametrize("field", ["name", "source", "agent", "system", "message"])
def test_half_a_surrogate_pair_in_a_file(workflow_data: dict[str, Any], field: str) -> None:
    first = workflow_data["workflows"][0]
    holder = {
        "agent": first["turns"][0],
        "system": first["agents"][0],
        "message": first["turns"][0],
    }.get(field, workflow_data)
    holder[field] = "a\udc80"
    if field == "agent":
        first["agents"][0]["name"] = "a\udc80"
    with pytest.raises(WorkflowError, match=f"{'name' if field == 'agent' else field}: half a"):
        parse_workflow(workflow_data)


def _hostile(workflow_data: dict[str, Any], path: Path) -> Path:
    """The same workflow with names and messages full of what a terminal obeys."""
    data = json.loads(json.dumps(workflow_data))
    whole = HOSTILE.replace("\ud800", "")
    data["name"] = data["source"] = whole
    for workflow in data["workflows"]:
        for item in [*workflow["agents"], *workflow["turns"]]:
            key = "name" if "name" in item else "agent"
            item[key] = whole + item[key]
            if "message" in item:
                item["message"] += whole
    path.write_text(json.dumps(data))
    return path


@pytest.fixture
def hostile_replies(monkeypatch: pytest.MonkeyPatch) -> None:
    original = FakeSession.turn

    def turn(self: FakeSession, *args: Any, **kwargs: Any) -> SimpleNamespace:
        reply = original(self, *args, **kwargs)
        reply.text = HOSTILE + "é漢🙂"
        return reply

    monkeypatch.setattr(FakeSession, "turn", turn)


@pytest.mark.usefixtures("hostile_replies")
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize("is_terminal", [False, True])
@pytest.mark.parametrize("name", [("run",), ("demo", "--output", "out", "--workflow")])
def test_nothing_shown_commands_the_terminal(
    engine: FakeEngine,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    workflow_data: dict[str, Any],
    tmp_path: Path,
    encoding: str,
    is_terminal: bool,
    name: tuple[str, ...],
) -> None:
    path = _hostile(workflow_data, tmp_path / "w.json")
    if is_terminal:
        monkeypatch.setenv("TTY_COMPATIBLE", "1")
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("NO_COLOR", "1")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding=encoding)
    code, out, err = command(*name, path)
    assert code == 0, err
    assert err == ""
    # What rich itself writes: styles, erased lines, the cursor.
    shown = re.sub(r"\x1b\[(\?25[lh]|2K|\d*A|\d*(;\d+)*m)|\r", "", out) if is_terminal else out
    for char in shown:
        assert char == "\n" or printable(char) == char, ascii(shown)
    assert "\x1b[31m" not in out and "\x1b[2J" not in out
    assert ":smile:" in shown and r"\x1b[31m" in shown
    if encoding == "ascii":
        assert set(shown) <= ENGLISH
    if not is_terminal:
        assert sum(r"\x1b[2J" in line for line in shown.splitlines()) >= 5


@pytest.mark.usefixtures("hostile_replies")
def test_reports_of_hostile_text(
    engine: FakeEngine, command: Command, workflow_data: dict[str, Any], tmp_path: Path
) -> None:
    path = _hostile(workflow_data, tmp_path / "w.json")
    assert command("demo", "--output", "out", "--workflow", path, "--model", "\udcff\x1b")[0] == 0
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert not {"\x1b", "\u202e", "\x07"} & set(page)
    assert r"\x1b[31m" in page and "<red>" not in page
    text = json.loads((tmp_path / "out" / "report.json").read_text())["stateful"][0]["text"]
    assert text == HOSTILE + "é漢🙂"  # data is not changed


def test_control_characters_of_stored_curves(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        cost_file, "stored_here", lambda: iter([({"shape": HOSTILE, "device": "[/b]"}, "curve")])
    )
    code, out, err = command("info")
    assert code == 0, err
    assert "\x1b" not in out and r"\x1b" in out


def test_control_characters_of_messages(
    engine: FakeEngine, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: str, **unused: Any) -> None:
        logging.getLogger("stateful_kv").warning("a file says \x1b[2J")
        raise OSError(HOSTILE)

    monkeypatch.setattr(loading, "load_engine", refuse)
    code, _, err = command("run", "six")
    assert code == 2 and r"says \x1b[2J" in err and r"error: x\x1b[31m" in err
    assert "\x1b" not in err


def test_a_fault_of_the_program_is_one_line_too(
    engine: FakeEngine, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(model: str, **unused: Any) -> None:
        raise KeyError("no such thing")

    monkeypatch.setattr(loading, "load_engine", fail)
    result = command("run", "six")
    assert result[0] == 70
    assert "internal error, please report it: KeyError: 'no such thing'" in result[2]
    assert len(result[2].splitlines()) == 1
    monkeypatch.setenv("STATEFUL_KV_TRACEBACK", "1")
    assert "Traceback" in command("run", "six")[2]


@pytest.mark.parametrize("name", ["COLUMNS", "LINES", "TERMINAL_WIDTH"])
@pytest.mark.parametrize("value", ["0", "-5", "x", "²", "9" * 5000, "1000000000", "1"])
def test_widths_of_the_environment(
    engine: FakeEngine, command: Command, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    for arguments in (["run", "six"], ["info"], ["--help"]):
        assert command(*arguments)[0] == 0


def test_without_matplotlib(
    engine: FakeEngine, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    line = _assert_one_line(command("demo"))
    assert "matplotlib" in line and 'pip install "stateful-kv[cli]"' in line
    assert engine.sessions == [] and not Path("demo-report").exists()
    assert command("run", "six")[0] == 0


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_typer_or_rich(
    command: Command, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] == package:
            monkeypatch.setitem(sys.modules, name, None)
    for name in [commands.__name__, "stateful_kv.apps.terminal", "stateful_kv.apps.cli.options"]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr("stateful_kv.apps.cli.commands")
    line = _assert_one_line(command("--help"))
    assert package in line and 'pip install "stateful-kv[cli]"' in line


def test_a_removed_working_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert report.relative_argv(["/usr/bin/x", "/a/b.json"]) == ["x", "b.json"]
    os.chdir("/")


def test_shorten() -> None:
    assert shorten("a\n b\tc", 10) == "a b c"
    assert shorten("abcdefghij", 8) == "abcde..."
    assert shorten("\x1b" * 100, 11) == r"\x1b\x1b..."
    assert shorten("x" * 10**7, 20) == "x" * 17 + "..."
    assert printable("👩‍💻 é\n", keep="\n") == "👩‍💻 é\n"
