"""scripts/gpu_check.sh with stand-ins for the GPU's programs, and in little without a GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAGES = [
    "environment", "build", "cpu-tests", "gpu-tests", "memcheck", "racecheck", "synccheck", "bits",
    "bench-attention", "bench-splits", "bench-flex", "bench-model", "bench-workflow",
]  # fmt: skip

# Writes down what it is asked; hangs, fails or lacks modules where it is told to.
PYTHON = """#!/bin/bash
echo "$* | SKV_REQUIRE_CUDA=${SKV_REQUIRE_CUDA:-}" >>"$FAKE_LOG"
case "$*" in
  *find_spec*sys.argv*)
    for name in $FAKE_MISSING; do [[ " $* " != *" $name "* ]] || found="$found $name"; done
    echo "${found# }"
    exit ;;
  *"import platform, torch"*) exit ;;
  -c*) exec "$REAL_PYTHON" "$@" ;;
  *"bench targets"*) [ -n "$FAKE_TARGETS" ] || exec "$REAL_PYTHON" "$@"; exit ;;
esac
[ -z "$FAKE_HANG" ] || [[ "$*" != *"$FAKE_HANG"* ]] || exec sleep 60
if [ -n "$FAKE_FAIL" ] && [[ "$*" == *"$FAKE_FAIL"* ]]; then
  echo "error: at first"; seq 30; exit 3
fi
[[ "$*" != *"bench run"* ]] || { cp "$FAKE_RESULT" "${@: -1}"; echo "case: 2 us, 3x vs peer"; }
[[ "$*" != *gpu_bits* ]] || echo "cublas: small 8x8: equal for 1 2 rows"
"""
PROGRAMS = {
    "nvidia-smi": "#!/bin/bash\necho 9.0\n",
    "cmake": '#!/bin/bash\necho "cmake $*" >>"$FAKE_LOG"; exit "${FAKE_CMAKE:-0}"\n',
    "compute-sanitizer": '#!/bin/bash\nwhile [ "$1" != "$PYTHON" ]; do shift; done; exec "$@"\n',
    "python-of-test": PYTHON,
}


class Machine:
    """A copy of the scripts beside programs that stand for those of a GPU machine."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out, self.programs = folder, folder / "out", folder / "programs"
        shutil.copytree(ROOT / "scripts", folder / "scripts")
        self.programs.mkdir()
        for name, text in PROGRAMS.items():
            (self.programs / name).write_text(text)
            (self.programs / name).chmod(0o755)
        headline = {"metric": "time", "first": None, "goal": 4e-6, "value": 3e-6, "met": "goal"}
        result = {"suite": "gpu_x", "name": "case", "axes": {}, "headline": headline}
        (folder / "result.json").write_text(
            json.dumps({"schema": "stateful-kv-bench/1", "results": [result]})
        )

    def run(self, *args: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*args), capture_output=True, text=True, env=self.environment(variables),
            timeout=280, cwd=self.folder.parent,
        )  # fmt: skip

    def command(self, *args: str) -> list[str]:
        return [str(self.folder / "scripts" / "gpu_check.sh"), *args, f"{self.folder.name}/out"]

    def environment(self, variables: dict[str, str]) -> dict[str, str]:
        own = {
            "PATH": f"{self.programs}:{os.environ['PATH']}",
            "PYTHON": str(self.programs / "python-of-test"),
            "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}",
            "REAL_PYTHON": sys.executable,
            "FAKE_LOG": str(self.folder / "asked"),
            "FAKE_TARGETS": "yes",
            "FAKE_RESULT": str(self.folder / "result.json"),
            **dict.fromkeys(("FAKE_MISSING", "FAKE_HANG", "FAKE_FAIL", "SKV_GPU_LIMITS"), ""),
        }
        return {**os.environ, **own, **variables}

    @property
    def asked(self) -> str:
        return (self.folder / "asked").read_text()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def table(text: str) -> dict[str, tuple[str, str]]:
    """Status and reason of each stage, from the last part of the output."""
    rows = re.findall(r"^(\S+) +(\w+) +\d+ s +(.*)$", text.partition("=== stages")[2], re.MULTILINE)
    return {stage: (status, reason) for stage, status, reason in rows}


def test_all_stages_pass(machine: Machine) -> None:
    done = machine.run(FAKE_TARGETS="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert table(done.stdout) == dict.fromkeys(STAGES, ("passed", ""))
    assert done.stdout.splitlines()[-1].startswith("no stage failed")
    assert "gpu_x case: 3 us (asked: <= 4): goal met" in done.stdout
    assert done.stdout.count("case: 2 us, 3x vs peer") == 5
    assert "cublas: small 8x8: equal for 1 2 rows" in done.stdout
    for stage in STAGES:
        assert (machine.out / f"{stage}.log").exists(), stage
    for name in ("gpu_attention", "gpu_splits", "gpu_flex", "gpu_model", "gpu_workflow"):
        assert (machine.out / f"{name}.json").exists()
    assert (machine.out / "table.txt").read_text() in done.stdout
    asked = machine.asked
    assert "-DSTATEFUL_KV_CUDA_ARCHS=90" in asked and "-DSTATEFUL_KV_CUDA=ON" in asked
    assert re.search(r"-m pytest .* tests -m cuda \| SKV_REQUIRE_CUDA=1", asked)
    assert "-m bench run gpu_attention --device cuda --peer decode_step," in asked
    assert asked.count("scripts/gpu/gpu_ops_once.py") == 3


def test_limits_are_below_ten_minutes() -> None:
    text = (ROOT / "scripts" / "gpu_check.sh").read_text()
    limits = dict(re.findall(r"\[([a-z-]+)\]=(\d+)", text))
    assert list(limits) == STAGES
    assert sum(map(int, limits.values())) <= 570


def test_a_stage_that_hangs_is_cut(machine: Machine) -> None:
    start = time.monotonic()
    done = machine.run(FAKE_HANG="-m cuda", SKV_GPU_LIMITS="gpu-tests=1")
    assert done.returncode == 1
    assert time.monotonic() - start < 50
    rows = table(done.stdout)
    assert rows.pop("gpu-tests") == ("FAILED", "cut at its limit of 1 s")
    assert set(rows.values()) == {("passed", "")}
    assert done.stdout.splitlines()[-1].startswith("1 FAILED")


def test_a_stage_that_fails_shows_its_end_and_stops_no_other(machine: Machine) -> None:
    done = machine.run(FAKE_FAIL="bench run gpu_model")
    assert done.returncode == 1
    rows = table(done.stdout)
    assert rows.pop("bench-model") == ("FAILED", "status 3, see bench-model.log")
    assert set(rows.values()) == {("passed", "")}
    shown = [line[6:] for line in done.stdout.splitlines() if line.startswith("    | ")]
    assert shown == ["error: at first", "...", *map(str, range(19, 31))]


def test_after_a_failed_build_only_what_needs_none_runs(machine: Machine) -> None:
    done = machine.run(FAKE_CMAKE="1")
    assert done.returncode == 1
    rows = table(done.stdout)
    assert rows.pop("build")[0] == "FAILED"
    assert rows.pop("environment") == rows.pop("bits") == ("passed", "")
    assert set(rows.values()) == {("SKIPPED", "the build failed")}
    assert len(rows) == 10


def test_missing_tools_are_named(machine: Machine) -> None:
    (machine.programs / "compute-sanitizer").unlink()
    only = "cpu-tests,gpu-tests,racecheck"
    nvcc = str(machine.programs / "nvcc")  # beside it there is no sanitizer either
    done = machine.run("--only", only, FAKE_MISSING="pytest hypothesis", CUDACXX=nvcc)
    assert done.returncode == 1
    rows = table(done.stdout)
    lacking = ("FAILED", "python packages that are missing: pytest hypothesis")
    assert rows["cpu-tests"] == rows["gpu-tests"] == lacking
    if not Path("/usr/local/cuda/bin/compute-sanitizer").exists():
        assert rows["racecheck"][1].startswith("compute-sanitizer not found")


def test_without_a_gpu_nothing_is_green(machine: Machine) -> None:
    (machine.programs / "nvidia-smi").write_text("#!/bin/bash\necho 'no devices'; exit 6\n")
    done = machine.run()
    assert done.returncode == 1
    rows = table(done.stdout)
    assert rows.pop("environment") == ("passed", "")
    assert rows.pop("GPU") == ("FAILED", "nvidia-smi names no GPU")
    assert rows == dict.fromkeys(STAGES[1:], ("SKIPPED", "nvidia-smi names no GPU"))


def test_smoke_runs_here(machine: Machine) -> None:
    """With the real interpreter and sources, those stages that are quick."""
    (machine.programs / "nvidia-smi").write_text("#!/bin/bash\nexit 9\n")
    stages = "environment,build,gpu-tests,memcheck,bits,bench-attention"
    for name in ("bench", "tests", "python"):
        (machine.folder / name).symlink_to(ROOT / name)
    patient = " ".join(f"{stage}=240" for stage in stages.split(","))
    done = machine.run("--smoke", "--only", stages, PYTHON=sys.executable, SKV_GPU_LIMITS=patient)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = table(done.stdout)
    assert rows["environment"] == rows["bits"] == rows["bench-attention"] == ("passed", "")
    assert rows["build"] == ("SKIPPED", "--smoke takes the extension that is there")
    assert rows["gpu-tests"] == rows["memcheck"] == ("SKIPPED", "nvidia-smi names no GPU")
    assert "equal for 1 2 4" in done.stdout
    document = json.loads((machine.out / "gpu_attention.json").read_text())
    assert document["smoke"] and document["device"] == "cpu" and document["results"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--only", "nothing"), "--only: no stage 'nothing'"),
        (("--fast",), "usage: "),
        (("one",), "usage: "),
    ],
)
def test_bad_command_lines(machine: Machine, args: tuple[str, ...], message: str) -> None:
    done = machine.run(*args)
    assert done.returncode == 1 and message in done.stderr
    assert not machine.out.exists()


def test_bad_limits(machine: Machine) -> None:
    done = machine.run(SKV_GPU_LIMITS="build=soon")
    assert done.returncode == 1
    assert "expected STAGE=SECONDS, got 'build=soon'" in done.stderr


def test_arguments_that_mean_nothing(machine: Machine) -> None:
    for chosen in ("", ",", " "):
        done = machine.run("--only", chosen)
        assert done.returncode == 1 and "usage: " in done.stderr, chosen
    done = machine.run(SKV_GPU_LIMITS="build=0")  # which `timeout` takes for no limit
    assert done.returncode == 1 and "expected STAGE=SECONDS, got 'build=0'" in done.stderr
    done = machine.run(SKV_GPU_WEIGHTS="no/such")
    assert done.returncode == 1
    assert f"SKV_GPU_WEIGHTS: expected a folder, got '{machine.folder.parent}/no" in done.stderr
    assert not machine.out.exists()


def test_a_folder_that_takes_no_files(machine: Machine) -> None:
    (machine.out / "table.txt").mkdir(parents=True)  # root may write where others may not
    done = machine.run()
    assert done.returncode == 1 and f"{machine.out}: cannot be written to" in done.stderr
    assert not (machine.folder / "asked").exists()


def test_figures_are_of_this_run(machine: Machine) -> None:
    assert machine.run(FAKE_TARGETS="").returncode == 0
    before = (machine.out / "gpu_model.json").read_bytes()
    done = machine.run(FAKE_TARGETS="", FAKE_CMAKE="1")
    assert "goal met" not in done.stdout and "2 us" not in done.stdout
    done = machine.run("--only", "bench-model", FAKE_TARGETS="", FAKE_FAIL="gpu_model")
    assert done.returncode == 1 and "goal met" not in done.stdout
    assert (machine.out / "gpu_model.json.before").read_bytes() == before


def test_no_stage_outlives_the_script(machine: Machine) -> None:
    environment = machine.environment({"FAKE_HANG": "gpu_model"})
    script = subprocess.Popen(
        machine.command("--only", "bits,bench-model"), env=environment, cwd=machine.folder.parent,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    asked = machine.folder / "asked"
    while not asked.exists() or "gpu_model" not in machine.asked:
        time.sleep(0.05)
    script.send_signal(signal.SIGTERM)
    output, _ = script.communicate(timeout=20)
    assert script.returncode == 143
    assert "bits             passed" in output and "interrupted by SIGTERM" in output
    assert "interrupted by SIGTERM" in (machine.out / "table.txt").read_text()
    mark = f"PYTHON={machine.programs}".encode()
    assert not [path for path in Path("/proc").glob("[0-9]*/environ") if mark in content(path)]


def content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # ended meanwhile
        return b""
