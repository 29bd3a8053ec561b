"""When several steps are taken at once and how many: streams, pages, what is sent to the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stateful_kv.engine.loop.device_loop import DeviceLoop
from stateful_kv.engine.loop.graphs import GraphRecorder
from stateful_kv.errors import OutOfPagesError
from tests.e2e.conftest import MakeEngine
from tests.e2e.multi_step_play import MESSAGES, STEPS, multi_step, play
from tests.e2e.tiny import END, FIRST_BYTE, CountingUp, Provenance, Scripted


class TestWhoWaits:
    def test_a_stream_takes_part(self, make_engine: MakeEngine) -> None:
        """When its text is shown and what a reader keeps does not depend on the steps taken."""
        outcomes = []
        for steps in (1, 8):
            engine = make_engine(CountingUp(), num_steps_per_sync=steps)
            streaming, other = engine.session(), engine.session()
            stream = streaming.stream("x", max_tokens=30)
            assert len(next(stream)) == 1
            assert other.turn("y", max_tokens=12).finish_reason == "length"
            assert (multi_step(engine).num_syncs > 0) is (steps > 1)
            shown = [next(stream) for _ in range(4)]
            stream.close()
            assert streaming.last_reply is not None
            assert streaming.last_reply.finish_reason == "cancelled"
            assert len(streaming.last_reply.token_ids) == 5
            whole = "".join(streaming.stream("z", max_tokens=9))
            outcomes.append((shown, whole, streaming.token_ids, other.token_ids))
        assert outcomes[0] == outcomes[1]

    def test_a_prompt_does_not_switch_it_off(self, make_engine: MakeEngine) -> None:
        """Between two steps that compute a part of a prompt the others take several at once."""
        engine = make_engine(CountingUp(), num_steps_per_sync=8, max_batch_tokens=16)
        short, long = engine.session(), engine.session()
        seen: list[tuple[int, int]] = []
        loop = multi_step(engine).loop
        run = loop.run

        def watched(sequences: Any, max_draft: int, num_steps: int) -> Any:
            seen.append((len(sequences), num_steps))
            return run(sequences, max_draft, num_steps)

        loop.run = watched  # type: ignore[method-assign]
        replies = engine.gather([(short, "s"), (long, "m" * 200)], max_tokens=40)
        # 203 tokens of a prompt at 15 rows a step; the short reply does not wait for them.
        num_alone = len([rows for rows, _ in seen if rows == 1])
        assert seen[:4] == [(1, 8)] * 4
        assert num_alone >= 4
        plain = make_engine(CountingUp(), max_batch_tokens=16)
        expected = plain.gather(
            [(plain.session(), "s"), (plain.session(), "m" * 200)], max_tokens=40
        )
        assert [r.token_ids for r in replies] == [r.token_ids for r in expected]

    @pytest.mark.parametrize(
        "sampling",
        [{"repetition_penalty": 1.2}, {"presence_penalty": 0.1}, {"frequency_penalty": 1}],
    )
    def test_penalties_are_for_single_steps(self, make_engine: MakeEngine, sampling: dict) -> None:
        engine = make_engine(CountingUp(), num_steps_per_sync=8)
        engine.session().turn("x", max_tokens=20, **sampling)
        assert multi_step(engine).num_syncs == 0

    @pytest.mark.parametrize(
        ("max_batch_tokens", "drafts"), [(16, {3}), (15, {0, 3}), (4, {0}), (3, {0})]
    )
    def test_more_turns_than_rows(
        self, make_engine: MakeEngine, max_batch_tokens: int, drafts: set[int]
    ) -> None:
        """Rows of all turns must fit into one pass: else without drafts, else not at all."""
        engine = make_engine(
            CountingUp(), num_steps_per_sync=4, max_draft=3, max_batch_tokens=max_batch_tokens
        )
        items = [(engine.session(), "y") for _ in range(4)]
        replies = engine.gather(items, max_tokens=40)
        assert all(len(reply.token_ids) == 40 for reply in replies)
        shapes = list(multi_step(engine).loop._recorded)
        assert {shape.max_draft for shape in shapes} <= drafts
        assert all(shape.num_rows <= max_batch_tokens for shape in shapes)
        assert multi_step(engine).num_syncs > 0
        assert any(shape.num_sequences == 4 for shape in shapes) is (max_batch_tokens > 3)


class TestPages:
    @pytest.mark.parametrize("kv_tokens", [96, 112, 160, 208])
    @pytest.mark.parametrize("steps", STEPS)
    def test_outcomes_are_those_of_single_steps(
        self, make_engine: MakeEngine, kv_tokens: int, steps: int
    ) -> None:
        """Pages run out at the same token, for the same turn."""
        outcomes = []
        for config in ({}, {"num_steps_per_sync": steps}):
            engine = make_engine(
                Provenance(), kv_dtype="float32", kv_tokens=kv_tokens, draft=False, **config
            )
            one, other = engine.session(), engine.session()
            found: list[Any] = []
            for message in ("first", "second"):
                for reply in engine.gather(
                    [(one, message), (other, message)], 40, return_exceptions=True
                ):
                    is_error = isinstance(reply, Exception)
                    found.append(type(reply).__name__ if is_error else reply.token_ids)
            outcomes.append((found, one.token_ids, other.token_ids))
        assert outcomes[0] == outcomes[1]

    def test_steps_ahead_take_nothing_from_idle_sessions(self, make_engine: MakeEngine) -> None:
        engine = make_engine(CountingUp(), kv_tokens=96, num_steps_per_sync=32, draft=False)
        idle, session = engine.session(), engine.session()
        idle.turn("i" * 20, max_tokens=4)  # two pages of six
        held = idle.num_cached_tokens
        session.turn("s" * 20, max_tokens=40)  # four pages, to the last slot
        assert session.num_cached_tokens == 3 + 20 + 39
        assert idle.num_cached_tokens == held
        assert multi_step(engine).num_syncs > 0

    def test_fewer_steps_where_there_are_fewer_pages(self, make_engine: MakeEngine) -> None:
        engine = make_engine(CountingUp(), kv_tokens=64, num_steps_per_sync=64, draft=False)
        session = engine.session()
        with pytest.raises(OutOfPagesError):
            session.turn("s" * 20, max_tokens=60)
        assert session.num_tokens == 0
        assert multi_step(engine).num_syncs > 0
        reply = session.turn("s" * 20, max_tokens=41)
        assert len(reply.token_ids) == 41
        assert engine.cache.num_free_pages == 0

    def test_what_was_reserved_in_vain_is_free_again(self, make_engine: MakeEngine) -> None:
        script = [FIRST_BYTE + 50, FIRST_BYTE + 51, END]
        engine = make_engine(Scripted(script), num_steps_per_sync=64, page_size=1, draft=False)
        session = engine.session()
        session.turn("hi", max_tokens=50)
        assert multi_step(engine).num_syncs == 1
        assert engine.cache.num_pages_of(session._state.sequence_id) == session.num_tokens - 1


class TestUploads:
    def test_the_past_is_sent_once(self, make_engine: MakeEngine) -> None:
        """What a turn sends depends on its message and its steps, not on the history."""
        sent = []
        engine = make_engine(CountingUp(), kv_tokens=1 << 14, page_size=64, num_steps_per_sync=4)
        session = engine.session()
        session.turn("long " * 800, max_tokens=9)
        first = multi_step(engine).loop.num_uploaded
        assert first > 4000
        for _ in range(20):
            before = multi_step(engine).loop.num_uploaded
            session.turn("short", max_tokens=9)
            sent.append(multi_step(engine).loop.num_uploaded - before)
        assert sum(sent) / 20 < 40
        assert max(sent) < 200, "a shape with more pages is sent its page table"

    def test_sessions_that_take_turns_keep_their_rows(self, make_engine: MakeEngine) -> None:
        engine = make_engine(CountingUp(), kv_tokens=1 << 14, page_size=64, num_steps_per_sync=4)
        sessions = [engine.session() for _ in range(4)]
        for session in sessions:
            session.turn("long " * 200, max_tokens=9)
        loop = multi_step(engine).loop
        before = loop.num_uploaded
        for session in sessions:
            session.turn("short", max_tokens=9)
        engine.gather([(session, "short") for session in sessions], max_tokens=9)
        # For the shape of four the page tables are new, 17 pages each; no token is sent twice.
        assert loop.num_uploaded - before < 700

    def test_more_sessions_than_rows(
        self, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("stateful_kv.engine.loop.token_store.TokenStore.NUM_ROWS", 2)
        texts = []
        for steps in (1, 3):
            engine = make_engine(num_steps_per_sync=steps)
            sessions = [engine.session() for _ in range(5)]
            for message in MESSAGES:
                for session in sessions:
                    session.turn(message + session.name[-1:], max_tokens=12)
                engine.gather([(session, message) for session in sessions[1:4]], max_tokens=12)
            texts.append([session.token_ids for session in sessions])
        assert texts[0] == texts[1]

    def test_shapes_are_few(self, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(DeviceLoop, "MAX_SHAPES", 2)
        texts = []
        for steps in (1, 3):
            engine = make_engine(num_steps_per_sync=steps)
            sessions = [engine.session() for _ in range(4)]
            for number in (1, 2, 4, 1, 2, 3):
                engine.gather([(session, "go on") for session in sessions[:number]], 20)
            texts.append([session.token_ids for session in sessions])
            assert len(multi_step(engine).loop._recorded) == (0 if steps == 1 else 2)
        assert texts[0] == texts[1]


class Launches(TorchDispatchMode):
    """Writes down the ops that are called, with the shapes of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        self.calls.append((str(func), tuple((t.shape, t.stride(), t.dtype) for t in tensors)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("llama", ["packed", "cpu"], indirect=True)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 3, "top_p": 0.8}])
def test_a_step_is_the_same_launches_every_time(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, sampling: dict
) -> None:
    """What a graph needs, checked without one: nothing depends on a value on the device."""
    seen: dict[Any, list[list[tuple[str, tuple[Any, ...]]]]] = {}
    step = DeviceLoop._step

    def watched(self: DeviceLoop, state: Any) -> None:
        with Launches() as launches:
            step(self, state)
        seen.setdefault(state.shape, []).append(launches.calls)

    monkeypatch.setattr(DeviceLoop, "_step", watched)
    engine = make_engine(num_steps_per_sync=4, is_recorded=False)
    sessions = [engine.session() for _ in range(3)]
    for message in MESSAGES:
        items = [(session, message * (1 + index)) for index, session in enumerate(sessions)]
        engine.gather(items, max_tokens=30, **sampling)
    assert sum(map(len, seen.values())) > 40
    for steps in seen.values():
        assert all(calls == steps[0] for calls in steps)
        names = {name for name, _ in steps[0]}
        assert "stateful_kv.advance_sequences.default" in names
        assert not waits_for_the_device(names)


def waits_for_the_device(names: set[str]) -> bool:
    waits = ("item", "_local_scalar", "nonzero", "index.Tensor", "masked_select", "equal", "unique")
    return any(wait in name for name in names for wait in waits)


def test_the_check_notices_waits_and_values() -> None:
    tokens = torch.tensor([1, 0, 2])
    for wait in (lambda: int(tokens[0]), lambda: tokens[tokens > 0], lambda: bool(tokens.any())):
        with torch.inference_mode(), Launches() as launches:
            wait()
        assert waits_for_the_device({name for name, _ in launches.calls})
    with Launches() as one, torch.inference_mode():
        tokens[:1] + 1
    with Launches() as other, torch.inference_mode():
        tokens[:2] + 1
    assert one.calls != other.calls


on_cuda = pytest.mark.parametrize("llama", ["cuda"], indirect=True)


@pytest.mark.cuda
class TestGraphs:
    @on_cuda
    def test_every_shape_is_recorded_once(self, make_engine: MakeEngine) -> None:
        engine = make_engine(num_steps_per_sync=8, is_recorded=False)
        session = engine.session()
        play(session)
        recorded = dict(multi_step(engine).loop._recorded)
        assert recorded
        assert all(step.replay is not None for step in recorded.values())
        play(session, MESSAGES[:1])
        assert all(
            multi_step(engine).loop._recorded[shape] is step for shape, step in recorded.items()
        )

    def test_a_replay_reads_what_is_there_then(self) -> None:
        device = torch.device("cuda")
        total, step = torch.zeros(2, 3, device=device)

        def add() -> None:
            total.add_(step * 2)

        replay = GraphRecorder(device).record(add)
        assert total.tolist() == [0.0] * 3, "warming up changed nothing"
        for value in (1.0, 2.0):
            step.fill_(value)
            replay()
        assert total.tolist() == [6.0] * 3

    @on_cuda
    def test_a_model_that_waits_for_the_device_takes_single_steps(
        self, make_engine: MakeEngine
    ) -> None:
        expected = play(make_engine().session())
        with pytest.warns(RuntimeWarning, match="several steps at once failed"):
            assert play(make_engine(num_steps_per_sync=8).session()) == expected
        assert play(make_engine(num_steps_per_sync=8, is_recorded=False).session()) == expected
