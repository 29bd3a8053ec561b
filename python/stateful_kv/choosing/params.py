"""How the next token is chosen, and what ends a reply."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from stateful_kv.errors import require, require_int, require_real

# What the search for stop strings may cost: its tables grow with their characters.
MAX_STOPS = 1024
MAX_STOP_CHARACTERS = 1 << 15


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen from the logits, and what ends a reply.

    Applied in this order: penalties, temperature, top_k, top_p, min_p. Temperature 0 is greedy
    (the lowest token id wins a tie).

    Attributes:
        temperature: 0 for greedy, else the divisor of the logits.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probability reaches this.
        min_p: keep tokens of at least this fraction of the likeliest token's probability.
        repetition_penalty: divides (positive) or multiplies (negative) the logit of every token
            of the prompt and the output; 1 is off.
        presence_penalty: subtracted once for every token of the output.
        frequency_penalty: subtracted for every occurrence of a token in the output.
        seed: of the random numbers; None draws one and puts it in the receipt.
        stop: strings that end the reply; the text is cut before them. At most 1024 strings of
            together 32768 characters.
        stop_token_ids: tokens that end the reply.
        ignore_eos: do not stop at the model's end-of-turn tokens.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Checks every field; a single string or a list is turned into a tuple."""
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for field, rule in (("stop", "strings"), ("stop_token_ids", "integers")):
            value = getattr(self, field)
            good = isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))
            require(good, field, f"expected a list of {rule}", value)
            object.__setattr__(self, field, tuple(value))
        require_real("temperature", self.temperature, "expected 0 <= x <= 100", 0.0, 100.0)
        require_int("top_k", self.top_k, 0)
        require_real("top_p", self.top_p, "expected 0 < x <= 1", 5e-324, 1.0)
        require_real("min_p", self.min_p, "expected 0 <= x <= 1", 0.0, 1.0)
        require_real(
            "repetition_penalty", self.repetition_penalty, "expected 0.01 <= x <= 100", 0.01, 100.0
        )
        for field in ("presence_penalty", "frequency_penalty"):
            require_real(field, getattr(self, field), "expected -100 <= x <= 100", -100.0, 100.0)
        if self.seed is not None:
            require_int("seed", self.seed, 0)
            require(self.seed < 2**64, "seed", "expected an integer < 2**64", self.seed)
        num_stops = len(self.stop)
        rule = f"expected at most {MAX_STOPS} strings"
        require(num_stops <= MAX_STOPS, "stop", rule, num_stops)
        for text in self.stop:
            good = isinstance(text, str) and text != ""
            require(good, "stop", "expected non-empty strings", text)
        length = sum(map(len, self.stop))
        rule = f"expected at most {MAX_STOP_CHARACTERS} characters in all strings together"
        require(length <= MAX_STOP_CHARACTERS, "stop", rule, length)
        for token in self.stop_token_ids:
            require_int("stop_token_ids", token, 0)
        require(isinstance(self.ignore_eos, bool), "ignore_eos", "expected a bool", self.ignore_eos)

    @property
    def greedy(self) -> bool:
        """True when no random number is needed."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """True when the context changes the logits before anything is chosen."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )
