"""One harness for all benches: check first, then time ours and the peer in turns.

A suite yields cases. A case is set up into a trial: the call of ours, calls of the peers, a check
that they agree, and the bytes and flops counted from the shapes. The harness runs the check, finds
the quickest way of a peer that has several, warms up, and takes samples A B A B in one process; the
verdict comes from the paired ratios (peer / ours, so above 1 ours is faster), whose median has a
bootstrap interval.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from bench import cuda_timing, floors, roofs, targets
from bench.cuda_timing import Call
from bench.floors import Work as Work
from bench.selection import Row, Selection
from bench.ways import Choice, Ways, quickest

SCHEMA = "stateful-kv-bench/1"
CLEAR = 0.02  # An interval this far from 1 is FASTER or SLOWER.
EQUAL = 0.05  # An interval within this of 1 is SAME.
MIN_PAIRS = 20


@dataclass(frozen=True)
class Settings:
    """What the command line chose."""

    smoke: bool = False
    device: str = "cpu"
    peer: str | None = None  # None: the first peer of each case; "all"; or names with commas.
    pairs: int = MIN_PAIRS
    sample_s: float = 0.01
    selection: Selection = field(default_factory=Selection)

    @property
    def num_pairs(self) -> int:
        return 3 if self.smoke else self.pairs

    @property
    def min_sample_s(self) -> float:
        return 0.0005 if self.smoke else self.sample_s

    def asks_for(self, peer: str) -> bool:
        """Whether this peer was named, or all were."""
        return self.peer is not None and (self.peer == "all" or peer in self.peer.split(","))

    @property
    def choice_s(self) -> float:
        """Length of a sample that only chooses between the ways of a peer."""
        return self.min_sample_s / 2

    @property
    def cold_bytes(self) -> int:
        return 1 << 20 if self.smoke else roofs.cold_bytes(self.device)


@dataclass(frozen=True)
class Check:
    """Outcome of comparing ours with a peer before timing."""

    ok: bool
    max_error: float = 0.0
    tolerance: float = 0.0
    # Whether results are equal bit for bit to ours computed alone; None where it is not checked.
    bits_equal: bool | None = None
    # Whether a model and its peer choose the same token from the last row; None elsewhere.
    same_token: bool | None = None


@dataclass(frozen=True)
class Missing:
    """Stands for a peer that cannot run here; the reason is one line and says how to get it."""

    reason: str


class PeerMissingError(Exception):
    """A peer cannot run here; the message is the reason that goes into the result file."""


class PeerFailedError(Exception):
    """A peer that ran stopped doing so; the message is one line."""


@dataclass
class Trial:
    """A case that is set up. Calls take a rotation index in [0, rotations)."""

    ours: Call
    work: Work
    check: Callable[[str], Check]  # given the peer's name, or "" where there is no peer
    peers: dict[str, Call | Ways | Missing] = field(default_factory=dict)
    rotations: int = 1
    rotation_bytes: int = 0
    calls_per_sample: int | None = None
    # Runs untimed after each sample: undoes what the calls changed.
    reset: Callable[[], None] | None = None
    # Each sample waits until the other side's threads sleep, then wakes its own with a call that
    # `reset` undoes. None: unless `calls_per_sample` gives each call its place in the sample.
    warm_up: bool | None = None
    # More about ours or the peer for the result file, asked for after the timing.
    details: Callable[[str], dict[str, Any]] | None = None
    units: int = 1
    unit: str = "call"
    # The calls are kernels of a CUDA device only: they are captured and timed there.
    is_captured: bool = False


@dataclass(frozen=True)
class Case:
    """A named point of a suite; `setup` allocates, so cases are set up one at a time."""

    name: str
    axes: dict[str, int | float | str]
    setup: Callable[[Settings], Trial]


def rows_of(cases: Iterable[Case]) -> list[Row]:
    """What `--list` and the filters need to know of cases."""
    return [Row(case.name, case.axes) for case in cases]


def compare(ours: Any, peer: Any, tolerance: float, bits_equal: bool | None = None) -> Check:
    """Largest absolute difference over the peer's largest value (at least 1), against `tolerance`.

    Takes tensors or tuples of them; integers must be equal.
    """
    if isinstance(ours, tuple):
        parts = [compare(a, b, tolerance) for a, b in zip(ours, peer, strict=True)]
        worst = max(part.max_error for part in parts)
        return Check(all(part.ok for part in parts), worst, tolerance, bits_equal)
    if ours.shape != peer.shape:
        return Check(False, float("inf"), tolerance, bits_equal)
    if not ours.is_floating_point():
        same = bool(torch.equal(ours.long(), peer.long()))
        return Check(same, 0.0 if same else float("inf"), 0.0, bits_equal)
    reference = peer.double()
    scale = max(1.0, float(reference.abs().max()))
    error = float((ours.double() - reference).abs().max()) / scale
    ok = error <= tolerance and bits_equal is not False
    return Check(ok, error, tolerance, bits_equal)


def statistics_of(samples: Iterable[float]) -> dict[str, Any]:
    """Median, p10, p90 and noise beside the raw samples."""
    values = np.asarray(list(samples), dtype=np.float64)
    p10, median, p90 = np.percentile(values, [10, 50, 90])
    return {
        "n": len(values),
        "median": float(median),
        "p10": float(p10),
        "p90": float(p90),
        "noise_percent": noise_percent(values),
        "samples": [float(value) for value in values],
    }


def noise_percent(samples: Iterable[float]) -> float | None:
    """Distance of the quartiles in percent of the median; None of a single sample."""
    values = np.asarray(list(samples), dtype=np.float64)
    if len(values) < 2:
        return None
    p25, median, p75 = np.percentile(values, [25, 50, 75])
    return float(100 * (p75 - p25) / median)


def bootstrap_interval(ratios: Iterable[float], resamples: int = 2000) -> tuple[float, float]:
    """95 % interval of the median; the seed is fixed, so a report can be recomputed."""
    values = np.asarray(list(ratios), dtype=np.float64)
    generator = np.random.default_rng(0)
    picks = generator.integers(0, len(values), size=(resamples, len(values)))
    low, high = np.percentile(np.median(values[picks], axis=1), [2.5, 97.5])
    return float(low), float(high)


def verdict(low: float, high: float) -> str:
    """What the interval of the ratio (peer time / our time) allows to say."""
    if low > 1 + CLEAR:
        return "FASTER"
    if high < 1 - CLEAR:
        return "SLOWER"
    if low > 1 - EQUAL and high < 1 + EQUAL:
        return "SAME"
    return "UNCLEAR"


def ratio_of(ours: list[float], peer: list[float]) -> dict[str, Any]:
    """Statistics of the paired ratios, with interval and verdict."""
    ratios = [b / a for a, b in zip(ours, peer, strict=True)]
    low, high = bootstrap_interval(ratios)
    return {**statistics_of(ratios), "low": low, "high": high, "verdict": verdict(low, high)}


# Idle threads of an OpenMP runtime spin for some milliseconds after its last parallel region. Each
# side waits until those of the other one sleep, or it would be timed on cores that are taken.
SETTLE_S = 0.03
# A call at least this long is not warmed up: what it loses while its threads wake up is too little
# to measure.
LONG_CALL_S = 0.1


class _Sampler(Protocol):
    """A side of a pair, timed by the host's clock or by the device's."""

    def sample(self, calls: int) -> float: ...

    def calibrate(self, min_s: float) -> int: ...


class _Side:
    """One of the two sides of a pair: calls that go round the rotating inputs."""

    def __init__(self, call: Call, trial: Trial) -> None:
        self._call = call
        self._trial = trial
        self._next = 0
        self._last_s = 0.0
        self._warms_up = trial.warm_up
        if self._warms_up is None:
            self._warms_up = trial.calls_per_sample is None

    def sample(self, calls: int) -> float:
        """Seconds per call, as the mean of `calls` calls in a row."""
        call, rotations = self._call, self._trial.rotations
        if self._warms_up:
            time.sleep(SETTLE_S)
            if self._last_s < LONG_CALL_S:
                call(self._next % rotations)  # wakes this side's own threads
                if self._trial.warm_up and self._trial.reset is not None:
                    self._trial.reset()
        indices = [(self._next + i) % rotations for i in range(calls)]
        self._next += calls
        start = time.perf_counter()
        for index in indices:
            call(index)
        elapsed = time.perf_counter() - start
        if self._trial.reset is not None:
            self._trial.reset()
        self._last_s = elapsed / calls
        return self._last_s

    def calibrate(self, min_s: float) -> int:
        """Calls that together take at least `min_s`; also the warm-up."""
        if self._trial.calls_per_sample is not None:
            self.sample(self._trial.calls_per_sample)
            return self._trial.calls_per_sample
        calls = 1
        while (seconds := self.sample(calls) * calls) < min_s and calls < 1 << 16:
            calls = max(calls * 2, int(calls * min_s / max(seconds, 1e-9)) + 1)
        return min(calls, 1 << 16)


def _side(call: Call, trial: Trial) -> _Sampler:
    if trial.is_captured:
        return cuda_timing.GraphSide(call, trial.rotations, trial.calls_per_sample)
    return _Side(call, trial)


def _choose(peer: Call | Ways, trial: Trial, settings: Settings) -> Choice | None:
    """The way of a peer that has several; None where it has one."""
    if not isinstance(peer, Ways):
        return None

    def sampler(call: Call) -> Callable[[], float]:
        side = _side(call, trial)
        calls = side.calibrate(settings.choice_s)
        return lambda: side.sample(calls)

    return quickest(peer, sampler)


def measure(trial: Trial, peer: str | None, settings: Settings) -> dict[str, Any]:
    """Time ours, in turns with `peer` unless that is None."""
    ours = _side(trial.ours, trial)
    calls = ours.calibrate(settings.min_sample_s)
    ours.sample(calls)
    if peer is None:
        samples = [ours.sample(calls) for _ in range(settings.num_pairs)]
        return {"calls_per_sample": calls, "ours": statistics_of(samples)}
    theirs = trial.peers[peer]
    assert not isinstance(theirs, Missing)
    choice = _choose(theirs, trial, settings)
    other = _side(theirs if choice is None else choice.call, trial)
    try:
        peer_calls = other.calibrate(settings.min_sample_s)
    except cuda_timing.CaptureError as error:
        raise PeerMissingError(f"cannot be captured in a CUDA graph: {error}") from error
    other.sample(peer_calls)
    pairs = [(ours.sample(calls), other.sample(peer_calls)) for _ in range(settings.num_pairs)]
    our_samples, peer_samples = [a for a, _ in pairs], [b for _, b in pairs]
    return {
        "calls_per_sample": calls,
        "peer_calls_per_sample": peer_calls,
        "ours": statistics_of(our_samples),
        "peer": statistics_of(peer_samples),
        "ratio": ratio_of(our_samples, peer_samples),
        **({} if choice is None else {"details": choice.details()}),
    }


class CheckFailedError(Exception):
    """Ours and the peer disagree, or ours is wrong, so a timing would mean nothing."""


def run_cases(
    suite: str,
    cases: Iterable[Case],
    settings: Settings,
    roof: dict[str, Any],
    emit: Callable[[dict[str, Any]], None],
) -> None:
    """Set up, check and time each case; `emit` gets one result for each case and peer."""
    for case in cases:
        if not settings.selection.takes(case.name, case.axes):
            continue
        trial = case.setup(settings)
        chosen = _chosen_peers(trial, settings)
        missing = {name: peer for name, peer in trial.peers.items() if isinstance(peer, Missing)}
        for name in chosen:
            if name in missing:
                emit(skipped(suite, case.name, case.axes, name, missing[name].reason))
        runnable = [name for name in chosen if name not in missing]
        if chosen and not runnable:
            runnable = [None]  # No peer that was asked for can run: ours is timed alone.
        for peer in runnable:
            check = trial.check(peer or "")
            if not check.ok:
                other = peer or "the rule"
                raise CheckFailedError(
                    f"{suite}: {case.name} {case.axes}: ours differs from {other}: error "
                    f"{check.max_error:.3g} against {check.tolerance:.3g}, "
                    f"bits equal: {check.bits_equal}"
                )
            try:
                timing = measure(trial, peer, settings)
            except PeerMissingError as error:
                emit(skipped(suite, case.name, case.axes, peer, str(error)))
                peer, timing = None, measure(trial, None, settings)
            result = _result(suite, case, trial, peer, check, timing, roof)
            emit(with_headline(result, settings))


def _result(
    suite: str,
    case: Case,
    trial: Trial,
    peer: str | None,
    check: Check,
    timing: dict[str, Any],
    roof: dict[str, Any],
) -> dict[str, Any]:
    """What is emitted of a case and a peer."""
    seconds, noise = timing["ours"]["median"], timing["ours"]["noise_percent"]
    num_bytes = floors.working_set(trial.work, trial.rotation_bytes)
    about = {} if trial.details is None else trial.details(peer or "")
    about |= timing.pop("details", {})
    return {
        "suite": suite,
        "name": case.name,
        "axes": case.axes,
        "peer_name": peer,
        "check": vars(check),
        "work": vars(trial.work),
        "rotations": trial.rotations,
        "rotation_bytes": trial.rotation_bytes,
        "working_set_bytes": num_bytes,
        "warm": floors.is_warm(num_bytes, roof) if num_bytes else None,
        "unit": trial.unit,
        "units_per_call": trial.units,
        "ns_per_unit": seconds * 1e9 / trial.units,
        "noise_percent": timing.get("ratio", timing["ours"])["noise_percent"],
        "floor": floors.judge(trial.work, trial.rotation_bytes, roof, seconds, noise or 0.0),
        **timing,
        **({"details": about} if about or trial.details is not None else {}),
    }


# What a smoke run must not say: its times mean nothing, so neither do ratios and shares of them.
JUDGED = (
    "ratio", "ratio_of_medians", "ratio_to_fp32", "ratio_to_llama_cpp", "target", "target_met",
    "headline", "note", "noise_percent", "floor",
)  # fmt: skip


def unjudged(result: dict[str, Any]) -> dict[str, Any]:
    """A result of a smoke run: that it ran, and its checks."""
    return {key: value for key, value in result.items() if key not in JUDGED}


def with_headline(result: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """The result, with what the project asks of it if it is a real one of a GPU suite."""
    is_real = settings.device == "cuda" and not settings.smoke
    line = targets.headline(result) if is_real else None
    return result if line is None else {**result, "headline": line}


def skipped(
    suite: str, name: str, axes: dict[str, Any], peer: str | None, reason: str
) -> dict[str, Any]:
    """What is emitted instead of a result where a peer cannot run."""
    return {"suite": suite, "name": name, "axes": axes, "peer_name": peer, "skipped": reason}


def run_each(
    suite: str,
    cases: Iterable[Case],
    settings: Settings,
    roof: dict[str, Any],
    emit: Callable[[dict[str, Any]], None],
) -> None:
    """As `run_cases`, but a case that fails is emitted as such and the others run all the same."""
    for case in cases:
        try:
            run_cases(suite, [case], settings, roof, emit)
        except Exception as error:
            emit(failed(suite, case.name, case.axes, error))


def failed(suite: str, name: str, axes: dict[str, Any], error: Exception) -> dict[str, Any]:
    """What is emitted instead of a result where a case fails."""
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return {"suite": suite, "name": name, "axes": axes, "failed": reason}


def _chosen_peers(trial: Trial, settings: Settings) -> list[str | None]:
    names: list[str | None] = list(trial.peers)
    if settings.peer is None:
        return names[:1] or [None]
    if settings.peer == "all":
        return names or [None]
    return [name for name in names if name is not None and settings.asks_for(name)]
