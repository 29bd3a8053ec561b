"""Several steps of decoding sequences without the host: draft, forward, choose, accept.

Tokens, lengths and page tables are on the device, in tensors that stay where they are, so each step
launches the same kernels on the same memory: on CUDA it is recorded as a graph, on the CPU the same
function is called. The steps give what as many plain steps give; the host looks afterwards.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stateful_kv import ops
from stateful_kv.choosing.params import SamplingParams
from stateful_kv.choosing.sampler import MAX_TOP_K
from stateful_kv.choosing.verify import NOTHING_CHOSEN, Outcome
from stateful_kv.drafts.policy import MAX_N, MIN_N
from stateful_kv.engine.batching import RowPlan
from stateful_kv.engine.loop.graphs import GraphRecorder
from stateful_kv.engine.loop.state import NUM_COUNTS, NUM_STOP_IDS, LoopShape, LoopState
from stateful_kv.engine.loop.token_store import StoredTokens, TokenStore
from stateful_kv.kv.batch import Batch
from stateful_kv.kv.cache import KVCache
from stateful_kv.models.protocol import Model
from stateful_kv.session.ledger import Ledger
from stateful_kv.system.device import to_device, to_host
from stateful_kv.types import TokenArray

MAX_SEQUENCES = 1024  # of `ops.fill_rows` on CUDA
MIN_PAGES = 16  # of a shape: fewer shapes to record matter more than columns that are empty


@dataclass(frozen=True)
class LoopRow:
    """A sequence that goes into the loop; its last token is pending, all others have KV.

    Attributes:
        plan: what it feeds in the first step: the pending token and the host's draft, if any.
        pages: int32[pages], page ids, those reserved included.
        kv_limit: tokens whose KV there is room for.
        can_draft: whether to draft in further steps.
    """

    plan: RowPlan
    pages: Tensor
    kv_limit: int
    can_draft: bool

    @property
    def ledger(self) -> Ledger:
        """Its tokens."""
        return self.plan.turn.state.ledger

    @property
    def start(self) -> int:
        """How many tokens it has before the first step."""
        return len(self.ledger)

    @property
    def num_left(self) -> int:
        """Tokens the reply may still get."""
        return self.plan.turn.num_left

    @property
    def sampling(self) -> SamplingParams:
        """How tokens are chosen; no penalties."""
        return self.plan.sampler.params


@dataclass
class _Recorded:
    """The tensors of one shape, and on CUDA the graph of its step."""

    state: LoopState
    replay: Callable[[], None] | None


class DeviceLoop:
    """Runs steps of a model and a cache on their device.

    Attributes:
        num_uploaded: numbers sent to the device so far.
    """

    MAX_SHAPES = 16  # states kept; the one that was used least recently goes first

    def __init__(self, model: Model, cache: KVCache, context_len: int, max_steps: int) -> None:
        """Takes no memory yet.

        Args:
            model: computes logits.
            cache: where KV lies.
            context_len: most tokens of a session.
            max_steps: steps before the host looks, at most.
        """
        self._model = model
        self._cache = cache
        self._max_steps = max_steps
        # The pending token has no KV: there may be one more than the pool holds.
        capacity = min(context_len, cache.num_pages * cache.page_size) + 1
        self._store = TokenStore(capacity, cache.device)
        self._graphs = GraphRecorder(cache.device)
        self._recorded: OrderedDict[LoopShape, _Recorded] = OrderedDict()
        self.num_uploaded = 0

    def run(
        self, sequences: Sequence[LoopRow], max_draft: int, num_steps: int
    ) -> list[list[Outcome]]:
        """Takes steps of all sequences; each stops where its reply ends or its pages are full.

        KV of the new tokens is written into the reserved pages. On the host only the notes of what
        is on the device change.

        Args:
            sequences: distinct, at least one.
            max_draft: tokens drafted at most in a step.
            num_steps: at most `max_steps`.

        Returns:
            What each step gave each sequence; an outcome without tokens at the end where none can
            be chosen from the logits.
        """
        with torch.inference_mode():
            recorded = self._recorded_for(_shape_of(sequences, max_draft))
            state = recorded.state
            self._upload(state, sequences)
            for step in range(num_steps):
                if recorded.replay is not None:
                    recorded.replay()
                else:
                    self._step(state)
                state.trace[step].copy_(state.progress)
            trace, tokens = self._download(state, num_steps)
        for index, sequence in enumerate(sequences):
            num_new = int(trace[-1, index]) - sequence.start
            self._store.of(sequence.ledger).chosen = tokens[index, :num_new]
        return [
            _outcomes(index, sequence.start, trace, tokens)
            for index, sequence in enumerate(sequences)
        ]

    def _recorded_for(self, shape: LoopShape) -> _Recorded:
        """The state of a shape and its step; a new one is recorded with zeros: no sequence runs."""
        recorded = self._recorded.pop(shape, None)
        if recorded is None:
            capacity = min(shape.max_pages * self._cache.page_size + 1, self._store.capacity)
            state = LoopState(shape, capacity, self._max_steps, self._cache.device)
            is_cuda = self._cache.device.type == "cuda"
            replay = self._graphs.record(lambda: self._step(state)) if is_cuda else None
            recorded = _Recorded(state, replay)
        self._recorded[shape] = recorded
        while len(self._recorded) > self.MAX_SHAPES:
            self._recorded.popitem(last=False)
        return recorded

    def _step(self, state: LoopState) -> None:
        """One step of whatever sequences the state says; launches only, no value on the host."""
        draft_ids, num_draft = state.no_draft
        if state.shape.max_draft:
            draft_ids, num_draft = ops.ngram_lookup(
                state.history.view(-1),
                state.borders,
                MIN_N,
                MAX_N,
                state.shape.max_draft,
                state["lengths"],
            )
            num_draft = torch.minimum(num_draft, state["draft_limits"])
            # The host's draft, in the first step alone.
            num_given = state["num_given"]
            is_given = num_given > 0
            draft_ids = torch.where(is_given[:, None], state["given_ids"], draft_ids)
            num_draft = torch.where(is_given, num_given, num_draft)
            num_given.zero_()
        rows = ops.fill_rows(
            state.history,
            state["lengths"],
            state["num_left"],
            state["kv_limits"],
            draft_ids,
            num_draft,
            state["page_table"],
            self._cache.page_size,
        )
        batch = Batch(
            token_ids=rows.token_ids,
            positions=rows.positions,
            query_offsets=rows.query_offsets,
            page_table=state["page_table"],
            seq_lens=rows.seq_lens,
            slots=rows.slots,
            logit_rows=state.all_rows,
        )
        ids, values = self._choose(state, rows, batch)
        ops.advance_sequences(
            rows.token_ids,
            ids,
            values,
            rows.query_offsets,
            state["stop_ids"],
            state.history,
            state["lengths"],
            state["num_left"],
            state["counts"],
        )

    def _choose(
        self, state: LoopState, rows: ops.FilledRows, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """The token after each row and the row's largest logit, int64[N] and float32[N]."""
        if not state.shape.is_sampled:
            ids, values = self._model.forward_top_k(batch, self._cache, 1)
            return ids.reshape(-1), values.reshape(-1)
        logits = self._model.forward(batch, self._cache)
        temperature, top_p, min_p = state.filters.index_select(1, rows.row_sequences).unbind(0)
        return ops.sample(
            logits,
            state.seeds.index_select(0, rows.row_sequences),
            rows.positions.long() + 1,  # of the token that is chosen
            temperature,
            state["top_k"].index_select(0, rows.row_sequences),
            top_p,
            min_p,
        )

    def _upload(self, state: LoopState, sequences: Sequence[LoopRow]) -> None:
        """Sends what is new of the tokens and what differs of the rest, in one copy."""
        stored = [self._store.of(sequence.ledger) for sequence in sequences]
        self._store.place(stored)
        store_rows = [tokens.row for tokens in stored]
        _describe(state, sequences, store_rows, self._store.spare_row)
        places, values = state.ints.changes()
        new_places, new_tokens = self._new_tokens(sequences, stored)
        self.num_uploaded += len(values) + len(new_tokens)
        arrays = (new_places, new_tokens, places, values)
        device_arrays = to_device([torch.from_numpy(array) for array in arrays], self._cache.device)
        self._store.tokens.view(-1).index_copy_(0, *device_arrays[:2])
        state.ints.buffer.index_copy_(0, *device_arrays[2:])
        state.ints.confirm()
        for sequence, tokens in zip(sequences, stored, strict=True):
            tokens.length = sequence.start
        length = state.history.shape[1]
        torch.index_select(self._store.tokens[:, :length], 0, state.store_rows, out=state.history)

    def _new_tokens(
        self, sequences: Sequence[LoopRow], stored: Sequence[StoredTokens]
    ) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], TokenArray]:
        """Tokens that the store lacks, and where they go in it."""
        places, tokens = [], []
        for sequence, known in zip(sequences, stored, strict=True):
            start = known.row * self._store.capacity
            begin, end = start + known.length, start + sequence.start
            places.append(np.arange(begin, end, dtype=np.int64))
            tokens.append(sequence.ledger.tokens[known.length :])
        return np.concatenate(places), np.concatenate(tokens)

    def _download(
        self, state: LoopState, num_steps: int
    ) -> tuple[np.ndarray[tuple[int, int], np.dtype[np.int32]], TokenArray]:
        """The trace of the steps and all new tokens, in one copy; the store keeps the tokens."""
        length = state.history.shape[1]
        self._store.tokens[:, :length].index_copy_(0, state.store_rows, state.history)
        num_columns = num_steps * (state.shape.max_draft + 1)
        columns = torch.arange(num_columns, device=self._cache.device) + state["starts"][:, None]
        tokens = state.history.gather(1, columns.clamp_(max=length - 1))
        trace, tokens = to_host([state.trace[:num_steps], tokens])
        return trace.numpy(), tokens.numpy()


def _shape_of(sequences: Sequence[LoopRow], max_draft: int) -> LoopShape:
    num_pages = max(len(sequence.pages) for sequence in sequences)
    return LoopShape(
        num_sequences=rounded_up(len(sequences)),
        max_draft=max_draft,
        max_pages=rounded_up(max(num_pages, MIN_PAGES)),
        is_sampled=not all(sequence.sampling.greedy for sequence in sequences),
    )


def rounded_up(number: int) -> int:
    """The next power of two: so that there are few shapes."""
    return 1 << (number - 1).bit_length()


def _describe(
    state: LoopState, sequences: Sequence[LoopRow], store_rows: Sequence[int], spare_row: int
) -> None:
    """Writes what the device's tensors are to hold; rows without a sequence do nothing."""
    wanted = state.ints.wanted
    num = len(sequences)
    state.ints.forget(*LoopState.PROGRESS)
    wanted["counts"][:] = 0
    wanted["num_left"][num:] = 0
    wanted["store_rows"].view(np.int64)[num:] = spare_row
    if state.shape.max_draft:
        state.ints.forget("num_given")
        wanted["num_given"][:] = 0
    for index, sequence in enumerate(sequences):
        wanted["store_rows"].view(np.int64)[index] = store_rows[index]
        wanted["lengths"][index] = wanted["starts"][index] = sequence.start
        wanted["num_left"][index] = sequence.num_left
        wanted["kv_limits"][index] = sequence.kv_limit
        wanted["draft_limits"][index] = state.shape.max_draft if sequence.can_draft else 0
        wanted["page_table"][index, : len(sequence.pages)] = sequence.pages.numpy()
        stops = sorted(sequence.plan.turn.stops.stop_token_ids)[:NUM_STOP_IDS]
        wanted["stop_ids"][index] = -1
        wanted["stop_ids"][index, : len(stops)] = stops
        if state.shape.max_draft:
            given = sequence.plan.draft_ids[: state.shape.max_draft]
            wanted["num_given"][index] = len(given)
            wanted["given_ids"][index, : len(given)] = given
        if state.shape.is_sampled:
            params = sequence.sampling
            wanted["seeds"].view(np.uint64)[index] = sequence.plan.sampler.seed or 0
            wanted["top_k"][index] = min(params.top_k, MAX_TOP_K)
            filters = (params.temperature, params.top_p, params.min_p)
            wanted["filters"].view(np.float32)[:, index] = filters


def _outcomes(
    index: int,
    start: int,
    trace: np.ndarray[tuple[int, int], np.dtype[np.int32]],
    tokens: TokenArray,
) -> list[Outcome]:
    """Splits the trace of one sequence into its steps."""
    num_sequences = trace.shape[1] // (2 + NUM_COUNTS)
    lengths, num_left = trace[:, index], trace[:, num_sequences + index]
    first_count = 2 * num_sequences + NUM_COUNTS * index
    counts = trace[:, first_count : first_count + NUM_COUNTS]
    outcomes: list[Outcome] = []
    before, counts_before = start, np.zeros(NUM_COUNTS, dtype=np.int32)
    for length, now in zip(lengths.tolist(), counts, strict=True):
        num_steps, num_drafted, num_accepted = (now - counts_before).tolist()
        if num_steps and length > before:
            new = tokens[index, before - start : length - start].tolist()
            outcomes.append(Outcome(new, num_drafted, num_accepted))
        before, counts_before = length, now
    return [*outcomes, NOTHING_CHOSEN] if num_left[-1] < 0 else outcomes
