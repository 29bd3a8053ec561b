"""From logits to tokens: the largest, a drawn one, and how much of a draft agrees."""

from __future__ import annotations

import torch
from torch import Tensor

_ops = torch.ops.stateful_kv


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy choice: the largest logit of each row, of equals the one with the lowest id.

    Args:
        logits: float32|float16|bfloat16[R, V], V contiguous, V >= 1.

    Returns:
        ids: int64[R].
        values: float32[R], the logits at those ids; NaN where the row has a NaN, and then the id
            of its first one.
    """
    result: tuple[Tensor, Tensor] = _ops.argmax.default(logits)
    return result


def sample(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperatures: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> tuple[Tensor, Tensor]:
    """Draws a token from each row of logits; the number drawn with belongs to (seed, position).

    Weights are integers, floor(2^32 e^((logit - largest) / temperature)), so no sum depends on an
    order: a row gives the same token in any batch, on any number of threads, on every instruction
    set and device. Of a row the top_k largest logits stay (of equals the lowest ids); of these the
    fewest, largest first, whose weights reach top_p of their sum; of these the tokens with at
    least min_p of the largest weight. The token is the first in the order of ids at which the sum
    of the weights left exceeds u times all of them, where u in [0, 1) is the first number of
    Philox4x64-10 with the key (seed, position), cut to 53 bits. Tokens less than e^-22.2 as likely
    as the likeliest are never drawn.

    On CUDA values out of range are not refused but replaced by the nearest valid one, a temperature
    that is no number > 0 by 0, NaN elsewhere by what keeps all tokens.

    Args:
        logits: float32|float16|bfloat16[R, V], V contiguous, V >= 1; -inf is never drawn.
        seeds: int64[R], contiguous - read as 64 bits without a sign.
        positions: int64[R], contiguous, >= 0 - of the tokens to draw.
        temperatures: float32[R], contiguous, finite, >= 0; 0 takes the largest logit, of equals the
            lowest id, as `argmax` does.
        top_k: int32[R], contiguous, >= 0; 0 keeps all tokens.
        top_p: float32[R], contiguous, from 0 to 1; 1 keeps all tokens, 0 the likeliest.
        min_p: float32[R], contiguous, from 0 to 1; 0 keeps all tokens.

    Returns:
        ids: int64[R], in [0, V).
        values: float32[R], the largest logit of each row, NaN if it has a NaN; where it is not
            finite there is nothing to draw from and the id means nothing.
    """
    result: tuple[Tensor, Tensor] = _ops.sample.default(
        logits, seeds, positions, temperatures, top_k, top_p, min_p
    )
    return result


def verify_draft(
    draft_ids: Tensor, target_ids: Tensor, draft_offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Greedy check of drafts against the tokens the model chose at the same places.

    Args:
        draft_ids: int32|int64[sum of k_s], contiguous - k_s drafted tokens of each sequence s.
        target_ids: dtype of draft_ids [sum of (k_s + 1)], contiguous - the model's choices; those
            of sequence s start at draft_offsets[s] + s.
        draft_offsets: int32[S + 1], contiguous, ascending from 0 - draft of sequence s is
            [draft_offsets[s], draft_offsets[s + 1]).

    Returns:
        num_accepted: int32[S] - length of the longest agreeing run.
        bonus_ids: dtype of draft_ids [S] - the model's choice after that run.
    """
    result: tuple[Tensor, Tensor] = _ops.verify_draft.default(draft_ids, target_ids, draft_offsets)
    return result
