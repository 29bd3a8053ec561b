"""What a session asks of the parts around it: a tokenizer, and the engine that hosts it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from stateful_kv.kv.cache import KVCache
from stateful_kv.session.turn import SessionState, Turn
from stateful_kv.text.decoding import StreamDecoder
from stateful_kv.types import TokenArray

Message = Mapping[str, Any]
Messages = str | Message | Sequence[Message]


class Tokenizer(Protocol):
    """What a session needs of a tokenizer; see `tokenizer.ChatTokenizer`."""

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a reply."""
        ...

    def render_start(
        self, messages: Sequence[Message], tools: Sequence[Message] | None = None
    ) -> TokenArray:
        """Tokens of a whole first prompt."""
        ...

    def render_delta(
        self, messages: Sequence[Message], last_token_id: int | None = None
    ) -> TokenArray:
        """Tokens of new messages behind a reply that ended with `last_token_id`."""
        ...

    def stream_decoder(self) -> StreamDecoder:
        """A decoder for one reply."""
        ...


class SessionHost(Protocol):
    """What a session needs of its engine."""

    @property
    def cache(self) -> KVCache:
        """Where KV lies."""
        ...

    @property
    def vocab_size(self) -> int:
        """Width of a row of logits."""
        ...

    @property
    def context_len(self) -> int:
        """Tokens a session may hold."""
        ...

    def guard(self) -> AbstractContextManager[None]:
        """Entered by every call that reads or changes state; refuses other threads."""
        ...

    def register(self, state: SessionState) -> None:
        """Makes a new session known."""
        ...

    def forget(self, state: SessionState) -> None:
        """Forgets a closed session."""
        ...

    def submit(self, turn: Turn) -> None:
        """Adds an open turn to those that steps work on."""
        ...

    def run(self, turns: Sequence[Turn]) -> None:
        """Steps until these turns are finished."""
        ...

    def step(self) -> bool:
        """Runs one step of all open turns; False when there is nothing to do."""
        ...

    def settle(self) -> None:
        """Carries out requested cancellations, now or at the end of the running step."""
        ...
