"""What a step costs: seconds by rows and context, the measure of whether a draft pays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

FORMAT = "stateful-kv-cost-curve/1"
_MAX_POINTS = 1024
_MAX_VALUE = 1e9


@dataclass(frozen=True)
class CostCurve:
    """Seconds of one forward pass: t(rows, context) = linear(rows) + attention(rows, context).

    `linear` goes straight from point to point. Attention reads a context once and computes with
    it once a row, so its cost is `context * (per_token + rows * per_row_token)`.

    Attributes:
        rows: row counts of the points, ascending, the first is 1.
        seconds: of a pass with that many rows and no context; never decreasing.
        per_token: seconds for each token of context, whatever the rows.
        per_row_token: seconds for each (row, token of context).
        window: a row sees only that many latest tokens; None sees all.
        noise: how far repeated times lay apart, 0.1 is a tenth; 0 where nothing was measured.
    """

    rows: tuple[int, ...]
    seconds: tuple[float, ...]
    per_token: float = 0.0
    per_row_token: float = 0.0
    window: int | None = None
    noise: float = 0.0
    # Seconds of every row count up to the last point, and what a row behind it costs.
    _table: tuple[float, ...] = field(init=False, repr=False, compare=False, default=())
    _further_row: float = field(init=False, repr=False, compare=False, default=0.0)

    def __post_init__(self) -> None:
        """Checks every field and fills the table."""
        rows, seconds = tuple(self.rows), tuple(self.seconds)
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "seconds", seconds)
        good = 0 < len(rows) <= _MAX_POINTS and all(map(_is_count, rows))
        good = good and rows[0] == 1 and rows[-1] <= _MAX_POINTS
        good = good and all(a < b for a, b in pairwise(rows))
        _require(good, "rows", "expected ascending integers from 1 on", self.rows)
        good = len(seconds) == len(rows) and all(_is_real(s) and s > 0 for s in seconds)
        good = good and all(a <= b for a, b in pairwise(seconds))
        _require(good, "seconds", "expected one number > 0 a point, never decreasing", seconds)
        for name in ("per_token", "per_row_token", "noise"):
            value = getattr(self, name)
            _require(_is_real(value) and value >= 0, name, "expected a number >= 0", value)
        good = self.window is None or _is_count(self.window)
        _require(good, "window", "expected an integer >= 1 or None", self.window)
        table = [seconds[0]]
        for (low, low_s), (high, high_s) in pairwise(zip(rows, seconds, strict=True)):
            step = (high_s - low_s) / (high - low)
            table += [low_s + step * (row - low) for row in range(low + 1, high)] + [high_s]
        object.__setattr__(self, "_table", tuple(table))
        # Behind the last point a row costs what one did there, and no less than on average.
        num = len(table)
        last = table[-1] - table[-2] if num > 1 else table[0]
        mean = (table[-1] - table[0]) / (num - 1) if num > 1 else table[0]
        object.__setattr__(self, "_further_row", max(last, mean))

    def linear(self, rows: int) -> float:
        """Seconds of a pass with that many rows (at least 1) and no context."""
        beyond = rows - len(self._table)
        if beyond < 0:
            return self._table[rows - 1]
        return self._table[-1] + beyond * self._further_row

    def attention(self, rows: int, context: int) -> float:
        """Seconds that the context of one sequence adds to a pass with `rows` rows of it."""
        if self.window is not None:
            context = min(context, self.window)
        return context * (self.per_token + rows * self.per_row_token)

    def total(self, rows: int, context: int) -> float:
        """Seconds of a pass with `rows` rows of one sequence behind `context` tokens."""
        return self.linear(rows) + self.attention(rows, context)

    def to_json(self) -> dict[str, Any]:
        """The curve as plain JSON data."""
        return {
            "format": FORMAT,
            "rows": list(self.rows),
            "seconds": list(self.seconds),
            "per_token": self.per_token,
            "per_row_token": self.per_row_token,
            "window": self.window,
            "noise": self.noise,
        }

    @staticmethod
    def from_json(data: Any) -> CostCurve:
        """The curve that `to_json` wrote.

        Raises:
            ValueError: names the field that is missing or wrong.
        """
        _require(isinstance(data, Mapping), "cost curve", "expected an object", data)
        _require(data.get("format") == FORMAT, "format", f"expected {FORMAT}", data.get("format"))
        names = ("rows", "seconds", "per_token", "per_row_token", "window", "noise")
        for name in names:
            _require(name in data, name, "expected the field", sorted(map(str, data)))
        for name in names[:2]:
            _require(isinstance(data[name], list), name, "expected a list", data[name])
        return CostCurve(**{name: data[name] for name in names})

    def __str__(self) -> str:
        points = ", ".join(
            f"{rows}: {1e3 * seconds:.3g}"
            for rows, seconds in zip(self.rows, self.seconds, strict=True)
        )
        per_kilotoken = [1e6 * (self.per_token + rows * self.per_row_token) for rows in (1, 4)]
        return (
            f"ms by rows {points}; and for 1000 tokens of context "
            f"{per_kilotoken[0]:.3g} with 1 row, {per_kilotoken[1]:.3g} with 4"
        )


def point_rows(max_rows: int) -> tuple[int, ...]:
    """Row counts worth measuring: 1, 2, 3, 4, 6, 8, 12, 16, ... and `max_rows` itself."""
    rows, count = {1, 2, max_rows}, 2
    while count < max_rows:
        rows |= {count, count * 3 // 2}
        count *= 2
    return tuple(sorted(row for row in rows if row <= max_rows))


def smoothed(values: Sequence[float]) -> tuple[float, ...]:
    """The never decreasing sequence closest to `values`: neighbours out of order are averaged."""
    runs: list[tuple[float, int]] = []  # mean, how many
    for value in values:
        mean, num = value, 1
        while runs and runs[-1][0] > mean:
            other_mean, other_num = runs.pop()
            mean = (mean * num + other_mean * other_num) / (num + other_num)
            num += other_num
        runs.append((mean, num))
    return tuple(mean for mean, num in runs for _ in range(num))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_real(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= _MAX_VALUE  # false for NaN; exact for integers of any size


def _require(condition: bool, name: str, rule: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{name}: {rule}, got {value!r}")
