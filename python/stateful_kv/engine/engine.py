"""The engine: one model, one KV cache, any number of sessions, one ragged step for all of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, overload

import torch

from stateful_kv._native import check_device
from stateful_kv.choosing.params import SamplingParams
from stateful_kv.drafts.calibrate import CostChoice, Costs
from stateful_kv.drafts.ngram import Drafter
from stateful_kv.engine.batching import Planner
from stateful_kv.engine.config import EngineConfig
from stateful_kv.engine.multi_step import Visits
from stateful_kv.engine.step import Model, Stepper
from stateful_kv.errors import (
    InvalidRequestError,
    InvariantError,
    SessionBusyError,
    SessionClosedError,
    require_type,
)
from stateful_kv.host import Message, Messages, Tokenizer
from stateful_kv.kv.cache import DTYPES, KVCache
from stateful_kv.session.ledger import Ledger
from stateful_kv.session.receipts import Reply
from stateful_kv.session.session import Session
from stateful_kv.session.turn import SessionState, Turn
from stateful_kv.system.tracing import traced


class Engine:
    """Runs turns of many sessions on one model and one KV cache.

    Everything runs in the calling thread: `Session.turn` steps the engine until its reply is
    complete, and each step also advances the streams of other sessions that are open. A call
    from another thread meanwhile raises SessionBusyError.

    A step is: admit turns, plan rows, reserve pages, forward, verify, commit. Where nothing waits
    for the host several may be taken in one visit (`visits.py`). Lengths move only in commit. An
    error of one turn ends that turn and takes its session back to where it was.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        config: EngineConfig | None = None,
        *,
        cost_curve: CostChoice = "auto",
    ) -> None:
        """Allocates the KV cache.

        Args:
            model: computes logits.
            tokenizer: renders messages and decodes tokens.
            config: sizes; None takes the defaults.
            cost_curve: by which the length of drafts is chosen. "auto" takes the one stored for
                this machine and model, else measures one when the first session that drafts is
                opened and stores it; "measure" does so anew.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.config = config = config if config is not None else EngineConfig()
        device = check_device(config.device)
        _check_model_device(model, device)
        shape = model.config
        self.cache = KVCache(
            shape.num_layers,
            shape.num_kv_heads,
            shape.head_dim,
            config.num_pages,
            config.page_size,
            DTYPES[config.kv_dtype],
            device,
        )
        self.cache.relieve = self._suspend_one
        self.cache.holders = self._holders
        self.vocab_size = shape.vocab_size
        self.context_len = shape.max_position
        self.costs = Costs(model, config, cost_curve)
        self._stepper = Stepper(model, self.cache, Planner(config.max_batch_tokens))
        self._visits = Visits(self._stepper, model, self.cache, config)
        self._sessions: dict[int, SessionState] = {}
        self._turns: list[Turn] = []
        self._num_named = 0
        self._is_closed = False
        self._lock = threading.RLock()
        self._depth = 0  # guards entered
        self._is_stepping = False

    @classmethod
    def load(
        cls,
        name: str = "smollm2",
        *,
        kv_tokens: int = 65536,
        page_size: int = 64,
        kv_dtype: str = "auto",
        weight_format: str = "auto",
        draft: bool = True,
        max_batch_tokens: int = 1024,
        device: str = "cpu",
        dtype: str = "auto",
        steps_per_visit: int | None = None,
        cost_curve: CostChoice = "auto",
    ) -> Engine:
        """Loads a model and makes an engine for it.

        Args:
            name: "smollm2", or the path of a GGUF file or a Hugging Face folder, or a Hub id.
            kv_tokens: tokens the KV cache holds, all sessions together.
            page_size: tokens a page holds.
            kv_dtype: "float16", "float32", "bfloat16" or "int8"; "auto" is float16 on the CPU, and
                on CUDA the 16-bit dtype of the model.
            weight_format: "auto", "int8", "int4", "fp32" or "dense"; on CUDA "auto" or "dense".
            draft: propose tokens from the session's own text; changes nothing but time.
            max_batch_tokens: rows of one forward pass.
            device: "cpu", "cuda" or "cuda:N".
            dtype: of dense weights and activations: "bfloat16" ("auto" on CUDA), "float16" or
                "float32" (the only one on the CPU).
            steps_per_visit: decode steps between two looks of the host; see `EngineConfig`.
            cost_curve: "auto", "measure" or a CostCurve; see `Engine`.

        Raises:
            DeviceUnavailableError: the device is not there, or not in this build.
            ModelNotFoundError: nothing of that name.
            ModelLoadError: its files are corrupt or not supported.
        """
        # Readers of model files are slow to import, and an engine can do without them.
        from stateful_kv.models.files.loading import load_model

        if kv_dtype == "auto" and dtype == "float16":
            kv_dtype = dtype  # attention on CUDA takes KV in the 16-bit dtype of its queries
        config = EngineConfig(
            kv_tokens=kv_tokens,
            page_size=page_size,
            kv_dtype=kv_dtype,
            max_batch_tokens=max_batch_tokens,
            draft=draft,
            device=device,
            steps_per_visit=steps_per_visit,
        )
        loaded = load_model(name, weight_format, device=device, dtype=dtype)
        return cls(loaded.model, loaded.tokenizer, config, cost_curve=cost_curve)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_closed(self) -> bool:
        """True after `close`."""
        return self._is_closed

    def session(
        self,
        name: str | None = None,
        system: str | None = None,
        tools: Sequence[Message] | None = None,
        sampling: SamplingParams | None = None,
        draft: bool | None = None,
    ) -> Session:
        """Opens a session.

        Args:
            name: a label for people; need not be unique.
            system: system prompt; an empty one also replaces a default of the chat template.
            tools: descriptions of tools, rendered by the chat template or into the system prompt.
            sampling: how replies are generated unless a turn says otherwise; greedy if None.
            draft: False switches drafts off for this session.

        Raises:
            InvalidRequestError: an argument of the wrong type.
        """
        require_type("name", name, str, "text", optional=True)
        require_type("system", system, str, "text", optional=True)
        require_type("sampling", sampling, SamplingParams, "SamplingParams", optional=True)
        require_type("draft", draft, bool, "a bool", optional=True)
        require_type("tools", tools, (list, tuple), "a list of dicts", optional=True)
        for index, tool in enumerate(tools or ()):
            require_type(f"tools[{index}]", tool, Mapping, "a dict")
        with self.guard():
            self._num_named += 1
            drafter = None
            if (self.config.draft if draft is None else draft) and self.config.max_draft:
                drafter = Drafter(self.config.max_draft, self.costs.curve())
            state = SessionState(
                name=name if name is not None else f"session-{self._num_named}",
                ledger=Ledger(),
                cache=self.cache,
                drafter=drafter,
                last_used=self._stepper.num_steps,
            )
            self.register(state)
            params = sampling if sampling is not None else SamplingParams()
            return Session(self, self.tokenizer, state, system=system, tools=tools, sampling=params)

    @overload
    def gather(
        self,
        items: Sequence[tuple[Session, Messages]],
        max_tokens: int = 256,
        *,
        return_exceptions: Literal[False] = False,
        **sampling: Any,
    ) -> list[Reply]: ...

    @overload
    def gather(
        self,
        items: Sequence[tuple[Session, Messages]],
        max_tokens: int = 256,
        *,
        return_exceptions: Literal[True],
        **sampling: Any,
    ) -> list[Reply | Exception]: ...

    def gather(
        self,
        items: Sequence[tuple[Session, Messages]],
        max_tokens: int = 256,
        *,
        return_exceptions: bool = False,
        **sampling: Any,
    ) -> list[Reply] | list[Reply | Exception]:
        """Runs a turn in each of several sessions together; the same tokens as one by one.

        Args:
            items: (session, message) pairs, each session once.
            max_tokens: longest reply of each.
            return_exceptions: put the exception of a failed turn into the list; else the first
                one is raised when all turns have ended. `Session.last_reply` has the others.
            **sampling: fields of SamplingParams for these turns.

        Raises:
            InvalidRequestError: `items` are no such pairs, or a session occurs twice.
        """
        require_type("items", items, (list, tuple), "a list of (session, message) pairs")
        for index, item in enumerate(items):
            is_pair = isinstance(item, (list, tuple)) and len(item) == 2
            if not is_pair or not isinstance(item[0], Session):
                raise InvalidRequestError(
                    f"items[{index}]: expected a (session, message) pair, got {item!r}"
                )
        with self.guard():
            sessions = [session for session, _ in items]
            if len({id(session) for session in sessions}) < len(sessions):
                raise InvalidRequestError("gather: a session occurs twice")
            for session in sessions:
                session.require_host(self)
            opened: list[Turn | Exception] = []
            try:
                for session, message in items:
                    try:
                        opened.append(session.open_turn(message, max_tokens, sampling))
                    except Exception as error:
                        opened.append(error)
                self.run([turn for turn in opened if isinstance(turn, Turn)])
            except BaseException as error:
                for turn in opened:
                    if isinstance(turn, Turn):
                        turn.fail(error)
                raise
            outcomes: list[Reply | Exception] = []
            for session, turn in zip(sessions, opened, strict=True):
                try:
                    if isinstance(turn, Exception):
                        raise turn
                    outcomes.append(session.collect(turn))
                except Exception as error:
                    outcomes.append(error)
            if return_exceptions:
                return outcomes
            replies: list[Reply] = []
            for outcome in outcomes:
                if isinstance(outcome, Exception):
                    raise outcome
                replies.append(outcome)
            return replies

    def clear_cache(self) -> int:
        """Empties the prefix cache; KV of open sessions stays. Returns the pages freed."""
        with self.guard():
            return self.cache.evict_all()

    def close(self) -> None:
        """Closes all sessions and empties the cache. Idempotent."""
        if self._is_closed:
            return
        with self.guard():
            for state in list(self._sessions.values()):
                if state.turn is not None:
                    state.turn.cancel()
                state.is_closed = True
                state.drop_kv()
            self._sessions.clear()
            self._turns.clear()
            self.cache.evict_all()
            # Hooks of ours in a part of ours: a cycle that would keep the pool until a collection.
            self.cache.relieve = self.cache.holders = None
            self._is_closed = True

    def check_integrity(self) -> str | None:
        """Describes the first broken invariant of the engine's state, or returns None."""
        with self.guard():
            for state in self._sessions.values():
                if state.committed_len > len(state.ledger):
                    return f"session {state.name!r}: KV of more tokens than its ledger has"
                if state.turn is not None and state.turn not in self._turns:
                    return f"session {state.name!r}: its turn is lost"
            held = sum(state.sequence_id is not None for state in self._sessions.values())
            if held != self.cache.num_sequences:
                return f"{self.cache.num_sequences} sequences, {held} held by sessions"
            return self.cache.check_integrity()

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Entered by every call that reads or changes state.

        Raises:
            SessionBusyError: another thread is inside, or the call comes from within a step.
            SessionClosedError: the engine is closed.
        """
        if not self._lock.acquire(blocking=False):
            raise SessionBusyError("the engine is busy in another thread")
        try:
            self._depth += 1
            if self._is_stepping:
                raise SessionBusyError("the engine is in the middle of a step")
            if self._is_closed:
                raise SessionClosedError("the engine is closed")
            if self._depth == 1:
                self.settle()
            yield
        except BaseException as error:
            if self._depth == 1 and not isinstance(error, Exception):
                self._recover(error)
            raise
        finally:
            self._depth -= 1
            self._lock.release()

    def register(self, state: SessionState) -> None:
        """Makes a new session known."""
        self._sessions[id(state)] = state

    def forget(self, state: SessionState) -> None:
        """Forgets a closed session."""
        self._sessions.pop(id(state), None)
        self._prune()

    def submit(self, turn: Turn) -> None:
        """Adds an open turn to those that steps work on."""
        self._turns.append(turn)

    def run(self, turns: Sequence[Turn]) -> None:
        """Steps until these turns are finished; if that is interrupted they fail, no others."""
        try:
            while not all(turn.is_finished for turn in turns):
                if not self.step():
                    raise InvariantError("no turn can make progress")
        except BaseException as error:
            for turn in turns:
                turn.fail(error)
            raise
        finally:
            self.settle()

    def settle(self) -> None:
        """Carries out requested cancellations; leaves them to the next step if one is running."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            if not self._is_stepping:
                for turn in self._turns:
                    if turn.cancel_requested:
                        turn.cancel()
                self._prune()
        finally:
            self._lock.release()

    @traced("step")
    def step(self) -> bool:
        """Runs one step of all open turns.

        Returns:
            False when there was nothing to compute.
        """
        with self.guard():
            self.settle()
            self._is_stepping = True
            try:
                running = [turn for turn in self._turns if not turn.is_finished]
                if running:
                    self._visits.advance(running)
                return bool(running)
            finally:
                self._is_stepping = False

    def _suspend_one(self) -> bool:
        """Drops the KV of the session that was idle longest; False if there is none."""
        idle = [
            state
            for state in self._sessions.values()
            if state.turn is None and state.sequence_id is not None
        ]
        if not idle:
            return False
        min(idle, key=lambda state: state.last_used).drop_kv()
        return True

    def _recover(self, error: BaseException) -> None:
        """After an interrupt, which can come between any two operations, makes state whole again.

        Turns that nobody drives or reads end; sequences that no session got to hold are released.
        """
        self._is_stepping = False
        for state in self._sessions.values():
            if state.turn is not None and not state.turn.has_reader:
                state.turn.abandon(error)
        self._prune()
        states = self._sessions.values()
        self.cache.release_others(
            {one.sequence_id for one in states if one.sequence_id is not None}
        )

    def _holders(self) -> tuple[list[int], list[int]]:
        """The sequences of running turns, and those that `_suspend_one` may drop."""
        kept: list[int] = []
        idle: list[int] = []
        for state in self._sessions.values():
            if state.sequence_id is not None:
                (idle if state.turn is None else kept).append(state.sequence_id)
        return kept, idle

    def _prune(self) -> None:
        self._turns = [turn for turn in self._turns if turn.reply is None and turn.error is None]


def _check_model_device(model: Model, device: torch.device) -> None:
    """InvalidRequestError if the model says that its weights lie on another device."""
    found = getattr(model, "device", device)
    if found != device:
        raise InvalidRequestError(
            f"model: expected weights on {device}, the engine's device, got a model on {found}"
        )
