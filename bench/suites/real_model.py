"""The default model and real text for suites that run on its file; loaded once a run."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from stateful_kv.apps.workflow import load_workflow
from stateful_kv.errors import ModelNotFoundError
from stateful_kv.models.files.loading import LoadedModel, load_model, resolve

MODEL = "smollm2"
TEXT_WORKFLOW = "coding35"


def is_installed() -> bool:
    """Whether the weights of the default model can be found."""
    try:
        resolve(MODEL)
    except ModelNotFoundError:
        return False
    return True


@lru_cache(maxsize=1)
def load(weight_format: str = "auto") -> LoadedModel:
    """The default model; only the last format asked for is kept in memory."""
    return load_model(MODEL, weight_format)


def text_ids(loaded: LoadedModel, length: int) -> Tensor:
    """int64[length]: the messages of a coding workflow, repeated where they are too short."""
    turns = load_workflow(TEXT_WORKFLOW).workflows[0].turns
    ids = loaded.tokenizer.encode("\n\n".join(turn.message for turn in turns))
    tokens = torch.as_tensor(ids, dtype=torch.int64)
    return tokens.repeat(-(-length // len(tokens)))[:length]
