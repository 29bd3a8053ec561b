"""What an import of the package brings with it, and needs: each in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys

import pytest

import stateful_kv
from stateful_kv._extras import EXTRAS

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


def run_without(packages: set[str], code: str) -> subprocess.CompletedProcess[str]:
    """Runs code where these packages are not installed, as far as an import can tell."""
    blocker = (
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {packages!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
    )
    command = [sys.executable, "-c", blocker + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_ops_need_torch_and_numpy_only() -> None:
    code = """
import torch, stateful_kv
from stateful_kv import *
from stateful_kv import Engine, Session, ops
print(stateful_kv.__version__, stateful_kv.build_info()["version"])
print(ops.silu_mul(torch.ones(1, 8)).shape)
"""
    run = run_without(FILE_READERS | COMMAND_LINE, code)
    assert run.returncode == 0, run.stderr
    version = stateful_kv.__version__
    assert run.stdout.split("\n")[:2] == [f"{version} {version}", "torch.Size([1, 4])"]


@pytest.mark.parametrize("package", EXTRAS["engine"])
@pytest.mark.parametrize(
    "code",
    [
        "import stateful_kv; stateful_kv.Engine.load('smollm2')",
        "from stateful_kv.models.files.loading import load_model",
    ],
)
def test_without_the_engine_the_error_says_what_to_install(package: str, code: str) -> None:
    run = run_without({package}, code)
    expected = f'ImportError: the engine needs {package}, run: pip install "stateful-kv[engine]"'
    assert run.stderr.strip().splitlines()[-1] == expected


def test_a_module_that_is_no_extra_keeps_its_error() -> None:
    run = run_without({"mmap"}, "from stateful_kv.models.files.loading import load_model")
    assert run.stderr.strip().splitlines()[-1] == "ModuleNotFoundError: No module named 'mmap'"
    code = """
from stateful_kv._extras import needs
with needs("engine", "this"):
    import no_such_module
"""
    assert (
        "ModuleNotFoundError: No module named 'no_such_module'" in run_without(set(), code).stderr
    )


def test_all_public_names_are_listed_and_there() -> None:
    assert set(stateful_kv.__all__) <= set(dir(stateful_kv))
    for name in stateful_kv.__all__:
        assert getattr(stateful_kv, name) is not None
    with pytest.raises(AttributeError, match="'stateful_kv' has no attribute 'Motor'"):
        _ = stateful_kv.Motor
