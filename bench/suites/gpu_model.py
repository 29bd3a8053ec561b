"""Suite `gpu_model`: one step of a whole model on a CUDA device against the bytes of its weights.

A step takes new tokens of one sequence through all layers to the likeliest next token of each:
one token (decode), or eight (verify). It runs as the engine runs it: dense weights in bf16, KV in
pages, everything in a CUDA graph. A third case is a reply through the engine itself. Each weight
must be read once, so the floor of a step is their bytes over the copy bandwidth. SmolLM2 has its
own weights, the shapes of Llama 3 have random ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import harness
from bench.harness import Case, Check, Settings, Trial, Work
from bench.selection import Row
from bench.suites import gpu_engine, on_device
from bench.suites.gpu_engine import LetterTokenizer
from stateful_kv._native import check_device
from stateful_kv.errors import ModelNotFoundError
from stateful_kv.kv.batch import Batch
from stateful_kv.kv.cache import KVCache
from stateful_kv.models.config import ModelConfig
from stateful_kv.models.files.dense_weights import DenseBuilder
from stateful_kv.models.files.loading import resolve
from stateful_kv.models.files.weights import build_weights
from stateful_kv.models.llama import LlamaModel

SUITE = "gpu_model"
CONTEXT = 256
PAGE_SIZE = 64
ROWS = {"decode": 1, "verify_8": 8}
REAL = "smollm2"
SHAPES = {
    "llama_1b": ModelConfig(
        128256, 2048, 8192, 16, 32, 8, 64, rope_theta=5e5, tie_word_embeddings=True
    ),
    "llama_8b": ModelConfig(128256, 4096, 14336, 32, 32, 8, 128, rope_theta=5e5),
}
SMALL = {"small": ModelConfig(500, 128, 160, 2, 4, 2, 64, tie_word_embeddings=True)}


class RandomSource:
    """Weights of a shape, made on the device when they are asked for; a `WeightSource`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._random = torch.Generator(device).manual_seed(0)

    def has(self, name: str) -> bool:
        """There are no biases and no factors."""
        return False

    def dense(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """float32: ones for norms, else values that keep the size of what they multiply."""
        if len(shape) == 1:
            return torch.ones(shape)
        values = torch.randn(shape, generator=self._random, device=self._device)
        return values.mul_(shape[-1] ** -0.5)

    def packed(self, name: str, shape: tuple[int, int], weight_format: str) -> Any:
        """Not asked for: the weights are dense."""
        raise NotImplementedError(f"{name}: random weights are dense")


@lru_cache(maxsize=1)
def load(name: str, device: str) -> LlamaModel:
    """A model by name; only the last one is kept."""
    if name == REAL:
        return on_device.load(device).model
    config = {**SHAPES, **SMALL}[name]
    where = check_device(device)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    source = RandomSource(where)
    return LlamaModel(config, build_weights(source, config, DenseBuilder(source, dtype, where)))


def weight_bytes(config: ModelConfig, item_bytes: int) -> int:
    """Bytes of the weights of all products; of the embedding a step reads next to nothing."""
    width = config.head_dim
    layer = config.hidden_size * (
        2 * config.num_heads * width
        + 2 * config.num_kv_heads * width
        + 3 * config.intermediate_size
    )
    head = config.vocab_size * config.hidden_size
    return (config.num_layers * layer + head) * item_bytes


def work_of(config: ModelConfig, rows: int, item_bytes: int) -> Work:
    """Every weight and the KV of the context once; products and attention of the rows."""
    num_weights = weight_bytes(config, 1)
    kv_width = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    seen = rows * CONTEXT + rows * (rows + 1) // 2
    attention = 4 * seen * config.num_layers * config.num_heads * config.head_dim
    num_bytes = (num_weights + kv_width * (CONTEXT + rows)) * item_bytes
    return Work(num_bytes, 2 * rows * num_weights + attention)


class Step:
    """A step of a model on a context of random KV; repeating it changes nothing."""

    def __init__(self, model: LlamaModel, device: str, kv_dtype: torch.dtype) -> None:
        config = model.config
        num_pages = -(-(CONTEXT + max(ROWS.values())) // PAGE_SIZE) + 1
        shape = (config.num_layers, config.num_kv_heads, config.head_dim, num_pages, PAGE_SIZE)
        self._cache = KVCache(*shape, kv_dtype, device)
        for pool in (self._cache.k, self._cache.v):
            pool.copy_(torch.randn(pool.shape[1:], device=pool.device))
        self._model = model
        self._sequence, _ = self._cache.match_and_adopt(np.zeros(0, dtype=np.int32))
        self._cache.reserve(self._sequence, CONTEXT)
        self._cache.commit([self._sequence], [CONTEXT])
        self._tokens = torch.randint(config.vocab_size, (max(ROWS.values()),))

    def batch(self, rows: int) -> Batch:
        """The next `rows` tokens, on the device."""
        self._cache.reserve(self._sequence, rows)
        pages = self._cache.batch_pages([self._sequence], [rows])
        batch = Batch(
            token_ids=self._tokens[:rows],
            positions=pages.positions,
            query_offsets=pages.query_offsets,
            page_table=pages.page_table,
            seq_lens=pages.seq_lens,
            slots=pages.slots,
            logit_rows=torch.arange(rows),
        )
        self._cache.truncate(self._sequence, CONTEXT)
        return batch.to(self._cache.device)

    def run(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Ids int64[R] and logits float32[R] of the likeliest next tokens."""
        ids, values = self._model.forward_top_k(batch, self._cache, 1)
        return ids[:, 0], values[:, 0]


def _setup(name: str, rows: int, settings: Settings) -> Trial:
    on_cuda = settings.device == "cuda"
    model = load(name, settings.device)
    step = Step(model, settings.device, torch.bfloat16 if on_cuda else torch.float16)
    batch, first = step.batch(rows), step.batch(1)

    def check(_peer: str) -> Check:
        ids, values = step.run(batch)
        alone_ids, alone_values = step.run(first)
        bits = torch.equal(ids[:1], alone_ids) and torch.equal(values[:1], alone_values)
        finite = bool(values.isfinite().all())
        return Check(finite and bits, bits_equal=bits)

    item_bytes = 2 if on_cuda else 4
    return Trial(
        ours=lambda _index: step.run(batch),
        peers={"decode_step": lambda _index: step.run(first)} if rows > 1 else {},
        check=check,
        work=work_of(model.config, rows, item_bytes),
        rotation_bytes=weight_bytes(model.config, item_bytes),
        is_captured=on_cuda,
        details=lambda _peer: {
            "context": CONTEXT,
            "weight_bytes": weight_bytes(model.config, item_bytes),
            "row_counts": {shape: str(rows) for shape, rows in model.row_counts.items()},
        },
    )


def _setup_engine(name: str, stack: ExitStack, settings: Settings) -> Trial:
    model = load(name, settings.device)
    is_real = name == REAL
    tokenizer = on_device.load(settings.device).tokenizer if is_real else LetterTokenizer()
    step_work = work_of(model.config, 1, model.dtype.itemsize)
    return gpu_engine.setup(model, tokenizer, CONTEXT, step_work, stack, settings)


def cases(settings: Settings, names: list[str]) -> Iterator[Case]:
    """Model by model, so that each is loaded once."""
    for name in names:
        for kind, rows in ROWS.items():
            axes: dict[str, int | float | str] = {"rows": rows, "context": CONTEXT}
            yield Case(f"{name}_{kind}", axes, partial(_setup, name, rows))
        with ExitStack() as stack:  # what the case opens is closed when the next one is asked for
            setup = partial(_setup_engine, name, stack)
            yield Case(f"{name}_engine", {"rows": 1, "context": CONTEXT}, setup)


def _random_names(settings: Settings) -> list[str]:
    return list(SMALL if settings.smoke else SHAPES)


def rows(settings: Settings) -> list[Row]:
    """Names and axes of all cases."""
    real = [] if settings.smoke else [REAL]
    return harness.rows_of(cases(settings, [*_random_names(settings), *real]))


def run(settings: Settings, roofs: dict[str, Any], emit: Callable[[dict[str, Any]], None]) -> None:
    """Run the suite; a case that fails does not keep the others from running."""
    names = _random_names(settings)
    if not settings.smoke:
        try:
            resolve(on_device.MODEL)
            names.append(REAL)
        except ModelNotFoundError as error:
            emit(harness.skipped(SUITE, REAL, {}, None, str(error)))
    try:
        with torch.inference_mode():
            harness.run_each(SUITE, cases(settings, names), settings, roofs, emit)
    finally:
        load.cache_clear()
