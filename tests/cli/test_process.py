"""The command line as a process: signals, pipes, terminals, and a package that cannot be loaded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
# The real script with a fake engine behind it; `{body}` may change the engine before it runs.
FAKE = """
import sys, time
from stateful_kv.apps.cli import loading, process
from tests.cli.fake_engine import FakeEngine, FakeSession
engine = FakeEngine()
loading.load_engine = lambda model, **unused: engine
{body}
sys.exit(process.run_process(sys.argv[1:]))
"""
SLOW_TURNS = """
turn = FakeSession.turn
def slow(self, *args, **kwargs):
    print('turn begins', file=sys.stderr, flush=True)
    while True:
        time.sleep(0.05)
FakeSession.turn = slow
"""
SLOW_CLOSE = """
def close(self):
    print('closing', file=sys.stderr, flush=True)
    while True:
        time.sleep(0.05)
FakeEngine.close = close
"""
SWALLOWS = """
class Loose:
    def __del__(self):
        print('turn begins', file=sys.stderr, flush=True)
        while True:
            time.sleep(0.05)
def swallow(self, *args, **kwargs):
    Loose()
    print('NEVER', flush=True)
FakeSession.turn = swallow
"""


def _environment(**extra: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT / "python"), str(ROOT)])
    return {**os.environ, "PYTHONPATH": path, **extra}


def _start(body: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", FAKE.format(body=body), *arguments],
        env=_environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def _wait_for(child: subprocess.Popen[str], text: str) -> None:
    assert child.stderr is not None
    for line in child.stderr:
        if text in line:
            return
    pytest.fail(f"{text!r} was not written")


def _run(*command: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        env=_environment(**extra),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(autouse=True)
def children_hear_ctrl_c() -> Iterator[None]:
    """A shell starts background jobs with Ctrl-C ignored, which they and their children inherit."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def workflow_path(tmp_path: Path, workflow_data: dict[str, Any]) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(workflow_data))
    return path


@pytest.mark.parametrize("name", ["run", "demo"])
def test_ctrl_c(workflow_path: Path, tmp_path: Path, name: str) -> None:
    where = ("--workflow", str(workflow_path), "--output") if name == "demo" else ("--json",)
    first = () if name == "demo" else (str(workflow_path),)
    child = _start(SLOW_TURNS, name, *first, *where, str(tmp_path / "out" / "x"))
    _wait_for(child, "turn begins")
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert err == "stateful-kv: stopped\n"
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_ctrl_c_twice(workflow_path: Path, tmp_path: Path) -> None:
    body = SLOW_TURNS + SLOW_CLOSE
    child = _start(body, "run", str(workflow_path), "--json", str(tmp_path / "out" / "x"))
    _wait_for(child, "turn begins")
    child.send_signal(signal.SIGINT)
    _wait_for(child, "closing")
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert err == "stateful-kv: stopped\n"
    assert list((tmp_path / "out").iterdir()) == []


def test_ctrl_c_many_times_in_a_row(workflow_path: Path) -> None:
    for pause in (0.0, 0.02):
        child = _start(SLOW_TURNS, "run", str(workflow_path))
        _wait_for(child, "turn begins")
        for _ in range(5):
            child.send_signal(signal.SIGINT)
            time.sleep(pause)
        _, err = child.communicate(timeout=60)
        assert child.returncode == 130
        assert err == "stateful-kv: stopped\n"


def test_ctrl_c_that_a_destructor_swallows(workflow_path: Path) -> None:
    child = _start(SWALLOWS, "run", str(workflow_path))
    _wait_for(child, "turn begins")
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert err == "stateful-kv: stopped\n" and "NEVER" not in out


def test_ctrl_c_while_the_package_loads() -> None:
    code = (
        "import sys, types, time, threading, os, signal\n"
        "import stateful_kv_command\n"
        "class Slow:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'stateful_kv':\n"
        "            print('loading', file=sys.stderr, flush=True)\n"
        "            time.sleep(60)\n"
        "sys.meta_path.insert(0, Slow())\n"
        "stateful_kv_command.main()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], env=_environment(), text=True, stderr=subprocess.PIPE
    )
    _wait_for(child, "loading")
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130 and err == "stateful-kv: stopped\n"


def test_a_request_to_end(workflow_path: Path, tmp_path: Path) -> None:
    number = signal.SIGTERM
    child = _start(SLOW_TURNS, "run", str(workflow_path), "--json", str(tmp_path / "out" / "x"))
    _wait_for(child, "turn begins")
    child.send_signal(number)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 128 + number and err == ""
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("arguments", [["run"], ["run", "--json", "-"], ["--help"]])
def test_a_reader_that_leaves(workflow_path: Path, arguments: list[str]) -> None:
    options = (
        [*arguments[:1], str(workflow_path), *arguments[1:]] if arguments[0] == "run" else arguments
    )
    read, write = os.pipe()
    os.close(read)
    child = subprocess.run(
        [sys.executable, "-c", FAKE.format(body=""), *options],
        env=_environment(),
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    os.close(write)
    # With `--json -` the rows are on the standard error.
    assert [line for line in child.stderr.splitlines() if "stateful-kv" in line] == []
    assert "Traceback" not in child.stderr and "Exception ignored" not in child.stderr
    assert child.returncode == (1 if arguments == ["--help"] else 141)


@pytest.mark.parametrize("stream", ["1", "2"])
def test_closed_streams(workflow_path: Path, tmp_path: Path, stream: str) -> None:
    closed = " ".join(f"{number}>&-" for number in stream.split(" and "))
    out = tmp_path / "out.json"
    shell = f'"{sys.executable}" -c "$CODE" run "$FILE" --json "$OUT" {closed}'
    child = subprocess.run(
        ["bash", "-c", shell],
        env=_environment(CODE=FAKE.format(body=""), FILE=str(workflow_path), OUT=str(out)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if stream == "2":
        assert child.returncode == 0 and json.loads(out.read_text())
    else:
        assert child.returncode == 2 and not out.exists()
        assert len(child.stderr.splitlines()) <= 1 and "Traceback" not in child.stderr


def test_a_full_device(workflow_path: Path) -> None:
    for options in ([], ["--json", "-"]):
        with open("/dev/full", "w") as full:
            child = subprocess.run(
                [sys.executable, "-c", FAKE.format(body=""), "run", str(workflow_path), *options],
                env=_environment(),
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                timeout=120,
                check=False,
            )
        assert child.returncode == 2
        assert "Traceback" not in child.stderr and "Exception ignored" not in child.stderr
        assert child.stderr.splitlines()[-1].startswith("stateful-kv: error: [Errno 28] No space")


ASCII_TERMINALS = (
    {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
)


@pytest.mark.parametrize("setting", ASCII_TERMINALS, ids=lambda setting: ",".join(setting))
def test_an_ascii_terminal(
    tmp_path: Path, workflow_data: dict[str, Any], setting: dict[str, str]
) -> None:
    path = tmp_path / "tiny.json"
    workflow_data["name"] = "日本 é"
    workflow_data["workflows"][0]["turns"][0]["message"] = "é漢🙂" * 9
    path.write_text(json.dumps(workflow_data))
    options = ["--workflow", str(path), "--output", str(tmp_path / "out")]
    commands = [
        ["demo", *options],
        ["run", str(path)],
        ["info"],
        ["--help"],
        ["run", "\u00e9\udcff"],
    ]
    body = (
        "import os\n"
        f"commands = {commands!a}\n"
        "codes = [process.run_process(arguments) for arguments in commands]\n"
        "os.environ.update(FORCE_COLOR='1', TTY_COMPATIBLE='1')\n"
        "codes += [process.run_process(arguments) for arguments in commands]\n"
        "sys.exit(0 if codes == [0, 0, 0, 0, 2] * 2 else f'exit codes {codes}')\n"
    )
    child = _run("-c", FAKE.format(body=body), **setting)
    assert child.returncode == 0, child.stderr
    assert "Traceback" not in child.stderr + child.stdout
    assert (child.stdout + child.stderr).isascii()


def test_a_package_that_cannot_be_loaded() -> None:
    child = _run("-m", "stateful_kv_command", "--help", STATEFUL_KV_CPU_ISA="sse9\x1b[2J")
    assert child.returncode == 2
    (line,) = child.stderr.splitlines()
    assert line.startswith("stateful-kv: error: STATEFUL_KV_CPU_ISA: expected one of")
    assert "sse9" in line and line.isprintable()


def test_the_package_can_be_run() -> None:
    child = _run("-m", "stateful_kv.apps.cli", "info")
    assert child.returncode == 0 and "cpu isa" in child.stdout


def test_what_help_loads() -> None:
    """Nothing that only a run needs, and without typer not even typer."""
    code = (
        "import sys\n"
        "from stateful_kv.apps.cli import main, process\n"
        "print([name for name in ('typer', 'rich', 'matplotlib') if name in sys.modules])\n"
        "process.run_process(['run', '--help'])\n"
        "heavy = ('tokenizers', 'gguf', 'jinja2', 'safetensors', 'matplotlib', 'transformers',\n"
        "         'torch.profiler', 'stateful_kv.engine.engine', 'stateful_kv.models.llama')\n"
        "print([name for name in heavy if name in sys.modules and name not in before])\n"
    )
    child = _run("-c", "import sys, torch\nbefore = set(sys.modules)\n" + code)
    assert child.returncode == 0, child.stderr
    lines = child.stdout.splitlines()
    assert lines[0] == lines[-1] == "[]"
