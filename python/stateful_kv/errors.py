"""All exceptions of this package that are not plain ValueError, TypeError or IndexError."""

from __future__ import annotations

from typing import Any


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


def require_type(
    field: str, value: Any, types: type | tuple[type, ...], expected: str, *, optional: bool = False
) -> None:
    """Raises InvalidRequestError naming `field` unless `value` is of one of `types`."""
    if not (optional and value is None) and not isinstance(value, types):
        raise InvalidRequestError(f"{field}: expected {expected}, got {value!r}")


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
