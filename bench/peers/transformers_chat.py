"""`transformers` playing a workflow file: `generate` on the whole conversation, turn by turn.

`play` keeps nothing between turns, so a turn takes seconds: only the first few of a file are
played. `play_cached` keeps a `DynamicCache` for each agent and computes what the conversation has
beyond the tokens that it holds.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.peers import transformers_model
from stateful_kv.apps.workflow import Agent, TurnRow, WorkflowFile, WorkflowTurn
from stateful_kv.text.tokenizer import ChatTokenizer

MAX_TURNS = 6


def load(path: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """The model, set to ignore end of text; PeerMissingError where it cannot be had."""
    model = transformers_model.load(path)
    for parameter in model.parameters():  # not the rotary frequencies, which stay float32
        parameter.data = parameter.data.to(dtype)
    model.to(device)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def play(
    model: Any, tokenizer: ChatTokenizer, file: WorkflowFile, max_tokens: int
) -> Generator[TurnRow, None, None]:
    """Yields one row for each of the first turns of the first workflow."""
    first = file.workflows[0]
    yield from _turns(model, tokenizer, 0, first.agents, first.turns[:MAX_TURNS], max_tokens, False)


def play_cached(
    model: Any, tokenizer: ChatTokenizer, file: WorkflowFile, max_tokens: int
) -> Generator[TurnRow, None, None]:
    """Yields one row for each turn of all workflows, keeping a cache for each agent."""
    for index, workflow in enumerate(file.workflows):
        yield from _turns(
            model, tokenizer, index, workflow.agents, workflow.turns, max_tokens, True
        )


class _Conversation:
    """Messages of one agent, and the tokens whose KV are kept."""

    def __init__(self, system: str) -> None:
        self.messages = [{"role": "system", "content": system}] if system else []
        self.cached: list[int] = []
        self.cache: Any = None

    def trim(self, prompt: list[int]) -> int:
        """Drops KV of tokens that the prompt does not begin with; returns how many are left.

        At least one token of the prompt is computed: its logits are wanted.
        """
        pairs = zip(self.cached, prompt[:-1], strict=False)
        kept = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if kept is None:
            kept = min(len(self.cached), len(prompt) - 1)
        if kept == 0:
            self.cache = importlib.import_module("transformers").DynamicCache()
        elif kept < len(self.cached):
            self.cache.crop(kept)
        self.cached = self.cached[:kept]
        return kept


def _turns(
    model: Any,
    tokenizer: ChatTokenizer,
    workflow: int,
    agents: Sequence[Agent],
    turns: Sequence[WorkflowTurn],
    max_tokens: int,
    keeps_cache: bool,
) -> Generator[TurnRow, None, None]:
    """Rows of the turns of one workflow."""
    conversations = {agent.name: _Conversation(agent.system) for agent in agents}
    for number, turn in enumerate(turns):
        conversation = conversations[turn.agent]
        conversation.messages.append({"role": "user", "content": turn.message})
        start = time.perf_counter()
        prompt = [int(token) for token in tokenizer.render_start(conversation.messages)]
        reused = conversation.trim(prompt) if keeps_cache else 0
        output = _generate(model, prompt, max_tokens, conversation.cache)
        reply = output[len(prompt) :]
        text = tokenizer.decode(reply)
        total_s = time.perf_counter() - start
        conversation.cached = output[:-1]  # the last token was chosen, not fed
        conversation.messages.append({"role": "assistant", "content": text})
        yield TurnRow(
            workflow=workflow,
            agent=turn.agent,
            turn=number,
            prompt_tokens=len(prompt),
            reused_tokens=reused,
            computed_tokens=len(prompt) - reused,
            drafted_tokens=0,
            accepted_tokens=0,
            output_tokens=len(reply),
            ttft_s=total_s,  # `generate` gives all tokens at once
            total_s=total_s,
            text=text,
            token_ids=reply,
        )


def _generate(model: Any, prompt: list[int], max_tokens: int, cache: Any) -> list[int]:
    """The prompt and its greedy continuation; extends `cache` unless that is None."""
    ids = torch.tensor([prompt], device=model.device)
    kept = {} if cache is None else {"past_key_values": cache}
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            **kept,
        )
    tokens: list[int] = output[0].tolist()
    return tokens
