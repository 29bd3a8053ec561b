"""The examples run; that of the README is what the README shows and says what the engine says."""

from __future__ import annotations

import asyncio
import runpy
from pathlib import Path

import torch

from stateful_kv.engine.engine import Engine

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "ops_decode_loop.py"
PROMPT = "Write the numbers from one to ten, then write them again."


def test_readme_shows_the_loop() -> None:
    _, rest = EXAMPLE.read_text().split("# README.md shows what follows\n")
    loop, _ = rest.split("# README.md shows what is above")
    assert f"```python\n{loop.strip()}\n```" in (ROOT / "README.md").read_text()


@torch.no_grad()
def test_the_loop_gives_the_tokens_of_the_engine() -> None:
    example = runpy.run_path(str(EXAMPLE))
    with Engine.load("smollm2", kv_tokens=1024) as engine:
        reply = engine.session().turn(PROMPT, max_tokens=40, ignore_eos=True)
        ids = engine.tokenizer.render_start([{"role": "user", "content": PROMPT}], None)
        weights, config = engine.model.weights, engine.model.config
    pools = torch.zeros(config.num_layers, 2, 8, config.num_kv_heads, 64, config.head_dim)
    pools = pools.half()
    table = torch.randperm(8, dtype=torch.int32)[None]
    start = torch.tensor(ids).long()
    tokens, passes = example["generate"](weights, config, pools, table, start, 40)
    assert tokens[len(start) :].tolist() == reply.token_ids
    assert passes <= 40


def test_agents_in_asyncio_say_what_each_says_alone() -> None:
    example = runpy.run_path(str(ROOT / "examples" / "asyncio_agents.py"))
    with Engine.load("smollm2", kv_tokens=4096) as engine:
        replies = asyncio.run(example["main"](engine, max_tokens=12))
        engine.clear_cache()
        assert replies.keys() == example["TASKS"].keys()
        for name, message in example["TASKS"].items():
            with engine.session(system="You are brief and friendly.") as session:
                for text, reply in zip(
                    [message, "Say that again in other words."], replies[name], strict=True
                ):
                    assert session.turn(text, max_tokens=12).text == reply
        assert engine.check_integrity() is None
