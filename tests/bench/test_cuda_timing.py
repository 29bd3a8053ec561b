"""Times on a device, with stand-ins for torch's graphs and events; and what is asked of results."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from bench import __main__ as command
from bench import cuda_timing, harness, report, roofs, targets
from bench.harness import Case, Check, Settings, Trial, Work
from bench.suites import state

CUDA_ROOF = {"copy_bytes_per_s": 4e12, "bf16_flops_per_s": 8e14}
SMOKE = Settings(smoke=True, device="cuda")


class FakeCuda:
    """Graphs that remember the calls of their capture; each call takes a microsecond."""

    def __init__(self) -> None:
        self.log: list[object] = []
        self.capturing: list[object] | None = None

    def call(self, who: str):
        def run(index: int) -> None:
            (self.log if self.capturing is None else self.capturing).append((who, index))

        return run

    def modules(self) -> SimpleNamespace:
        fake = self

        class Nothing:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                return None

            def wait_stream(self, _):
                return None

        class Graph:
            def __init__(self) -> None:
                self.calls: list[object] = []

            def replay(self) -> None:
                fake.log.append(("replay", list(self.calls)))
                fake.last_s = 1e-6 * sum(kind != "event" for kind in self.calls)

        class Capture(Nothing):
            def __init__(self, graph: Graph, stream) -> None:
                self.graph = graph

            def __enter__(self):
                fake.capturing = self.graph.calls

            def __exit__(self, *_):
                fake.capturing = None

        class Event:
            def __init__(self, enable_timing: bool, external: bool) -> None:
                assert enable_timing and external

            def record(self, _stream) -> None:
                assert fake.capturing is not None
                fake.capturing.append("event")

            def elapsed_time(self, _end) -> float:
                return fake.last_s * 1e3  # in milliseconds, as torch has it

        return SimpleNamespace(
            CUDAGraph=Graph, graph=Capture, Event=Event, Stream=Nothing,
            stream=lambda _: Nothing(), current_stream=lambda: None, synchronize=lambda: None,
        )  # fmt: skip


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(cuda_timing, "torch", SimpleNamespace(cuda=fake.modules()))
    return fake


def trial(cuda: FakeCuda, **more) -> Trial:
    return Trial(
        ours=cuda.call("ours"), check=lambda _: Check(True), work=Work(4000, 10),
        rotations=3, is_captured=True, **more,
    )  # fmt: skip


def run(timed: Trial, settings: Settings = SMOKE) -> list[dict]:
    results: list[dict] = []
    case = Case("c", {}, lambda _: timed)
    harness.run_cases("s", [case], settings, CUDA_ROOF, results.append)
    return results


def test_a_graph_holds_whole_rounds_between_two_events(cuda):
    side = cuda_timing.GraphSide(cuda.call("ours"), rotations=3)
    calls = side.calibrate(7e-6)
    assert calls == 9  # three rounds over three inputs, not fewer than seven calls
    assert side.sample(calls) == pytest.approx(1e-6)
    kind, captured = cuda.log[-1]
    assert kind == "replay" and captured[0] == captured[-1] == "event"
    assert [index for _, index in captured[1:-1]] == [0, 1, 2] * 3
    # Before a capture the call ran as it is: what is made at the first call is not in the graph.
    assert cuda.log[:3] == [("ours", 0), ("ours", 1), ("ours", 2)]


def test_seconds_of_a_graph_are_those_of_one_call(cuda):
    assert cuda_timing.graph_seconds(cuda.call("ours"), 3) == pytest.approx(1e-6)
    replays = [entry[1] for entry in cuda.log if entry[0] == "replay"]
    assert [len(calls) - 2 for calls in replays] == [3] * 3


@pytest.mark.parametrize(
    ("seconds", "rotations", "expected"),
    [(1e-6, 3, 3 * 3334), (1e-2, 5, 5), (1e-5, 1, 1000), (1e-9, 7, 7 * 585), (1e-9, 5000, 5000)],
)
def test_calls_of_a_graph(seconds, rotations, expected, monkeypatch):
    if rotations == 3:
        monkeypatch.setattr(cuda_timing, "MAX_CALLS", 1 << 20)
    assert cuda_timing.calls_for(seconds, rotations, 0.01) == expected


def test_sides_take_turns_and_the_floor_is_that_of_the_device(cuda):
    (result,) = run(trial(cuda, peers={"p": cuda.call("peer")}))
    replays = [entry[1][1][0] for entry in cuda.log if entry[0] == "replay"]
    assert replays[-6:] == ["ours", "peer"] * 3
    assert result["ratio"]["median"] == pytest.approx(1.0)
    assert result["floor"]["seconds"] == 1e-9 and result["floor"]["fraction"] == pytest.approx(1e-3)


def test_a_peer_that_cannot_be_captured_is_named_and_ours_timed_alone(cuda):
    def refuse(_index):
        if cuda.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    skipped, alone = run(trial(cuda, peers={"p": refuse}))
    assert skipped["skipped"] == (
        "cannot be captured in a CUDA graph: operation not permitted when stream is capturing"
    )
    assert alone["peer_name"] is None and "ratio" not in alone


def _result(**more) -> dict:
    base = {"suite": "gpu_attention", "name": "decode_32x4k", "axes": {}, "peer_name": None}
    return {**base, "ours": {"median": 1e-4}, "work": {"bytes": 4.05e8, "flops": 10}, **more}


def test_headlines():
    line = targets.headline(_result())
    assert line["value"] == pytest.approx(4.05e12) and line["met"] == "first"
    assert targets.words(line) == "4.05 TB/s (asked: >= 4, then 4.1): first target met"
    assert targets.headline(_result(ours={"median": 2e-4}))["met"] == "no"
    verify = _result(name="verify_8", peer_name="decode_step", ratio={"median": 1 / 1.02})
    line = targets.headline(verify)
    assert line["value"] == pytest.approx(1.02) and line["met"] == "goal"
    assert targets.headline({**verify, "peer_name": "torch_sdpa"}) is None
    time = _result(name="decode_1x8k", ours={"median": 12e-6})
    assert targets.words(targets.headline(time)) == (
        "12 us (asked: <= 15, then 11): first target met"
    )
    reply = _result(
        suite="gpu_model", name="llama_1b_engine", ours={"median": 0.0512}, units_per_call=64
    )
    assert targets.headline(reply)["value"] == pytest.approx(0.8e-3)
    workflow = _result(
        suite="gpu_workflow", name="later_turn", axes={"workflow": "coding35"},
        peer_name="transformers", ratio={"median": 9.0}, ratio_of_medians=7.9,
    )  # fmt: skip
    assert targets.headline(workflow)["value"] == 7.9
    assert targets.words(targets.headline(workflow)) == "7.9 x (asked: >= 8): not met"
    assert targets.headline(_result(name="other")) is None


def test_only_real_runs_on_a_device_have_headlines():
    assert "headline" in harness.with_headline(_result(), Settings(device="cuda"))
    assert "headline" not in harness.with_headline(_result(), SMOKE)
    assert "headline" not in harness.with_headline(_result(), Settings(device="cpu"))


def test_targets_are_listed_once_each(tmp_path, capsys):
    path = tmp_path / "a.json"
    results = [harness.with_headline(_result(peer_name=p), Settings(device="cuda")) for p in "ab"]
    failed = [{"suite": "s", "name": "c", "axes": {}, "failed": "Error: x"}]
    path.write_text(json.dumps({"schema": harness.SCHEMA, "results": results, "failed": failed}))
    assert command.main(["targets", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "gpu_attention decode_32x4k: 4.05 TB/s (asked: >= 4, then 4.1): first target met",
        "s c: FAILED: Error: x",
    ]
    assert command.main(["targets", str(tmp_path / "none.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_roofs_of_a_device(monkeypatch):
    times = iter([0.5, 9.0, 0.25])
    monkeypatch.setattr(cuda_timing, "quick_seconds", lambda call, _: (call(), next(times))[1])
    found = roofs._measure_cuda(smoke=True, device="cpu")
    assert found["copy_bytes_per_s"] == 2 * (1 << 26) / 0.5
    assert found["bf16_flops_per_s"] == 2 * 512**3 / 0.25
    assert roofs.limits(found) == (found["copy_bytes_per_s"], found["bf16_flops_per_s"])


def test_what_a_device_is(monkeypatch):
    properties = SimpleNamespace(
        name="A GPU", major=9, minor=0, multi_processor_count=132, L2_cache_size=60 << 20,
        total_memory=1 << 37,
    )  # fmt: skip
    fake = SimpleNamespace(current_device=lambda: 0, get_device_properties=lambda _: properties)
    version = SimpleNamespace(cuda="13.0")
    monkeypatch.setattr(cuda_timing, "torch", SimpleNamespace(cuda=fake, version=version))
    assert json.loads(json.dumps(cuda_timing.machine()))["capability"] == "9.0"
    # Rotating inputs must be more than twice as large as L2.
    assert Settings(device="cuda").cold_bytes > 2 * (60 << 20)


def test_roofs_of_a_device_are_shown():
    assert roofs.describe(CUDA_ROOF) == "copy 4.00 TB/s, bf16 800 TFLOP/s (cuBLAS)"
    assert roofs.limits(CUDA_ROOF) == (4e12, 8e14)


def test_a_report_of_a_device(tmp_path, monkeypatch):
    out = tmp_path / "state.json"
    assert command.main(["run", "state", "--smoke", "--only", "fork", "--out", str(out)]) == 0
    document = json.loads(out.read_text())
    failed = {"suite": "s", "name": "c", "axes": {}, "failed": "Error: x"}
    document |= {"roofs": CUDA_ROOF, "failed": [failed]}
    document["machine"]["gpu"] = {"name": "A GPU"}
    text = report.markdown(document)
    assert (
        "A GPU beside " in text
        and "copy 4.00 TB/s" in text
        and "Asked: s c: FAILED: Error: x" in text
    )


def test_a_run_that_is_cut_keeps_its_results(tmp_path, monkeypatch):
    def cut(settings, roof, emit):
        emit({"suite": "state", "name": "c", "axes": {}, "ours": {"median": 1.0}})
        raise KeyboardInterrupt

    monkeypatch.setattr(state, "run", cut)
    out = tmp_path / "state.json"
    with pytest.raises(KeyboardInterrupt):
        command.main(["run", "state", "--smoke", "--out", str(out)])
    document = json.loads(out.read_text())
    assert len(document["results"]) == 1 and document["ended_early"].startswith("KeyboardInterrupt")
