"""Small stand-ins for the end-to-end tests: a byte tokenizer, a random Llama, and stub models."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from stateful_kv import ops
from stateful_kv.drafts.costs import CostCurve
from stateful_kv.errors import InvalidRequestError
from stateful_kv.kv.batch import Batch
from stateful_kv.kv.cache import KVCache
from stateful_kv.models import packing
from stateful_kv.models.config import ModelConfig
from stateful_kv.models.dense import RowCountTable
from stateful_kv.models.llama import LayerWeights, LlamaModel, LlamaWeights, Projection
from stateful_kv.models.packed import Linear
from stateful_kv.models.rope import cos_sin_table, inverse_frequencies

END = 0
ROLES = {"system": 1, "user": 2, "assistant": 3, "tool": 4}
FIRST_BYTE = 8
# Shaped like that of a real small model; given, so that no test depends on the machine.
COSTS = CostCurve((1, 2, 4, 8), (8e-3, 8.6e-3, 10e-3, 16e-3), 2e-6, 4e-7)
VOCAB_SIZE = 272  # the last tokens stand for no byte, as in padded vocabularies


class ByteDecoder:
    """Streams UTF-8: a character appears with its last byte."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        if not FIRST_BYTE <= token_id < FIRST_BYTE + 256:
            return ""
        return self._utf8.decode(bytes([token_id - FIRST_BYTE]))

    def flush(self) -> str:
        return self._utf8.decode(b"", True)


class ByteTokenizer:
    """One token a byte, one special token a role, one that ends a message."""

    eos_token_ids = frozenset({END})
    vocab_size = FIRST_BYTE + 256

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def encode(self, text: str) -> list[int]:
        return [FIRST_BYTE + byte for byte in text.encode()]

    def decode(self, token_ids: Sequence[int]) -> str:
        decoder = self.stream_decoder()
        return "".join([*map(decoder.push, token_ids), decoder.flush()])

    def stream_decoder(self) -> ByteDecoder:
        return ByteDecoder()

    def render_start(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> np.ndarray:
        ids = [*self._render(messages), ROLES["assistant"]]
        if tools:
            ids = [*self.encode(repr(tools)), *ids]
        self.calls.append(("start", len(ids)))
        return np.array(ids, dtype=np.int32)

    def render_delta(
        self, messages: Sequence[Mapping[str, Any]], last_token_id: int | None = None
    ) -> np.ndarray:
        closing = [] if last_token_id == END else [END]
        ids = [*closing, *self._render(messages), ROLES["assistant"]]
        self.calls.append(("delta", len(ids)))
        return np.array(ids, dtype=np.int32)

    def _render(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        ids: list[int] = []
        for message in messages:
            if message.get("role") not in ROLES:
                raise InvalidRequestError(f"messages: unknown role {message.get('role')!r}")
            ids += [ROLES[message["role"]], *self.encode(message["content"]), END]
        return ids


def tiny_config(num_layers: int = 2, max_position: int = 2048, head_dim: int = 32) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_layers=num_layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=head_dim,
        max_position=max_position,
    )


class PackedForm:
    """Makes the linear layers of a model with int8 weights."""

    def values(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def embedding(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def linear(self, weight: torch.Tensor) -> Projection:
        return Linear.fuse([self._pack(weight)], [None])

    def gate_up(self, gate: torch.Tensor, up: torch.Tensor) -> Projection:
        return Linear.gate_up(self._pack(gate), self._pack(up))

    def _pack(self, weight: torch.Tensor) -> packing.PackedWeight:
        return packing.pack_int8(*packing.quantize_int8(weight))


class DenseForm:
    """Makes the linear layers of a model with dense weights."""

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self._device = device
        self._dtype = dtype
        self._rows = RowCountTable()

    def values(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device)

    def embedding(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device, self._dtype)

    def linear(self, weight: torch.Tensor) -> Projection:
        return self._rows.linear(self.embedding(weight))

    def gate_up(self, gate: torch.Tensor, up: torch.Tensor) -> Projection:
        return self._rows.linear(self.embedding(torch.cat([gate, up])), has_silu_mul=True)


def tiny_llama(
    seed: int = 0,
    max_position: int = 2048,
    form: PackedForm | DenseForm | None = None,
    head_dim: int = 32,
) -> LlamaModel:
    """A random Llama, its head bent so that text runs in circles for a while; int8 weights if no
    other form is given.
    """
    config = tiny_config(max_position=max_position, head_dim=head_dim)
    random = torch.Generator().manual_seed(seed)
    form = form or PackedForm()

    def weight(out_features: int, in_features: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(out_features, in_features, generator=random)
        return values * scale * in_features**-0.5

    def linear(out_features: int, in_features: int, scale: float = 1.0) -> Projection:
        return form.linear(weight(out_features, in_features, scale))

    embedding = torch.randn(config.vocab_size, config.hidden_size, generator=random)
    circles = (torch.arange(config.vocab_size).view(-1, 16).roll(1, 1)).flatten()
    head = torch.randn(config.vocab_size, config.hidden_size, generator=random) * 0.6
    head = (head + embedding[circles]) * 3.0 * config.hidden_size**-0.5
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layers = tuple(
        LayerWeights(
            attn_norm=form.values(torch.ones(config.hidden_size)),
            qkv=linear(q_width + 2 * kv_width, config.hidden_size, 2.0),
            o=linear(config.hidden_size, q_width),
            ffn_norm=form.values(torch.ones(config.hidden_size)),
            gate_up=form.gate_up(
                *(weight(config.intermediate_size, config.hidden_size) for _ in range(2))
            ),
            down=linear(config.hidden_size, config.intermediate_size),
        )
        for _ in range(config.num_layers)
    )
    inverse = inverse_frequencies(config.head_dim, config.rope_theta, None)
    weights = LlamaWeights(
        embedding=form.embedding(embedding),
        layers=layers,
        norm=form.values(torch.ones(config.hidden_size)),
        head=form.linear(head),
        cos_sin=form.values(cos_sin_table(inverse, config.max_position)),
    )
    return LlamaModel(config, weights)


class TopKOfLogits:
    """`forward_top_k` of a model that computes its logits in full."""

    def forward(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        raise NotImplementedError

    def forward_top_k(
        self, batch: Batch, cache: KVCache, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert k == 1, "the engine asks for no more"
        ids, values = ops.argmax(self.forward(batch, cache))
        return ids[:, None], values[:, None]


class StubModel(TopKOfLogits):
    """A model without mathematics; `next_tokens` gives the greedy token of each asked row."""

    def __init__(self, max_position: int = 1 << 20) -> None:
        self.config = ModelConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=16,
            intermediate_size=16,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_dim=2,
            max_position=max_position,
        )
        self.num_rows = 0
        self.before_forward: Callable[[Batch], None] = lambda batch: None

    def forward(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        self.before_forward(batch)
        self.num_rows += batch.num_tokens
        logits = torch.zeros(len(batch.logit_rows), VOCAB_SIZE)
        for row, token in enumerate(self.next_tokens(batch, cache)):
            if token is None:
                logits[row] = torch.nan
            else:
                logits[row, token] = 10.0
        return logits

    def next_tokens(self, batch: Batch, cache: KVCache) -> list[int | None]:
        raise NotImplementedError


class CountingUp(StubModel):
    """The next token is the one after the row's own: cheap whatever the history."""

    def next_tokens(self, batch: Batch, cache: KVCache) -> list[int | None]:
        tokens = batch.token_ids[batch.logit_rows].tolist()
        return [FIRST_BYTE + (token + 1) % 200 for token in tokens]


class Scripted(StubModel):
    """Says `script` again and again, whatever it is asked; None makes a row of NaN.

    The place in the script is the row's distance from the last assistant token of its sequence,
    read from the tokens it was fed.
    """

    def __init__(self, script: Sequence[int | None], max_position: int = 1 << 20) -> None:
        super().__init__(max_position)
        self.script = list(script)
        self._starts: dict[int, list[int]] = {}

    def next_tokens(self, batch: Batch, cache: KVCache) -> list[int | None]:
        offsets = batch.query_offsets.tolist()
        positions = batch.positions.tolist()
        token_ids = batch.token_ids.tolist()
        wanted: list[int | None] = []
        for row in batch.logit_rows.tolist():
            if row >= offsets[-1]:  # padding
                wanted.append(END)
                continue
            sequence = next(s for s in range(len(offsets) - 1) if row < offsets[s + 1])
            first_page = int(batch.page_table[sequence, 0])
            begin = offsets[sequence]
            # What a refused draft fed is fed anew.
            starts = [s for s in self._starts.get(first_page, []) if s < positions[begin]]
            for before in range(begin, row + 1):
                if token_ids[before] == ROLES["assistant"]:
                    starts.append(positions[before])
            self._starts[first_page] = starts
            index = positions[row] - starts[-1]
            wanted.append(self.script[index % len(self.script)])
        return wanted


class Provenance(StubModel):
    """The bookkeeping oracle: KV of a token is (token id, position), read back by page table.

    The next token is a function of everything read back, so a page that is stale, shared by
    mistake or out of order changes the text; `oracle_token` tells what it should have been.
    """

    def next_tokens(self, batch: Batch, cache: KVCache) -> list[int | None]:
        size = cache.page_size
        keys = cache.k[0, :, 0].view(-1, 2)
        fed = batch.slots >= 0
        keys[batch.slots[fed], 0] = batch.token_ids[fed].to(keys.dtype)
        keys[batch.slots[fed], 1] = batch.positions[fed].to(keys.dtype)
        wanted: list[int | None] = []
        offsets = batch.query_offsets.tolist()
        rows = batch.logit_rows.tolist()
        for sequence, seq_len in enumerate(batch.seq_lens.tolist()):
            pages = batch.page_table[sequence, : -(-seq_len // size)].long()
            slots = (pages[:, None] * size + torch.arange(size)).flatten()[:seq_len]
            text = keys[slots].numpy().astype(np.int64)
            assert (text[:, 1] == np.arange(seq_len)).all(), "a page is at the wrong place"
            begin, end = offsets[sequence], offsets[sequence + 1]
            wanted += [
                oracle_token(text[: seq_len - (end - row) + 1, 0])
                for row in rows
                if begin <= row < end
            ]
        return wanted


def oracle_token(tokens: np.ndarray) -> int:
    """What Provenance says after `tokens`: mostly an echo, so that drafts hit; never END."""
    powers = np.arange(1, len(tokens) + 1, dtype=np.int64) * 7919 + 1
    mixed = int((tokens * powers).sum()) & 0xFFFFFFFF
    mixed = (mixed ^ (mixed >> 15)) * 0x2C1B3C6D & 0xFFFFFFFF
    mixed ^= mixed >> 12
    if mixed % 4 and len(tokens) > 9 and tokens[-9] >= FIRST_BYTE:
        return int(tokens[-9])
    return FIRST_BYTE + (mixed >> 8) % 200


Row = tuple[int, int, bytes]


class Recorder(TopKOfLogits):
    """Wraps a model and keeps (position, fed token, logits) of every row that asked for logits."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.config = model.config
        self.device = getattr(model, "device", torch.device("cpu"))
        self.rows: list[Row] = []
        self.num_tokens = 0
        self.num_steps = 0

    def forward(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        logits: torch.Tensor = self._model.forward(batch, cache)
        self.num_tokens += batch.num_tokens
        self.num_steps += 1
        positions, token_ids = batch.positions.tolist(), batch.token_ids.tolist()
        for row, values in zip(batch.logit_rows.tolist(), logits.cpu(), strict=True):
            self.rows.append((positions[row], token_ids[row], values.numpy().tobytes()))
        return logits


def rows_from_scratch(
    model: LlamaModel, tokens: Sequence[int], kv_dtype: torch.dtype
) -> dict[int, Row]:
    """The logits rows of a text by position, all computed in one pass on a fresh cache."""
    config = model.config
    shape = config.num_layers, config.num_kv_heads, config.head_dim
    cache = KVCache(*shape, 4, len(tokens), kv_dtype, model.device)
    sequence, _ = cache.match_and_adopt(np.empty(0, dtype=np.int32))
    cache.reserve(sequence, len(tokens))
    pages = cache.batch_pages([sequence], [len(tokens)])
    batch = Batch(
        token_ids=torch.tensor(tokens, dtype=torch.int64),
        positions=pages.positions,
        query_offsets=pages.query_offsets,
        page_table=pages.page_table,
        seq_lens=pages.seq_lens,
        slots=pages.slots,
        logit_rows=torch.arange(len(tokens)),
    )
    logits = model.forward(batch.to(model.device), cache).cpu()
    return {
        position: (position, token, logits[position].numpy().tobytes())
        for position, token in enumerate(tokens)
    }
