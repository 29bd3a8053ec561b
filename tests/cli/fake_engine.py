"""A stand-in engine with the public surface that replays use; tokens are characters."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import SimpleNamespace


@dataclass
class FakeSession:
    """Counts like the real one: a turn computes what is not cached, state can be dropped."""

    engine: FakeEngine
    name: str
    system: str | None
    draft: bool | None
    length: int = 0
    cached: int = 0
    closed: bool = False
    messages: list[str] = field(default_factory=list)

    def turn(self, message: str, max_tokens: int = 256, ignore_eos: bool = False):
        """Append ``message`` and answer with an echo of it."""
        assert not self.closed
        delta = len(message) + (len(self.system or "") if not self.messages else 0)
        self.messages.append(message)
        reused = self.cached
        prompt = self.length + delta
        computed = prompt - reused
        time.sleep(computed * self.engine.seconds_per_token)
        text = f"[{self.name}] & <{message}>"[:max_tokens]
        self.length = prompt + len(text)
        self.cached = self.length - 1
        receipt = SimpleNamespace(
            prompt_tokens=prompt,
            reused_tokens=reused,
            computed_tokens=computed,
            drafted_tokens=4 if self.draft else 0,
            accepted_tokens=3 if self.draft else 0,
            output_tokens=len(text),
            ttft_s=0.001,
        )
        ids = [ord(c) for c in text]
        if self.engine.break_equality and reused == 0:
            ids[-1] += 1
        return SimpleNamespace(text=text, token_ids=ids, receipt=receipt)

    def suspend(self) -> None:
        """Drop the cached state, keep the history."""
        self.cached = 0

    def close(self) -> None:
        """Close the session."""
        self.closed = True


class FakeEngine:
    """Hands out fake sessions and remembers what was asked of it."""

    def __init__(self, break_equality: bool = False, seconds_per_token: float = 0.0) -> None:
        """Start without sessions."""
        self.break_equality = break_equality
        self.seconds_per_token = seconds_per_token
        self.sessions: list[FakeSession] = []
        self.num_clears = 0
        self.closed = False

    def session(self, name=None, system=None, draft=None) -> FakeSession:
        """Open a session."""
        self.sessions.append(FakeSession(self, name, system, draft))
        return self.sessions[-1]

    def clear_cache(self) -> None:
        """Count the call."""
        self.num_clears += 1

    def close(self) -> None:
        """Close the engine."""
        self.closed = True
