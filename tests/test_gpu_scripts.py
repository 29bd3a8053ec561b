"""The Python programs that scripts/gpu_check.sh runs, on the CPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from stateful_kv import ops

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts" / "gpu"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *args])
    return int(load(name).main())


@pytest.mark.parametrize("rows", [1, 8, 64, 256])
def test_a_product_that_depends_on_its_rows_is_seen(rows: int) -> None:
    bits = load("gpu_bits")
    weight = torch.randn(48, 32)

    def exact(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (x[:, None, :] * w).sum(dim=2)

    def not_exact(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = exact(x, w)
        if len(x) == rows:
            y[-1, 3] += 1.0
        return y

    assert bits.equal_share(weight, rows, 0, exact) == 1.0
    # 64 rows are the reference itself.
    assert (bits.equal_share(weight, rows, 0, not_exact) < 1.0) == (rows != 64)


def test_row_counts_are_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bits.json"
    assert run("gpu_bits", monkeypatch, "--device", "cpu", "--smoke", "--out", str(out)) == 0
    document = json.loads(out.read_text())
    for shape in document["shapes"]:
        assert 64 in shape["equal_rows"] and shape["least_equal_share"]["64"] == 1.0
    assert capsys.readouterr().out.count("equal for") == len(document["shapes"]) == 2


def test_every_op_runs_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("gpu_ops_once", monkeypatch, "--device", "cpu") == 0
    text = capsys.readouterr().out
    for op in ("append_kv", "rms_norm", "verify_draft", "attention of 67 rows"):
        assert f"{op}" in text
    real = ops.silu_mul
    monkeypatch.setattr(ops, "silu_mul", lambda gate_up: real(gate_up) * float("nan"))
    assert run("gpu_ops_once", monkeypatch, "--device", "cpu") == 1
    assert "silu_mul: gave NaN" in capsys.readouterr().out
