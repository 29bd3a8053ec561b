"""Sessions: long-lived conversations in which each turn computes only its delta."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

from stateful_kv.choosing.params import SamplingParams
from stateful_kv.choosing.sampler import Sampler, draw_seed
from stateful_kv.errors import (
    ContextLengthError,
    InvalidRequestError,
    SessionClosedError,
    require_type,
)
from stateful_kv.session.ledger import TurnRecord
from stateful_kv.session.receipts import Reply
from stateful_kv.session.runner import TurnRunner
from stateful_kv.session.state import SessionState
from stateful_kv.session.stream import AsyncTurnStream, TurnStream
from stateful_kv.session.turn import Basis, Turn, TurnRequest, busy_error, current_caller
from stateful_kv.session.waiting import give_up, wait_for
from stateful_kv.system.tracing import traced
from stateful_kv.text.messages import Tokenizer, as_messages
from stateful_kv.text.stopping import StopRules
from stateful_kv.types import Message, Messages, TokenArray

T = TypeVar("T")


class Session:
    """A conversation: a ledger of exact tokens, and its KV in the engine's cache.

    Made by `Engine.session` or `fork`. Use `close` (or a with block) when done; a session that is
    dropped is closed too. A turn that fails leaves the session as it was before that turn.

    Any thread may call any method. One turn of a session runs at a time; a call from another
    thread or asyncio task waits until it has ended. A call that would wait for a stream which the
    caller itself has open raises SessionBusyError instead.
    """

    def __init__(
        self,
        runner: TurnRunner,
        tokenizer: Tokenizer,
        state: SessionState,
        *,
        system: str | None,
        tools: Sequence[Message] | None,
        sampling: SamplingParams,
    ) -> None:
        """Not for users: see `Engine.session`."""
        self._runner = runner
        self._tokenizer = tokenizer
        self._state = state
        self._system = system
        self._tools = tools
        self._sampling = sampling
        runner.watch(self, state)

    def __repr__(self) -> str:
        return f"<Session {self.name!r}: {self.num_turns} turns, {self.num_tokens} tokens>"

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def name(self) -> str:
        """The label given to the session."""
        return self._state.name

    @property
    def token_ids(self) -> list[int]:
        """A copy of all tokens of the session."""
        tokens: list[int] = self._settled_state().ledger.tokens.tolist()
        return tokens

    @property
    def num_tokens(self) -> int:
        """Tokens of the session."""
        return len(self._settled_state().ledger)

    @property
    def turns(self) -> tuple[TurnRecord, ...]:
        """Where the finished turns lie in token_ids."""
        return self._settled_state().ledger.records

    @property
    def num_turns(self) -> int:
        """Finished turns."""
        return self._settled_state().ledger.num_turns

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of the session that have KV of their own right now."""
        return self._settled_state().committed_len

    @property
    def is_closed(self) -> bool:
        """True after `close`."""
        return self._settled_state().is_closed

    @property
    def is_busy(self) -> bool:
        """True while a turn runs or its stream was not read to the end."""
        return self._settled_state().is_busy

    @property
    def last_reply(self) -> Reply | None:
        """The reply of the last turn; None if that failed, was interrupted or still runs."""
        return self._settled_state().last_reply

    @traced("turn")
    def turn(self, message: Messages, max_tokens: int = 256, **sampling: Any) -> Reply:
        """Appends a message and generates the reply.

        Args:
            message: text of a user message, or a {"role", "content"} dict, or several of those.
            max_tokens: longest reply.
            **sampling: fields of SamplingParams that differ from the session's for this turn.

        Raises:
            InvalidRequestError: a malformed message or setting.
            ContextLengthError: the session would not fit into the model's context.
            OutOfPagesError: the KV pool is too small.
            SessionBusyError: the stream of another turn of this session is open.
            SessionClosedError: the session or its engine is closed.
        """
        return self._collect(*self._runner.run_turns([self._opener(message, max_tokens, sampling)]))

    def stream(self, message: Messages, max_tokens: int = 256, **sampling: Any) -> TurnStream:
        """Like `turn`, as an iterator over pieces of the reply's text.

        Bad input raises here, before the first piece. `last_reply` is set when the iterator is
        exhausted or closed. Closing it early (also by dropping it) ends the turn as "cancelled":
        the tokens whose text was read stay in the session, the others never happened; if none
        was read, neither message nor reply stay.
        """
        stream = TurnStream(self._runner, self)
        return stream.begin(self._opener(message, max_tokens, sampling, stream)())

    async def aturn(self, message: Messages, max_tokens: int = 256, **sampling: Any) -> Reply:
        """Like `turn`, for asyncio. Cancelled, it ends the turn within one step: it never was."""
        turn = await self._open_async(message, max_tokens, sampling, None)
        try:
            await wait_for(turn.settled)
        except BaseException as error:
            await give_up(self._runner, lambda: turn.withdraw(asyncio.CancelledError()), error)
            raise
        return self._collect(turn)

    def astream(self, message: Messages, max_tokens: int = 256, **sampling: Any) -> AsyncTurnStream:
        """Like `stream`, for asyncio: `async for piece in session.astream(...)`.

        The turn is opened by the first piece that is asked for, by `async with`, or by awaiting
        the stream (`stream = await session.astream(...)`): there bad input raises. A task that is
        cancelled while it waits for a piece ends the turn within one step: it never was. `aclose`
        ends it early like `TurnStream.close`.
        """

        async def open_turn(stream: AsyncTurnStream) -> Turn:
            return await self._open_async(message, max_tokens, sampling, stream)

        return AsyncTurnStream(self._runner, open_turn)

    def fork(self, name: str | None = None) -> Session:
        """Returns an independent session with the same past; shares KV, copies none."""
        require_type("name", name, str, "text", optional=True)
        return self._when_idle(lambda: self._fork(name))

    def rewind(self, turn: int) -> None:
        """Goes back to the end of turn number `turn`; 0 empties the session."""

        def rewind() -> None:
            ledger = self._state.ledger
            _require_count("turn", turn, ledger.num_turns, "turns")
            self._state.truncate(ledger.turn_end(turn))

        self._when_idle(rewind)

    def truncate(self, tokens: int) -> None:
        """Keeps the first `tokens` tokens; turns that lose a token are forgotten as turns."""

        def truncate() -> None:
            _require_count("tokens", tokens, len(self._state.ledger), "tokens")
            self._state.truncate(tokens)

        self._when_idle(truncate)

    def suspend(self) -> None:
        """Drops the session's own KV and keeps its tokens.

        The next turn takes what the prefix cache still has and computes the rest again.
        """
        self._when_idle(self._state.drop_kv)

    def close(self) -> None:
        """Ends the session; its prefix stays cached while there is room. Idempotent.

        A stream that is open ends as if it were closed; a `turn` of another thread ends first.
        """
        while not self._state.is_closed and not self._runner.perform(self._try_to_close):
            self._runner.wait_until_idle(self._state)

    def _settled_state(self) -> SessionState:
        """The state, after streams that were dropped have ended."""
        self._runner.catch_up()
        return self._state

    def _opener(
        self,
        message: Messages,
        max_tokens: int,
        sampling: Mapping[str, Any],
        stream: TurnStream | None = None,
    ) -> Callable[[], Turn]:
        """Returns what checks, renders and opens a turn in the calling thread.

        The message is rendered behind the tokens of the session as they are. If another turn was
        quicker they are others when the request arrives, and it is made anew.
        """

        def open_request(request: TurnRequest) -> Turn | None:
            opened: list[Turn | None] = []
            try:
                self._runner.perform(lambda: opened.append(self._runner.open(request)))
            except Exception:
                raise
            except BaseException:
                self._runner.post(partial(_withdraw, opened))
                raise
            return opened[0]

        def open_turn() -> Turn:
            while True:
                self._runner.wait_until_idle(self._state)
                turn = open_request(self._make_request(message, max_tokens, sampling, stream))
                if turn is not None:
                    return turn

        return open_turn

    async def _open_async(
        self,
        message: Messages,
        max_tokens: int,
        sampling: Mapping[str, Any],
        stream: AsyncTurnStream | None,
    ) -> Turn:
        while True:
            other = self._runner.running_turn(self._state)
            if other is not None and other.is_read_by(current_caller(), blocking=False):
                raise busy_error(self._state)
            if other is not None:
                await wait_for(other.settled)
            request = self._make_request(message, max_tokens, sampling, stream)
            turn = await self._submit_async(request)
            if turn is not None:
                return turn

    async def _submit_async(self, request: TurnRequest) -> Turn | None:
        opened = self._runner.submit(lambda: self._runner.open(request))
        try:
            await wait_for(opened)
        except BaseException as error:

            def withdraw() -> None:
                # Behind the operation that opens the turn: it has been run.
                turn = None if opened.exception() else opened.result()
                if turn is not None:
                    turn.withdraw(asyncio.CancelledError())

            await give_up(self._runner, withdraw, error)
            raise
        return opened.result()

    def _when_idle(self, operation: Callable[[], T]) -> T:
        """Runs an operation when no turn of this session runs."""
        results: list[T] = []

        def attempt() -> bool:
            if self._state.is_closed:
                raise SessionClosedError(f"session {self.name!r} is closed")
            if not self._state.is_busy:
                results.append(operation())
            return bool(results)

        while not self._runner.perform(attempt):
            self._runner.wait_until_idle(self._state)
        return results[0]

    def _fork(self, name: str | None) -> Session:
        state = self._state
        has_kv = state.sequence_id is not None and state.has_kv
        child = SessionState(
            name=name if name is not None else f"{state.name}-fork",
            ledger=state.ledger.copy(),
            cache=state.cache,
            drafter=None if state.drafter is None else state.drafter.fork(),
            root=state.root,
        )
        session = Session(
            self._runner,
            self._tokenizer,
            child,
            system=self._system,
            tools=self._tools,
            sampling=self._sampling,
        )
        self._runner.register(child)
        if has_kv:
            assert state.sequence_id is not None
            child.num_inserted = state.num_inserted
            child.sequence_id = state.cache.fork(state.sequence_id)
            child.rest()
        return session

    def _try_to_close(self) -> bool:
        """An operation; False if another thread's turn has to end first."""
        return self._state.is_closed or self._runner.close_session(self._state)

    def _require_runner(self, runner: TurnRunner) -> None:
        """Raises InvalidRequestError unless the session belongs to `runner`."""
        if self._runner is not runner:
            raise InvalidRequestError(f"session {self.name!r}: it belongs to another engine")

    def _collect(self, opened: Turn | Exception) -> Reply:
        """Returns the reply of a settled turn, or raises its error."""
        outcome = self._outcome(opened)
        if isinstance(outcome, Reply):
            return outcome
        try:
            raise outcome
        finally:
            del opened, outcome  # or the error would keep this frame, and this the error

    def _outcome(self, opened: Turn | Exception) -> Reply | Exception:
        """The reply of a settled turn, or its error."""
        if isinstance(opened, Turn):
            return opened.outcome()
        self._state.last_reply = None
        return opened

    def _make_request(
        self,
        message: Messages,
        max_tokens: int,
        sampling: Mapping[str, Any],
        stream: TurnStream | AsyncTurnStream | None,
    ) -> TurnRequest:
        """Checks, renders and tokenises: all that needs no lock."""
        began_at = time.perf_counter()
        state = self._state
        state.last_reply = None  # a turn that is refused has none either
        if state.is_closed:
            raise SessionClosedError(f"session {self.name!r} is closed")
        if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1:
            raise InvalidRequestError(f"max_tokens: expected an integer >= 1, got {max_tokens!r}")
        params = self._sampling_for(sampling)
        basis, tokens = Basis.of(state), state.ledger.tokens
        delta = self._render(as_messages(message), tokens)
        length, context_len = basis.length + len(delta), self._runner.context_len
        _check_delta(delta, self._runner.vocab_size)
        if length >= context_len:
            raise ContextLengthError(
                f"session {self.name!r}: a prompt of {length} tokens ({basis.length} before "
                f"this turn and {len(delta)} new ones) leaves no room for a reply in the context "
                f"of {context_len} tokens"
            )
        seed = params.seed
        if seed is None and not params.greedy:
            seed = draw_seed()
        eos = frozenset() if params.ignore_eos else self._tokenizer.eos_token_ids
        prompt = tokens
        if params.repetition_penalty != 1.0:
            prompt = np.concatenate([tokens, delta])
        stop_ids = eos.union(params.stop_token_ids)
        return TurnRequest(
            state=state,
            basis=basis,
            delta=delta,
            max_tokens=max_tokens,
            context_len=context_len,
            sampler=Sampler(params, seed, self._runner.vocab_size, prompt),
            stops=StopRules(self._tokenizer.stream_decoder(), stop_ids, params.stop),
            began_at=began_at,
            reader=None if stream is None else weakref.ref(stream),
            listener=None if stream is None else stream.listener,
        )

    def _sampling_for(self, changes: Mapping[str, Any]) -> SamplingParams:
        params = self._sampling
        if changes:
            try:
                params = replace(params, **changes)
            except (TypeError, ValueError) as error:
                raise InvalidRequestError(f"sampling: {error}") from error
        for token in params.stop_token_ids:
            if token >= self._runner.vocab_size:
                raise InvalidRequestError(
                    f"stop_token_ids: expected ids below {self._runner.vocab_size}, got {token}"
                )
        return params

    @traced("render")
    def _render(self, messages: Sequence[Message], tokens: TokenArray) -> TokenArray:
        """Tokens of the new messages alone: the history is never rendered again."""
        if len(tokens):
            return self._tokenizer.render_delta(messages, int(tokens[-1]))
        if self._system is not None:
            messages = ({"role": "system", "content": self._system}, *messages)
        return self._tokenizer.render_start(messages, self._tools)


def _withdraw(opened: Sequence[Turn | None]) -> None:
    """An operation, behind the one that opens a turn: its caller was interrupted meanwhile."""
    if opened and opened[0] is not None:
        opened[0].withdraw(KeyboardInterrupt())


def _check_delta(delta: TokenArray, vocab_size: int) -> None:
    """Raises InvalidRequestError unless every token has a row in the embedding."""
    if len(delta) == 0:
        raise InvalidRequestError("message: it has no tokens")
    low, high = int(delta.min()), int(delta.max())
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise InvalidRequestError(
            f"message: token id {bad} is out of range: the model has {vocab_size} tokens"
        )


def _require_count(name: str, value: int, limit: int, unit: str) -> None:
    good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= limit
    if not good:
        raise InvalidRequestError(
            f"{name}: expected 0..{limit} (the session has {limit} {unit}), got {value!r}"
        )
