"""Warm and cold inputs, the roofs they are held against, and shares that cannot be."""

from __future__ import annotations

import pytest
import torch

from bench import floors, harness, report, roofs
from bench.floors import Work
from bench.harness import Case, Check, Settings, Trial

PLAIN = {"read_bytes_per_s": 1e10, "fp32_flops_per_s": 1e11}


def _roof(llc_bytes: int | None = 1 << 20, **rates: float) -> dict:
    """A roof whose cache has been measured: bytes a second by buffer size."""
    by_size = {
        1 << 14: 4e11,
        1 << 16: 2e11,
        1 << 19: 1e11,
        1 << 20: 1e11,
        **{int(k): v for k, v in rates.items()},
    }
    cache = [{"buffer_bytes": size, "bytes_per_s": rate} for size, rate in by_size.items()]
    return {**PLAIN, "llc_bytes": llc_bytes, "cache": cache}


def test_the_higher_roof_is_the_floor():
    assert floors.floor_of(Work(10**10, 10**9), PLAIN)["seconds"] == 1.0
    assert floors.floor_of(Work(10**10, 10**9), PLAIN)["kind"] == "bandwidth"
    found = floors.floor_of(Work(10**9, 10**11), PLAIN)
    assert (found["seconds"], found["kind"], found["read_seconds"]) == (1.0, "flops", 0.1)


def test_warm_is_what_fits_into_the_last_cache():
    assert floors.is_warm(1 << 20, _roof()) is True
    assert floors.is_warm((1 << 20) + 1, _roof()) is False
    assert floors.is_warm(5, _roof(None)) is None
    assert floors.is_warm(5, PLAIN) is None
    assert floors.working_set(Work(100), 0) == 100  # one set of inputs, met at every call
    assert floors.working_set(Work(100), 5000) == 5000


def test_warm_inputs_are_held_against_the_cache_and_cold_ones_against_the_memory():
    warm = floors.floor_of(Work(50_000), _roof(), rotation_bytes=100_000)
    assert warm["kind"] == "cache bandwidth" and warm["seconds"] == 50_000 / 2e11
    cold = floors.floor_of(Work(50_000), _roof(), rotation_bytes=10 << 20)
    assert cold["kind"] == "bandwidth" and cold["seconds"] == 50_000 / 1e10
    # Of an unknown cache the buffer of the same size shows what can be had.
    unknown = floors.floor_of(Work(50_000), _roof(None), rotation_bytes=100_000)
    assert unknown["kind"] == "cache bandwidth"


def test_bytes_that_stay_hot_do_not_come_from_memory():
    work = Work(1000_000, hot_bytes=900_000)
    cold = floors.floor_of(work, _roof(), rotation_bytes=10 << 20)
    assert cold["kind"] == "bandwidth" and cold["seconds"] == 100_000 / 1e10
    work = Work(1_000_000, hot_bytes=1_000_000 - 64)
    hot = floors.floor_of(work, _roof(), rotation_bytes=10 << 20)
    assert hot["kind"] == "cache bandwidth" and hot["seconds"] == work.hot_bytes / 1e11


def test_a_share_above_the_roof_is_a_fault_unless_it_is_noise():
    good = floors.judge(Work(50_000), 100_000, _roof(), seconds=50_000 / 2.1e11, noise_percent=6.0)
    assert good["fraction"] == pytest.approx(1.05) and "fault" not in good
    bad = floors.judge(Work(50_000), 100_000, _roof(), seconds=50_000 / 2.1e11, noise_percent=4.0)
    assert bad["fault"].startswith("105% of the cache bandwidth roof, 4.0 % noise: ")


def test_a_roof_that_is_exceeded_is_measured_again(monkeypatch):
    rates = iter([1.5e11, 2.5e11, 9e11])
    monkeypatch.setattr(roofs, "_cpu_cache", lambda size, repeats: {"sum": next(rates)})
    roof = {**_roof(), "repeats": 1}
    found = floors.judge(Work(50_000), 100_000, roof, seconds=50_000 / 2.2e11, noise_percent=0.0)
    assert found["fraction"] == pytest.approx(2.2 / 2.5) and "fault" not in found
    assert roof["measured_again"] == 2 and next(rates) == 9e11
    known = {entry["buffer_bytes"]: entry["bytes_per_s"] for entry in roof["cache"]}
    assert known[1 << 16] == 2.5e11 and known[1 << 20] == 1e11


@pytest.mark.parametrize(
    ("work", "key"),
    [(Work(10**7), "read_bytes_per_s"), (Work(8, flops=10**7), "fp32_flops_per_s")],
)
def test_each_roof_can_be_measured_again(work, key, monkeypatch):
    monkeypatch.setattr(roofs, "_read_bandwidth", lambda *_: {"sum": 4e10})
    monkeypatch.setattr(roofs, "_matrix_rates", lambda *_: {"1024": 4e11})
    more = {"repeats": 1, "read_buffer_bytes": 1 << 20, "fp32_by_size": {"1024": 1e11}}
    roof = {**_roof(1 << 10, **{"8": 1e12}), **more}
    seconds = work.bytes / 3e10 if work.flops == 0 else work.flops / 3e11
    found = floors.judge(work, 10 << 20, roof, seconds, 0.0)
    assert found["fraction"] == pytest.approx(0.75) and roof[key] == 4 * PLAIN[key]


def test_the_cache_is_measured_once_for_a_size_and_kept():
    roof = roofs.measure(smoke=True)
    assert roof["cache"] == [] and roofs.can_measure_again(roof)
    rate = roofs.cache_bandwidth(roof, 100_000)
    assert rate == roofs.cache_bandwidth(roof, 70_000) > 0
    (entry,) = roof["cache"]
    assert entry["buffer_bytes"] == 65536 and entry["bytes_per_s"] == max(
        entry["by_method"].values()
    )
    assert roofs.cache_bandwidth(roof, 3) > 0
    assert [e["buffer_bytes"] for e in roof["cache"]] == [65536, roofs.MIN_CACHE_BYTES]
    assert roof["threads"] == torch.get_num_threads()  # as before the measurement


def test_the_size_of_the_last_cache(monkeypatch):
    sizes = {"l2_bytes": 1 << 21, "l3_bytes": 1 << 25}
    monkeypatch.setattr(roofs, "cache_sizes", lambda: sizes)
    assert roofs.last_level_bytes() == 1 << 25
    assert roofs.cold_bytes() >= min(2 << 25, 1 << 25)
    sizes["l3_bytes"] = None
    assert roofs.last_level_bytes() == (1 << 21) * torch.get_num_threads()
    sizes["l2_bytes"] = None
    assert roofs.last_level_bytes() is None


def _run(trial: Trial, roof: dict) -> dict:
    results: list[dict] = []
    case = Case("c", {"n": 1}, lambda _: trial)
    harness.run_cases("s", [case], Settings(smoke=True), roof, results.append)
    return results[0]


def test_results_say_whether_they_are_warm():
    trial = Trial(lambda _: None, Work(bytes=50_000), lambda _: Check(True))
    trial.rotation_bytes = 100_000
    warm = _run(trial, _roof())
    assert warm["warm"] is True and warm["working_set_bytes"] == 100_000
    assert ", warm, " in report.line(warm)
    trial.rotation_bytes = 10 << 20
    cold = _run(trial, _roof())
    assert cold["warm"] is False and ", cold, " in report.line(cold)
    trial.work = Work(0)
    trial.rotation_bytes = 0
    assert _run(trial, _roof())["warm"] is None  # nothing is known to be read


def test_a_fault_is_shown_instead_of_a_share():
    trial = Trial(lambda _: None, Work(bytes=10**9), lambda _: Check(True))
    result = _run(trial, PLAIN)  # 0.1 s at least, measured in no time
    assert "fault" in result["floor"]
    assert "FAULT: " in report.line(result) and "% of bandwidth," not in report.line(result)
    # A file of an earlier version knows no faults, and is not believed either.
    del result["floor"]["fault"]
    result["ours"].pop("noise_percent")
    assert "FAULT: above the roof of bandwidth" in report.line(result)
