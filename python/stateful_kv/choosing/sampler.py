"""Token choice: a pure function of the logits, the context, the seed and the position.

Random numbers come from a counter generator keyed by (seed, position), so neither batching nor
drafts nor a restart changes a sample. A draft token is kept only if it equals the token its row
chooses; drafts therefore never change the reply. All draws are made by the op `sample`; what is
here are the penalties, which look at the context, and the settings of each row.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from stateful_kv import ops
from stateful_kv.choosing.params import SamplingParams
from stateful_kv.errors import BadLogitsError
from stateful_kv.system.device import to_device

FloatArray = npt.NDArray[np.float32]
MAX_TOP_K = 2**31 - 1


def draw_seed() -> int:
    """Returns a fresh random seed."""
    return secrets.randbits(63)


def keyed_uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that belongs to (seed, position): what the op `sample` draws with."""
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

    @property
    def is_plain_sampled(self) -> bool:
        """True when a token is drawn from the raw row: such rows go through one op together."""
        return not self.params.greedy and not self.params.has_penalties

    def choose(self, row: FloatArray, position: int) -> int:
        """Chooses the token at `position`; the context stays as it is.

        Args:
            row: float32[V], logits; not changed.
            position: index in the ledger of the token to choose.

        Raises:
            BadLogitsError: no token can be chosen.
        """
        logits = torch.from_numpy(self._penalised(row))[None]
        ids, values = sample_rows(logits, [(self, [position])])
        top = float(values[0])
        if not math.isfinite(top):
            raise BadLogitsError.at(position, top)
        return int(ids[0])

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


def sample_rows(
    logits: torch.Tensor, owners: Sequence[tuple[Sampler, Sequence[int]]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws a token from each row, by the settings of the sampler that owns it.

    Args:
        logits: float32|float16|bfloat16[R, V], V contiguous.
        owners: each sampler with the positions of the tokens to draw, in the order of the rows; R
            positions together. Penalties are not applied.

    Returns:
        What the op `sample` gives, on its device: ids int64[R] and values float32[R].
    """
    counts = [len(positions) for _, positions in owners]
    settings = [sampler.params for sampler, _ in owners]
    seeds = [sampler.seed or 0 for sampler, _ in owners]  # greedy ones have none and need none

    def per_row(values: Sequence[float], dtype: npt.DTypeLike) -> torch.Tensor:
        # By numpy: torch's repeat_interleave would start a second pool of threads.
        return torch.from_numpy(np.repeat(np.array(values, dtype), counts))

    rows = [
        per_row(seeds, np.uint64).view(torch.int64),
        torch.tensor([position for _, run in owners for position in run], dtype=torch.int64),
        per_row([params.temperature for params in settings], np.float32),
        per_row([min(params.top_k, MAX_TOP_K) for params in settings], np.int32),
        per_row([params.top_p for params in settings], np.float32),
        per_row([params.min_p for params in settings], np.float32),
    ]
    return ops.sample(logits, *to_device(rows, logits.device))
