"""The queue of turns: opens them, advances them step by step, and ends them.

Everything that changes a session happens in an operation of `Owner`, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TypeVar

from stateful_kv.engine.config import EngineConfig
from stateful_kv.engine.multi_step import MultiStep
from stateful_kv.engine.step import Stepper
from stateful_kv.engine.thread import Owner
from stateful_kv.errors import InvariantError, SessionClosedError
from stateful_kv.kv.cache import KVCache
from stateful_kv.models.protocol import Model
from stateful_kv.session.state import SessionState
from stateful_kv.session.turn import Basis, Turn, TurnRequest, busy_error, current_caller
from stateful_kv.system.promise import Promise
from stateful_kv.system.tracing import traced

T = TypeVar("T")


class Scheduler:
    """Runs the turns of one engine; see `session.runner.TurnRunner`.

    Attributes:
        owner: runs the operations.
        sessions: those that are open.
        turns: those that are open, in the order in which they came.
        stepper: takes steps.
        multi_step: takes several at once.
    """

    def __init__(self, model: Model, cache: KVCache, config: EngineConfig) -> None:
        self.owner = Owner(self)
        self.cache = cache
        self.sessions: list[SessionState] = []
        self.turns: list[Turn] = []
        self.stepper = Stepper(model, cache, config.max_batch_tokens)
        self.multi_step = MultiStep(self.stepper, model, cache, config)
        self.is_closed = False
        self._vocab_size = model.config.vocab_size
        self._context_len = model.config.max_position

    @property
    def vocab_size(self) -> int:
        """Width of a row of logits."""
        return self._vocab_size

    @property
    def context_len(self) -> int:
        """Tokens a session may hold."""
        return self._context_len

    # ---- for callers, from any thread ----

    def perform(self, operation: Callable[[], T]) -> T:
        """Runs an operation when its turn comes; returns or raises what it does."""
        return self.owner.perform(operation)

    def submit(self, operation: Callable[[], T]) -> Promise[T]:
        """Hands an operation to the engine's thread, which is started if need be."""
        return self.owner.submit(operation)

    def post(self, operation: Callable[[], object]) -> None:
        """Leaves an operation to be run soon and returns at once."""
        self.owner.post(operation)

    def watch(self, user: object, subject: Turn | SessionState) -> None:
        """Ends a turn or a session soon after the last reference to its user is gone."""
        self.owner.watch(user, subject)

    def catch_up(self) -> None:
        """Runs what was posted, if the calling thread can: before state is looked at."""
        self.owner.catch_up()

    def run_turns(self, openers: Sequence[Callable[[], Turn]]) -> list[Turn | Exception]:
        """Opens turns and returns when all of them are settled.

        If that is interrupted, none of them ever happened.
        """
        opened: list[Turn | Exception] = []
        is_counted = self.owner.is_inline()
        self.owner.num_waiting += is_counted
        try:
            for opener in openers:
                try:
                    opened.append(opener())
                except Exception as error:
                    opened.append(error)
            for turn in _turns_of(opened):
                self._wait_until_settled(turn)
            return opened
        except BaseException as error:
            for turn in _turns_of(opened):
                self._give_up(turn, error)
            raise
        finally:
            self.owner.num_waiting -= is_counted
            del opened  # or an error in it would keep this frame, and this the error

    def wait_for_news(self, news: SimpleQueue[None]) -> None:
        """Returns when there may be something new of a turn, whose listener adds to `news`."""
        if self.owner.is_inline():
            self.owner.run(self._step_if_open)
        else:
            news.get()
        with suppress(Empty):
            while True:
                news.get_nowait()

    def running_turn(self, state: SessionState) -> Turn | None:
        """The turn that makes a session busy."""
        turns = (turn for turn in self.turns if turn.state is state)
        return next((turn for turn in turns if not turn.is_settled), None)

    def wait_until_idle(self, state: SessionState) -> None:
        """Returns when no turn of the session runs.

        Raises:
            SessionBusyError: that would never be: the caller itself has the stream of a turn.
        """
        self.owner.catch_up()
        if not state.is_busy:
            return
        turn = self.running_turn(state)
        if self.owner.is_inline() or (turn and turn.is_read_by(current_caller(), blocking=True)):
            raise busy_error(state)
        if turn is not None:
            turn.settled.result()

    # ---- operations ----

    def open(self, request: TurnRequest) -> Turn | None:
        """Begins a turn; None if the request is stale, or another turn of the session runs.

        Raises:
            SessionClosedError: the session or the engine is closed.
            OutOfPagesError: the prompt can never fit into the KV pool.
        """
        state = request.state
        self.require_open()
        if state.is_closed:
            raise SessionClosedError(f"session {state.name!r} is closed")
        if state.is_busy or request.basis != Basis.of(state):
            return None
        self.cache.check_fits(request.basis.length + len(request.delta))
        turn = Turn.of(request)
        if request.reader is not None:
            reader = request.reader()
            if reader is None:
                return None  # its caller was interrupted and is gone
            self.owner.watch(reader, turn)
        self.turns.append(turn)
        try:
            turn.begin()
        except Exception as error:
            turn.fail(error)
            raise
        turn.has_reader = request.reader is not None
        return turn

    def register(self, state: SessionState) -> None:
        """Makes a session known."""
        self.require_open()
        self.sessions.append(state)

    def close_session(self, state: SessionState) -> bool:
        """Closes a session and an open stream of it; False if another turn has to end first."""
        if state.is_busy:
            turn = self.running_turn(state)
            if turn is None or not turn.has_reader:
                return False
            turn.cancel()
        state.insert(with_partial_page=True)
        state.drop_kv()
        self.sessions = [other for other in self.sessions if other is not state]
        state.is_closed = True
        return True

    @traced("step")
    def step(self) -> bool:
        """Runs one step of all open turns.

        Returns:
            False when there was nothing to compute.

        Raises:
            InvariantError: the step changed nothing; all that were in it have failed.
        """
        self.require_open()
        running = [turn for turn in self.turns if not turn.is_finished]
        if not running:
            return False
        before = [_progress(turn) for turn in running]
        self.multi_step.advance(running)
        if before == [_progress(turn) for turn in running]:
            error = InvariantError("no turn can make progress")
            for turn in running:
                turn.fail(error)
            raise error
        for turn in running:
            turn.notify()
        self._prune()
        return True

    def close(self) -> None:
        """Ends all turns, closes all sessions and empties the cache; may be repeated."""
        for turn in self.turns:
            if turn.has_reader:
                turn.cancel()
            else:
                turn.fail(SessionClosedError("the engine was closed"))
        for state in self.sessions:
            state.drop_kv()
            state.is_closed = True
        self.cache.evict_all()
        self.is_closed = True
        self.sessions, self.turns = [], []

    def require_open(self) -> None:
        """Raises SessionClosedError if the engine is closed."""
        if self.is_closed:
            raise SessionClosedError("the engine is closed")

    def check_integrity(self) -> str | None:
        """Describes the first broken invariant of the engine's state, or returns None."""
        busy = {id(turn.state) for turn in self.turns if not turn.is_settled}
        for state in self.sessions:
            problem = state.check_integrity()
            if problem is not None:
                return problem
            if state.is_busy != (id(state) in busy):
                return f"session {state.name!r}: its turn is lost"
        held = sum(state.has_kv for state in self.sessions)
        if held != self.cache.num_sequences:
            return f"{self.cache.num_sequences} sequences, {held} held by sessions"
        return self.cache.check_integrity()

    # ---- what the owner asks; see `engine.thread.Worker` ----

    @property
    def has_work(self) -> bool:
        """Whether a step would compute something."""
        return any(not turn.is_finished for turn in self.turns)

    @property
    def is_tidy(self) -> bool:
        """Whether somebody waits for each turn."""
        if self.owner.num_waiting or self.owner.is_threaded:
            return True
        return all(turn.has_reader for turn in self.turns)

    def tidy(self) -> None:
        """Ends turns that nobody waits for, which only an interrupt of their caller leaves."""
        if not self.is_tidy:
            for turn in self.turns:
                if not turn.has_reader:
                    turn.fail(KeyboardInterrupt())
        self._prune()

    def abandon(self, subject: object) -> None:
        """Ends a turn whose stream was dropped, or a session that was."""
        if isinstance(subject, Turn):
            subject.cancel()
            self._prune()
        elif isinstance(subject, SessionState) and not subject.is_closed:
            turn = self.running_turn(subject)
            if turn is not None:
                turn.cancel()
            self.close_session(subject)

    def recover(self, error: BaseException | None, *, is_interrupt: bool) -> None:
        """Makes the state whole after an operation that was cut off."""
        error = KeyboardInterrupt() if error is None else error
        self.cache.recount()
        for turn in self.turns:
            if turn.is_settled:
                turn.announce()  # it may have been cut off in the middle of that
            elif turn.is_taking or turn.error or (is_interrupt and not turn.has_reader):
                turn.fail(error)
        for state in self.sessions:
            state.repair()
        self._prune()
        held = {state.sequence_id for state in self.sessions if state.sequence_id is not None}
        self.cache.recover(held)

    def fail_all(self, error: BaseException) -> None:
        """Ends all running turns."""
        for turn in self.turns:
            if not turn.is_finished:
                turn.fail(error)
        self._prune()

    def _wait_until_settled(self, turn: Turn) -> None:
        while not turn.is_settled:
            if self.owner.is_inline():
                self.owner.run(self._step_if_open)
            else:
                turn.settled.result()

    def _give_up(self, turn: Turn, error: BaseException) -> None:
        """The turn never happened: its caller was interrupted."""
        if turn.is_settled:
            return
        if self.owner.is_inline():
            self.owner.run(lambda: turn.fail(error))
        else:
            self.owner.post(lambda: turn.fail(error))

    def _step_if_open(self) -> None:
        """Another thread may have closed the engine; then all turns have ended."""
        if not self.is_closed:
            self.step()

    def _prune(self) -> None:
        self.turns = [turn for turn in self.turns if not turn.is_settled]


def _turns_of(opened: Sequence[Turn | Exception]) -> list[Turn]:
    return [turn for turn in opened if isinstance(turn, Turn)]


def _progress(turn: Turn) -> tuple[object, int, int]:
    return turn.phase, turn.state.committed_len, len(turn.output)
