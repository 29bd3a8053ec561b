"""What a turn gives back: the reply and the receipt of what it cost. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

FINISH_STOP = "stop"
FINISH_LENGTH = "length"
FINISH_CANCELLED = "cancelled"


@dataclass(frozen=True)
class Receipt:
    """What one turn reused, computed and drafted, and how long it took.

    Attributes:
        prompt_tokens: the whole context before the reply, this turn's message included.
        reused_tokens: prompt tokens whose KV was already there; with computed_tokens of an
            undisturbed turn they sum to prompt_tokens.
        computed_tokens: prompt tokens whose KV this turn computed.
        drafted_tokens: tokens proposed from the session's own text.
        accepted_tokens: drafted tokens that became part of the reply.
        output_tokens: tokens of the reply.
        host_s: seconds of the turn's steps outside the model, rendering included; steps are
            shared with the other running turns.
        prefill_s: seconds in forward passes that computed prompt tokens of this turn.
        decode_s: seconds in forward passes that computed reply tokens of this turn.
        ttft_s: seconds from the call to the first token of the reply.
        total_s: seconds from the call to the end of the turn.
        pages_held: pages of the KV pool the session's sequence holds afterwards.
        seed: seed of the random numbers: as asked for, or drawn; None for greedy without one.
        steps: forward passes the turn took part in.
    """

    prompt_tokens: int
    reused_tokens: int
    computed_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    output_tokens: int
    host_s: float
    prefill_s: float
    decode_s: float
    ttft_s: float
    total_s: float
    pages_held: int
    seed: int | None
    steps: int


@dataclass
class ReceiptDraft:
    """The counters of a running turn; `finish` turns them into a Receipt."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    computed_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    host_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    ttft_s: float = 0.0
    steps: int = 0
    seed: int | None = None

    def finish(self, *, output_tokens: int, total_s: float, pages_held: int) -> Receipt:
        """Returns the receipt of a turn that ended with these last three figures."""
        return Receipt(
            prompt_tokens=self.prompt_tokens,
            reused_tokens=self.reused_tokens,
            computed_tokens=self.computed_tokens,
            drafted_tokens=self.drafted_tokens,
            accepted_tokens=self.accepted_tokens,
            output_tokens=output_tokens,
            host_s=self.host_s,
            prefill_s=self.prefill_s,
            decode_s=self.decode_s,
            ttft_s=self.ttft_s,
            total_s=total_s,
            pages_held=pages_held,
            seed=self.seed,
            steps=self.steps,
        )


@dataclass(frozen=True)
class Reply:
    """The generated part of one turn.

    Attributes:
        text: the reply as text, cut before a stop string, without end-of-turn tokens.
        token_ids: the exact tokens the ledger keeps, the one that ended the reply included.
        finish_reason: "stop" (end-of-turn token, stop token or stop string), "length"
            (max_tokens or the context is full) or "cancelled" (the stream was closed early).
        receipt: what the turn cost.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    receipt: Receipt
