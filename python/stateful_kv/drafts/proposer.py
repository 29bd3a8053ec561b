"""Drafts, and what every source of them offers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np

from stateful_kv.types import TokenArray


@dataclass(frozen=True)
class Draft:
    """Tokens that may follow a text.

    Attributes:
        tokens: int32[K], in order; may be empty.
        match_len: tokens at the end of the text that the source found again; 0 if none.
        source: where the tokens come from, "ngram" for example; "" of no draft.
    """

    tokens: TokenArray
    match_len: int = 0
    source: str = ""

    def __len__(self) -> int:
        """K, the number of proposed tokens."""
        return len(self.tokens)

    def first(self, count: int) -> Draft:
        """The draft cut to its first `count` tokens."""
        return self if count >= len(self) else replace(self, tokens=self.tokens[:count])


NO_DRAFT = Draft(np.empty(0, dtype=np.int32))


class StepLoad(NamedTuple):
    """What a step computes besides a draft.

    Attributes:
        num_sequences: sequences that decode in it, the draft's own included.
        num_rows: rows it has without the draft: pending tokens, drafts planned before it, prompts.
    """

    num_sequences: int
    num_rows: int


ALONE = StepLoad(1, 1)


class Drafter(Protocol):
    """Proposes tokens of one session, and learns what became of them."""

    def propose(self, tokens: TokenArray, limit: int) -> Draft:
        """Returns tokens that may follow; often none.

        Args:
            tokens: int32[T], all tokens of the session. They begin with those of the last call,
                unless `truncate` was called since.
            limit: longest draft.
        """
        ...

    def worthwhile(self, draft: Draft, context: int, load: StepLoad) -> Draft:
        """The part of a draft that is expected to pay; to be called once in every step.

        Args:
            draft: as proposed.
            context: tokens of the session.
            load: what else the step computes.
        """
        ...

    def observe(self, draft: Draft, num_accepted: int) -> None:
        """Learns how many tokens of a verified draft were accepted."""
        ...

    def truncate(self, length: int) -> None:
        """Forgets the tokens from `length` on."""
        ...

    def fork(self) -> Drafter:
        """A drafter for a copy of the session that knows the same."""
        ...
