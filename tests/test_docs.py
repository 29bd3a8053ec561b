"""The pages of docs/: the code on them runs, and the site has all public names."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import stateful_kv
from stateful_kv import ops, state

ROOT = Path(__file__).resolve().parent.parent


def python_blocks(page: str) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))


def test_the_page_on_the_ops_runs(tmp_path: Path) -> None:
    code = python_blocks((ROOT / "docs" / "use-the-ops.md").read_text())
    assert code.count("ops.paged_attention(") == 1 and "torch.compile(fullgraph=True)" in code
    script = tmp_path / "page.py"  # a file, because torch.compile reads the source
    script.write_text(code)
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_site_has_every_public_name(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    shown = {
        name
        for page in (tmp_path / "api").rglob("index.html")
        for name in re.findall(r'<h\d id="([\w.]+)" class="doc', page.read_text())
    }
    assert {f"stateful_kv.{name}" for name in stateful_kv.__all__} - shown == {
        "stateful_kv.__version__",
        "stateful_kv.ops",  # pages of their own
        "stateful_kv.state",
    }
    assert {f"stateful_kv.ops.{name}" for name in ops.__all__} - shown == {
        "stateful_kv.ops.LAYER_TENSORS"  # a table of names
    }
    assert {f"stateful_kv.state.{name}" for name in state.__all__} <= shown
