"""Calls to interrupt, and the states that their sessions may have afterwards."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from stateful_kv.engine.config import EngineConfig
from stateful_kv.engine.engine import Engine
from stateful_kv.session.session import Session
from tests.e2e.tiny import COSTS, ByteTokenizer, Provenance

State = tuple[tuple[int, ...], int, bool]
SAMPLING = {"ignore_eos": True}


def make_engine(**config: Any) -> Engine:
    """Its text changes if any KV is stale."""
    config = {"page_size": 8, "kv_tokens": 512, "kv_dtype": "float32", **config}
    config = {"num_steps_per_sync": 1, **config}
    return Engine(Provenance(), ByteTokenizer(), EngineConfig(**config), cost_curve=COSTS)


def state_of(session: Session) -> State:
    return tuple(session.token_ids), session.num_turns, session.is_closed


@dataclass
class Scene:
    """An engine with sessions, and a call to interrupt.

    Attributes:
        engine: not closed yet.
        sessions: those that exist before the call.
        act: makes the call.
        made: what the call returned: sessions and streams.
        pieces: what was read of the stream.
        before: states of `sessions` before the call, and before a stream was opened.
    """

    engine: Engine
    sessions: list[Session]
    act: Callable[[], object] = lambda: None
    made: list[Any] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    before: list[State] = field(default_factory=list)

    def keep(self, made: Any) -> None:
        self.made.append(made)

    def read(self, num_pieces: int) -> None:
        """Reads so many more pieces of the stream."""
        for _ in range(num_pieces):
            piece = next(self.made[0], None)
            if piece is not None:
                self.pieces.append(piece)

    def drop_streams(self) -> None:
        self.made = [made for made in self.made if isinstance(made, Session)]


def scene_with(num_sessions: int = 1, **config: Any) -> Scene:
    """Sessions of one turn each."""
    engine = make_engine(**config)
    sessions = [engine.session(f"s{i}", system="shared text") for i in range(num_sessions)]
    for index, session in enumerate(sessions):
        session.turn(f"hello {index}", 4, **SAMPLING)
    return Scene(engine, sessions, before=[state_of(session) for session in sessions])


CASES: dict[str, Callable[[], Scene]] = {}


def case(prepare: Callable[[], Scene]) -> Callable[[], Scene]:
    CASES[prepare.__name__] = prepare
    return prepare


@case
def session() -> Scene:
    scene = scene_with()
    scene.act = lambda: scene.keep(scene.engine.session("new"))
    return scene


@case
def first_turn() -> Scene:
    engine = make_engine()
    scene = Scene(engine, [engine.session(system="shared text")])
    scene.before = [state_of(scene.sessions[0])]
    scene.act = lambda: scene.sessions[0].turn("hello", 4, **SAMPLING)
    return scene


@case
def later_turn() -> Scene:
    scene = scene_with(draft=False)
    scene.act = lambda: scene.sessions[0].turn("go on", 5, **SAMPLING)
    return scene


@case
def turn_with_drafts() -> Scene:
    scene = scene_with()
    scene.act = lambda: scene.sessions[0].turn("hello 0", 12, **SAMPLING)
    return scene


@case
def turn_with_penalties() -> Scene:
    scene = scene_with()
    penalties = {"repetition_penalty": 1.1, "presence_penalty": 0.1}
    sampling = {"temperature": 0.5, "seed": 7, **penalties, **SAMPLING}
    scene.act = lambda: scene.sessions[0].turn("go on", 4, **sampling)
    return scene


@case
def turn_under_pressure() -> Scene:
    """A fork writes into a shared page, and a session at rest must give way."""
    scene = scene_with(2, kv_tokens=12 * 8)
    child = scene.sessions[0].fork("child")
    scene.sessions.append(child)
    scene.before.append(state_of(child))
    scene.act = lambda: child.turn("go on and on and on", 16, **SAMPLING)
    return scene


@case
def turns_of_several_steps() -> Scene:
    scene = scene_with(num_steps_per_sync=4)
    scene.act = lambda: scene.sessions[0].turn("go on", 12, **SAMPLING)
    return scene


@case
def turn_beside_a_stream() -> Scene:
    scene = scene_with(2)
    scene.keep(scene.sessions[0].stream("tell me", 8, **SAMPLING))
    scene.read(2)
    scene.act = lambda: scene.sessions[1].turn("go on", 4, **SAMPLING)
    return scene


@case
def gather() -> Scene:
    scene = scene_with(2)
    items = [(session, "go on") for session in scene.sessions]
    scene.act = lambda: scene.engine.gather(items, 4, **SAMPLING)
    return scene


@case
def stream() -> Scene:
    scene = scene_with()
    scene.act = lambda: scene.keep(scene.sessions[0].stream("tell me", 8, **SAMPLING))
    return scene


def streaming(num_read: int = 0, **config: Any) -> Scene:
    scene = scene_with(**config)
    scene.keep(scene.sessions[0].stream("tell me", 6, **SAMPLING))
    scene.read(num_read)
    return scene


@case
def first_piece() -> Scene:
    scene = streaming()
    scene.act = lambda: scene.read(1)
    return scene


@case
def later_pieces() -> Scene:
    scene = streaming(2)
    scene.act = lambda: scene.read(2)
    return scene


@case
def end_of_a_stream() -> Scene:
    scene = streaming(6)
    scene.act = lambda: scene.read(1)
    return scene


@case
def stream_of_several_steps() -> Scene:
    scene = streaming(num_steps_per_sync=4)
    scene.act = lambda: scene.read(7)
    return scene


@case
def close_a_stream() -> Scene:
    scene = streaming(3)
    scene.act = lambda: scene.made[0].close()
    return scene


@case
def close_a_stream_not_begun() -> Scene:
    scene = streaming()
    scene.act = lambda: scene.made[0].close()
    return scene


@case
def drop_a_stream() -> Scene:
    scene = streaming(3)

    def drop() -> None:
        scene.drop_streams()
        scene.engine.check_integrity()

    scene.act = drop
    return scene


@case
def drop_a_session() -> Scene:
    scene = scene_with(2)
    dropped = [scene.sessions.pop()]
    scene.before.pop()

    def drop() -> None:
        dropped.clear()
        scene.engine.check_integrity()

    scene.act = drop
    return scene


@case
def step() -> Scene:
    scene = streaming()
    scene.act = lambda: [scene.engine.step() for _ in range(3)]
    return scene


@case
def fork() -> Scene:
    scene = scene_with()
    scene.act = lambda: scene.keep(scene.sessions[0].fork("child"))
    return scene


@case
def rewind() -> Scene:
    scene = scene_with()
    scene.sessions[0].turn("go on", 4, **SAMPLING)
    scene.before = [state_of(scene.sessions[0])]
    scene.act = lambda: scene.sessions[0].rewind(1)
    return scene


@case
def rewind_to_nothing() -> Scene:
    scene = scene_with()
    scene.act = lambda: scene.sessions[0].rewind(0)
    return scene


@case
def truncate() -> Scene:
    scene = scene_with()
    scene.act = lambda: scene.sessions[0].truncate(11)
    return scene


@case
def suspend() -> Scene:
    scene = scene_with()
    scene.act = scene.sessions[0].suspend
    return scene


@case
def close() -> Scene:
    scene = scene_with(2)
    scene.act = scene.sessions[0].close
    return scene


@case
def close_while_streaming() -> Scene:
    scene = streaming(3)
    scene.act = scene.sessions[0].close
    return scene


@case
def clear_cache() -> Scene:
    scene = scene_with()
    scene.act = scene.engine.clear_cache
    return scene


@case
def check_integrity() -> Scene:
    scene = scene_with()
    scene.act = scene.engine.check_integrity
    return scene


@case
def close_the_engine() -> Scene:
    scene = scene_with(2)
    scene.keep(scene.sessions[0].stream("tell me", 6, **SAMPLING))
    scene.read(2)
    scene.act = scene.engine.close
    return scene


@functools.cache
def states_after(name: str) -> list[set[State]]:
    """Of each session of a case, the states that it may have after an interrupt."""
    scene = CASES[name]()
    allowed = [{state} for state in scene.before]
    scene.act()
    _add_states(scene, allowed)
    scene.drop_streams()
    _add_states(scene, allowed)
    return allowed


@functools.cache
def state_when_cancelled(name: str, num_pieces: int) -> State:
    """Of a streaming session that is closed after so many pieces were read."""
    scene = CASES[name]()
    if not scene.made:
        scene.act()
    scene.read(num_pieces - len(scene.pieces))
    assert len(scene.pieces) == num_pieces
    scene.made[0].close()
    return state_of(scene.sessions[0])


def _add_states(scene: Scene, allowed: list[set[State]]) -> None:
    if any(not isinstance(made, Session) for made in scene.made):
        return  # a stream is open
    for session, states in zip(scene.sessions, allowed, strict=True):
        states.add(state_of(session))
