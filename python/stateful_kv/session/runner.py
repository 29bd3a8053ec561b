"""What sessions need of the engine that runs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Protocol, TypeVar

from stateful_kv.session.state import SessionState
from stateful_kv.session.turn import Turn, TurnRequest
from stateful_kv.system.promise import Promise

T = TypeVar("T")


class TurnRunner(Protocol):
    """Runs operations on the state of sessions, one at a time, and takes the steps of turns.

    All methods may be called from any thread. An operation is run by whoever owns the state; see
    `engine.thread`.
    """

    @property
    def vocab_size(self) -> int:
        """Width of a row of logits."""
        ...

    @property
    def context_len(self) -> int:
        """Tokens a session may hold."""
        ...

    def perform(self, operation: Callable[[], T]) -> T:
        """Runs an operation when its turn comes; returns or raises what it does."""
        ...

    def submit(self, operation: Callable[[], T]) -> Promise[T]:
        """Hands an operation to the engine's thread, which is started if need be."""
        ...

    def post(self, operation: Callable[[], object]) -> None:
        """Leaves an operation to be run soon and returns at once."""
        ...

    def watch(self, user: object, subject: Turn | SessionState) -> None:
        """Ends a turn or a session soon after the last reference to its user is gone."""
        ...

    def catch_up(self) -> None:
        """Runs what was posted, if the calling thread can: before state is looked at."""
        ...

    def open(self, request: TurnRequest) -> Turn | None:
        """Begins a turn; part of an operation.

        Returns:
            The turn; None if the session has other tokens than the request was made for, or
            another turn runs.
        """
        ...

    def run_turns(self, openers: Sequence[Callable[[], Turn]]) -> list[Turn | Exception]:
        """Opens turns and returns when all of them are settled.

        Args:
            openers: each opens a turn; what it raises is returned in its place.
        """
        ...

    def wait_for_news(self, news: SimpleQueue[None]) -> None:
        """Returns when there may be something new of a turn, whose listener adds to `news`."""
        ...

    def running_turn(self, state: SessionState) -> Turn | None:
        """The turn that makes a session busy."""
        ...

    def wait_until_idle(self, state: SessionState) -> None:
        """Returns when no turn of the session runs.

        Raises:
            SessionBusyError: that would never be: the caller itself has the stream of a turn.
        """
        ...

    def register(self, state: SessionState) -> None:
        """Makes a session known; part of an operation."""
        ...

    def close_session(self, state: SessionState) -> bool:
        """Closes a session and an open stream of it; part of an operation.

        Returns:
            False if another turn has to end first.
        """
        ...
