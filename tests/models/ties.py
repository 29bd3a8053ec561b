"""Ties of the parity test: where `transformers`' own best two logits are all but equal.

Either token is right there, yet which ties occur is known and kept in known_ties.json, so that a
new one is looked at by somebody. `SKV_UPDATE_TIES=1` adds what a run finds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

KNOWN = Path(__file__).parent / "known_ties.json"
# A gap below this is a tie; a listed gap may move by this much with the machine's rounding.
TIE = 1e-3
GAP_TOLERANCE = 1e-4


@dataclass(frozen=True, order=True)
class Tie:
    """Prompt (index into PROMPTS), position in its reply, and distance of the best two logits."""

    prompt: int
    position: int
    gap: float


def read_ties(path: Path) -> list[Tie]:
    return [Tie(**entry) for entry in json.loads(path.read_text())]


def unlisted_ties(found: Sequence[Tie], known: Sequence[Tie]) -> list[Tie]:
    """Those found that no known tie of the same place and gap explains."""
    return [
        tie
        for tie in found
        if not any(
            (tie.prompt, tie.position) == (other.prompt, other.position)
            and abs(tie.gap - other.gap) <= GAP_TOLERANCE
            for other in known
        )
    ]


def check_ties(found: Sequence[Tie], path: Path = KNOWN) -> None:
    """Fails if a tie is not in the list; with SKV_UPDATE_TIES=1 puts it there instead."""
    known = read_ties(path)
    new = unlisted_ties(found, known)
    if new and os.environ.get("SKV_UPDATE_TIES") == "1":
        places = {(tie.prompt, tie.position) for tie in new}
        kept = [tie for tie in known if (tie.prompt, tie.position) not in places]
        lines = ",\n".join(f" {json.dumps(asdict(tie))}" for tie in sorted([*kept, *new]))
        path.write_text(f"[\n{lines}\n]\n")
        return
    assert not new, f"ties that {path.name} does not list (SKV_UPDATE_TIES=1 adds them): {new}"
