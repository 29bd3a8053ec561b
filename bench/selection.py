"""Which rows of the suites are to run: what there is, filters by name and by axis."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

Value = int | float | str


class SelectionError(Exception):
    """A filter that matches nothing; the message names what there is."""


@dataclass(frozen=True)
class Row:
    """A row of a suite, without what it takes to run it.

    Attributes:
        name: of the case.
        axes: its values by axis.
        label: what `--only` is compared with, if that is not the name.
    """

    name: str
    axes: Mapping[str, Value]
    label: str | None = None


@dataclass(frozen=True)
class Selection:
    """Filters of the command line.

    Attributes:
        only: rows whose name contains this, or one of these by commas; None: all.
        where: by axis the values that are let through, as text.
    """

    only: str | None = None
    where: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def takes(self, label: str, axes: Mapping[str, Value]) -> bool:
        """Whether a row of this name and these axes is to run; it must have every axis named."""
        return self._takes_name(label) and all(
            axis in axes and any(_equals(axes[axis], text) for text in texts)
            for axis, texts in self.where.items()
        )

    def _takes_name(self, label: str) -> bool:
        return self.only is None or any(part in label for part in self.only.split(","))

    def check(self, rows: Sequence[Row]) -> None:
        """Raises SelectionError for an axis or a value that no row has, or if no row is left."""
        known = values_by_axis(rows)
        for axis, texts in self.where.items():
            if axis not in known:
                raise SelectionError(f"--where: no axis {axis}; there are {_listed(known)}")
            for text in texts:
                if not any(_equals(value, text) for value in known[axis]):
                    raise SelectionError(
                        f"--where: no row has {axis}={text}; {axis} is {_listed(known[axis])}"
                    )
        if not any(self._takes_name(row.label or row.name) for row in rows):
            names = dict.fromkeys(row.label or row.name for row in rows)
            raise SelectionError(f"--only: no row matches {self.only}; there are {_listed(names)}")
        if not any(self.takes(row.label or row.name, row.axes) for row in rows):
            left = [row for row in rows if self._takes_name(row.label or row.name)]
            raise SelectionError(
                "no row matches all filters together; axes of the rows left by --only: "
                + "; ".join(lines(left))
            )


def _listed(values: Iterable[Value]) -> str:
    return ", ".join(str(value) for value in values)


def _equals(value: Value, text: str) -> bool:
    """Whether an axis value is what the command line says; 1 is 1.0."""
    if isinstance(value, str):
        return value == text
    try:
        return float(text) == value
    except ValueError:
        return False


def parse_where(text: str) -> tuple[str, tuple[str, ...]]:
    """AXIS=VALUE,VALUE as axis and values; ValueError for anything else."""
    axis, sign, values = text.partition("=")
    parts = tuple(part.strip() for part in values.split(","))
    if not sign or not axis.strip() or not all(parts):
        raise ValueError(f"expected AXIS=VALUE,..., got {text!r}")
    return axis.strip(), parts


def values_by_axis(rows: Iterable[Row]) -> dict[str, list[Value]]:
    """Every axis of some rows with its values, in the order in which they come."""
    known: dict[str, dict[Value, None]] = {}
    for row in rows:
        for axis, value in row.axes.items():
            known.setdefault(axis, {})[value] = None
    return {axis: list(values) for axis, values in known.items()}


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """Rows of one name on one line: how many, and their axes with values."""
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row.name, []).append(row)
    for name, some in by_name.items():
        axes = (
            f"{axis}={','.join(map(str, values))}" for axis, values in values_by_axis(some).items()
        )
        yield " ".join([f"{name} ({len(some)})", *axes])
