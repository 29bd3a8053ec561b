"""Measures the cost curve of a model on this machine, or finds the one measured before.

Drafts change nothing but time, and so does a curve: two runs with different curves give the same
tokens in steps of other sizes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import statistics
import time
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch

from stateful_kv._native import check_device
from stateful_kv.drafts import cost_file
from stateful_kv.drafts.costs import CostCurve, point_rows, smoothed
from stateful_kv.errors import InvalidRequestError
from stateful_kv.kv.batch import Batch
from stateful_kv.kv.cache import KVCache
from stateful_kv.kv.pools import DTYPES
from stateful_kv.models.config import ModelConfig
from stateful_kv.models.protocol import Model
from stateful_kv.system.device import device_name, synchronize

CostChoice = CostCurve | Literal["auto", "measure"]

BUDGET_S = 0.6
_MAX_ROUNDS = 9
_CONTEXT = 2048
_SCRATCH_BYTES = 1 << 26
_SCRATCH_PAGE = 64
# A curve that was measured while something else ran serves this process only.
MAX_STORED_NOISE = 0.3
_log = logging.getLogger(__name__)


class Costs:
    """The cost curve of one engine, found when it is first asked for.

    Attributes:
        source: "given", "file", "measured", or "" as long as nobody has asked.
    """

    def __init__(
        self,
        model: Model,
        choice: CostChoice,
        *,
        kv_dtype: str,
        page_size: int,
        max_draft: int,
        device: str,
    ) -> None:
        """Checks the choice; measures nothing yet.

        Args:
            model: whose passes are timed.
            choice: the curve, or how to find it.
            kv_dtype: of the engine's KV.
            page_size: tokens a page of it holds.
            max_draft: longest draft.
            device: where it lies.
        """
        if not isinstance(choice, CostCurve) and choice not in ("auto", "measure"):
            raise InvalidRequestError(
                f"cost_curve: expected a CostCurve, 'auto' or 'measure', got {choice!r}"
            )
        self._model = model
        self._kv_dtype = kv_dtype
        self._page_size = min(page_size, _SCRATCH_PAGE)
        self._max_rows = max_draft + 1
        self._device = device
        self._choice = choice
        self._curve: CostCurve | None = None
        self.source = ""

    def curve(self) -> CostCurve:
        """The curve: the given one, else the stored one ("auto" only), else one measured now."""
        if self._curve is None:
            self._curve, self.source = self._find()
        return self._curve

    def _find(self) -> tuple[CostCurve, str]:
        if isinstance(self._choice, CostCurve):
            return self._choice, "given"
        model_key = fingerprint(self._model)
        key: cost_file.Key | None = None
        if model_key is not None:
            key = {
                **cost_file.machine_key(),
                "device": device_name(check_device(self._device)),
                "model": model_key,
                "shape": _shape_name(self._model.config),
                "kv_dtype": self._kv_dtype,
                "page_size": self._page_size,
                "max_rows": self._max_rows,
            }
            stored = cost_file.load(key) if self._choice == "auto" else None
            if stored is not None:
                return stored, "file"
        began_at = time.perf_counter()
        curve = measure(self._model, self._kv_dtype, self._page_size, self._max_rows, self._device)
        seconds = time.perf_counter() - began_at
        _log.info("cost curve measured in %.2f s: %s", seconds, curve)
        if key is not None and curve.noise <= MAX_STORED_NOISE:
            cost_file.store(key, curve)
        return curve, "measured"


def fingerprint(model: Model) -> str | None:
    """32 hex digits that differ when shape or weight format do; None without visible weights.

    Costs depend on the size and type of every weight, not on its values.
    """
    weights = getattr(model, "weights", None)
    if not dataclasses.is_dataclass(weights):
        return None
    digest = hashlib.blake2b(repr(model.config).encode(), digest_size=16)
    for tensor in _tensors(weights):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)};".encode())
    return digest.hexdigest()


def measure(model: Model, kv_dtype: str, page_size: int, max_rows: int, device: str) -> CostCurve:
    """Times passes of 1 to `max_rows` rows, without context and with some.

    A model whose longest context is shorter than that gets no more rows than it has positions.
    Uses a small cache of its own. All points are timed in rounds, forwards and backwards, so that
    a machine that gets slower or faster affects them alike. Each gets the least of its times,
    since other work of the machine only adds to them. Rounds end after `BUDGET_S`; a model so slow
    that one round takes longer is measured once.
    """
    scratch = _Scratch(model, kv_dtype, page_size, max_rows, device)
    rows = point_rows(scratch.max_rows)
    passes = [scratch.batch(count, 0) for count in rows]
    context = scratch.context
    if context:
        passes += [scratch.batch(count, context) for count in (rows[0], rows[-1])]
    # The first pass also ends each round: so even one round shows whether times repeat.
    times = list(zip(*_rounds(model, scratch.cache, [*passes, passes[0]]), strict=True))
    times[0] += times.pop()
    least = [min(point) for point in times]
    seconds = smoothed(least[: len(rows)])
    per_token = per_row_token = 0.0
    if context:
        slope_first = max(0.0, least[-2] - seconds[0]) / context
        slope_last = max(0.0, least[-1] - seconds[-1]) / context
        if rows[-1] > 1:
            per_row_token = max(0.0, slope_last - slope_first) / (rows[-1] - 1)
        per_token = max(0.0, slope_first - per_row_token)
    # More rows that took less time are noise too.
    spread = [statistics.median(point) / min(point) - 1.0 for point in times]
    spread += [abs(value / mean - 1.0) for value, mean in zip(least, seconds, strict=False)]
    noise = max(spread)
    window = model.config.sliding_window
    return CostCurve(rows, seconds, per_token, per_row_token, window, noise)


def _rounds(model: Model, cache: KVCache, passes: list[Batch]) -> list[list[float]]:
    """Seconds of every pass, several times."""
    rounds: list[list[float]] = []
    began_at = time.perf_counter()
    with torch.inference_mode():
        model.forward_top_k(passes[0], cache, 1)  # warms up
        for number in range(_MAX_ROUNDS):
            times = [0.0] * len(passes)
            order = range(len(passes))
            for index in order if number % 2 == 0 else reversed(order):
                synchronize(cache.device)
                start = time.perf_counter()
                model.forward_top_k(passes[index], cache, 1)  # as in a greedy step
                synchronize(cache.device)
                times[index] = time.perf_counter() - start
            rounds.append(times)
            if time.perf_counter() - began_at + sum(times) > BUDGET_S:
                break
    return rounds


class _Scratch:
    """A small cache with one empty sequence and one with some context, for timing alone."""

    def __init__(
        self, model: Model, kv_dtype: str, page_size: int, max_rows: int, device: str
    ) -> None:
        shape, dtype = model.config, DTYPES[kv_dtype]
        self.max_rows = max_rows = min(max_rows, shape.max_position)
        token_bytes = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * dtype.itemsize
        self.context = max(0, min(_CONTEXT, _SCRATCH_BYTES // token_bytes))
        self.context = min(self.context, max(0, shape.max_position - max_rows))
        if shape.sliding_window is not None:
            self.context = min(self.context, shape.sliding_window)
        num_pages = -(-(self.context + max_rows) // page_size) + -(-max_rows // page_size)
        self.cache = KVCache(
            shape.num_layers,
            shape.num_kv_heads,
            shape.head_dim,
            num_pages,
            page_size,
            dtype,
            device,
        )
        self._fill(torch.linspace(-1.0, 1.0, page_size, device=self.cache.device))
        self._vocab_size = shape.vocab_size
        nothing = np.empty(0, dtype=np.int32)
        self._sequences = {}
        for context in {0, self.context}:
            sequence, _ = self.cache.match_and_adopt(nothing)
            self.cache.reserve(sequence, context)
            self.cache.commit([sequence], [context])
            self._sequences[context] = sequence

    def _fill(self, pattern: torch.Tensor) -> None:
        """Writes float32[B] to the vectors of each page, all numbers of a vector alike.

        Memory that was never written is one physical page of zeros, so it would always be in the
        CPU's cache.
        """
        pools = (self.cache.k, self.cache.k_scales), (self.cache.v, self.cache.v_scales)
        for pool, scales in pools:
            if scales is None:
                pool.copy_(pattern.unsqueeze(1))
            else:
                pool.copy_((pattern * 127).round().unsqueeze(1))
                scales.fill_(1 / 127)

    def batch(self, num_rows: int, context: int) -> Batch:
        """A verify of `num_rows` rows behind `context` tokens; all rows want logits."""
        sequence = self._sequences[context]
        self.cache.reserve(sequence, num_rows)
        pages = self.cache.batch_pages([sequence], [num_rows])
        rows = torch.arange(num_rows, dtype=torch.int64)
        return Batch(
            token_ids=rows % self._vocab_size,
            positions=pages.positions,
            query_offsets=pages.query_offsets,
            page_table=pages.page_table,
            seq_lens=pages.seq_lens,
            slots=pages.slots,
            logit_rows=rows,
        ).to(self.cache.device)


def _shape_name(config: ModelConfig) -> str:
    """A short name of the model's shape, for people."""
    return f"{config.architecture} {config.num_layers}x{config.hidden_size}"


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors inside dataclasses and sequences, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
