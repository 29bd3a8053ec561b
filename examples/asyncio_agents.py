"""Three agents at work at the same time on one engine, each in an asyncio task of its own.

The engine's thread computes all of them in one batch; each gets the tokens it would get alone.
"""

import asyncio

from stateful_kv import Engine, Session

TASKS = {
    "namer": "Suggest a name for a bakery.",
    "writer": "Write one sentence about fresh bread.",
    "counter": "Count from one to ten.",
}


async def ask(session: Session, message: str, max_tokens: int) -> str:
    """Streams a reply; leaving the block early would end the turn and keep what was read."""
    pieces = []
    async with session.astream(message, max_tokens=max_tokens) as stream:
        async for piece in stream:
            pieces.append(piece)
            print(f"{session.name:>8} | {''.join(pieces).splitlines()[-1][-70:]}")
    return "".join(pieces)


async def work(engine: Engine, name: str, message: str, max_tokens: int) -> list[str]:
    """Two turns of one agent; the second computes its new message alone."""
    with engine.session(name, system="You are brief and friendly.") as session:
        first = await ask(session, message, max_tokens)
        reply = await session.aturn("Say that again in other words.", max_tokens=max_tokens)
        return [first, reply.text]


async def main(engine: Engine, max_tokens: int = 32) -> dict[str, list[str]]:
    works = [work(engine, name, message, max_tokens) for name, message in TASKS.items()]
    return dict(zip(TASKS, await asyncio.gather(*works), strict=True))


if __name__ == "__main__":
    with Engine.load("smollm2", kv_tokens=4096) as engine:
        for name, (first, second) in asyncio.run(main(engine)).items():
            print(f"\n{name}\n  {first}\n  {second}")
