"""Values of a model file by their names: each of the type that is wanted, or a ModelLoadError."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from stateful_kv.errors import ModelLoadError, shown


class Fields:
    """Typed access to the values of one file or of one object in it.

    A value that is null counts as missing.
    """

    def __init__(self, values: Mapping[str, Any], where: str, prefix: str = "") -> None:
        """Keeps all three.

        Args:
            values: what the file has, of any type.
            where: the file, for messages.
            prefix: of all names.
        """
        self.where = where
        self._values = values
        self._prefix = prefix

    def get(self, key: str) -> Any:
        """Returns the value as it is; None if it is missing."""
        return self._values.get(self._prefix + key)

    def integer(self, key: str, default: int | None = None) -> int:
        """Returns an integer; without a default it must be there."""
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.unsupported(key, "an integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Returns a finite number; without a default it must be there."""
        value = self.get(key)
        value = default if value is None else value
        try:
            if not isinstance(value, bool) and isinstance(value, (int, float)):
                number = float(value)
                if math.isfinite(number):
                    return number
        except OverflowError:
            pass  # an integer larger than any float
        raise self.unsupported(key, "a finite number")

    def flag(self, key: str) -> bool:
        """Returns a boolean; False if it is missing."""
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.unsupported(key, "true or false")
        return bool(value)

    def text(self, key: str) -> str | None:
        """Returns text; None if it is missing."""
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            raise self.unsupported(key, "text")
        return value

    def child(self, key: str) -> Fields | None:
        """Returns the fields of an object; None if it is missing or empty."""
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.unsupported(key, "an object")
        if not value:
            return None
        return Fields(value, f"{self.where}: {self._prefix}{key}")

    def unsupported(self, key: str, want: str) -> ModelLoadError:
        """The error for a value that is not what is wanted."""
        got = shown(self.get(key))
        return ModelLoadError(f"{self.where}: {self._prefix}{key}: expected {want}, got {got}")
