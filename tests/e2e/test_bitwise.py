"""Whatever way a token was computed, its logits are the same bits.

Cached or not, in chunks of any size, forked, rewound, drafted, batched with others, evicted and
computed again, on one thread, two or three; with packed weights, with dense ones on the CPU and on
CUDA. Engines to compare with run without drafts, since rows
of refused drafts belong to no text.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from stateful_kv.engine.engine import Engine
from stateful_kv.kv.pools import DTYPES
from stateful_kv.models.llama import LlamaModel
from stateful_kv.session.session import Session
from tests.e2e.conftest import CUDA, MakeEngine, on_devices
from tests.e2e.tiny import Recorder, rows_from_scratch

MESSAGES = ("list the files, please", "read a.txt and read a.txt again", "ok", "now write b.txt")
SAMPLED = {"temperature": 0.8, "seed": 11, "top_p": 0.9, "min_p": 0.01}
PENALISED = {**SAMPLED, "repetition_penalty": 1.3, "presence_penalty": 0.2}
GREEDY_PENALISED = {"repetition_penalty": 1.2, "frequency_penalty": 0.1}
SETTINGS = [{}, SAMPLED, PENALISED, GREEDY_PENALISED]


def play(session: Session, messages: tuple[str, ...] = MESSAGES, **sampling: object) -> list[int]:
    for message in messages:
        session.turn(message, max_tokens=24, ignore_eos=True, **sampling)
    return session.token_ids


def recorder(engine: Engine) -> Recorder:
    assert isinstance(engine.model, Recorder)
    return engine.model


@pytest.mark.parametrize(
    ("llama", "kv_dtype", "num_threads", "max_batch_tokens"),
    [
        *itertools.product(["packed"], ["float16"], [1, 2, 3], [1, 7, 16, 1024]),
        *itertools.product(["packed"], ["float32", "bfloat16"], [1], [7, 1024]),
        *itertools.product(["packed"], ["int8"], [1, 2], [1, 7, 1024]),
        *itertools.product(["cpu"], ["float16", "float32", "int8"], [1], [1, 7, 1024]),
        *(
            pytest.param(*device.values, kv_dtype, 1, size, marks=device.marks)
            for device in CUDA
            for kv_dtype, size in itertools.product(["bfloat16", "int8"], [1, 7, 16, 1024])
        ),
    ],
    indirect=["llama"],
)
def test_incremental_equals_from_scratch(
    make_engine: MakeEngine,
    llama: LlamaModel,
    set_num_threads: Callable[[int], None],
    kv_dtype: str,
    num_threads: int,
    max_batch_tokens: int,
) -> None:
    set_num_threads(num_threads)
    engine = make_engine(kv_dtype=kv_dtype, max_batch_tokens=max_batch_tokens)
    session = engine.session(system="You are terse.")
    tokens = play(session)
    if not llama.row_counts:  # of our own kernels the thread count is no part of the result
        set_num_threads(num_threads % 3 + 1)
    expected = rows_from_scratch(llama, tokens, DTYPES[kv_dtype])
    rows = set(recorder(engine).rows)
    for turn in session.turns:
        for position in range(turn.reply_start - 1, turn.end - 1):
            assert expected[position] in rows, f"logits at position {position} differ"


@on_devices
@pytest.mark.parametrize("kv_dtype", ["float16", "int8"])
@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
def test_page_size_does_not_matter(make_engine: MakeEngine, page_size: int, kv_dtype: str) -> None:
    one = make_engine(page_size=page_size, kv_dtype=kv_dtype)
    other = make_engine(page_size=32, kv_dtype=kv_dtype)
    assert play(one.session("a")) == play(other.session("b"))
    assert recorder(one).rows == recorder(other).rows


@pytest.mark.parametrize(
    ("llama", "sampling", "num_threads", "kv_dtype"),
    [
        *(("packed", sampling, 1, "float16") for sampling in SETTINGS),
        *(("packed", sampling, 1, "int8") for sampling in SETTINGS),
        ("packed", {}, 2, "float16"),
        ("packed", {}, 3, "float16"),
        ("packed", PENALISED, 3, "float16"),
        *(("cpu", sampling, 1, "float16") for sampling in SETTINGS),
        *(
            pytest.param(*device.values, sampling, 1, "bfloat16", marks=device.marks)
            for device in CUDA
            for sampling in SETTINGS
        ),
    ],
    indirect=["llama"],
)
def test_drafts_change_nothing_but_steps(
    make_engine: MakeEngine,
    set_num_threads: Callable[[int], None],
    sampling: dict,
    num_threads: int,
    kv_dtype: str,
) -> None:
    drafted = make_engine(draft=True, kv_dtype=kv_dtype)
    plain = make_engine(draft=False, kv_dtype=kv_dtype)
    one, other = drafted.session("a"), plain.session("b")
    expected = play(other, **sampling)
    set_num_threads(num_threads)
    assert play(one, **sampling) == expected
    assert one.turns == other.turns
    assert set(recorder(plain).rows) <= set(recorder(drafted).rows)
    assert one.num_cached_tokens == other.num_cached_tokens == one.num_tokens - 1


@on_devices
def test_drafts_hit(make_engine: MakeEngine) -> None:
    engine = make_engine()
    session = engine.session()
    replies = []
    for message in MESSAGES:
        before = recorder(engine).num_tokens
        reply = session.turn(message, max_tokens=60, ignore_eos=True)
        receipt = reply.receipt
        rows = receipt.computed_tokens + receipt.steps - 1 + receipt.drafted_tokens
        assert recorder(engine).num_tokens - before == rows, "no accepted token is fed again"
        replies.append(reply)
    assert sum(reply.receipt.accepted_tokens for reply in replies) > 10
    for reply in replies:
        receipt = reply.receipt
        assert receipt.accepted_tokens <= receipt.drafted_tokens
        assert receipt.output_tokens == 60
        assert receipt.steps == 60 - receipt.accepted_tokens


@on_devices
@pytest.mark.parametrize("kv_dtype", ["float16", "int8"])
@pytest.mark.parametrize("sampling", [{}, PENALISED])
def test_fork_equals_independent(make_engine: MakeEngine, sampling: dict, kv_dtype: str) -> None:
    engine = make_engine(kv_dtype=kv_dtype)
    parent = engine.session("parent", system="shared")
    play(parent, MESSAGES[:2], **sampling)
    child = parent.fork("child")
    grandchild = child.fork()
    play(child, ("left",), **sampling)
    play(parent, ("right",), **sampling)
    play(grandchild, ("left", "right"), **sampling)
    child.truncate(child.num_tokens - 3)
    child.close()
    play(parent, ("more",), **sampling)
    for session, messages in (
        (parent, (*MESSAGES[:2], "right", "more")),
        (grandchild, (*MESSAGES[:2], "left", "right")),
    ):
        alone = make_engine(draft=False, kv_dtype=kv_dtype)
        assert play(alone.session(system="shared"), messages, **sampling) == session.token_ids
        assert set(recorder(alone).rows) <= set(recorder(engine).rows)


@on_devices
@pytest.mark.parametrize("sampling", [{}, SAMPLED])
def test_rewind_then_redo_equals_never_happened(make_engine: MakeEngine, sampling: dict) -> None:
    engine = make_engine()
    session = engine.session(system="same")
    play(session, (MESSAGES[0], "a detour", "and more of it"), **sampling)
    session.rewind(turn=1)
    assert session.num_turns == 1
    play(session, MESSAGES[1:], **sampling)

    straight = make_engine(draft=False)
    other = straight.session(system="same")
    play(other, MESSAGES, **sampling)
    assert session.token_ids == other.token_ids
    assert session.turns == other.turns
    assert set(recorder(straight).rows) <= set(recorder(engine).rows)


def test_rewind_to_nothing_renders_the_system_prompt_again(make_engine: MakeEngine) -> None:
    engine = make_engine()
    session = engine.session(system="same")
    first = play(session)
    session.rewind(turn=0)
    assert session.num_tokens == 0
    assert play(session) == first


@on_devices
@pytest.mark.parametrize("max_batch_tokens", [1, 2, 16, 1024])
@pytest.mark.parametrize("sampling", [{}, PENALISED])
def test_gather_equals_alone(
    make_engine: MakeEngine, max_batch_tokens: int, sampling: dict
) -> None:
    scripts = {name: tuple(f"{name}: {message}" for message in MESSAGES[:3]) for name in "abc"}
    engine = make_engine(max_batch_tokens=max_batch_tokens)
    together = {name: engine.session(name, system="a common preamble") for name in scripts}
    for messages in zip(*scripts.values(), strict=True):
        items = list(zip(together.values(), messages, strict=True))
        replies = engine.gather(items, max_tokens=20, ignore_eos=True, **sampling)
        assert [len(reply.token_ids) for reply in replies] == [20, 20, 20]
    rows = set(recorder(engine).rows)
    for name, messages in scripts.items():
        alone = make_engine(draft=False)
        session = alone.session(name, system="a common preamble")
        for message in messages:
            session.turn(message, max_tokens=20, ignore_eos=True, **sampling)
        assert session.token_ids == together[name].token_ids
        assert set(recorder(alone).rows) <= rows


@on_devices
def test_streams_advance_together(make_engine: MakeEngine) -> None:
    engine = make_engine()
    sessions = [engine.session(str(number)) for number in range(3)]
    streams = [s.stream(f"m{i}", 30, ignore_eos=True) for i, s in enumerate(sessions)]
    texts = ["", "", ""]
    live = set(range(3))
    while live:
        for index in sorted(live):
            piece = next(streams[index], None)
            if piece is None:
                live.discard(index)
            else:
                texts[index] += piece
    for index, session in enumerate(sessions):
        alone = make_engine().session()
        reply = alone.turn(f"m{index}", 30, ignore_eos=True)
        assert session.last_reply is not None
        assert session.last_reply.text == texts[index] == reply.text
        assert session.token_ids == alone.token_ids


@on_devices
@pytest.mark.parametrize("forget", ["suspend", "suspend and clear", "pressure"])
def test_evicted_equals_kept(make_engine: MakeEngine, forget: str) -> None:
    kept = make_engine(draft=False)
    expected = play(kept.session())
    engine = make_engine(kv_tokens=320 if forget == "pressure" else 4096)
    session = engine.session()
    for message in MESSAGES:
        session.turn(message, max_tokens=24, ignore_eos=True)
        if forget == "pressure":
            other = engine.session()
            other.turn("x" * 220, max_tokens=8, ignore_eos=True)
            other.close()
        else:
            session.suspend()
            assert session.num_cached_tokens == 0
            if forget == "suspend and clear":
                engine.clear_cache()
                assert engine.cache.num_free_pages == engine.cache.num_pages
    assert session.token_ids == expected
    assert set(recorder(kept).rows) <= set(recorder(engine).rows)
