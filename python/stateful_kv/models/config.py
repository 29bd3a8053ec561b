"""The shape of a model: what a loader reads from a file and the model is built from."""

from __future__ import annotations

from dataclasses import dataclass

from stateful_kv.errors import require, require_int, require_real

# Bases and factors of rotary frequencies: beyond these borders float32 angles overflow.
_LEAST_FACTOR, _LARGEST_FACTOR = 1e-6, 1e12
_FACTOR_RULE = "expected 1e-6 <= x <= 1e12"


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
        require(self.kind in ("llama3", "linear"), "kind", "expected llama3 or linear", self.kind)
        require_real("factor", self.factor, _FACTOR_RULE, _LEAST_FACTOR, _LARGEST_FACTOR)
        if self.kind == "llama3":
            borders = (self.low_freq_factor, self.high_freq_factor)
            for field in ("low_freq_factor", "high_freq_factor"):
                value = getattr(self, field)
                require_real(field, value, _FACTOR_RULE, _LEAST_FACTOR, _LARGEST_FACTOR)
            require(
                0 < borders[0] < borders[1],
                "high_freq_factor",
                "expected 0 < low_freq_factor < high_freq_factor",
                borders,
            )
            require_int("original_max_position", self.original_max_position, 1)


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
            require_int(field, getattr(self, field), 1)
        require(
            self.num_heads % self.num_kv_heads == 0,
            "num_kv_heads",
            f"expected a divisor of num_heads = {self.num_heads}",
            self.num_kv_heads,
        )
        require(self.head_dim % 2 == 0, "head_dim", "expected an even number", self.head_dim)
        require_real("rms_norm_eps", self.rms_norm_eps, "expected 0 <= x <= 1", 0.0, 1.0)
        require_real("rope_theta", self.rope_theta, _FACTOR_RULE, _LEAST_FACTOR, _LARGEST_FACTOR)
        if self.sliding_window is not None:
            require_int("sliding_window", self.sliding_window, 1)
            good = self.sliding_window < 2**31
            require(good, "sliding_window", "expected less than 2**31", self.sliding_window)
