"""The harness alone: statistics, verdicts, pairing, checks, and the command line around it."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from bench import __main__ as command
from bench import harness, report, roofs
from bench.harness import Case, Check, Settings, Trial, Work
from bench.selection import Selection

ROOF = {"read_bytes_per_s": 1e10, "fp32_flops_per_s": 1e11}
SMOKE = Settings(smoke=True)


def _case(trial: Trial, name: str = "c") -> Case:
    return Case(name, {"n": 1}, lambda settings: trial)


def _run(trial: Trial, settings: Settings = SMOKE) -> list[dict]:
    results: list[dict] = []
    harness.run_cases("s", [_case(trial)], settings, ROOF, results.append)
    return results


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.03, 1.5, "FASTER"),
        (0.5, 0.97, "SLOWER"),
        (0.97, 1.04, "SAME"),
        (1.01, 1.04, "SAME"),
        (0.9, 1.2, "UNCLEAR"),
        (1.01, 1.2, "UNCLEAR"),
    ],
)
def test_verdict(low, high, expected):
    assert harness.verdict(low, high) == expected


def test_bootstrap_interval_holds_the_median_and_repeats():
    ratios = [1.4, 1.5, 1.6, 1.5, 1.45, 1.55] * 5
    low, high = harness.bootstrap_interval(ratios)
    assert 1.4 <= low <= 1.5 <= high <= 1.6
    assert (low, high) == harness.bootstrap_interval(ratios)


def test_ratio_is_peer_over_ours():
    ratio = harness.ratio_of([1.0] * 20, [3.0] * 20)
    assert ratio["median"] == ratio["low"] == ratio["high"] == 3.0
    assert ratio["verdict"] == "FASTER" and len(ratio["samples"]) == 20


def test_compare():
    a = torch.tensor([1.0, 100.0])
    assert harness.compare(a, a + 0.05, 1e-3).ok
    assert not harness.compare(a, a + 0.5, 1e-3).ok
    assert not harness.compare(a, a, 1e-3, bits_equal=False).ok
    assert not harness.compare(a, a[:1], 1e-3).ok
    assert not harness.compare(a, a * float("nan"), 1e-3).ok
    ids = torch.tensor([1, 2])
    assert harness.compare(ids.int(), ids, 0.0).ok
    assert not harness.compare((a, ids), (a, ids + 1), 1.0).ok


def test_sides_take_turns_and_rotate():
    calls: list[tuple[str, int]] = []
    trial = Trial(
        ours=lambda i: calls.append(("ours", i)),
        peers={"p": lambda i: calls.append(("peer", i))},
        check=lambda peer: Check(True),
        work=Work(1),
        rotations=3,
        calls_per_sample=2,
        reset=lambda: calls.append(("reset", 0)),
    )
    (result,) = _run(trial)
    samples = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert all(sample[2] == ("reset", 0) for sample in samples)
    timed = [sample[0][0] for sample in samples[-6:]]
    assert timed == ["ours", "peer"] * 3
    assert {i for who, i in calls if who == "ours"} == {0, 1, 2}
    assert result["ours"]["n"] == result["peer"]["n"] == result["ratio"]["n"] == 3


def test_warm_up_is_undone_and_long_calls_need_none(monkeypatch):
    calls: list[str] = []

    def trial(seconds: float) -> Trial:
        monkeypatch.setattr(harness.time, "perf_counter", iter(range(10**6)).__next__)
        monkeypatch.setattr(harness, "LONG_CALL_S", 1 / seconds)  # the clock ticks seconds
        calls.clear()
        return Trial(
            ours=lambda i: calls.append("call"),
            check=lambda _: Check(True),
            work=Work(1),
            calls_per_sample=1,
            warm_up=True,
            reset=lambda: calls.append("reset"),
        )

    _run(trial(seconds=0.5))
    assert calls == ["call", "reset"] * 10  # 5 samples with a warm-up each
    _run(trial(seconds=2.0))
    assert calls == ["call", "reset"] * 6  # only the first one has a warm-up


def test_a_missing_peer_is_named_and_ours_timed_alone():
    trial = Trial(
        ours=lambda _: None,
        peers={"gone": harness.Missing("pip install gone"), "there": lambda _: None},
        check=lambda peer: Check(peer in ("", "there")),
        work=Work(8),
    )
    skipped, alone = _run(trial)
    assert (skipped["peer_name"], skipped["skipped"]) == ("gone", "pip install gone")
    assert "gone skipped: pip install gone" in report.line(skipped)
    assert alone["peer_name"] is None and alone["ours"]["n"] == 3
    results = _run(trial, Settings(smoke=True, peer="all"))
    assert [r["peer_name"] for r in results] == ["gone", "there"]
    assert "ratio" in results[1]
    (only,) = _run(trial, Settings(smoke=True, peer="there,other"))
    assert only["peer_name"] == "there"


def test_fractions_of_the_roofs():
    trial = Trial(lambda _: None, Work(bytes=1000, flops=10**6), lambda _: Check(True))
    (result,) = _run(trial)
    floor, seconds = result["floor"], result["ours"]["median"]
    assert floor["kind"] == "flops" and floor["fraction"] == pytest.approx(1e-5 / seconds)
    assert floor["read_fraction"] == pytest.approx(1e-7 / seconds)


def test_details_are_asked_for_by_peer():
    trial = Trial(
        ours=lambda _: None,
        peers={"p": lambda _: None},
        check=lambda _: Check(True),
        work=Work(8),
        details=lambda peer: {"of": peer},
    )
    assert _run(trial)[0]["details"] == {"of": "p"}


def test_failed_check_stops_before_timing():
    def fail(_index):
        raise AssertionError("timed although the check failed")

    trial = Trial(
        ours=fail, peers={"p": fail}, check=lambda _: Check(False, 2.0, 1.0), work=Work(1)
    )
    with pytest.raises(harness.CheckFailedError, match="error 2 against 1"):
        _run(trial)


def test_a_case_without_a_peer_is_checked_too():
    trial = Trial(ours=lambda _: None, check=lambda peer: Check(peer != ""), work=Work(1))
    with pytest.raises(harness.CheckFailedError, match="ours differs from the rule"):
        _run(trial)


def test_peers_are_chosen():
    trial = Trial(
        ours=lambda _: None,
        peers={"first": lambda _: None, "second": lambda _: None},
        check=lambda _: Check(True),
        work=Work(8),
    )

    def names(peer: str | None) -> list[str]:
        return [r["peer_name"] for r in _run(trial, Settings(smoke=True, peer=peer))]

    assert names(None) == ["first"]
    assert names("all") == ["first", "second"]
    assert names("second") == ["second"]
    assert names("other") == []
    trial.peers = {}
    (result,) = _run(trial)
    assert result["peer_name"] is None and "ratio" not in result
    assert report.line(result).startswith("c n=1: ")


def test_only_selects_by_name():
    trial = Trial(lambda _: None, Work(1), lambda _: Check(True))
    results: list[dict] = []
    cases = [_case(trial, "match"), _case(trial, "fork")]
    settings = Settings(smoke=True, selection=Selection("for"))
    harness.run_cases("s", cases, settings, ROOF, results.append)
    assert [r["name"] for r in results] == ["fork"]
    results.clear()
    harness.run_cases(
        "s", cases, Settings(smoke=True, selection=Selection("mat,x")), ROOF, results.append
    )
    assert [r["name"] for r in results] == ["match"]


def test_roofs_state_their_method():
    measured = roofs.measure(smoke=True)
    assert measured["read_bytes_per_s"] == max(measured["read_by_method"].values()) > 0
    assert measured["fp32_flops_per_s"] > 0
    assert "torch.mm" in measured["fp32_method"]
    assert roofs.cold_bytes() > 0


def test_settings_are_plain():
    assert json.dumps(asdict(SMOKE))


def test_bad_command_lines(capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        command.main(["run", "nothing"])
    assert caught.value.code == 2
    with pytest.raises(SystemExit) as caught:
        command.main(["run", "state", "--device", "tpu"])
    assert caught.value.code == 2
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    assert command.main(["report", str(bad)]) == 2
    assert command.main(["report", str(tmp_path / "missing.json")]) == 2
    assert "Traceback" not in capsys.readouterr().err
