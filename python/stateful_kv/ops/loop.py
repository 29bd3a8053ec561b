"""What a loop of steps on the device needs around the model: drafts, rows, and the steps' ends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_ops = torch.ops.stateful_kv


class FilledRows(NamedTuple):
    """What `fill_rows` returns: a batch of N = S * (K + 1) rows, the last of them maybe padding.

    Attributes:
        token_ids: int64[N], rows of the sequences one behind the other, then padding of 0.
        positions: int32[N], absolute positions, padding of 0.
        slots: int64[N], where K and V of each row go, padding of -1.
        seq_lens: int32[S], KV length of each sequence with its new rows; 0 if it has none.
        query_offsets: int32[S + 1], rows of the sequences; the padding is behind the last.
        row_sequences: int64[N], sequence of each row, padding of 0.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    seq_lens: Tensor
    query_offsets: Tensor
    row_sequences: Tensor


def fill_rows(
    history: Tensor,
    lengths: Tensor,
    num_left: Tensor,
    kv_limits: Tensor,
    draft_ids: Tensor,
    num_draft: Tensor,
    page_table: Tensor,
    page_size: int,
) -> FilledRows:
    """The rows of the next step of sequences whose tokens are on the device.

    Sequence s has no rows if num_left[s] <= 0, or if there is no room for its pending token,
    lengths[s] > kv_limits[s]. Else it feeds its pending token and behind it as much of its draft
    as there is room for and as the reply may still get, less one: the last token of a reply is
    never a drafted one. How many rows are padding is known on the device only.

    Args:
        history: int32[S, L], contiguous - tokens; of the first lengths[s] the last is pending, it
            has no KV yet.
        lengths: int32[S], contiguous, in [1, L] where num_left[s] > 0.
        num_left: int32[S], contiguous - tokens the reply may still get; <= 0: it does not run.
        kv_limits: int32[S], contiguous, at most M * page_size - tokens whose KV there is room for.
        draft_ids: int32[S, K], contiguous - proposed tokens.
        num_draft: int32[S], contiguous, in [0, K] - how many of them there are.
        page_table: int32[S, M], contiguous - page ids in order.
        page_size: tokens a page holds, from 1 to 2^31 - 1.

    Returns:
        Tensors of sizes that depend on S and K alone. On CUDA S is at most 1024.
    """
    return FilledRows(
        *_ops.fill_rows.default(
            history, lengths, num_left, kv_limits, draft_ids, num_draft, page_table, page_size
        )
    )


def advance_sequences(
    token_ids: Tensor,
    target_ids: Tensor,
    target_values: Tensor,
    query_offsets: Tensor,
    stop_ids: Tensor,
    history: Tensor,
    lengths: Tensor,
    num_left: Tensor,
    counts: Tensor,
) -> None:
    """The end of a step that began with `fill_rows`: accepts what agrees and appends it.

    Of each sequence the model's choices are appended row by row, until one is not what the next
    row fed, is a stop token, is the last one the reply may get, or cannot be used since the row's
    largest logit is not finite (that one is not appended). A sequence without rows stays as it is.

    Args:
        token_ids: int64[N], contiguous - what each row fed.
        target_ids: int64[N], contiguous, ids in [0, 2^31) - the model's choice after each row.
        target_values: float32[N], contiguous - the largest logit of each row.
        query_offsets: int32[S + 1], contiguous, ascending from 0 to at most N - rows of the
            sequences.
        stop_ids: int32[S, E], contiguous, padded with -1 - tokens that end a reply.
        history: int32[S, L], contiguous - written in place behind the first lengths[s] tokens.
        lengths: int32[S], contiguous, room for the new tokens below L - grows in place.
        num_left: int32[S], contiguous, at least 1 of a sequence with rows - counts down in place;
            becomes 0 with a stop token, -1 where a largest logit was not finite.
        counts: int32[S, 3], contiguous - steps, drafted tokens and accepted ones are added;
            they stay at 2^31 - 1.
    """
    _ops.advance_sequences.default(
        token_ids,
        target_ids,
        target_values,
        query_offsets,
        stop_ids,
        history,
        lengths,
        num_left,
        counts,
    )


def ngram_lookup(
    tokens: Tensor,
    offsets: Tensor,
    min_n: int,
    max_n: int,
    max_draft: int,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Prompt lookup: proposes what followed the last earlier occurrence of each text's ending.

    Of the suffixes of min_n to max_n tokens that occur earlier too, the longest is taken, and of
    its earlier occurrences the most recent. The draft is the text behind it. If the occurrence
    overlaps the suffix, the text is periodic and the draft goes on periodically; else it stops
    where the text ends. NgramIndex.propose follows the same rule.

    Args:
        tokens: int32|int64[T], contiguous - the texts of all sequences, ids in [0, 2^31).
        offsets: int32[S + 1], contiguous, ascending from 0 to T - text of sequence s is
            [offsets[s], offsets[s + 1]).
        min_n: shortest suffix that counts, >= 1.
        max_n: longest suffix looked for, >= min_n.
        max_draft: tokens proposed at most, from 0 to (2^31 - 1) / S.
        lengths: int32[S], contiguous, or None - then only the first lengths[s] of these tokens are
            the text of s; the others are never read.

    Returns:
        draft_ids: int32[S, max_draft], padded with -1.
        num_draft: int32[S].
    """
    result: tuple[Tensor, Tensor] = _ops.ngram_lookup.default(
        tokens, offsets, min_n, max_n, max_draft, lengths
    )
    return result
