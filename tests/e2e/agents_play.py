"""Agents that work on one engine from threads and asyncio tasks, and the same stories alone.

Each agent plays at random: turns, greedy and sampled, streams that are read slowly, closed early,
dropped or cancelled, forks, rewinds. What it did and the tokens after it are written down. A story
is then told again, call by call, on an engine where nobody else is; its tokens must be the same.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from stateful_kv.engine.engine import Engine
from stateful_kv.errors import OutOfPagesError
from stateful_kv.session.session import Session

SYSTEM = "a common beginning for all of them"
WORDS = ("alpha ", "beta ", "alpha beta ", "gamma")
MAX_TOKENS_HELD = 240


Calls = list[tuple[Callable[[Session], object], list[int]]]


@dataclass
class Story:
    """What was done with a session, and its tokens after each of these calls.

    Attributes:
        session: the session.
        calls: those since it had no tokens the last time.
        chapters: those before that.
    """

    session: Session
    calls: Calls = field(default_factory=list)
    chapters: list[Calls] = field(default_factory=list)

    def add(self, call: Callable[[Session], object]) -> None:
        """Writes down a call that has been made."""
        self.calls.append((call, self.session.token_ids))
        if not self.calls[-1][1]:
            self.chapters.append(self.calls)
            self.calls = []

    @property
    def token_ids(self) -> list[int]:
        """Those after the last call."""
        return self.calls[-1][1] if self.calls else []

    def check_alone(self, engine: Engine) -> int:
        """Tells the story again; every call must give the same tokens. Returns their number."""
        for calls in (*self.chapters, self.calls):
            with engine.session(system=SYSTEM) as session:
                for number, (call, tokens) in enumerate(calls):
                    call(session)
                    assert session.token_ids == tokens, f"call {number} of {self.session}"
        return sum(map(len, (*self.chapters, self.calls)))


class Agent:
    """One that plays with a few sessions, in a thread or a task of its own."""

    def __init__(self, engine: Engine, seed: int, deadline: float) -> None:
        self.engine = engine
        self.rng = random.Random(seed)
        self.deadline = deadline
        self.stories = [self._new_story() for _ in range(2)]
        self.finished: list[Story] = []
        self.num_turns = self.num_starved = self.num_cancelled = 0

    def _new_story(self) -> Story:
        return Story(self.engine.session(system=SYSTEM))

    @property
    def all_stories(self) -> list[Story]:
        return self.finished + self.stories

    def play(self) -> None:
        """In a thread."""
        while time.monotonic() < self.deadline:
            story = self.rng.choice(self.stories)
            if not self._act_at_once(story):
                try:
                    self._take_turn(story)
                except OutOfPagesError:
                    self._note_starved(story)
        self._close()

    async def play_async(self) -> None:
        """In a task."""
        while time.monotonic() < self.deadline:
            story = self.rng.choice(self.stories)
            if not self._act_at_once(story):
                try:
                    await self._take_turn_async(story)
                except OutOfPagesError:
                    self._note_starved(story)
            await asyncio.sleep(0)
        self._close()

    def _close(self) -> None:
        for story in self.stories:
            story.session.close()

    def _note_starved(self, story: Story) -> None:
        self.num_starved += 1
        assert not story.session.is_busy
        assert story.session.token_ids == story.token_ids

    def _act_at_once(self, story: Story) -> bool:
        """Perhaps something else than a turn."""
        session, rng = story.session, self.rng
        kind = rng.randrange(12)
        if session.num_tokens > MAX_TOKENS_HELD:
            kind = rng.choice([0, 1, 2])
        if kind == 0:
            turn = rng.randint(0, max(0, session.num_turns - 1))
            session.rewind(turn)
            story.add(lambda session: session.rewind(turn))
        elif kind == 1:
            length = rng.randint(0, session.num_tokens)
            session.truncate(length)
            story.add(lambda session: session.truncate(length))
        elif kind == 2:  # a fork takes the place of another session
            other = rng.choice(self.stories)
            if other is story:
                return False
            child = Story(session.fork(), list(story.calls))
            assert child.session.token_ids == session.token_ids
            other.session.close()
            self.finished.append(other)
            self.stories[self.stories.index(other)] = child
        elif kind == 3:
            session.suspend()
            if rng.random() < 0.1:
                self.engine.clear_cache()
        else:
            return False
        return True

    def _request(self) -> tuple[str, dict[str, Any]]:
        rng = self.rng
        text = "".join(rng.choice(WORDS) for _ in range(rng.randint(1, 5)))
        settings: dict[str, Any] = {"max_tokens": rng.randint(1, 24), "ignore_eos": True}
        if rng.random() < 0.5:
            settings |= {"temperature": rng.choice([0.7, 2.0]), "seed": rng.randrange(1 << 31)}
        if rng.random() < 0.2:
            settings["stop"] = ("a", "e")
        return text, settings

    def _take_turn(self, story: Story) -> None:
        session, rng = story.session, self.rng
        text, settings = self._request()
        kind = rng.randrange(5)
        if kind < 2:
            reply = session.turn(text, **settings)
            assert session.token_ids[-len(reply.token_ids) :] == reply.token_ids
            story.add(lambda session: session.turn(text, **settings))
        else:
            stream = session.stream(text, **settings)
            num_read, is_over = self._read(stream, 1 << 30 if kind == 2 else rng.randint(0, 9))
            if kind == 4 and not is_over:  # dropped; a while later nobody knows of it
                del stream
                wait_until(lambda: not session.is_busy)
            else:
                stream.close()
            story.add(lambda session: read_and_close(session, text, settings, num_read, is_over))
        self.num_turns += 1

    def _read(self, stream: Any, limit: int) -> tuple[int, bool]:
        """Reads pieces; returns how many, and whether the stream has ended."""
        pause = self.rng.choice([0, 0, 0.002])
        for num_read in range(limit):
            if next(stream, None) is None:
                return num_read, True
            time.sleep(pause)
        return limit, False

    async def _take_turn_async(self, story: Story) -> None:
        session, rng = story.session, self.rng
        text, settings = self._request()
        kind = rng.randrange(7)
        if kind < 2:
            reply = await session.aturn(text, **settings)
            assert session.token_ids[-len(reply.token_ids) :] == reply.token_ids
            story.add(lambda session: session.turn(text, **settings))
        elif kind < 4:
            task = asyncio.create_task(
                session.aturn(text, **settings)
                if kind == 2
                else self._read_async(session, text, settings, 1 << 30, is_patient=False)
            )
            await asyncio.sleep(rng.choice([0, 0, 0.001, 0.01]))
            task.cancel()
            try:
                await task
            except asyncio.CancelledError:
                self.num_cancelled += 1
                assert not session.is_busy
                assert session.token_ids == story.token_ids
                return
            story.add(lambda session: session.turn(text, **settings))
        else:
            limit = 1 << 30 if kind == 4 else rng.randint(0, 9)
            is_dropped = kind == 6
            num_read, is_over = await self._read_async(session, text, settings, limit, is_dropped)
            while session.is_busy:
                await asyncio.sleep(0.001)
            story.add(lambda session: read_and_close(session, text, settings, num_read, is_over))
        self.num_turns += 1

    async def _read_async(
        self,
        session: Session,
        text: str,
        settings: Any,
        limit: int,
        is_dropped: bool = False,
        is_patient: bool = True,
    ) -> tuple[int, bool]:
        pause = self.rng.choice([0, 0, 0.002])
        stream = await session.astream(text, **settings)
        num_read = 0
        while num_read < limit:
            try:
                await anext(stream)
            except StopAsyncIteration:
                return num_read, True
            num_read += 1
            if is_patient:
                await asyncio.sleep(pause)
        if not is_dropped:
            await stream.aclose()
        return num_read, False


def read_and_close(
    session: Session, text: str, settings: dict[str, Any], num_read: int, is_over: bool
) -> None:
    with session.stream(text, **settings) as stream:
        for _ in range(num_read):
            next(stream)
        if is_over:
            assert next(stream, None) is None


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.001)


def play_together(engine: Engine, num_threads: int, num_tasks: int, seconds: float) -> list[Agent]:
    """Lets agents play, each in a thread or a task; raises what one of them raised."""
    deadline = time.monotonic() + seconds
    errors: list[BaseException] = []
    agents = [Agent(engine, seed, deadline) for seed in range(num_threads + num_tasks)]

    def guarded(play: Callable[[], object]) -> None:
        try:
            play()
        except BaseException as error:
            errors.append(error)

    async def play_tasks() -> None:
        await asyncio.gather(*(agent.play_async() for agent in agents[num_threads:]))

    threads = [
        threading.Thread(target=guarded, args=[agent.play]) for agent in agents[:num_threads]
    ]
    threads.append(threading.Thread(target=guarded, args=[lambda: asyncio.run(play_tasks())]))
    for thread in threads:
        thread.daemon = True  # one that hangs must not keep the test run from ending
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()) + 60)
        assert not thread.is_alive(), "a deadlock"
    if errors:
        raise errors[0]
    return agents
