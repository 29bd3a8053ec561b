"""Peers that play whole workflows beside our engine, by name."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from bench.peers import llama_server, older_tree, transformers_chat
from stateful_kv.apps.workflow import TurnRow, WorkflowFile
from stateful_kv.models.files.loading import LoadedModel, resolve

Turns = Generator[TurnRow, None, None]
# Given a stack for what must be ended, the model, the file and the tokens of a reply; returns the
# turns and what the result file should say about the setting.
Start = Callable[[ExitStack, LoadedModel, WorkflowFile, int], tuple[Turns, dict[str, Any]]]


def _start_llama_server(
    name: str, stack: ExitStack, loaded: LoadedModel, file: WorkflowFile, max_tokens: int
) -> tuple[Turns, dict[str, Any]]:
    num_slots = max(len(workflow.agents) for workflow in file.workflows)
    server = stack.enter_context(
        llama_server.LlamaServer(
            resolve(loaded.name),
            num_slots,
            torch.get_num_threads(),
            llama_server.SETTINGS[name],
        )
    )
    setting = {"arguments": server.arguments, "build": server.build}
    return llama_server.play(server, file, max_tokens), setting


def _start_transformers(
    stack: ExitStack, loaded: LoadedModel, file: WorkflowFile, max_tokens: int
) -> tuple[Turns, dict[str, Any]]:
    model = transformers_chat.load(resolve(loaded.name))
    turns = transformers_chat.play(model, loaded.tokenizer, file, max_tokens)
    return turns, {"dtype": "float32", "max_turns": transformers_chat.MAX_TURNS}


def start_cached_transformers(
    device: str, stack: ExitStack, loaded: LoadedModel, file: WorkflowFile, max_tokens: int
) -> tuple[Turns, dict[str, Any]]:
    """`transformers` on a device with a cache for each agent; bf16 on a GPU."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = transformers_chat.load(resolve(loaded.name), device, dtype)
    turns = transformers_chat.play_cached(model, loaded.tokenizer, file, max_tokens)
    setting = {
        "dtype": str(dtype).removeprefix("torch."),
        "cache": "DynamicCache of each agent, cut back to the common tokens",
        "attention": model.config._attn_implementation,
    }
    return turns, setting


PEERS: dict[str, Start] = {
    **{name: partial(_start_llama_server, name) for name in llama_server.SETTINGS},
    "transformers": _start_transformers,
    "older_tree": older_tree.start,
}
