"""The examples run; that of the README is what the README shows and says what the engine says."""

from __future__ import annotations

import asyncio
import re
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


def test_decode_loop_says_the_same_with_forks_cache_and_drafts() -> None:
    path = ROOT / "examples" / "decode_loop.py"
    source = path.read_text()
    assert len(source.splitlines()) <= 60
    assert re.findall(r"^.*import.*$", source, re.M) == [
        "import torch",
        "from stateful_kv import ops, state",
    ]
    example = runpy.run_path(str(path))
    pool, table, tree, generate = (example[n] for n in ("pool", "table", "tree", "generate"))
    seq = table.create()
    text, num_passes = generate(seq, torch.randint(64, (29,)), 40)
    assert num_passes < 40  # some drafts were right
    plain = table.create()
    logits = example["forward"](plain, text)
    table.release(plain)
    assert torch.equal(logits[28:-1].argmax(1), text[29:])
    longer = torch.cat([text, torch.tensor([1, 2, 3])])
    cached = tree.match(0, longer[:-1])
    starts = [table.fork(seq), table.adopt(cached.pages, cached.num_tokens), table.create()]
    assert [table.length(start) for start in starts] == [68, 68, 0]
    answers = [generate(start, longer, 9)[0].tolist() for start in starts]
    assert answers[0] == answers[1] == answers[2]
    for start in (seq, *starts):
        table.release(start)
    for _ in range(12):  # more than the pool holds: what only the tree holds is evicted
        other = table.create()
        generate(other, torch.randint(64, (50,)), 5)
        table.release(other)
    assert generate(table.create(), longer, 9)[0].tolist() == answers[0]
    assert example["state"].check_references(pool, table, [tree]) is None


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
