"""llama.cpp through its Python package: the logits of a text from the same GGUF file.

Repacked weights are off (`use_extra_bufts`): they change the speed, and the AMX ones need a kernel
that grants tile registers, else the process dies.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor


def is_available() -> bool:
    """Whether the package is there; it is not imported."""
    return importlib.util.find_spec("llama_cpp") is not None


class LlamaCppError(Exception):
    """llama.cpp did not do what it was asked for."""


class LlamaCpp:
    """A model with one context of llama.cpp; a context manager.

    Attributes:
        settings: versions and the parameters that differ from the defaults.
    """

    def __init__(self, path: Path, num_tokens: int, chunk: int, threads: int) -> None:
        import llama_cpp
        from llama_cpp import llama_cpp as api

        # Hundreds of lines otherwise; what goes wrong is raised here.
        logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)
        self._api: Any = api
        api.llama_backend_init()
        parameters = api.llama_model_default_params()
        parameters.use_extra_bufts = False
        self._model = api.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            raise LlamaCppError(f"llama.cpp cannot load {path.name}")
        self._vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        context = api.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = num_tokens, chunk, chunk
        context.n_threads = context.n_threads_batch = threads
        self._context = api.llama_init_from_model(self._model, context)
        if not self._context:
            api.llama_model_free(self._model)
            raise LlamaCppError("llama.cpp cannot make a context")
        self._chunk = chunk
        version = getattr(api, "llama_version", None)
        self.settings = {
            "llama_cpp_python": llama_cpp.__version__,
            "llama_cpp": version().decode() if version else None,
            "system_info": api.llama_print_system_info().decode().strip(" |"),
            "n_ctx": num_tokens,
            "n_batch": chunk,
            "n_ubatch": chunk,
            "kv": "f16",
            "flash_attn": "auto",
            "use_extra_bufts": False,
        }

    def chunks_of(self, tokens: Sequence[int]) -> Iterator[Tensor]:
        """Yields the logits of a text, float32[up to chunk, V] at a time."""
        api = self._api
        batch = api.llama_batch_init(self._chunk, 0, 1)
        try:
            for start in range(0, len(tokens), self._chunk):
                part = tokens[start : start + self._chunk]
                batch.n_tokens = len(part)
                for row, token in enumerate(part):
                    batch.token[row], batch.pos[row], batch.logits[row] = token, start + row, 1
                    batch.n_seq_id[row], batch.seq_id[row][0] = 1, 0
                if status := api.llama_decode(self._context, batch):
                    raise LlamaCppError(f"llama_decode: status {status} at token {start}")
                rows = api.llama_get_logits(self._context)
                shape = len(part), self._vocab_size
                yield torch.from_numpy(np.ctypeslib.as_array(rows, shape).copy())
        finally:
            api.llama_batch_free(batch)

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)
