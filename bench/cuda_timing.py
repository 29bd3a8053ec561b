"""Times on a CUDA device: events inside a replayed CUDA graph.

A graph holds many calls in a row between two events of its own, each call on the next of the
rotating inputs. So neither Python nor the launch of the graph is in the time, only the calls and
the gaps between their kernels. The rotating inputs together exceed the L2 cache more than twice:
before a call sees its input again, all others went through the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[int], object]  # given the index of the inputs to use

CLOCK = "CUDA events inside a replayed CUDA graph"
WARM_UP_CALLS = 3
MAX_CALLS = 4096
L2_TIMES = 3  # rotating inputs hold this many times the L2 cache


class CaptureError(RuntimeError):
    """A call cannot be captured in a CUDA graph; the message is one line."""


def l2_bytes() -> int:
    """Size of the device's L2, its last cache before memory."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return int(properties.L2_cache_size)


def cold_bytes() -> int:
    """How much rotating data counts as cold: a multiple of L2 above two."""
    return L2_TIMES * l2_bytes()


def machine() -> dict[str, Any]:
    """What the device is, as plain JSON data."""
    index = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": int(properties.L2_cache_size),
        "memory_bytes": int(properties.total_memory),
        "cuda": torch.version.cuda,
    }


def calls_for(seconds_per_call: float, rotations: int, min_s: float) -> int:
    """Calls of one graph: whole rounds over the inputs that take `min_s`, within reason."""
    rounds = -(-min_s // max(seconds_per_call * rotations, 1e-9))
    return rotations * max(1, min(int(rounds), MAX_CALLS // rotations))


class GraphSide:
    """One of the two sides of a pair, captured; takes the place of the harness's own side.

    Args:
        call: what is timed.
        rotations: sets of inputs that the calls go round.
        calls_per_sample: where it must be a fixed number.
    """

    def __init__(self, call: Call, rotations: int, calls_per_sample: int | None = None) -> None:
        self._call = call
        self._rotations = rotations
        self._fixed = calls_per_sample
        self._graphs: dict[int, _TimedGraph] = {}

    def sample(self, calls: int) -> float:
        """Seconds per call, as the mean of `calls` calls in one graph."""
        if calls not in self._graphs:
            self._graphs.clear()  # only the last one is replayed again
            self._graphs[calls] = _TimedGraph(self._call, calls, self._rotations)
        return self._graphs[calls].seconds() / calls

    def calibrate(self, min_s: float) -> int:
        """Calls that together take at least `min_s`; also the warm-up.

        Raises:
            CaptureError: the call does something that a CUDA graph cannot hold.
        """
        if self._fixed is not None:
            self.sample(self._fixed)
            return self._fixed
        self.sample(self._rotations)
        return calls_for(self.sample(self._rotations), self._rotations, min_s)


class _TimedGraph:
    """A CUDA graph of calls between two events."""

    def __init__(self, call: Call, calls: int, rotations: int) -> None:
        self._start, self._end = (
            torch.cuda.Event(enable_timing=True, external=True) for _ in range(2)
        )
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for index in range(WARM_UP_CALLS):
                    call(index % rotations)
            torch.cuda.synchronize()
            with torch.cuda.graph(self._graph, stream=stream):
                self._start.record(stream)
                for index in range(calls):
                    call(index % rotations)
                self._end.record(stream)
        except RuntimeError as error:
            raise CaptureError(str(error).splitlines()[0]) from error

    def seconds(self) -> float:
        """Replays it once; seconds between the events."""
        self._graph.replay()
        torch.cuda.synchronize()  # not the event's own: it may still be that of the last replay
        return self._start.elapsed_time(self._end) * 1e-3


def graph_seconds(call: Call, rotations: int, repeats: int = 3) -> float:
    """Least seconds of a call, by a few replays of a graph; to choose between settings.

    Raises:
        CaptureError: the call does something that a CUDA graph cannot hold.
    """
    calls = rotations * max(1, 4 // rotations)
    graph = _TimedGraph(call, calls, rotations)
    return min(graph.seconds() for _ in range(repeats)) / calls


def quick_seconds(call: Callable[[], object], repeats: int = 5) -> float:
    """Median seconds of a call by events on the stream; to choose between settings of a peer."""
    call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return sorted(times)[len(times) // 2]
