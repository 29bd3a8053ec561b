"""What an import of the package brings with it: each in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys

import pytest

FILE_READERS = {"gguf", "safetensors", "tokenizers", "jinja2", "huggingface_hub", "transformers"}
COMMAND_LINE = {"typer", "rich", "matplotlib"}
BRINGS_NONE = {
    "stateful_kv": FILE_READERS | COMMAND_LINE,
    "stateful_kv.ops": FILE_READERS | COMMAND_LINE,
    "stateful_kv.state": FILE_READERS | COMMAND_LINE,
    "stateful_kv.adapters.hf": COMMAND_LINE,
    "stateful_kv.engine.engine": FILE_READERS | COMMAND_LINE,
    "stateful_kv.models.llama": FILE_READERS | COMMAND_LINE,
    "stateful_kv.text.messages": FILE_READERS | COMMAND_LINE,
    "stateful_kv.models.files.loading": COMMAND_LINE | {"huggingface_hub", "transformers"},
}


@pytest.mark.parametrize("module", BRINGS_NONE)
def test_imports_bring_only_what_they_need(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert set(run.stdout.split()) & BRINGS_NONE[module] == set()
