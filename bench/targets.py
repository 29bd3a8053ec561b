"""What the project asks of the GPU suites, and whether a result meets it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Metric = Literal["bandwidth", "rate", "time", "cost", "speed_up"]
# How a value is shown: factor and unit.
UNITS = {
    "bandwidth": (1e-12, "TB/s"),
    "rate": (1e-12, "TFLOP/s"),
    "time": (1e6, "us"),
    "cost": (1.0, "x of its peer"),
    "speed_up": (1.0, "x"),
}
NOT_JUDGED = "smoke: nothing is judged"
LESS_IS_BETTER = ("time", "cost")


@dataclass(frozen=True)
class Target:
    """What is asked of one case.

    Attributes:
        metric: bytes or operations that the case cannot do without, a second; seconds; time over
            that of `peer`; or the peer's time over ours.
        first: to reach first; None where there is one goal only.
        goal: to reach then.
        peer: for the two ratios.
    """

    metric: Metric
    first: float | None
    goal: float
    peer: str | None = None


# By suite and case; a case of `gpu_workflow` is a workflow.
TARGETS = {
    ("gpu_attention", "decode_32x4k"): Target("bandwidth", 4.0e12, 4.1e12),
    ("gpu_attention", "decode_1x8k"): Target("time", 15e-6, 11e-6),
    ("gpu_attention", "decode_1x1k"): Target("time", None, 4e-6),
    ("gpu_attention", "verify_8"): Target("cost", 1.10, 1.03, "decode_step"),
    ("gpu_attention", "verify_16"): Target("cost", None, 1.06, "decode_step"),
    ("gpu_attention", "extend_512_on_32k"): Target("rate", 450e12, 650e12),
    ("gpu_attention", "extend_64_on_32k"): Target("time", None, 60e-6),
    ("gpu_attention", "shared_prefix_32x16k"): Target("speed_up", 8.0, 13.0, "not_shared"),
    ("gpu_model", "llama_1b_decode"): Target("time", 0.80e-3, 0.64e-3),
    ("gpu_model", "llama_1b_engine"): Target("time", 0.80e-3, 0.64e-3),
    ("gpu_model", "llama_8b_decode"): Target("time", None, 3.75e-3),
    ("gpu_model", "llama_8b_engine"): Target("time", None, 3.75e-3),
    ("gpu_workflow", "coding35"): Target("speed_up", None, 8.0, "transformers"),
}


def value_of(metric: Metric, result: dict[str, Any]) -> float:
    """The measured value of a metric."""
    seconds = float(result["ours"]["median"])
    if metric == "bandwidth":
        return float(result["work"]["bytes"]) / seconds
    if metric == "rate":
        return float(result["work"]["flops"]) / seconds
    if metric == "time":
        return seconds / result.get("units_per_call", 1)
    # Of whole turns the ratio of the medians counts, else the median of the paired ratios.
    ratio = float(result.get("ratio_of_medians", result["ratio"]["median"]))
    return ratio if metric == "speed_up" else 1 / ratio


def headline(result: dict[str, Any]) -> dict[str, Any] | None:
    """What is asked of a result beside what it reached; None where nothing is asked of it."""
    name = result["axes"].get("workflow", result["name"])
    target = TARGETS.get((result["suite"], name))
    if target is None or (target.peer is not None and target.peer != result["peer_name"]):
        return None
    value = value_of(target.metric, result)
    return {**asdict(target), "value": value, "met": _met(target, value)}


def _met(target: Target, value: float) -> str:
    """ "goal", "first" or "no"."""
    sign = -1 if target.metric in LESS_IS_BETTER else 1
    if sign * value >= sign * target.goal:
        return "goal"
    return "first" if target.first is not None and sign * value >= sign * target.first else "no"


def words(line: dict[str, Any]) -> str:
    """A headline in a few words."""
    scale, unit = UNITS[line["metric"]]
    asked = [bound for bound in (line["first"], line["goal"]) if bound is not None]
    bounds = ", then ".join(f"{bound * scale:.4g}" for bound in asked)
    sign = "<=" if line["metric"] in LESS_IS_BETTER else ">="
    met = {"goal": "goal met", "first": "first target met", "no": "not met"}[line["met"]]
    return f"{line['value'] * scale:.4g} {unit} (asked: {sign} {bounds}): {met}"


def lines(document: dict[str, Any]) -> list[str]:
    """One line for each case of which something is asked, and for each that failed."""
    found: dict[str, str] = {}
    is_smoke = bool(document.get("smoke"))
    for result in () if is_smoke else document["results"]:
        line = result.get("headline")
        if line is not None:
            # With several peers a case is there several times; the first is as good as any.
            name = result["axes"].get("workflow", result["name"])
            found.setdefault(f"{result['suite']} {name}", words(line))
    for failed in document.get("failed", ()):
        name = failed["axes"].get("workflow", failed["name"])
        found[f"{failed['suite']} {name}"] = f"FAILED: {failed['failed']}"
    said = [NOT_JUDGED] if is_smoke else []
    return said + [f"{name}: {text}" for name, text in found.items()]


def main(documents: list[dict[str, Any]]) -> int:
    """Prints the lines of all documents."""
    for document in documents:
        for line in lines(document):
            print(line)
    return 0
