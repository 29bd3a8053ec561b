"""The state of a loop of steps on a device, and what of it has to be sent there.

All of it is one array of int32. The host keeps two copies, what is to be there and what it knows to
be there, and sends the entries that differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

NUM_STOP_IDS = 8  # of a session; where it has more, the host finds the others
NUM_COUNTS = 3


class LoopShape(NamedTuple):
    """What a recorded step depends on; sizes are rounded up, so that there are few of them.

    Attributes:
        num_sequences: S.
        max_draft: K, tokens drafted at most.
        max_pages: M, columns of the page table.
        is_sampled: some sequence is not plain greedy.
    """

    num_sequences: int
    max_draft: int
    max_pages: int
    is_sampled: bool

    @property
    def num_rows(self) -> int:
        """Rows of a forward pass, padding included."""
        return self.num_sequences * (self.max_draft + 1)


class MirroredInts:
    """Named parts of one int32 array on a device, and the host's side of it.

    Attributes:
        wanted: what is to be there, by name; write into these.
        tensors: what is there, by name; views of one buffer.
    """

    def __init__(self, parts: Mapping[str, tuple[int, ...]], device: torch.device) -> None:
        """Begins with zeros everywhere.

        Args:
            parts: the shape of each part, in the order in which they lie.
            device: where.
        """
        sizes = {name: int(np.prod(shape)) for name, shape in parts.items()}
        total = sum(sizes.values())
        self.buffer = torch.zeros(total, dtype=torch.int32, device=device)
        self._wanted = np.zeros(total, dtype=np.int32)
        self._known = np.zeros(total, dtype=np.int32)
        self._is_known = np.ones(total, dtype=np.bool_)
        self.wanted: dict[str, npt.NDArray[np.int32]] = {}
        self.tensors: dict[str, Tensor] = {}
        self._ranges: dict[str, slice] = {}
        start = 0
        for name, shape in parts.items():
            part = slice(start, start + sizes[name])
            self._ranges[name] = part
            self.wanted[name] = self._wanted[part].reshape(shape)
            self.tensors[name] = self.buffer[part].view(shape)
            start = part.stop

    def forget(self, *names: str) -> None:
        """Marks parts that the device writes: they are sent whole."""
        for name in names:
            self._is_known[self._ranges[name]] = False

    def changes(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """Places and values to send; until `confirm` nothing is known of these places."""
        places = np.flatnonzero((self._wanted != self._known) | ~self._is_known)
        self._is_known[places] = False
        return places, self._wanted[places]

    def confirm(self) -> None:
        """What was wanted is there."""
        np.copyto(self._known, self._wanted)
        self._is_known[:] = True


class LoopState:
    """The static tensors of one shape, which every step of it reads and writes.

    Attributes:
        shape: the shape.
        ints: all of it but `history`.
        history: int32[S, L], tokens of the sequences; what the ops of a loop call so.
        borders: int32[S + 1], where each sequence's part of the history begins.
        all_rows: int64[N], 0, 1, 2 and so on.
        no_draft: int32[S, 0] and int32[S], what is drafted where K = 0.
        trace: int32[steps, 5 * S], what `progress` was after each step.
    """

    # Written by the device; they lie together, so that one copy keeps a step's outcome.
    PROGRESS = ("lengths", "num_left", "counts")

    def __init__(
        self, shape: LoopShape, capacity: int, max_steps: int, device: torch.device
    ) -> None:
        """Takes the memory.

        Args:
            shape: the shape.
            capacity: L, tokens of a sequence; at least its KV and one more.
            max_steps: steps before the host looks, at most.
            device: where.
        """
        num = shape.num_sequences
        self.shape = shape
        self.ints = MirroredInts(
            {
                "store_rows": (num, 2),  # int64
                "seeds": (num, 2),  # int64
                "lengths": (num,),
                "num_left": (num,),
                "counts": (num, NUM_COUNTS),
                "starts": (num,),
                "kv_limits": (num,),
                "draft_limits": (num,),
                "num_given": (num,),
                "given_ids": (num, shape.max_draft),
                "stop_ids": (num, NUM_STOP_IDS),
                "top_k": (num,),
                "filters": (3, num),  # float32: temperature, top_p, min_p
                "page_table": (num, shape.max_pages),
            },
            device,
        )
        ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
        self.history = torch.zeros(num, capacity, **ints)
        self.borders = torch.arange(num + 1, **ints) * capacity
        self.all_rows = torch.arange(shape.num_rows, device=device)
        self.no_draft = torch.zeros(num, 0, **ints), torch.zeros(num, **ints)
        self.trace = torch.zeros(max_steps, (2 + NUM_COUNTS) * num, **ints)

    def __getitem__(self, name: str) -> Tensor:
        """A part of the state on the device."""
        return self.ints.tensors[name]

    @property
    def store_rows(self) -> Tensor:
        """int64[S], rows of the token store."""
        return self["store_rows"].view(torch.int64).view(-1)

    @property
    def seeds(self) -> Tensor:
        """int64[S], of the random numbers."""
        return self["seeds"].view(torch.int64).view(-1)

    @property
    def filters(self) -> Tensor:
        """float32[3, S], temperature, top_p and min_p."""
        return self["filters"].view(torch.float32)

    @property
    def progress(self) -> Tensor:
        """int32[5 * S], what a step changes but the history."""
        start = 4 * self.shape.num_sequences
        return self.ints.buffer[start : start + self.trace.shape[1]]
