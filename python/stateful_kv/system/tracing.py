"""Named spans over what the engine does: next to free unless somebody records them.

The places are few: a turn, its text work, a step and the phases of a step. Who wants to see them
(`apps/profile`) hands a recorder to `recording`; without one a span is a shared object that does
nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import get_ident
from typing import ParamSpec, Protocol, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Recorder(Protocol):
    """What takes spans, those of the thread that began `recording`; others are left out."""

    def open(self, name: str, label: str) -> AbstractContextManager[object]:
        """Returns a span that begins when it is entered."""
        ...


_NOTHING: AbstractContextManager[object] = nullcontext()
_recorder: Recorder | None = None
_owner = 0  # the thread whose spans `_recorder` takes


def span(name: str, label: Callable[[], str] | None = None) -> AbstractContextManager[object]:
    """Returns a span to enter with `with`.

    Args:
        name: the kind of span, one of few.
        label: says more about this one; called only if the span is recorded.
    """
    if _recorder is None or get_ident() != _owner:
        return _NOTHING
    return _recorder.open(name, "" if label is None else label())


def traced(name: str) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """Makes each call of the decorated function a span."""

    def decorate(function: Callable[_P, _T]) -> Callable[_P, _T]:
        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            if _recorder is None or get_ident() != _owner:
                return function(*args, **kwargs)
            with _recorder.open(name, ""):
                return function(*args, **kwargs)

        return call

    return decorate


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Gives all spans of this thread to `recorder` while it is entered."""
    global _owner, _recorder
    before = _owner, _recorder
    _owner, _recorder = get_ident(), recorder
    try:
        yield
    finally:
        _owner, _recorder = before
