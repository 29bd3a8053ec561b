"""State of a paged KV cache: which page holds which tokens, of which text. No tensors, no model.

| object | answers |
|---|---|
| `PagePool` | which pages are free, and how many hold each of the others |
| `SequenceTable` | on which pages a text lies, how long it is, where its next tokens go |
| `RadixTree` | how much of a new text has keys and values already, and on which pages |
| `NgramIndex` | what followed when the newest tokens of a text occurred before: a draft |

The tensors are yours: the ops of `stateful_kv.ops` take them beside the page tables and slots that
come from here. docs/state.md has the life of a sequence; examples/decode_loop.py is a whole loop.

Rules that hold for every object:

- Array arguments are one-dimensional, contiguous int32 or int64 torch tensors, numpy arrays or
  buffers on the CPU. Page ids and query lengths are int32 only, sequence ids and counts int64 only;
  anything else is a TypeError. Results are fresh torch tensors on the CPU.
- A bad value is a ValueError, an unknown id an IndexError. "Not enough free pages" is an expected
  outcome and comes as None. In each of these cases nothing has changed.
- There are no locks. One thread at a time works on a pool and on what was made on it; a second one
  that enters an object during a call gets a StateBusyError. So does a forked process, from an
  object that another thread was changing at the fork.
- `check_integrity()` recomputes everything, for tests: the first violation as text, or None.
"""

from __future__ import annotations

import stateful_kv._native  # noqa: F401  (loads the extension and checks that it fits)
from stateful_kv._C import (
    InsertResult,
    Match,
    NgramIndex,
    PagePool,
    RadixTree,
    SequenceTable,
    check_references,
    propose_drafts,
)
from stateful_kv.errors import InvariantError, StateBusyError

__all__ = [
    "InsertResult",
    "InvariantError",
    "Match",
    "NgramIndex",
    "PagePool",
    "RadixTree",
    "SequenceTable",
    "StateBusyError",
    "check_references",
    "propose_drafts",
]
