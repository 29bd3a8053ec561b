"""Which suite runs on which device, and a clear word where the device is missing."""

from __future__ import annotations

from stateful_kv._native import check_device
from stateful_kv.errors import DeviceUnavailableError

CPU_SUITES = (
    "ops",
    "state",
    "cpu_linear",
    "cpu_attention",
    "cpu_model",
    "workflow",
    "hf_adapter",
    "quality",
)
GPU_SUITES = ("gpu_attention", "gpu_model", "gpu_workflow")
NEEDS_DEVICE = 4  # exit status


class DeviceError(Exception):
    """These suites cannot run on this device.

    Attributes:
        status: exit status of the command line.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def choose(suites: list[str], asked: str | None, smoke: bool) -> str:
    """The device that all suites of a run use.

    Args:
        suites: their names.
        asked: "cpu", "cuda", or None for the one the suites are made for.
        smoke: suites for CUDA run on the CPU too, on small shapes.

    Raises:
        DeviceError: the suites do not run there, or the device is not there.
    """
    on_gpu = [name for name in suites if name in GPU_SUITES]
    on_cpu = [name for name in suites if name not in GPU_SUITES]
    device = asked or ("cuda" if on_gpu else "cpu")
    if device == "cuda":
        if on_cpu:
            raise DeviceError(f"{on_cpu[0]} runs on the CPU only; run the others apart", 2)
        try:
            check_device(device)
        except DeviceUnavailableError as error:
            raise DeviceError(f"{on_gpu[0]} needs a CUDA device: {error}", NEEDS_DEVICE) from error
    elif on_gpu and not smoke:
        raise DeviceError(
            f"{on_gpu[0]} needs a CUDA device: on the CPU it runs with --smoke only", NEEDS_DEVICE
        )
    return device
