"""A token's way from `Session.turn` to the kernel is short, and docs/architecture.md draws it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import stateful_kv
from tests.e2e.conftest import MakeEngine
from tests.e2e.tiny import DenseForm, PackedForm, tiny_llama

PACKAGE = Path(stateful_kv.__file__).parent
PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"
HEADING = "## A token's way from Session.turn to the kernel"
MAX_FILES = 8
# Only calls what it decorates.
TRACING = "system/tracing.py"


def files_on(frame: FrameType | None) -> list[str]:
    """The files of the package on a call stack, outermost first, each where it occurs first."""
    files: list[str] = []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            files.insert(0, path.relative_to(PACKAGE).as_posix())
        frame = frame.f_back
    return [file for file in dict.fromkeys(files) if file != TRACING]


class WatchedStack:
    """Stands in for a model's `_C.LayerStack` and keeps the way to each of its calls."""

    def __init__(self, stack: Any) -> None:
        self._stack = stack
        self.ways: list[list[str]] = []

    def forward(self, *args: Any) -> Any:
        self.ways.append(files_on(sys._getframe()))
        return self._stack.forward(*args)

    def forward_top_k(self, *args: Any) -> Any:
        self.ways.append(files_on(sys._getframe()))
        return self._stack.forward_top_k(*args)


def ways_to_ops(act: Callable[[], object]) -> list[list[str]]:
    """The ways to the ops that `act` calls below a model."""
    ways: list[list[str]] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE / "ops")):
            way = files_on(frame)
            if any(file.startswith("models/") for file in way):
                ways.append(way)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        act()
    finally:
        sys.setprofile(before)
    return ways


def drawn() -> list[str]:
    """The files that the picture names, in its order."""
    page = PAGE.read_text(encoding="utf-8")
    picture = page.partition(f"\n{HEADING}\n")[2].partition("```")[2].partition("```")[0]
    return list(dict.fromkeys(re.findall(r"[\w/]+\.py", picture)))


# What takes the step, by the number of steps between two looks of the host.
STEPPERS = {1: "engine/step.py", 4: "engine/loop/device_loop.py"}


@pytest.mark.parametrize("num_steps", STEPPERS)
def test_way_to_the_layer_stack(make_engine: MakeEngine, num_steps: int) -> None:
    model = tiny_llama(form=PackedForm())
    stack = model.__dict__["_stack"] = WatchedStack(model._stack)
    engine = make_engine(model, is_recorded=False, num_steps_per_sync=num_steps)
    session = engine.session()
    session.turn("hello", max_tokens=8)  # what is made once is made here
    stack.ways.clear()
    session.turn("again", max_tokens=6)
    head = ["session/session.py", "engine/scheduler.py", "engine/thread.py", "engine/multi_step.py"]
    expected = [*head, STEPPERS[num_steps], "models/llama.py"]
    assert expected in stack.ways
    assert [file for file in drawn() if file in expected] == expected
    assert all(len(way) <= MAX_FILES for way in stack.ways)


@pytest.mark.parametrize("num_steps", STEPPERS)
@pytest.mark.parametrize("form", ["packed", "dense"])
def test_way_to_ops(make_engine: MakeEngine, form: str, num_steps: int) -> None:
    """Dense weights, and packed ones that no LayerStack takes."""
    model = tiny_llama(form=PackedForm() if form == "packed" else DenseForm())
    model.__dict__["_stack"] = None
    engine = make_engine(model, is_recorded=False, num_steps_per_sync=num_steps)
    session = engine.session()
    session.turn("hello", max_tokens=8)
    ways = ways_to_ops(lambda: session.turn("again", max_tokens=6))
    assert {way[-1] for way in ways} >= {"ops/attention.py", "ops/rows.py"} or form == "packed"
    assert any(STEPPERS[num_steps] in way for way in ways)
    page = PAGE.read_text(encoding="utf-8").partition(f"\n{HEADING}\n")[2].partition("\n## ")[0]
    for way in ways:
        assert len(way) <= MAX_FILES, way
        assert [file for file in drawn() if file in way] == [f for f in way if f in drawn()]
        assert all(file in page for file in way if not file.startswith("ops/")), way
