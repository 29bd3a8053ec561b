"""Roots of the prefix tree: what two sequences must have in common to share keys and values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RootKey:
    """Names one root of the prefix tree. Nothing is ever shared between two roots.

    Attributes:
        tenant: whose text it is; tenants never see each other's prefixes.
        adapter: what changes the model's weights, if anything does.
        numerics: what changes the bits of keys and values: kernels, formats, instruction set.
    """

    tenant: str = ""
    adapter: str = ""
    numerics: str = ""


DEFAULT_ROOT = RootKey()


class RootIds:
    """The numbers by which the tree knows roots.

    Numbers are given out one by one and never derived from a key, so that no two keys can collide.
    """

    def __init__(self) -> None:
        self._ids: dict[RootKey, int] = {DEFAULT_ROOT: 0}

    def __getitem__(self, root: RootKey) -> int:
        """The number of this root, which is the same each time."""
        return self._ids.setdefault(root, len(self._ids))
