"""The least time that the machine allows for a case, and the share of it that a result reached.

Bytes come from memory only if the inputs do not fit into the last-level cache; those that do are
warm and are held against reads of a buffer of their own size. A share above 100 % says that the
measurement is at fault: the roof is measured once more, and if that does not explain it the result
says so instead of a share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench import roofs

ATTEMPTS = 3  # to measure a roof that a result exceeds


@dataclass(frozen=True)
class Work:
    """Bytes that must move and flops that must be done for one call, from the shapes alone.

    Attributes:
        bytes: all of them.
        flops: floating-point operations.
        hot_bytes: those of `bytes` that every call finds at the same addresses, however the inputs
            rotate: results, tables, weights of which there is one copy. They stay in the cache.
    """

    bytes: int
    flops: int = 0
    hot_bytes: int = 0


def working_set(work: Work, rotation_bytes: int) -> int:
    """Bytes that pass through the cache before a call meets its inputs again."""
    return max(rotation_bytes, work.bytes)


def is_warm(num_bytes: int, roof: dict[str, Any]) -> bool | None:
    """Whether that many bytes fit into the last-level cache; None where its size is unknown."""
    size = roof.get("llc_bytes")
    return None if size is None else num_bytes <= size


def floor_of(work: Work, roof: dict[str, Any], rotation_bytes: int = 0) -> dict[str, Any]:
    """The least time the roofs allow for `work`, and which roof it is."""
    bytes_per_s, flops_per_s = roofs.limits(roof)
    num_bytes = working_set(work, rotation_bytes)
    by_kind = {"bandwidth": 0.0, "cache bandwidth": 0.0, "flops": work.flops / flops_per_s}
    # None: the size of the cache is unknown, but a buffer of the same size shows what can be had.
    if "llc_bytes" in roof and is_warm(num_bytes, roof) is not False:
        if work.bytes:
            by_kind["cache bandwidth"] = work.bytes / roofs.cache_bandwidth(roof, num_bytes)
    else:
        by_kind["bandwidth"] = (work.bytes - work.hot_bytes) / bytes_per_s
        if work.hot_bytes and "llc_bytes" in roof:
            hot = work.hot_bytes / roofs.cache_bandwidth(roof, work.hot_bytes)
            by_kind["cache bandwidth"] = hot
    kind = max(by_kind, key=by_kind.__getitem__)
    read = max(by_kind["bandwidth"], by_kind["cache bandwidth"])
    return {"seconds": by_kind[kind], "kind": kind, "read_seconds": read}


def _share(floor: dict[str, Any], seconds: float) -> dict[str, Any]:
    known = {key: floor[key] for key in ("seconds", "kind")}
    return {
        **known,
        "fraction": floor["seconds"] / seconds,
        "read_fraction": floor["read_seconds"] / seconds,
    }


def judge(
    work: Work, rotation_bytes: int, roof: dict[str, Any], seconds: float, noise_percent: float
) -> dict[str, Any]:
    """Floor and shares of a result, with `fault` where a share cannot be true.

    Args:
        work: of a call.
        rotation_bytes: of all copies of its inputs.
        roof: of the run; a roof that is exceeded is measured again and raised there.
        seconds: measured for a call.
        noise_percent: of those seconds; a share may exceed 100 % by as much.
    """
    found = _share(floor_of(work, roof, rotation_bytes), seconds)
    most = 1 + noise_percent / 100
    for _ in range(ATTEMPTS if roofs.can_measure_again(roof) else 0):
        if found["fraction"] <= most:
            break
        all_bytes = working_set(work, rotation_bytes)
        is_hot = found["kind"] == "cache bandwidth" and is_warm(all_bytes, roof) is False
        num_bytes = work.hot_bytes if is_hot else all_bytes
        roofs.measure_again(roof, found["kind"], num_bytes)
        found = _share(floor_of(work, roof, rotation_bytes), seconds)
    if found["fraction"] > most:
        found["fault"] = (
            f"{found['fraction']:.0%} of the {found['kind']} roof, {noise_percent:.1f} % noise: "
            "the roof was measured too low or the work is counted wrong"
        )
    return found
