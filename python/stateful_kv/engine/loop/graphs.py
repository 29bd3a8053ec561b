"""CUDA graphs: a function that only launches kernels, recorded once and replayed as one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NUM_WARM_UPS = 2  # libraries choose kernels and take workspaces in their first calls


class GraphRecorder:
    """Records functions; their graphs share one pool of memory, so only one may run at a time.

    What a function allocates lies in that pool and is overwritten by the next replay of any of
    these graphs: what is to last goes to tensors that exist before.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # One for all: the libraries keep a workspace for each stream that they were used on.
        self._stream: Any = None
        # Of a living graph: torch refuses a pool that no graph uses any more.
        self._pool: Any = None

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Returns what does the same as `function` with the contents its tensors have then.

        The function is run a few times, then recorded: it must not look at device memory from the
        host, and running it must change nothing yet.
        """
        with torch.cuda.device(self._device):
            if self._stream is None:
                self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream = self._stream
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(NUM_WARM_UPS):
                    function()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Only this thread's calls are forbidden meanwhile: others may use the device.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
            ):
                function()
            self._pool = graph.pool()
        replay: Callable[[], None] = graph.replay
        return replay
