"""`help()` of the state objects says what their stub says, and the stub names all that is there."""

from __future__ import annotations

import ast
import inspect
import runpy
from pathlib import Path

import pytest

import stateful_kv
from stateful_kv import state

ROOT = Path(__file__).resolve().parents[2]
STUB = ast.parse((ROOT / "python" / "stateful_kv" / "_state.pyi").read_text())
DEFINED = {
    node.name: node for node in STUB.body if isinstance(node, ast.ClassDef | ast.FunctionDef)
}
CLASSES = {name: node for name, node in DEFINED.items() if isinstance(node, ast.ClassDef)}


def methods_of(node: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    return {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}


def parameters(function: ast.FunctionDef) -> list[str]:
    return [argument.arg for argument in function.args.args]


def test_the_header_is_up_to_date() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "make_state_docs.py"))
    assert script["main"](ROOT, ["--check"]) == 0


def test_an_old_header_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "make_state_docs.py"))
    for name in (script["STUB"], script["HEADER"]):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    stub = tmp_path / script["STUB"]
    stub.write_text(stub.read_text().replace("Takes free pages.", "Takes pages."))
    assert script["main"](tmp_path, ["--check"]) == 1
    assert "out of date: run scripts/make_state_docs.py" in capsys.readouterr().err
    assert script["main"](tmp_path, []) == 0
    assert script["main"](tmp_path, ["--check"]) == 0


@pytest.mark.parametrize("name", CLASSES)
def test_help_of_a_class(name: str) -> None:
    made, methods = getattr(state, name), methods_of(CLASSES[name])
    assert inspect.getdoc(made) == ast.get_docstring(CLASSES[name])
    init = methods.pop("__init__", None)
    if init is not None:
        assert list(inspect.signature(made).parameters) == parameters(init)[1:]
    assert {key for key in vars(made) if not key.startswith("_")} == set(methods)
    for key, method in methods.items():
        text = ast.get_docstring(method)
        assert text and inspect.getdoc(getattr(made, key)) == text, f"{name}.{key}"
        if not method.decorator_list:  # a property has no signature
            found = inspect.signature(getattr(made, key)).parameters
            assert list(found) == parameters(method), f"{name}.{key}"


@pytest.mark.parametrize("name", sorted(set(DEFINED) - set(CLASSES)))
def test_help_of_a_function(name: str) -> None:
    function = getattr(state, name)
    assert inspect.getdoc(function) == ast.get_docstring(DEFINED[name])
    assert list(inspect.signature(function).parameters) == parameters(DEFINED[name])


def test_everything_is_public() -> None:
    errors = {"InvariantError", "StateBusyError"}
    assert set(state.__all__) == set(DEFINED) | errors
    assert stateful_kv.state is state
    for name in errors:
        assert getattr(state, name) is getattr(stateful_kv, name)
