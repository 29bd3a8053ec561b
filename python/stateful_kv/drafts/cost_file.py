"""Measured cost curves in the user's cache folder, one file for each machine, build and model.

Nothing here can fail an engine: what cannot be read is measured again, what cannot be written is
measured by the next process too; both leave a warning in the log. A file appears by a rename, so
processes that write the same one at once do no harm. Files that another build of the library left
for the same machine go when one is written; what such a build then misses it measures again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from stateful_kv._native import _C, build_info
from stateful_kv.drafts.costs import CostCurve
from stateful_kv.system.machine import cpu_name, num_cores

FOLDER_VARIABLE = "STATEFUL_KV_CACHE_DIR"
_FORMAT = "stateful-kv-costs/1"
_PATTERN = "costs-*.json"
_MAX_BYTES = 1 << 20
# The part of a key that says on what machine, whatever the build.
_MACHINE = ("cpu", "isa", "cores", "threads")
_log = logging.getLogger(__name__)

Key = dict[str, str | int]


def folder() -> Path:
    """Where the files are: $STATEFUL_KV_CACHE_DIR, or stateful_kv in the user's cache folder.

    Raises:
        RuntimeError: no variable says where, and the user has no home.
    """
    if chosen := os.environ.get(FOLDER_VARIABLE):
        return Path(chosen)
    shared = os.environ.get("XDG_CACHE_HOME")
    # A relative path is to be ignored, says the XDG specification.
    if shared and os.path.isabs(shared):
        return Path(shared) / "stateful_kv"
    return Path.home() / ".cache" / "stateful_kv"


def machine_key() -> Key:
    """The part of a key that says what computes: CPU, instruction set, threads, build."""
    info = build_info()
    library = os.stat(str(_C.__file__))
    return {
        "cpu": cpu_name(),
        "isa": str(info["cpu_isa"]),
        "cores": num_cores(),
        "threads": torch.get_num_threads(),
        "version": str(info["version"]),
        "library": f"{library.st_size}-{library.st_mtime_ns}",
    }


def load(key: Key) -> CostCurve | None:
    """The curve that was stored under exactly this key, or None."""
    try:
        path = _path(key)
        if not path.exists():
            return None
        stored, curve = _read(path)
        if stored != key:
            raise ValueError(f"key: expected {key}, got {stored}")
        return curve
    except (OSError, ValueError, RuntimeError, RecursionError) as error:
        _log.warning("the stored cost curve is not used, it will be measured: %s", error)
        return None


def store(key: Key, curve: CostCurve) -> None:
    """Writes the curve for `load`, replacing what is there and what other builds left."""
    data = {"format": _FORMAT, "key": key, "curve": curve.to_json()}
    try:
        path = _path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".costs-", suffix=".tmp", dir=path.parent)
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(json.dumps(data, indent=1) + "\n")
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
        _remove_other_builds(key)
    except (OSError, RuntimeError) as error:
        _log.warning("the cost curve is not stored, the next process measures it: %s", error)


def stored_here() -> Iterator[tuple[Key, CostCurve]]:
    """Keys and curves of this machine as it is set up now; unreadable files are left out."""
    here = machine_key()
    try:
        paths = sorted(folder().glob(_PATTERN))
    except (OSError, RuntimeError):
        return
    for path in paths:
        try:
            key, curve = _read(path)
        except (OSError, ValueError, RecursionError):
            continue
        if here.items() <= key.items():
            yield key, curve


def _remove_other_builds(key: Key) -> None:
    """Removes the curves of this machine whose library differs; what is no curve of ours stays."""
    for path in folder().glob(_PATTERN):
        try:
            other, _ = _read(path)
            is_same_machine = all(other.get(name) == key.get(name) for name in _MACHINE)
            if is_same_machine and other.get("library") != key.get("library"):
                path.unlink(missing_ok=True)
        except (OSError, ValueError, RecursionError):
            continue


def _path(key: Key) -> Path:
    text = json.dumps(key, sort_keys=True)
    return folder() / f"costs-{hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}.json"


def _read(path: Path) -> tuple[Any, CostCurve]:
    if path.exists() and not path.is_file():  # to open a pipe would wait for its writer
        raise ValueError(f"{path}: expected a file")
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)
    try:
        if len(content) > _MAX_BYTES:
            raise ValueError(f"expected at most {_MAX_BYTES} bytes")
        data = json.loads(content)
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise ValueError(f"format: expected {_FORMAT}")
        if not isinstance(data.get("key"), dict):
            raise ValueError("key: expected an object")
        return data["key"], CostCurve.from_json(data.get("curve"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
