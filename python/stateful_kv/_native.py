"""Loads the extension: torch first, then `_C`, then the check that the two fit together."""

from __future__ import annotations

import importlib.util
from typing import NoReturn

import torch

from stateful_kv.errors import (
    BuildMismatchError,
    DeviceUnavailableError,
    InvariantError,
    StateBusyError,
)

_REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


def _fail_to_load(error: ImportError) -> NoReturn:
    """Tells a library that is missing from one that does not fit."""
    if importlib.util.find_spec("stateful_kv._C") is None:
        raise ImportError(
            "stateful_kv._C, the compiled extension, is not built; in the source folder run: "
            "pip install --no-build-isolation ."
        ) from error
    raise BuildMismatchError(
        f"stateful_kv._C cannot be loaded with torch {torch.__version__}: {error}. "
        f"It was built for another torch or Python; in the source folder run: {_REBUILD}"
    ) from error


try:
    from stateful_kv import _C
except ImportError as error:
    _fail_to_load(error)


def _minor(version: str) -> tuple[str, ...]:
    """Major and minor of a version: torch keeps its C++ interface only within a minor version."""
    return tuple(version.split("+")[0].split(".")[:2])


def check_torch_version(built: str, running: str) -> None:
    """Raises BuildMismatchError unless both versions of torch have the same major and minor."""
    if _minor(built) != _minor(running):
        raise BuildMismatchError(
            f"stateful_kv was built with torch {built}, but torch {running} is running; "
            f"in the source folder run: {_REBUILD}"
        )


def check_device(device: str | torch.device) -> torch.device:
    """The device as torch names it, if this build has kernels for it and it is there.

    Raises:
        DeviceUnavailableError: the message says which of the two is missing, and what to do.
    """
    try:
        if not isinstance(device, (str, torch.device)):  # torch takes 0 as a device
            raise TypeError
        wanted = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise DeviceUnavailableError(f"device {device}: expected cpu or cuda or cuda:N") from error
    # torch keeps 8 bits of the number: "cuda:256" would be the first device.
    is_whole = wanted.index is None or str(device).endswith(f":{wanted.index}")
    if not is_whole:
        raise DeviceUnavailableError(f"device {device}: expected a number below 128")
    if wanted.type == "cpu" and wanted.index is None:
        return wanted
    if wanted.type != "cuda":
        raise DeviceUnavailableError(f"device {wanted}: expected cpu or cuda or cuda:N")
    if not _C.build_info()["cuda"]:
        raise DeviceUnavailableError(
            f"device {wanted}: stateful_kv was built without CUDA; with a CUDA build of torch and "
            f"nvcc installed, run in the source folder: STATEFUL_KV_CUDA=ON {_REBUILD}"
        )
    num_devices = torch.cuda.device_count()
    if num_devices == 0 or (wanted.index is not None and wanted.index >= num_devices):
        if torch.version.cuda is None:
            hint = f"torch {torch.__version__} is built without CUDA; install a CUDA build of it"
        elif num_devices:
            hint = f"expected cuda:0 to cuda:{num_devices - 1}"
        else:
            hint = "check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES"
        raise DeviceUnavailableError(
            f"device {wanted}: torch sees {num_devices} CUDA devices; {hint}"
        )
    # With its index, as tensors on it say: "cuda" alone would compare unequal to theirs.
    return wanted if wanted.index is not None else torch.device("cuda", torch.cuda.current_device())


check_torch_version(str(_C.build_info()["torch"]), torch.__version__)
if _isa_error := _C.cpu_isa_error():
    raise ImportError(_isa_error)
_C._set_error_types({"InvariantError": InvariantError, "StateBusyError": StateBusyError})


def build_info() -> dict[str, object]:
    """What was built and what runs: versions, compiler, CUDA, instruction sets.

    Returns:
        Plain data: version, torch, python, compiler, cuda (False without CUDA kernels),
        cuda_archs, cpu_isas (built) and cpu_isa (the one in use).
    """
    return {**_C.build_info(), "cpu_isa": _C.cpu_isa()}


__all__ = ["_C", "build_info", "check_torch_version"]
