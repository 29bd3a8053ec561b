"""What the commands load and write down: engines, the files a run reads, the head of a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stateful_kv._native import build_info
from stateful_kv.apps import report
from stateful_kv.apps.cli.options import DEFAULT_KV_DTYPE
from stateful_kv.apps.workflow import ReplayOptions, WorkflowFile, workflow_path
from stateful_kv.engine.config import EngineConfig
from stateful_kv.errors import InvalidRequestError, StatefulKVError

if TYPE_CHECKING:
    from stateful_kv.engine.engine import Engine

# Endings of the files in a model folder that loading it may read.
_MODEL_ENDINGS = (
    ".gguf",
    ".jinja",
    ".safetensors",
    ".safetensors.index.json",
    "config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "chat_template.json",
)


def load_engine(
    model: str,
    *,
    kv_tokens: int,
    threads: int | None,
    kv_dtype: str = DEFAULT_KV_DTYPE,
    device: str = "cpu",
) -> Engine:
    """Loads a model into an engine with these settings."""
    import torch

    from stateful_kv.engine.engine import Engine

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        return Engine.load(model, kv_tokens=kv_tokens, kv_dtype=kv_dtype, device=device)
    except ValueError as error:
        # Settings check themselves with ValueError; elsewhere one would be a bug and is not hidden.
        if isinstance(error, StatefulKVError):
            raise
        raise InvalidRequestError(str(error)) from error


def inputs_of(workflow: str, model: str) -> list[Path]:
    """The files that a run reads, which no output may replace."""
    return [workflow_path(workflow), *_model_files(model)]


def _model_files(model: str) -> list[Path]:
    from stateful_kv.models.files.loading import DEFAULT_MODEL, resolve

    try:
        path = Path(model).expanduser()
        if model == DEFAULT_MODEL:
            return [resolve(model)]
        if path.is_dir():
            return [file for file in path.iterdir() if file.name.endswith(_MODEL_ENDINGS)]
        return [path] if path.exists() else []
    except (OSError, ValueError, RuntimeError, StatefulKVError):
        return []  # loading it says what is wrong


def meta_data(
    file: WorkflowFile,
    model: str,
    options: ReplayOptions,
    kv_dtype: str = DEFAULT_KV_DTYPE,
    device: str = "cpu",
) -> dict[str, Any]:
    """The head of a report: what ran, with what settings, on what machine."""
    return {
        "format": "stateful-kv-run/1",
        "workflow": file.name,
        "source": file.source,
        "model": Path(model).name if Path(model).is_absolute() else model,
        "max_tokens": options.max_tokens,
        "ignore_eos": options.ignore_eos,
        "stateless": options.stateless,
        "draft": options.draft,
        "kv_dtype": EngineConfig(kv_dtype=kv_dtype, device=device).kv_dtype,
        "device": report.device_info(device),
        "argv": report.relative_argv(),
        "build": build_info(),
        "machine": report.machine_info(),
    }
