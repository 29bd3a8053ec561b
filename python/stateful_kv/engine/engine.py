"""The engine: one model, one KV cache, any number of sessions, one ragged step for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

import torch

from stateful_kv._native import check_device
from stateful_kv.choosing.params import SamplingParams
from stateful_kv.drafts.calibrate import CostChoice, Costs
from stateful_kv.drafts.ngram import NgramDrafter
from stateful_kv.engine.config import EngineConfig
from stateful_kv.engine.scheduler import Scheduler
from stateful_kv.errors import InvalidRequestError, require_type
from stateful_kv.kv.cache import KVCache
from stateful_kv.kv.pools import DTYPES
from stateful_kv.models.protocol import Model
from stateful_kv.session.ledger import Ledger
from stateful_kv.session.receipts import Reply
from stateful_kv.session.session import Session
from stateful_kv.session.state import SessionState
from stateful_kv.text.messages import Tokenizer
from stateful_kv.types import Message, Messages


class Engine:
    """Runs turns of many sessions on one model and one KV cache.

    A script needs no thread: `Session.turn` steps the engine until its reply is complete, and
    each step also advances the streams of other sessions that are open. After `start`, or from
    the first call of a second thread on, a thread of the engine's own takes the steps, and calls
    from any thread wait their turn.

    A step is: admit turns, plan rows, reserve pages, forward, verify, commit. Several may be taken
    before the host looks at them (`EngineConfig.num_steps_per_sync`). Lengths move only in commit.
    An error of one turn ends that turn and takes its session back to where it was.
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
        self.costs = Costs(
            model,
            cost_curve,
            kv_dtype=config.kv_dtype,
            page_size=config.page_size,
            max_draft=config.max_draft,
            device=config.device,
        )
        self._scheduler = Scheduler(model, self.cache, config)
        self._num_named = 0

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
        num_steps_per_sync: int | None = None,
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
            num_steps_per_sync: decode steps between two looks of the host; see `EngineConfig`.
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
            num_steps_per_sync=num_steps_per_sync,
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
        return self._scheduler.is_closed

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
        params = sampling if sampling is not None else SamplingParams()
        wants_drafts = self.config.draft if draft is None else draft

        def make() -> Session:
            self._scheduler.require_open()
            self._num_named += 1
            drafter = None
            if wants_drafts and self.config.max_draft:
                drafter = NgramDrafter(self.config.max_draft, self.costs.curve())
            state = SessionState(
                name=name if name is not None else f"session-{self._num_named}",
                ledger=Ledger(),
                cache=self.cache,
                drafter=drafter,
            )
            session = Session(
                self._scheduler, self.tokenizer, state, system=system, tools=tools, sampling=params
            )
            self._scheduler.register(state)
            return session

        return self._scheduler.perform(make)

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
        sessions = [session for session, _ in items]
        if len({id(session) for session in sessions}) < len(sessions):
            raise InvalidRequestError("gather: a session occurs twice")
        for session in sessions:
            session._require_runner(self._scheduler)
        opened = self._scheduler.run_turns(
            [session._opener(message, max_tokens, sampling) for session, message in items]
        )
        outcomes = [session._outcome(turn) for session, turn in zip(sessions, opened, strict=True)]
        if return_exceptions:
            return outcomes
        failures = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        if failures:
            try:
                raise failures[0]
            finally:
                del opened, outcomes, failures  # or the error would keep this frame, and this it
        return [outcome for outcome in outcomes if isinstance(outcome, Reply)]

    def step(self) -> bool:
        """Runs one step of all open turns.

        Returns:
            False when there was nothing to compute.
        """
        return self._scheduler.perform(self._scheduler.step)

    def start(self) -> None:
        """Gives the engine a thread of its own, which takes all steps from now on.

        That also happens by itself when a second thread calls, and with the first `Session.aturn`
        or `astream`.
        """
        self._scheduler.perform(self._scheduler.require_open)
        self._scheduler.owner.start()

    def clear_cache(self) -> int:
        """Empties the prefix cache; KV of open sessions stays. Returns the pages freed."""

        def clear() -> int:
            self._scheduler.require_open()
            return self.cache.evict_all()

        return self._scheduler.perform(clear)

    def close(self) -> None:
        """Closes all sessions and empties the cache. Idempotent.

        A stream that is open ends as if it were closed; other turns that run in other threads
        fail with SessionClosedError.
        """
        if not self.is_closed:
            self._scheduler.perform(self._scheduler.close)
        self._scheduler.owner.stop()

    def check_integrity(self) -> str | None:
        """Describes the first broken invariant of the engine's state, or returns None."""
        return self._scheduler.perform(self._scheduler.check_integrity)


def _check_model_device(model: Model, device: torch.device) -> None:
    """InvalidRequestError if the model says that its weights lie on another device."""
    found = getattr(model, "device", device)
    if found != device:
        raise InvalidRequestError(
            f"model: expected weights on {device}, the engine's device, got a model on {found}"
        )
