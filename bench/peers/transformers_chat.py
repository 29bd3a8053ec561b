"""`transformers` playing a workflow file: `generate` on the whole conversation, turn by turn.

Nothing is kept between turns, so a turn takes seconds: only the first few of a file are played.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch

from bench.peers import transformers_model
from stateful_kv.tokenizer import ChatTokenizer
from stateful_kv.workflow import TurnRow, WorkflowFile

MAX_TURNS = 6


def load(path: Path) -> Any:
    """The model, set to ignore end of text; PeerMissingError where it cannot be had."""
    model = transformers_model.load(path)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def play(
    model: Any, tokenizer: ChatTokenizer, file: WorkflowFile, max_tokens: int
) -> Generator[TurnRow, None, None]:
    """Yields one row for each of the first turns of the first workflow."""
    workflow = file.workflows[0]
    histories: dict[str, list[dict[str, str]]] = {
        agent.name: [{"role": "system", "content": agent.system}] if agent.system else []
        for agent in workflow.agents
    }
    for number, turn in enumerate(workflow.turns[:MAX_TURNS]):
        history = histories[turn.agent]
        history.append({"role": "user", "content": turn.message})
        start = time.perf_counter()
        prompt = torch.as_tensor(tokenizer.render_start(history), dtype=torch.int64)[None]
        with torch.inference_mode():
            output = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=max_tokens,
                do_sample=False,
            )
        reply = output[0, prompt.shape[1] :].tolist()
        text = tokenizer.decode(reply)
        total_s = time.perf_counter() - start
        history.append({"role": "assistant", "content": text})
        num_prompt = prompt.shape[1]
        yield TurnRow(
            workflow=0,
            agent=turn.agent,
            turn=number,
            prompt_tokens=num_prompt,
            reused_tokens=0,
            computed_tokens=num_prompt,
            drafted_tokens=0,
            accepted_tokens=0,
            output_tokens=len(reply),
            ttft_s=total_s,  # `generate` gives all tokens at once
            total_s=total_s,
            text=text,
            token_ids=reply,
        )
