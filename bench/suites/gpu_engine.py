"""Cases of the suite `gpu_model` that go through the engine: the time of a token in a long reply.

A call is a turn of a session that has a context: a short message, then a reply. All of it counts,
on the host's clock: planning, pages, the passes on the device, choosing, detokenising. There are no
drafts, so a token is a step. The session is taken back between calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from bench.harness import Check, Settings, Trial, Work
from stateful_kv.engine.config import EngineConfig
from stateful_kv.engine.engine import Engine
from stateful_kv.models.llama import LlamaModel
from stateful_kv.text.messages import Tokenizer
from stateful_kv.types import TokenArray

MESSAGE = "Go on."


class _Decoder:
    """A letter for each token."""

    def push(self, token_id: int) -> str:
        return chr(ord("a") + token_id % 26)

    def flush(self) -> str:
        return ""


class LetterTokenizer:
    """A token for each letter: random weights have no tokenizer."""

    eos_token_ids = frozenset({0})

    def render_start(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> TokenArray:
        """Letters of all messages."""
        text = "".join(str(message["content"]) for message in messages)
        return np.array([1 + ord(letter) % 128 for letter in text], dtype=np.int32)

    def render_delta(
        self, messages: Sequence[Mapping[str, Any]], last_token_id: int | None = None
    ) -> TokenArray:
        """Letters of the new messages."""
        return self.render_start(messages)

    def stream_decoder(self) -> _Decoder:
        """Of one reply."""
        return _Decoder()


def setup(
    model: LlamaModel,
    tokenizer: Tokenizer,
    context: int,
    step_work: Work,
    stack: ExitStack,
    settings: Settings,
) -> Trial:
    """A case; `stack` closes what it opens.

    Args:
        model: on the device of the run.
        tokenizer: its own or a stand-in.
        context: letters that the session begins with.
        step_work: bytes and operations of one decode step.
        stack: of the case.
        settings: of the run.
    """
    num_tokens = 8 if settings.smoke else 64
    config = EngineConfig(kv_tokens=2048, device=settings.device, draft=False)
    engine = Engine(model, tokenizer, config)
    stack.callback(engine.close)
    session = engine.session(system="", draft=False)
    session.turn("x" * context, max_tokens=1, ignore_eos=True)

    def turn(_index: int = 0) -> Any:
        return session.turn(MESSAGE, max_tokens=num_tokens, ignore_eos=True)

    def reset() -> None:
        session.rewind(turn=1)

    def check(_peer: str) -> Check:
        replies = []
        for _ in range(2):
            replies.append(list(turn().token_ids))
            reset()
        same = replies[0] == replies[1] and len(replies[0]) == num_tokens
        return Check(same, bits_equal=same)

    def details(_peer: str) -> dict[str, Any]:
        receipt = turn().receipt
        reset()
        return {
            "context": context,
            "steps": receipt.steps,
            "decode_s": receipt.decode_s,
            "prefill_s": receipt.prefill_s,
            "host_s": receipt.host_s,
        }

    return Trial(
        ours=turn,
        check=check,
        work=Work(num_tokens * step_work.bytes, num_tokens * step_work.flops),
        calls_per_sample=1,
        reset=reset,
        details=details,
        units=num_tokens,
        unit="token",
    )
