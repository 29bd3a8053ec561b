"""Token choice: a pure function of the logits, the context, the seed and the position.

Random numbers come from a counter generator keyed by (seed, position), so neither batching nor
drafts nor a restart changes a sample. A draft token is kept only if it equals the token its row
chooses; drafts therefore never change the reply.
"""

from __future__ import annotations

import math
import secrets

import numpy as np
import numpy.typing as npt

from stateful_kv.config import SamplingParams
from stateful_kv.errors import StatefulKVError

FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]
IndexArray = npt.NDArray[np.int64]


class BadLogitsError(StatefulKVError):
    """A row of logits holds NaN or +inf, or nothing but -inf: no token can be chosen from it."""

    @staticmethod
    def at(position: int, top: float) -> BadLogitsError:
        """The error for a row whose maximum is `top`."""
        return BadLogitsError(f"row_error: logits for position {position} have the maximum {top}")


def draw_seed() -> int:
    """Returns a fresh random seed."""
    return secrets.randbits(63)


def keyed_uniform(seed: int, position: int) -> float:
    """Returns the number in [0, 1) that belongs to (seed, position)."""
    key = np.array([seed, position], dtype=np.uint64)
    bits = int(np.random.Philox(key=key).random_raw())
    return (bits >> 11) * 2.0**-53


class Sampler:
    """Chooses the tokens of one turn.

    Penalties look at the context of the very row: the prompt, the output so far and, inside a
    verified draft, the draft tokens before it.
    """

    def __init__(
        self,
        params: SamplingParams,
        seed: int | None,
        vocab_size: int,
        prompt: npt.NDArray[np.int32],
    ) -> None:
        """Prepares for one reply.

        Args:
            params: how to choose.
            seed: of the random numbers; may be None when params are greedy.
            vocab_size: width of a logits row.
            prompt: int32[T], all tokens before the reply; read only with a repetition penalty,
                then in one vectorised pass.
        """
        if not params.greedy and seed is None:
            raise ValueError("seed: a sampled reply needs one")
        self.params = params
        self.seed = seed
        self._seen: npt.NDArray[np.bool_] | None = None
        self._counts: npt.NDArray[np.int32] | None = None
        if params.repetition_penalty != 1.0:
            self._seen = np.zeros(vocab_size, dtype=np.bool_)
            self._seen[prompt] = True
        if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
            self._counts = np.zeros(vocab_size, dtype=np.int32)

    @property
    def is_plain_greedy(self) -> bool:
        """True when a token is the argmax of the raw row: the engine's fast path."""
        return self.params.greedy and not self.params.has_penalties

    def choose(self, row: FloatArray, position: int) -> int:
        """Chooses the token at `position`; the context stays as it is.

        Args:
            row: float32[V], logits; not changed.
            position: index in the ledger of the token to choose.

        Raises:
            BadLogitsError: no token can be chosen.
        """
        row = self._penalised(row)
        top = float(row.max())
        if not math.isfinite(top):
            raise BadLogitsError.at(position, top)
        if self.params.greedy:
            return int(row.argmax())  # the first of equals: the lowest id
        assert self.seed is not None
        return _draw(row, top, self.params, keyed_uniform(self.seed, position))

    def choose_run(
        self, rows: FloatArray, draft: list[int], position: int
    ) -> tuple[list[int], BadLogitsError | None]:
        """Chooses from the rows of a verified draft until one disagrees with the draft.

        Args:
            rows: float32[len(draft) + 1, V], logits after the pending token and each draft token.
            draft: proposed tokens.
            position: index in the ledger of the first token to choose.

        Returns:
            The accepted draft tokens and one more, or fewer tokens and the error that stopped
            the run. The context is as before: `note` adds what is really kept.
        """
        tokens: list[int] = []
        error: BadLogitsError | None = None
        before = self._seen, self._counts
        if draft and self.params.has_penalties:
            self._seen = None if self._seen is None else self._seen.copy()
            self._counts = None if self._counts is None else self._counts.copy()
        try:
            for index in range(len(draft) + 1):
                tokens.append(self.choose(rows[index], position + index))
                if index == len(draft) or tokens[-1] != draft[index]:
                    break
                self.note(tokens[-1])
        except BadLogitsError as caught:
            error = caught
        finally:
            self._seen, self._counts = before
        return tokens, error

    def note(self, token: int) -> None:
        """Makes a token of the reply part of the context of penalties."""
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1

    def _penalised(self, row: FloatArray) -> FloatArray:
        params = self.params
        if self._seen is not None:
            factor = np.float32(params.repetition_penalty)
            row = np.where(self._seen, np.where(row > 0, row / factor, row * factor), row)
        if self._counts is not None:
            row = row - np.float32(params.frequency_penalty) * self._counts.astype(np.float32)
            row -= np.float32(params.presence_penalty) * (self._counts > 0)
        return row


def _draw(row: FloatArray, top: float, params: SamplingParams, uniform: float) -> int:
    """Draws a token by `uniform` from the filtered distribution of a row whose maximum is top."""
    with np.errstate(over="ignore", under="ignore"):
        scaled = (row.astype(np.float64) - top) / params.temperature
        ids = _top_k(scaled, params.top_k)
        weights = np.exp(scaled[ids])
    if params.top_p < 1.0:
        ids, weights = _top_p(ids, weights, params.top_p)
    if params.min_p > 0.0:
        kept = weights >= params.min_p  # the likeliest token has weight 1
        ids, weights = ids[kept], weights[kept]
    cumulative = np.cumsum(weights)
    at = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    return int(ids[min(at, len(ids) - 1)])


def _top_k(scaled: DoubleArray, k: int) -> IndexArray:
    """Ids of the k highest entries (all for k = 0), ascending; lower ids win ties at the border."""
    size = len(scaled)
    if not 0 < k < size:
        return np.arange(size)
    border = np.partition(scaled, size - k)[size - k]
    ids = np.flatnonzero(scaled >= border)
    if len(ids) > k:
        ids = np.sort(ids[np.lexsort((ids, -scaled[ids]))][:k])
    return ids


def _top_p(ids: IndexArray, weights: DoubleArray, top_p: float) -> tuple[IndexArray, DoubleArray]:
    """The likeliest ids that together reach `top_p` of the weight, likeliest first."""
    total = float(weights.sum())
    # Tokens lighter than this sum to less than 1 - top_p even if all were so light: the set is
    # complete without them, and only the few others need sorting.
    heavy = weights >= (1.0 - top_p) * total / len(weights)
    ids, weights = ids[heavy], weights[heavy]
    order = np.lexsort((ids, -weights))
    ids, weights = ids[order], weights[order]
    count = int(np.searchsorted(np.cumsum(weights), top_p * total, side="left")) + 1
    return ids[:count], weights[:count]
