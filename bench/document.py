"""The JSON document of a run without its results: who measured what, where and how."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from bench import cuda_timing, roofs
from bench.harness import SCHEMA, Settings
from stateful_kv import build_info
from stateful_kv.apps import report as package_report


def git_state() -> dict[str, Any]:
    """Commit and dirty flag of the checkout the benches lie in; nulls outside of one."""
    folder = Path(__file__).resolve().parent

    def git(*args: str) -> str | None:
        command = ["git", "-C", str(folder), *args]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    status = git("status", "--porcelain")
    return {"sha": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def document(suites: list[str], settings: Settings, argv: list[str]) -> dict[str, Any]:
    """Everything but the results; measures the roofs of the device."""
    args = package_report.relative_argv(["bench", *argv])[1:]
    machine = package_report.machine_info()
    busy = os.getloadavg()[0] > 0.5 * machine["cores"]
    on_cuda = settings.device == "cuda"
    gpu = {"gpu": cuda_timing.machine()} if on_cuda else {}
    return {
        "schema": SCHEMA,
        "suites": suites,
        "smoke": settings.smoke,
        "device": settings.device,
        "argv": args,
        "command": " ".join(["python -m bench", *args]),
        "git": git_state(),
        "build": build_info(),
        "machine": {**machine, **roofs.cache_sizes(), **gpu},
        "busy_at_start": busy,
        "cold_bytes": settings.cold_bytes,
        "clock": cuda_timing.CLOCK if on_cuda else "time.perf_counter (monotonic)",
        "roofs": roofs.measure(settings.smoke, settings.device),
        "results": [],
        "skipped": [],
    }
