"""An interrupt at any moment of any call leaves every session as before that call or as after."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from random import Random

import numpy as np
import pytest
import torch

from stateful_kv.session.session import Session
from stateful_kv.system.promise import Promise
from tests.e2e.interrupt_scenes import (
    CASES,
    SAMPLING,
    Scene,
    state_of,
    state_when_cancelled,
    states_after,
)
from tests.e2e.interrupting import Interrupter, Point
from tests.e2e.tiny import oracle_token

FOLLOW_UP = "and then?"
# Every point instead of some: about twenty minutes; for who changes how the engine ends turns.
thorough = pytest.mark.skipif("SKV_ALL_INTERRUPTS" not in os.environ, reason="takes long")
traced = pytest.mark.skipif(sys.version_info < (3, 11), reason="instructions are those since 3.11")


def check(name: str, scene: Scene) -> None:
    """Nothing is lost, nothing is half done, and all goes on."""
    engine = scene.engine
    has_stream = any(not isinstance(made, Session) for made in scene.made) or scene.pieces
    allowed = [set(states) for states in states_after(name)]
    if has_stream:
        allowed[0].add(state_when_cancelled(name, len(scene.pieces)))
    scene.drop_streams()
    gc.collect()
    if engine._scheduler.owner.is_threaded:
        wait_until_idle(scene)
    if len(scene.pieces) % 2 or len(scene.sessions) % 2:  # now one is the first call, now another
        assert not any(session.is_busy for session in scene.sessions)
    assert engine.check_integrity() is None
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    children = [made for made in scene.made if isinstance(made, Session)]
    for index, session in enumerate(scene.sessions):
        assert not session.is_busy
        assert state_of(session) in allowed[index], f"session {index}"
    open_sessions = [s for s in [*scene.sessions, *children] if not s.is_closed]
    assert sum(not state.is_closed for state in engine._scheduler.sessions) == len(open_sessions)
    assert [turn for turn in engine._scheduler.turns if not turn.is_settled] == []
    for session in open_sessions:
        go_on(session)
    for session in [*scene.sessions, *children]:
        session.close()
        session.close()
    if not engine.is_closed:
        assert engine.check_integrity() is None
        engine.clear_cache()
        assert engine.cache.num_free_pages == engine.cache.num_pages
    engine.close()
    engine.close()
    assert engine.cache.num_free_pages == engine.cache.num_pages
    assert engine.cache.num_sequences == 0
    assert engine.cache.check_integrity() is None


def wait_until_idle(scene: Scene) -> None:
    """A turn whose caller is gone may run to its end; what an operation made is then dropped."""
    deadline = time.monotonic() + 30
    for _ in range(2):  # what is dropped while the first operation waits is ended before the second
        scene.engine.check_integrity()
    while any(session.is_busy for session in scene.sessions):
        assert time.monotonic() < deadline, "a session is busy for ever"
        time.sleep(0.001)


def go_on(session: Session) -> None:
    """The next turn gives what follows from the session's tokens alone."""
    tokens = session.token_ids
    reply = session.turn(FOLLOW_UP, 10, **SAMPLING)
    text = session.token_ids[: -len(reply.token_ids)]
    assert text[: len(tokens)] == tokens
    assert session.last_reply is reply
    expected = []
    for _ in reply.token_ids:
        expected.append(oracle_token(np.array(text + expected)))
    assert reply.token_ids == expected


def scene_of(name: str, *, is_threaded: bool = False) -> Scene:
    scene = CASES[name]()
    if is_threaded:
        scene.engine.start()
    return scene


def points_of(name: str, at: tuple[int, ...] = (), *, is_threaded: bool = False) -> list[Point]:
    """The points of a call, or those after interrupts `at`."""
    scene = scene_of(name, is_threaded=is_threaded)
    interrupter = Interrupter(at, is_listing=True)
    interrupter.run(scene.act)
    return list(interrupter.points) if interrupter.num_delivered == len(at) else []


def run(name: str, at: tuple[int, ...], is_threaded: bool) -> None:
    """Interrupts a call and looks at what it left."""
    scene = scene_of(name, is_threaded=is_threaded)
    interrupter = Interrupter(at)
    interrupter.run(scene.act)
    check(name, scene)


def spread(points: list[Point], limit: int) -> list[int]:
    """Some of the points, each place in the code once before any comes again."""
    if len(points) <= limit:
        return [point.index for point in points]
    seen: dict[object, int] = {}
    ranked = []
    for point in points:
        seen[point.place] = seen.get(point.place, -1) + 1
        ranked.append((seen[point.place], point.index))
    ranked.sort()
    fresh = [index for rank, index in ranked if rank == 0]
    if len(fresh) > limit:
        return fresh[:: -(-len(fresh) // limit)]
    return [index for _, index in ranked[:limit]]


@pytest.fixture(autouse=True)
def quick_collections() -> Iterator[None]:
    """What exists before a test is none of its garbage."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@traced
@pytest.mark.parametrize("name", CASES)
def test_an_interrupt(name: str) -> None:
    sweep(name, 40)


@traced
@pytest.mark.parametrize("name", CASES)
def test_two_interrupts(name: str) -> None:
    sweep_twice(name, 5, 4)


@traced
@pytest.mark.parametrize("name", CASES)
def test_an_interrupt_of_who_waits_for_the_thread(name: str) -> None:
    """The engine's own thread does the work."""
    sweep(name, 12, is_threaded=True)
    sweep_twice(name, 3, 3, is_threaded=True)


def test_a_reply_that_ends_before_its_interrupted_reader_can_fail_it() -> None:
    """With a thread of its own the engine may take the last step meanwhile."""
    scene = CASES["later_pieces"]()
    turn = scene.made[0]._turn
    while turn.num_left > 1:
        scene.engine.step()

    def take_the_last_step() -> None:
        turn.must_fail, turn.has_reader = True, False  # what the reader does first
        scene.engine._scheduler.step()

    scene.engine._scheduler.perform(take_the_last_step)
    assert turn.is_settled
    assert [state_of(session) for session in scene.sessions] == scene.before
    check("later_pieces", scene)


@thorough
@pytest.mark.timeout(3600)
@traced
@pytest.mark.parametrize("name", CASES)
def test_an_interrupt_at_every_point(name: str) -> None:
    sweep(name, 10**9)


@thorough
@pytest.mark.timeout(3600)
@traced
@pytest.mark.parametrize("name", CASES)
def test_two_interrupts_at_many_points(name: str) -> None:
    sweep_twice(name, 40, 25)


@thorough
@pytest.mark.timeout(3600)
@traced
@pytest.mark.parametrize("name", CASES)
def test_interrupts_of_who_waits_at_many_points(name: str) -> None:
    sweep(name, 400, is_threaded=True)
    sweep_twice(name, 20, 20, is_threaded=True)


def sweep(name: str, limit: int, *, is_threaded: bool = False) -> None:
    for _ in range(2):  # what is done once is done in the first run
        points = points_of(name, is_threaded=is_threaded)
    at = spread(points, limit)
    report([failure for index in at for failure in attempt(name, (index,), is_threaded)], len(at))


def sweep_twice(name: str, limit: int, second_limit: int, *, is_threaded: bool = False) -> None:
    for _ in range(2):
        points = points_of(name, is_threaded=is_threaded)
    failures, num = [], 0
    for index in spread(points, limit):
        seconds = points_of(name, (index,), is_threaded=is_threaded)
        for second in spread(seconds, second_limit):
            num += 1
            failures += attempt(name, (index, second), is_threaded)
    report(failures, num)


def attempt(name: str, at: tuple[int, ...], is_threaded: bool) -> list[str]:
    try:
        run(name, at, is_threaded)
    except Exception as error:
        return [f"{at}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"]
    return []


def report(failures: list[str], num: int) -> None:
    shown = chr(10).join(failures[:10])
    assert not failures, f"{len(failures)} of {num} runs:{chr(10)}{shown}"
    print(f"{num} runs")


@pytest.mark.parametrize("is_threaded", [False, True])
def test_signals_at_random_moments(is_threaded: bool) -> None:
    """Ctrl-C, as the operating system delivers it."""
    random = Random(20)
    names = ["later_turn", "turn_with_drafts", "gather", "stream_of_several_steps", "rewind"]
    is_armed = False

    def handle(signum: int, frame: object) -> None:
        if is_armed:
            raise KeyboardInterrupt

    num_hits = 0
    before = signal.signal(signal.SIGINT, handle)
    try:
        for name in names:
            states_after(name)
            for _ in range(25):
                scene = scene_of(name, is_threaded=is_threaded)
                sender = threading.Thread(target=send_signals, args=(random.uniform(0, 0.003),))
                try:
                    try:
                        sender.start()
                        is_armed = True
                        scene.act()
                    finally:
                        is_armed = False
                except KeyboardInterrupt:
                    num_hits += 1
                is_armed = False
                sender.join()
                check(name, scene)
    finally:
        signal.signal(signal.SIGINT, before)
    assert num_hits > 5


def send_signals(delay: float) -> None:
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(delay / 50)
    os.kill(os.getpid(), signal.SIGINT)


@traced
def test_an_interrupted_promise_blocks_nobody() -> None:
    def acts(promise: Promise[int]) -> list[Callable[[], object]]:
        return [lambda: promise.add_done_callback(id), lambda: promise.set_result(3)]

    for index, act in enumerate(acts(Promise())):
        listing = Interrupter(is_listing=True)
        listing.run(act)
        for point in listing.points:
            promise: Promise[int] = Promise()
            Interrupter((point.index,)).run(acts(promise)[index])
            promise.set_result(3)
            assert promise.result() == 3
        assert listing.points
