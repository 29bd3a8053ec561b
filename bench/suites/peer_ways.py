"""Builds the ways of a peer from functions, with the comparison that each must pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bench import harness
from bench.harness import Call
from bench.peers.torch_composites import compiled
from bench.ways import Ways

COMPILED = "torch.compile"


def ways(
    functions: Mapping[str, Callable[..., Any]],
    bind: Callable[[Callable[..., Any]], Call],
    result: Callable[[Callable[..., Any]], Any],
    tolerance: float,
    *,
    compiles: bool = False,
) -> Ways:
    """Ways to call.

    Args:
        functions: by name, the plain one first.
        bind: makes the call that is timed of a function.
        result: tensors that a function gives for the first inputs, which it must not change.
        tolerance: for a result beside that of the plain one, as in `harness.compare`.
        compiles: adds the plain one through `torch.compile`.
    """
    tried = dict(functions)
    plain = next(iter(tried.values()))
    if compiles:
        tried[COMPILED] = compiled(plain)

    def agrees(name: str) -> bool:
        return harness.compare(result(tried[name]), result(plain), tolerance).ok

    return Ways({name: bind(function) for name, function in tried.items()}, agrees)
