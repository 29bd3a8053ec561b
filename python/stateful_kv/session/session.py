"""Sessions: long-lived conversations in which each turn computes only its delta."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from stateful_kv.choosing.params import SamplingParams
from stateful_kv.choosing.sampler import Sampler, draw_seed
from stateful_kv.errors import (
    ContextLengthError,
    InvalidRequestError,
    SessionBusyError,
    SessionClosedError,
    require_type,
)
from stateful_kv.host import Message, Messages, SessionHost, Tokenizer
from stateful_kv.session.ledger import TurnRecord
from stateful_kv.session.receipts import Reply
from stateful_kv.session.turn import SessionState, Turn, TurnRequest
from stateful_kv.system.tracing import traced
from stateful_kv.text.stopping import StopRules
from stateful_kv.types import TokenArray


class Session:
    """A conversation: a ledger of exact tokens, and its KV in the engine's cache.

    Made by `Engine.session` or `fork`. Use `close` (or a with block) when done. A turn that
    fails leaves the session as it was before that turn.
    """

    def __init__(
        self,
        host: SessionHost,
        tokenizer: Tokenizer,
        state: SessionState,
        *,
        system: str | None,
        tools: Sequence[Message] | None,
        sampling: SamplingParams,
    ) -> None:
        """Not for users: see `Engine.session`."""
        self._host = host
        self._tokenizer = tokenizer
        self._state = state
        self._system = system
        self._tools = tools
        self._sampling = sampling
        self.last_reply: Reply | None = None

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
        tokens: list[int] = self._state.ledger.tokens.tolist()
        return tokens

    @property
    def num_tokens(self) -> int:
        """Tokens of the session."""
        return len(self._state.ledger)

    @property
    def turns(self) -> tuple[TurnRecord, ...]:
        """Where the finished turns lie in token_ids."""
        return self._state.ledger.records

    @property
    def num_turns(self) -> int:
        """Finished turns."""
        return self._state.ledger.num_turns

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of the session that have KV of their own right now."""
        return self._state.committed_len

    @property
    def is_closed(self) -> bool:
        """True after `close`."""
        return self._state.is_closed

    @property
    def is_busy(self) -> bool:
        """True while a turn runs or its stream was not read to the end."""
        return self._state.turn is not None

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
            SessionBusyError: another turn of this session runs, or another thread is stepping.
            SessionClosedError: the session or its engine is closed.
        """
        with self._host.guard():
            turn = self.open_turn(message, max_tokens, sampling)
            self._host.run((turn,))
            return self.collect(turn)

    def stream(self, message: Messages, max_tokens: int = 256, **sampling: Any) -> TurnStream:
        """Like `turn`, as an iterator over pieces of the reply's text.

        Bad input raises here, before the first piece. `last_reply` is set when the iterator is
        exhausted or closed. Closing it early (also by dropping it) ends the turn as "cancelled":
        the tokens whose text was read stay in the session, the others never happened; if none
        was read, neither message nor reply stay.
        """
        with self._host.guard():
            turn = self.open_turn(message, max_tokens, sampling, is_streamed=True)
            return TurnStream(self._host, self, turn)

    def fork(self, name: str | None = None) -> Session:
        """Returns an independent session with the same past; shares KV, copies none."""
        require_type("name", name, str, "text", optional=True)
        with self._host.guard():
            state = self._require_idle()
            sequence_id = state.sequence_id
            child = SessionState(
                name=name if name is not None else f"{state.name}-fork",
                ledger=state.ledger.copy(),
                cache=state.cache,
                drafter=None if state.drafter is None else state.drafter.fork(),
                sequence_id=None if sequence_id is None else state.cache.fork(sequence_id),
                num_stored=state.num_stored,
                last_used=state.last_used,
            )
            self._host.register(child)
            return Session(
                self._host,
                self._tokenizer,
                child,
                system=self._system,
                tools=self._tools,
                sampling=self._sampling,
            )

    def rewind(self, turn: int) -> None:
        """Goes back to the end of turn number `turn`; 0 empties the session."""
        with self._host.guard():
            state = self._require_idle()
            _require_count("turn", turn, state.ledger.num_turns, "turns")
            state.truncate(state.ledger.turn_end(turn))

    def truncate(self, tokens: int) -> None:
        """Keeps the first `tokens` tokens; turns that lose a token are forgotten as turns."""
        with self._host.guard():
            state = self._require_idle()
            _require_count("tokens", tokens, len(state.ledger), "tokens")
            state.truncate(tokens)

    def suspend(self) -> None:
        """Drops the session's own KV and keeps its tokens.

        The next turn takes what the prefix cache still has and computes the rest again.
        """
        with self._host.guard():
            self._require_idle().drop_kv()

    def close(self) -> None:
        """Ends the session; its prefix stays cached while there is room. Idempotent."""
        if self._state.is_closed:
            return
        with self._host.guard():
            state = self._state
            if state.turn is not None:
                state.turn.cancel()
            state.is_closed = True
            state.store(with_partial_page=True)
            state.drop_kv()
            state.drafter = None
            self._host.forget(state)

    def open_turn(
        self,
        message: Messages,
        max_tokens: int,
        sampling: Mapping[str, Any],
        *,
        is_streamed: bool = False,
    ) -> Turn:
        """Checks, renders and submits a turn; the engine's half of `turn` and `gather`."""
        began_at = time.perf_counter()
        state = self._require_idle()
        request = self._make_request(message, max_tokens, sampling)
        delta = self._render(request)
        length = len(state.ledger) + len(delta)
        _check_delta(delta, self._host.vocab_size)
        if length >= self._host.context_len:
            raise ContextLengthError(
                f"session {self.name!r}: a prompt of {length} tokens ({len(state.ledger)} before "
                f"this turn and {len(delta)} new ones) leaves no room for a reply in the context "
                f"of {self._host.context_len} tokens"
            )
        state.cache.check_fits(length)
        params = request.sampling
        seed = params.seed
        if seed is None and not params.greedy:
            seed = draw_seed()
        eos = frozenset() if params.ignore_eos else self._tokenizer.eos_token_ids
        prompt = state.ledger.tokens
        if params.repetition_penalty != 1.0:
            prompt = np.concatenate([prompt, delta])
        turn = Turn.open(
            state,
            delta,
            max_tokens=request.max_tokens,
            context_len=self._host.context_len,
            sampler=Sampler(params, seed, self._host.vocab_size, prompt),
            stops=StopRules(
                self._tokenizer.stream_decoder(), eos.union(params.stop_token_ids), params.stop
            ),
            began_at=began_at,
        )
        turn.is_streamed = is_streamed
        self._host.submit(turn)
        return turn

    def collect(self, turn: Turn) -> Reply:
        """Returns the reply of a finished turn and keeps it as last_reply, or raises its error."""
        self.last_reply = turn.result()
        return self.last_reply

    def require_host(self, host: SessionHost) -> None:
        """Raises InvalidRequestError unless the session belongs to `host`."""
        if self._host is not host:
            raise InvalidRequestError(f"session {self.name!r}: it belongs to another engine")

    def _require_idle(self) -> SessionState:
        if self._state.is_closed:
            raise SessionClosedError(f"session {self.name!r} is closed")
        if self._state.turn is not None:
            raise SessionBusyError(
                f"session {self.name!r} is in the middle of a turn; read its stream to the end "
                "or close it"
            )
        return self._state

    def _make_request(
        self, message: Messages, max_tokens: int, sampling: Mapping[str, Any]
    ) -> TurnRequest:
        if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1:
            raise InvalidRequestError(f"max_tokens: expected an integer >= 1, got {max_tokens!r}")
        params = self._sampling
        if sampling:
            try:
                params = replace(params, **sampling)
            except (TypeError, ValueError) as error:
                raise InvalidRequestError(f"sampling: {error}") from error
        for token in params.stop_token_ids:
            if token >= self._host.vocab_size:
                raise InvalidRequestError(
                    f"stop_token_ids: expected ids below {self._host.vocab_size}, got {token}"
                )
        return TurnRequest(_as_messages(message), max_tokens, params)

    @traced("render")
    def _render(self, request: TurnRequest) -> TokenArray:
        """Tokens of the new messages alone: the history is never rendered again."""
        ledger = self._state.ledger
        if len(ledger):
            return self._tokenizer.render_delta(request.messages, ledger.last_token)
        messages = request.messages
        if self._system is not None:
            messages = ({"role": "system", "content": self._system}, *messages)
        return self._tokenizer.render_start(messages, self._tools)


class TurnStream(Iterator[str]):
    """Iterator over the text of a running turn; see `Session.stream`."""

    _turn: Turn | None = None  # so that one whose making was interrupted can be dropped

    def __init__(self, host: SessionHost, session: Session, turn: Turn) -> None:
        self._host = host
        self._session = session
        self._is_collected = False
        self._turn = turn
        turn.has_reader = True

    def __next__(self) -> str:
        turn = self._turn
        if turn is None or self._is_collected:
            raise StopIteration
        with self._host.guard():
            try:
                while True:
                    piece = turn.take_piece()
                    if piece is not None:
                        return piece
                    if turn.is_finished:
                        break
                    self._host.step()
                if turn.reply is None and turn.error is None:
                    turn.close_books()
            except BaseException as error:
                turn.fail(error)
                raise
            finally:
                self._host.settle()
        self._is_collected = True
        self._session.collect(turn)
        raise StopIteration

    def __enter__(self) -> TurnStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Ends the turn early if it still runs. Idempotent; safe to call at any time."""
        turn = self._turn
        if turn is None:
            return
        turn.cancel_requested = True
        self._host.settle()
        if not self._is_collected and turn.reply is not None:
            self._is_collected = True
            self._session.last_reply = turn.reply


def _as_messages(message: Messages) -> tuple[Message, ...]:
    items: Sequence[Message]
    if isinstance(message, str):
        items = ({"role": "user", "content": message},)
    elif isinstance(message, Mapping):
        items = (message,)
    elif isinstance(message, (list, tuple)) and message:
        items = message
    else:
        raise InvalidRequestError(
            f"message: expected text, a message or a non-empty list of messages, got {message!r}"
        )
    for item in items:
        if not isinstance(item, Mapping):
            raise InvalidRequestError(f"message: expected a dict, got {type(item).__name__}")
        if item.get("role") == "user" and item.get("content") == "":
            raise InvalidRequestError("message: the content of a user message is empty")
    return tuple(items)


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
