"""llama.cpp through `llama-cpp-python`: one sequence, `llama_decode` on the same GGUF file.

Its settings are those it does best with on a CPU: weights repacked for this CPU (its default), f16
KV, batches of 512, all threads for one row as for many. Flash attention is the caller's choice.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.harness import PeerMissingError

MAX_BATCH = 512
INSTALL = "pip install llama-cpp-python"
ROOT = Path(__file__).resolve().parents[2]


def _library() -> Any:
    """The module `llama_cpp`, its log switched off; PeerMissingError where it is not there."""
    try:
        module = importlib.import_module("llama_cpp")
    except ModuleNotFoundError as error:
        raise PeerMissingError(f"{error.name} is not installed: {INSTALL}") from error
    except (ImportError, OSError, RuntimeError) as error:
        # The message would name folders of this machine.
        kind = type(error).__name__
        raise PeerMissingError(
            f"the shared library of llama_cpp cannot be loaded ({kind}): {INSTALL}"
        ) from error
    return module


def check_runs(path: Path) -> None:
    """Runs a few tokens in a process of its own.

    A library built for another CPU dies of a signal, which would end the whole bench.

    Raises:
        PeerMissingError: it did.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        return  # `LlamaCppModel` says so
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "bench.peers.llama_cpp_model", str(path)],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode < 0:
        raise PeerMissingError(
            f"llama.cpp dies of signal {-done.returncode} on this CPU: build its library for it"
        )


class LlamaCppModel:
    """Weights of one GGUF file; contexts of different settings share them.

    Raises:
        PeerMissingError: llama_cpp cannot be imported, or does not run on this CPU.
    """

    def __init__(self, path: Path) -> None:
        self.library = _library()
        # Kept: the library holds no reference to it.
        self._log = self.library.llama_log_callback(lambda level, text, user_data: None)
        self.library.llama_log_set(self._log, None)
        params = self.library.llama_model_default_params()
        params.n_gpu_layers = 0
        self.handle = self.library.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle:
            raise PeerMissingError(f"llama.cpp cannot load {path.name}")
        vocab = self.library.llama_model_get_vocab(self.handle)
        self.vocab_size = self.library.llama_vocab_n_tokens(vocab)

    def close(self) -> None:
        """Frees the weights; contexts must be closed before."""
        if self.handle:
            self.library.llama_model_free(self.handle)
            self.handle = None


class LlamaCppContext:
    """One sequence and its KV.

    Attributes:
        length: tokens that have KV.
        about: version and instruction sets of the library.
    """

    def __init__(
        self, model: LlamaCppModel, capacity: int, num_threads: int, *, flash_attention: bool
    ) -> None:
        library = self._library = model.library
        params = library.llama_context_default_params()
        params.n_ctx = -(-capacity // 256) * 256
        params.n_batch = params.n_ubatch = MAX_BATCH
        params.n_threads = params.n_threads_batch = num_threads
        params.flash_attn_type = int(flash_attention)
        params.no_perf = True
        self._handle = library.llama_init_from_model(model.handle, params)
        if not self._handle:
            raise RuntimeError(f"llama.cpp: no context of {capacity} tokens could be made")
        self._memory = library.llama_get_memory(self._handle)
        self._vocab_size = model.vocab_size
        self._batch = library.llama_batch_init(MAX_BATCH, 0, 1)
        for i in range(MAX_BATCH):
            self._batch.n_seq_id[i] = 1
            self._batch.seq_id[i][0] = 0
        # Written through views: a loop in Python would count as the peer's time.
        self._tokens = np.ctypeslib.as_array(self._batch.token, (MAX_BATCH,))
        self._positions = np.ctypeslib.as_array(self._batch.pos, (MAX_BATCH,))
        self._wanted = np.ctypeslib.as_array(self._batch.logits, (MAX_BATCH,))
        self._num_logits = 0
        self.length = 0
        self.about = {
            "llama_cpp_python": str(library.__version__),
            "system_info": library.llama_print_system_info().decode().strip(" |"),
        }

    def run(self, tokens: Tensor, num_logits: int) -> Tensor:
        """Appends tokens int64[N]; returns the likeliest next token of each of the last rows."""
        ids = tokens.numpy()
        for start in range(0, len(ids), MAX_BATCH):
            part = ids[start : start + MAX_BATCH]
            is_last = start + MAX_BATCH >= len(ids)
            self._decode(part, num_logits if is_last else 0)
        return torch.from_numpy(self._view().argmax(axis=1))

    def _decode(self, ids: Any, num_logits: int) -> None:
        count = len(ids)
        self._batch.n_tokens = count
        self._tokens[:count] = ids
        self._positions[:count] = np.arange(self.length, self.length + count)
        self._wanted[:count] = 0
        self._wanted[count - num_logits : count] = 1
        status = self._library.llama_decode(self._handle, self._batch)
        if status != 0:
            raise RuntimeError(f"llama_decode: status {status} at {self.length} + {count} tokens")
        self._library.llama_synchronize(self._handle)
        self.length += count
        self._num_logits = num_logits

    def _view(self) -> Any:
        pointer = self._library.llama_get_logits(self._handle)
        return np.ctypeslib.as_array(pointer, (self._num_logits, self._vocab_size))

    def logits(self) -> Tensor:
        """float32[R, V] of the last call."""
        return torch.from_numpy(self._view().copy())

    def truncate(self, length: int) -> None:
        """Drops the tokens from `length` on."""
        self._library.llama_memory_seq_rm(self._memory, 0, length, -1)
        self.length = length

    def close(self) -> None:
        """Frees KV and buffers."""
        if self._handle:
            with contextlib.suppress(AttributeError):
                self._library.llama_batch_free(self._batch)
            self._library.llama_free(self._handle)
            self._handle = None


def _try_out(path: Path) -> None:
    model = LlamaCppModel(path)
    for flash_attention in (True, False):
        context = LlamaCppContext(model, MAX_BATCH, 1, flash_attention=flash_attention)
        for count in (1, 4, 64):
            context.run(torch.arange(1, 1 + count), 1)
        context.close()
    model.close()


if __name__ == "__main__":
    _try_out(Path(sys.argv[1]))
