"""Plain, validated settings: the shape of a model, how to sample, how an engine is sized.

Everything here is a frozen dataclass that checks itself on construction, so a bad value is
reported where it was written (with the name of the field) and never reaches the step loop.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

KV_DTYPES = ("float16", "float32", "bfloat16", "int8")
# What "auto" stands for, by the type of the device.
_DEFAULT_KV_DTYPES = {"cpu": "float16", "cuda": "bfloat16"}
_DEVICE_NAME = re.compile(r"cpu|cuda(:\d{1,4})?", re.ASCII)
_DEFAULT_STEPS_PER_VISIT = {"cpu": 1, "cuda": 8}
MAX_DRAFT_LIMIT = 63
MAX_STEPS_PER_VISIT = 64


def _require(condition: bool, field: str, rule: str, value: object) -> None:
    """Raises ValueError naming `field` unless `condition` holds."""
    if not condition:
        raise ValueError(f"{field}: {rule}, got {value!r}")


def _require_int(field: str, value: Any, minimum: int) -> None:
    """Raises ValueError unless `value` is an int (not a bool) of at least `minimum`."""
    good = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
    _require(good, field, f"expected an integer >= {minimum}", value)


def _require_real(field: str, value: Any, rule: str, low: float, high: float) -> None:
    """Raises ValueError unless `value` is a finite number within [low, high]."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    good = good and low <= value <= high  # false for NaN; exact for integers of any size
    _require(good, field, rule, value)


@dataclass(frozen=True)
class RopeScaling:
    """Rescaling of rotary frequencies (the Llama 3 rule, or a linear factor).

    Attributes:
        kind: "llama3" or "linear".
        factor: how much longer the context became.
        low_freq_factor: llama3 only, border of the frequencies scaled in full.
        high_freq_factor: llama3 only, border of the frequencies left alone.
        original_max_position: llama3 only, context length before scaling.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self) -> None:
        """Checks every field."""
        _require(self.kind in ("llama3", "linear"), "kind", "expected llama3 or linear", self.kind)
        _require(self.factor > 0, "factor", "expected a number > 0", self.factor)
        if self.kind == "llama3":
            borders = (self.low_freq_factor, self.high_freq_factor)
            _require(
                0 < borders[0] < borders[1],
                "high_freq_factor",
                "expected 0 < low_freq_factor < high_freq_factor",
                borders,
            )
            _require_int("original_max_position", self.original_max_position, 1)


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Llama-family model; what a loader reads from a file and the model is built from.

    Attributes:
        vocab_size: rows of the embedding and of the head.
        hidden_size: width of the residual stream.
        intermediate_size: width of the gated feed-forward layer.
        num_layers: transformer layers.
        num_heads: query heads.
        num_kv_heads: key/value heads (divides num_heads).
        head_dim: width of one head.
        rms_norm_eps: epsilon of every RMS norm.
        rope_theta: base of the rotary frequencies.
        rope_scaling: rescaling of those frequencies, or None.
        max_position: longest context the model was made for.
        tie_word_embeddings: the head uses the embedding matrix.
        attention_bias: q, k and v have a bias (Qwen2).
        qk_norm: q and k are normalised per head before rotary (Qwen3).
        sliding_window: a token sees only that many latest tokens; None sees all.
        architecture: the family's name as its file has it ("llama", "qwen2", ...).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    architecture: str = "llama"

    def __post_init__(self) -> None:
        """Checks every field."""
        for field in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position",
        ):
            _require_int(field, getattr(self, field), 1)
        _require(
            self.num_heads % self.num_kv_heads == 0,
            "num_kv_heads",
            f"expected a divisor of num_heads = {self.num_heads}",
            self.num_kv_heads,
        )
        _require(self.head_dim % 2 == 0, "head_dim", "expected an even number", self.head_dim)
        _require_real("rms_norm_eps", self.rms_norm_eps, "expected 0 <= x <= 1", 0.0, 1.0)
        _require(self.rope_theta > 0, "rope_theta", "expected > 0", self.rope_theta)
        if self.sliding_window is not None:
            _require_int("sliding_window", self.sliding_window, 1)
            good = self.sliding_window < 2**31
            _require(good, "sliding_window", "expected less than 2**31", self.sliding_window)


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
        stop: strings that end the reply; the text is cut before them.
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
            _require(good, field, f"expected a list of {rule}", value)
            object.__setattr__(self, field, tuple(value))
        _require_real("temperature", self.temperature, "expected 0 <= x <= 100", 0.0, 100.0)
        _require_int("top_k", self.top_k, 0)
        _require_real("top_p", self.top_p, "expected 0 < x <= 1", 5e-324, 1.0)
        _require_real("min_p", self.min_p, "expected 0 <= x <= 1", 0.0, 1.0)
        _require_real(
            "repetition_penalty", self.repetition_penalty, "expected 0.01 <= x <= 100", 0.01, 100.0
        )
        for field in ("presence_penalty", "frequency_penalty"):
            _require_real(field, getattr(self, field), "expected -100 <= x <= 100", -100.0, 100.0)
        if self.seed is not None:
            _require_int("seed", self.seed, 0)
            _require(self.seed < 2**64, "seed", "expected an integer < 2**64", self.seed)
        for text in self.stop:
            good = isinstance(text, str) and text != ""
            _require(good, "stop", "expected non-empty strings", text)
        for token in self.stop_token_ids:
            _require_int("stop_token_ids", token, 0)
        _require(
            isinstance(self.ignore_eos, bool), "ignore_eos", "expected a bool", self.ignore_eos
        )

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


@dataclass(frozen=True)
class EngineConfig:
    """How big an engine is and how it steps.

    Attributes:
        kv_tokens: tokens the KV pool holds (rounded up to whole pages).
        page_size: tokens a page holds.
        kv_dtype: "float16", "float32", "bfloat16" or "int8" (with a scale a vector; half the memory
            of float16, not quite its values). "auto", which is float16 on the CPU and bfloat16 on
            CUDA, is replaced by what it stands for.
        max_batch_tokens: rows of one forward pass, all sessions together.
        draft: propose tokens from the session's own text and verify them in one pass.
        max_draft: longest draft of one session in one step.
        device: "cpu", "cuda" or "cuda:N"; where the KV lies and the model computes.
        steps_per_visit: decode steps the device takes before the host looks at them, where no turn
            waits and none is streamed. None, which is 1 on the CPU and 8 on CUDA, is replaced by
            what it stands for.
    """

    kv_tokens: int = 65536
    page_size: int = 64
    kv_dtype: str = "auto"
    max_batch_tokens: int = 1024
    draft: bool = True
    max_draft: int = 7
    device: str = "cpu"
    steps_per_visit: int | None = None

    def __post_init__(self) -> None:
        """Checks every field."""
        _require_int("kv_tokens", self.kv_tokens, 1)
        _require_int("page_size", self.page_size, 1)
        is_device = isinstance(self.device, str) and _DEVICE_NAME.fullmatch(self.device)
        _require(bool(is_device), "device", "expected 'cpu', 'cuda' or 'cuda:N'", self.device)
        known = ("auto", *KV_DTYPES)
        _require(self.kv_dtype in known, "kv_dtype", f"expected one of {known}", self.kv_dtype)
        if self.kv_dtype == "auto":
            device_type = self.device.partition(":")[0]
            object.__setattr__(self, "kv_dtype", _DEFAULT_KV_DTYPES[device_type])
        _require_int("max_batch_tokens", self.max_batch_tokens, 1)
        _require(isinstance(self.draft, bool), "draft", "expected a bool", self.draft)
        _require_int("max_draft", self.max_draft, 0)
        limit = self.max_draft <= MAX_DRAFT_LIMIT
        _require(limit, "max_draft", f"expected at most {MAX_DRAFT_LIMIT}", self.max_draft)
        if self.steps_per_visit is None:
            device_type = self.device.partition(":")[0]
            object.__setattr__(self, "steps_per_visit", _DEFAULT_STEPS_PER_VISIT[device_type])
        _require_int("steps_per_visit", self.steps_per_visit, 1)
        fits = self.steps_per_visit is not None and self.steps_per_visit <= MAX_STEPS_PER_VISIT
        rule = f"expected at most {MAX_STEPS_PER_VISIT}"
        _require(fits, "steps_per_visit", rule, self.steps_per_visit)

    @property
    def num_pages(self) -> int:
        """Pages of the pool."""
        return -(-self.kv_tokens // self.page_size)
