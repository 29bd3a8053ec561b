"""The commands: output, JSON, reports, and one clear line for each mistake."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from stateful_kv.apps import cli, report
from stateful_kv.apps.cli import commands, loading
from stateful_kv.drafts import cost_file
from stateful_kv.drafts.costs import CostCurve
from stateful_kv.engine.config import EngineConfig
from stateful_kv.engine.engine import Engine
from stateful_kv.errors import ModelNotFoundError
from stateful_kv.system.machine import cpu_name
from tests.cli.test_workflow import ROW_FIELDS
from tests.e2e.tiny import ByteTokenizer, CountingUp, DenseForm, tiny_llama


@pytest.fixture
def workflow_path(tmp_path, workflow_data):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(workflow_data))
    return path


def _assert_one_error_line(result, *parts):
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("stateful-kv: error: ")
    for part in parts:
        assert part in lines[0]
    assert "Traceback" not in result.output


def test_run_writes_rows(engine, invoke, workflow_path, tmp_path):
    out = tmp_path / "new folder" / "out.json"
    result = invoke("run", workflow_path, "--json", out)
    assert result.exit_code == 0, result.output
    data = json.loads(out.read_text())
    assert [list(row) for row in data["turns"]] == [ROW_FIELDS] * 5
    assert data["meta"]["stateless"] is False
    assert data["meta"]["max_tokens"] == 48
    assert str(tmp_path) not in json.dumps(data["meta"])
    assert "median later turn" in result.stdout
    assert engine.closed


def test_run_options_reach_the_replay(engine, invoke, workflow_path, tmp_path):
    out = tmp_path / "out.json"
    result = invoke(
        "run", workflow_path, "--stateless", "--no-draft", "--max-tokens", 5, "--json", out
    )
    assert result.exit_code == 0, result.output
    data = json.loads(out.read_text())
    assert data["meta"]["stateless"] and not data["meta"]["draft"]
    assert all(row["reused_tokens"] == row["drafted_tokens"] == 0 for row in data["turns"])
    assert all(row["output_tokens"] == 5 for row in data["turns"])


def test_run_json_to_stdout_is_only_json(engine, invoke, workflow_path):
    result = invoke("run", workflow_path, "--json", "-")
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["turns"]) == 5
    assert "median later turn" in result.stderr


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{", ("not valid JSON", "line 1 column 2")),
        ("[" * 100_000, ("not valid JSON",)),
        ('{"format": "other/1"}', ("format", "'other/1'")),
        ("[]", ("expected an object",)),
    ],
)
def test_bad_file(engine, invoke, tmp_path, text, parts):
    path = tmp_path / "bad.json"
    path.write_text(text)
    _assert_one_error_line(invoke("run", path), "bad.json", *parts)


def test_unknown_agent_and_empty_message(engine, invoke, tmp_path, workflow_data):
    path = tmp_path / "w.json"
    workflow_data["workflows"][0]["turns"][0]["agent"] = "nobody"
    path.write_text(json.dumps(workflow_data))
    _assert_one_error_line(invoke("run", path), "unknown agent 'nobody'")
    workflow_data["workflows"][0]["turns"][0] = {"agent": "a", "message": ""}
    path.write_text(json.dumps(workflow_data))
    _assert_one_error_line(invoke("run", path), "turns[0].message: must not be empty")


def test_names_are_text_and_no_markup(engine, invoke, workflow_path, workflow_data):
    workflow_data["name"] = "n [/x] [red]z"
    workflow_path.write_text(json.dumps(workflow_data))
    result = invoke("run", workflow_path)
    assert result.exit_code == 0
    assert "n [/x] [red]z" in result.stdout


def test_missing_file_names_the_shipped_ones(engine, invoke):
    result = invoke("run", "missing.json")
    _assert_one_error_line(result, "missing.json", "no such workflow file", "coding35")


def test_folder_and_binary_file(engine, invoke, tmp_path):
    _assert_one_error_line(invoke("run", tmp_path), "cannot be read")
    path = tmp_path / "binary.json"
    path.write_bytes(b"\xff\xfe\x00")
    _assert_one_error_line(invoke("run", path), "not UTF-8 text")


def test_unwritable_output_is_found_before_the_run(engine, invoke, workflow_path, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    _assert_one_error_line(invoke("run", workflow_path, "--json", blocker / "out.json"))
    _assert_one_error_line(invoke("demo", "--output", blocker))
    assert engine.sessions == []


def test_a_bad_setting_is_one_line(invoke, monkeypatch, workflow_path):
    def load(model, **config):
        return Engine(CountingUp(), ByteTokenizer(), EngineConfig(**config))

    monkeypatch.setattr(Engine, "load", load)
    size = ("--kv-tokens", 10**13)
    num_bytes = f"({10**13 * 2 * 2 * 2} bytes)"  # keys and values of 2 halves of 16 bits
    _assert_one_error_line(invoke("run", workflow_path, *size), "kv_tokens", num_bytes)

    def refuse(model, **config):
        return EngineConfig(page_size=0)

    monkeypatch.setattr(Engine, "load", refuse)
    for command in (("run", workflow_path), ("demo", "--workflow", workflow_path)):
        _assert_one_error_line(invoke(*command), "page_size: expected an integer >= 1, got 0")


@pytest.mark.parametrize("command", ["run", "profile"])
def test_kv_dtype_reaches_the_engine(invoke, monkeypatch, workflow_path, command):
    asked = []

    def load(model, **config):
        asked.append(EngineConfig(**config).kv_dtype)
        raise ModelNotFoundError("seen")

    monkeypatch.setattr(Engine, "load", load)
    for dtype in ("float16", "float32", "bfloat16", "int8"):
        _assert_one_error_line(invoke(command, workflow_path, "--kv-dtype", dtype), "seen")
    _assert_one_error_line(invoke(command, workflow_path), "seen")
    assert asked == ["float16", "float32", "bfloat16", "int8", "float16"]
    result = invoke(command, workflow_path, "--kv-dtype", "int4")
    _assert_one_error_line(result, "kv_dtype: expected", "'int8'", "got 'int4'")


@pytest.mark.parametrize("command", [("run",), ("demo", "--workflow")])
def test_device_reaches_the_engine(invoke, monkeypatch, workflow_path, command):
    asked = []

    def load(model, **config):
        asked.append(EngineConfig(**config).device)
        raise ModelNotFoundError("seen")

    monkeypatch.setattr(Engine, "load", load)
    for device in ("cpu", "cuda", "cuda:3"):
        _assert_one_error_line(invoke(*command, workflow_path, "--device", device), "seen")
    assert asked == ["cpu", "cuda", "cuda:3"]
    result = invoke(*command, workflow_path, "--device", "gpu")
    _assert_one_error_line(result, "device: expected 'cpu', 'cuda' or 'cuda:N', got 'gpu'")


def test_a_missing_device_is_one_line(invoke, workflow_path):
    for arguments in (("run", workflow_path), ("info",), ("info", "--model", "smollm2")):
        result = invoke(*arguments, "--device", "cuda:77")
        _assert_one_error_line(result, "device cuda:77: ")


def test_info_shows_the_row_counts_of_a_model(invoke, monkeypatch):
    asked = []

    def load(name, weight_format, *, device):
        asked.append((name, weight_format, device))
        return SimpleNamespace(model=tiny_llama(form=DenseForm()))

    monkeypatch.setattr("stateful_kv.models.files.loading.load_model", load)
    monkeypatch.setenv("COLUMNS", "200")
    result = invoke("info", "--model", "some.gguf")
    assert result.exit_code == 0, result.output
    assert asked == [("some.gguf", "dense", "cpu")]
    for shape in ("256x64", "64x128", "192x64", "64x96", "272x64"):
        assert re.search(rf"products with {shape} +rows (\d+, )*64(, \d+)* as 64", result.stdout)


def test_device_is_written_down(engine, invoke, workflow_path, tmp_path):
    out = tmp_path / "out.json"
    assert invoke("run", workflow_path, "--json", out).exit_code == 0
    meta = json.loads(out.read_text())["meta"]
    assert meta["device"] == {"name": "cpu", "model": cpu_name()}
    assert meta["kv_dtype"] == "float16"


def test_kv_dtype_is_written_down(engine, invoke, workflow_path, tmp_path):
    out = tmp_path / "out.json"
    assert invoke("run", workflow_path, "--kv-dtype", "int8", "--json", out).exit_code == 0
    assert json.loads(out.read_text())["meta"]["kv_dtype"] == "int8"


def test_unknown_model(invoke, monkeypatch, workflow_path):
    def refuse(model, **unused):
        raise ModelNotFoundError(f"unknown model\n {model!r}")

    monkeypatch.setattr(loading, "load_engine", refuse)
    result = invoke("run", workflow_path, "--model", "nothing")
    _assert_one_error_line(result, "unknown model 'nothing'")


def test_bad_option_is_a_usage_error(invoke):
    assert invoke("run", "six", "--max-tokens", "0").exit_code == 2
    assert invoke("nothing").exit_code == 2


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.sources = []

    def handle_starttag(self, tag, attrs):
        self.sources += [value for key, value in attrs if key in ("src", "href")]


def test_demo_report(engine, invoke, workflow_path, tmp_path):
    out = tmp_path / "report"
    result = invoke("demo", "--workflow", workflow_path, "--output", out)
    assert result.exit_code == 0, result.output
    assert "without state" in result.stdout and "every reply" in result.stdout
    data = json.loads((out / "report.json").read_text())
    assert data["summary"]["tokens_equal"] is True
    assert len(data["stateful"]) == len(data["stateless"]) == 5
    assert (out / "latency.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "index.html").read_text()
    parser = _Page()
    parser.feed(page)
    assert len(parser.sources) == 1 and parser.sources[0].startswith("data:image/png;base64,")
    assert "&amp; &lt;message 0&gt;" in page  # replies are escaped
    assert not re.search(r"https?://", page)


def test_demo_fails_when_replies_differ(engine, invoke, workflow_path, tmp_path):
    engine.break_equality = True
    result = invoke("demo", "--workflow", workflow_path, "--output", tmp_path / "report")
    # The first turns reuse nothing in both runs; the later ones differ.
    assert result.exit_code == 1
    assert "differ" in result.stderr
    assert (
        json.loads((tmp_path / "report" / "report.json").read_text())["summary"]["num_equal_turns"]
        < 5
    )


def test_relative_argv():
    argv = ["/usr/bin/stateful-kv", "run", "/etc/some/w.json", "--json=/etc/out.json", "-x"]
    expected = ["stateful-kv", "run", "w.json", "--json=out.json", "-x"]
    assert report.relative_argv(argv) == expected


def test_info_shows_the_curves_of_this_machine(invoke, tmp_path, monkeypatch):
    monkeypatch.setenv(cost_file.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    assert "cost curve" not in invoke("info").stdout
    curve = CostCurve((1, 4), (0.0081, 0.0105), 2e-6, 5e-7)
    key = {**cost_file.machine_key(), "shape": "llama 30x576", "kv_dtype": "float16"}
    cost_file.store(key, curve)
    cost_file.store({**key, "shape": "other machine", "cpu": "another"}, curve)
    cost_file.store({**key, "shape": "at home", "device": str(key["cpu"])}, curve)
    cost_file.store({**key, "kv_dtype": "bfloat16", "device": "a GPU"}, curve)
    (tmp_path / "costs-damaged.json").write_text("{")
    result = invoke("info")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("cost curve") == 3
    assert "at home, float16 KV: ms" in result.stdout
    assert "llama 30x576, bfloat16 KV on a GPU: ms" in result.stdout
    assert "llama 30x576, float16 KV: ms by rows 1: 8.1, 4: 10.5;" in result.stdout
    assert "2.5 with 1 row, 4 with 4" in result.stdout


def test_a_request_to_end_leaves_in_order(monkeypatch):
    left = []

    def app(arguments, prog_name, standalone_mode):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            left.append(prog_name)

    before = {number: signal.getsignal(number) for number in (1, 2, 15)}
    hook = sys.unraisablehook
    # Whatever happens, the process of the tests is not what ends.
    signal.signal(signal.SIGTERM, lambda *_: None)
    monkeypatch.setattr(commands, "app", app)
    try:
        with pytest.raises(SystemExit) as caught:
            cli.main()
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)
    assert caught.value.code == 143 and left == ["stateful-kv"]
