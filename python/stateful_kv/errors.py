"""All exceptions of this package that are not plain ValueError, TypeError or IndexError."""

from __future__ import annotations

import reprlib
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200


class StatefulKVError(Exception):
    """Base of the exceptions below: what the engine refuses, with the state left as it was."""


class OutOfPagesError(StatefulKVError):
    """The KV pool cannot hold the tokens, even after evicting all that may be evicted.

    Attributes:
        wanted: pages the request needs.
        free: pages that are free.
        evictable: further pages that eviction could free.
        pinned: pages that sequences or pins hold, which eviction must keep.
    """

    def __init__(self, wanted: int, free: int, evictable: int, pinned: int) -> None:
        super().__init__(wanted, free, evictable, pinned)
        self.wanted = wanted
        self.free = free
        self.evictable = evictable
        self.pinned = pinned

    def __str__(self) -> str:
        return (
            f"the KV pool is too small: {self.wanted} pages wanted, {self.free} free, "
            f"{self.evictable} evictable, {self.pinned} pinned; close sessions or raise kv_tokens"
        )


class SessionClosedError(StatefulKVError):
    """The session was closed; only what it returned before remains."""


class SessionBusyError(StatefulKVError):
    """The session is in the middle of a turn, which must end first."""


class StateBusyError(StatefulKVError, RuntimeError):
    """A state object (page pool, sequence table, ...) is inside a call of another thread.

    In a forked child also: a thread that the child does not have was changing it at the fork.
    """


class InvalidRequestError(StatefulKVError, ValueError):
    """The request cannot be served as written: empty messages, unknown roles, bad token ids."""


class WorkflowError(InvalidRequestError):
    """A workflow file is missing, unreadable or not in the expected format."""


class BadLogitsError(StatefulKVError):
    """A row of logits holds NaN or +inf, or nothing but -inf: no token can be chosen from it."""

    @staticmethod
    def at(position: int, top: float) -> BadLogitsError:
        """The error for a row whose maximum is `top`."""
        return BadLogitsError(f"row_error: logits for position {position} have the maximum {top}")


def shown(value: object) -> str:
    """A short text for any value, for messages: also for one that is huge, deep or has no repr."""
    try:
        return _SHORT.repr(value)
    except Exception:  # an integer with more digits than Python writes, for example
        return f"a value of type {type(value).__name__}"


def require(condition: bool, field: str, rule: str, value: object) -> None:
    """Raises ValueError naming `field` unless `condition` holds."""
    if not condition:
        raise ValueError(f"{field}: {rule}, got {shown(value)}")


def require_int(field: str, value: Any, minimum: int) -> None:
    """Raises ValueError unless `value` is an int (not a bool) of at least `minimum`."""
    good = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
    require(good, field, f"expected an integer >= {minimum}", value)


def require_real(field: str, value: Any, rule: str, low: float, high: float) -> None:
    """Raises ValueError unless `value` is a finite number within [low, high]."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    good = good and low <= value <= high  # false for NaN; exact for integers of any size
    require(good, field, rule, value)


def require_type(
    field: str, value: Any, types: type | tuple[type, ...], expected: str, *, optional: bool = False
) -> None:
    """Raises InvalidRequestError naming `field` unless `value` is of one of `types`."""
    if not (optional and value is None) and not isinstance(value, types):
        raise InvalidRequestError(f"{field}: expected {expected}, got {shown(value)}")


class ContextLengthError(StatefulKVError, ValueError):
    """The prompt and the wanted output do not fit the model's context."""


class ModelNotFoundError(StatefulKVError):
    """No model of this name: no such file, or the package with its weights is not installed."""


class ModelLoadError(StatefulKVError):
    """The model's files are corrupt, incomplete or of an unsupported kind."""


class DeviceUnavailableError(StatefulKVError):
    """The device is not there, or this build has no kernels for it."""


class BuildMismatchError(StatefulKVError, ImportError):
    """The extension was built for another torch or Python than the running one."""


class InvariantError(StatefulKVError):
    """The library broke one of its own rules: a bug to report, never a fault of the caller."""


def without_frames(error: BaseException) -> BaseException:
    """The error without tracebacks, its causes too: frames keep alive all that they worked with."""
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        current = left.pop()
        if current is not None and id(current) not in seen:
            seen.add(id(current))
            current.__traceback__ = None
            left += [current.__cause__, current.__context__]
    return error
