"""A peer at its best: several ways to compute the same, of which the quickest counts.

What is quick depends on the shape, the machine and the build of the library, so the choice is made
in the run, on the inputs of the case. A way that raises, or whose result differs from that of the
first one, is left out, and the result file says so. The first way is the plain one that the check
of the case compares ours with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.cuda_timing import Call

ROUNDS = 3


@dataclass(frozen=True)
class Ways:
    """Calls that do the same.

    Attributes:
        calls: by a few words that name the way; the plain one first.
        agrees: whether the way of this name gives what the first one gives. It may raise.
    """

    calls: Mapping[str, Call]
    agrees: Callable[[str], bool]

    @property
    def plain(self) -> Call:
        """The first way."""
        return next(iter(self.calls.values()))


@dataclass
class Choice:
    """The way that counts, and what is known of the others.

    Attributes:
        name: of the quickest way.
        call: that way.
        seconds: of a call, by way; the least of a few samples.
        left_out: ways that cannot run or disagree, with the reason.
    """

    name: str
    call: Call
    seconds: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def details(self) -> dict[str, Any]:
        """For the result file."""
        said: dict[str, Any] = {"peer_setting": self.name, "seconds_by_setting": self.seconds}
        return {**said, "settings_left_out": self.left_out} if self.left_out else said


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def quickest(ways: Ways, sampler: Callable[[Call], Callable[[], float]]) -> Choice:
    """The quickest way.

    Args:
        ways: at least one.
        sampler: prepares a call; what it returns takes one sample, in seconds a call.
    """
    samplers: dict[str, Callable[[], float]] = {}
    left_out: dict[str, str] = {}
    for name, call in ways.calls.items():
        try:
            if samplers and not ways.agrees(name):
                left_out[name] = "its result differs"
                continue
            samplers[name] = sampler(call)
        except Exception as error:
            # Libraries raise what they like, for want of a compiler too. Without the plain way
            # there is no peer.
            if not samplers:
                raise
            left_out[name] = _words(error)
    if len(samplers) == 1:
        (name,) = samplers
        return Choice(name, ways.calls[name], {}, left_out)
    # In turns, so that a busy moment of the machine does not fall on one way alone.
    rounds = [{name: sample() for name, sample in samplers.items()} for _ in range(ROUNDS)]
    seconds = {name: min(times[name] for times in rounds) for name in samplers}
    best = min(seconds, key=seconds.__getitem__)
    return Choice(best, ways.calls[best], seconds, left_out)
