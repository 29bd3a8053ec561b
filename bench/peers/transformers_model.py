"""`transformers` in float32 on the same GGUF file, with a DynamicCache that is cropped back.

The weights come through our reader: that of `transformers` needs one more package and gives the
same numbers.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness import PeerMissingError
from stateful_kv.models.config import ModelConfig
from stateful_kv.models.files.gguf_file import GGUFFile
from stateful_kv.models.files.gguf_model import GGUFSource, read_config

MAX_BATCH = 512
INSTALL = "pip install transformers"
# Theirs below "model.layers.N." and ours below "layers.N.".
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}
NAMES = {"model.embed_tokens": "embedding", "model.norm": "norm"}


def _our_name(name: str, config: ModelConfig) -> str:
    """Our name of a parameter of `LlamaForCausalLM`."""
    stem = name.removesuffix(".weight")
    if stem == "lm_head":
        return "embedding" if config.tie_word_embeddings else "head"
    if stem in NAMES:
        return NAMES[stem]
    _, _, number, rest = stem.split(".", 3)
    return f"layers.{number}.{LAYER_NAMES[rest]}"


def load(path: Path) -> Any:
    """The model of a GGUF file of the Llama family, dequantised.

    Raises:
        PeerMissingError: transformers cannot be imported.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise PeerMissingError(f"{error.name} cannot be imported: {INSTALL}") from error
    file = GGUFFile(path)
    config = read_config(file)
    source = GGUFSource(file, config)
    theirs = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        max_position_embeddings=config.max_position,
        tie_word_embeddings=config.tie_word_embeddings,
    )
    model = transformers.LlamaForCausalLM(theirs).float().eval()
    state = {
        name: source.dense(_our_name(name, config), tuple(value.shape))
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(state)
    return model


class TransformersContext:
    """One sequence and its KV.

    Attributes:
        length: tokens that have KV.
        about: version of the library.
    """

    def __init__(self, model: Any) -> None:
        transformers = importlib.import_module("transformers")
        self._model = model
        self._cache = transformers.DynamicCache()
        self._logits = torch.empty(0)
        self.length = 0
        self.about = {"transformers": str(transformers.__version__)}

    def run(self, tokens: Tensor, num_logits: int) -> Tensor:
        """Appends tokens int64[N]; returns the likeliest next token of each of the last rows."""
        for part in tokens.split(MAX_BATCH):
            # 0 would ask for the logits of all rows.
            output = self._model(
                part[None], past_key_values=self._cache, logits_to_keep=max(1, num_logits)
            )
        self.length += len(tokens)
        self._logits = output.logits[0]
        return self._logits.argmax(dim=1)

    def logits(self) -> Tensor:
        """float32[R, V] of the last call."""
        return self._logits

    def truncate(self, length: int) -> None:
        """Drops the tokens from `length` on."""
        if length == 0:
            self._cache = type(self._cache)()
        elif length < self.length:
            self._cache.crop(length - self.length)
        self.length = length

    def close(self) -> None:
        """Frees KV."""
        self._cache = self._model = None
