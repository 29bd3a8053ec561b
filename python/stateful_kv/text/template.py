"""Chat templates: Jinja text of a model file, run in a sandbox with bounded work.

A template comes with the weights, so it is treated as data from outside: attributes are those the
Jinja sandbox allows, all loops and calls of one rendering share one budget, and no operation may
build a string longer than a limit. Whatever a template raises becomes one InvalidRequestError.
A compiled template is never changed, so several threads may render it at once.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from stateful_kv._extras import needs
from stateful_kv.errors import InvalidRequestError, ModelLoadError

with needs("engine", "the engine"):
    import jinja2
    from jinja2 import compiler, nodes, sandbox

MAX_TEXT = 1 << 24
MAX_SOURCE = 1 << 20
# Loop passes, calls and numbers of `range`, all loops of one rendering together.
MAX_WORK = 2_000_000
_MAX_INDENT = 16
_PADDING_METHODS = frozenset(
    {"center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map"}
)
_COUNTED = "counted passes"  # no name that a template could write
_PADDING_FILTERS = ("center", "format", "indent", "wordwrap", "random")


class ChatTemplate:
    """A compiled chat template.

    Attributes:
        mentions_tools: the template renders a list of tools itself.
        mentions_tool_calls: the template renders an assistant's tool calls itself.
    """

    def __init__(self, source: str, bos_token: str = "", eos_token: str = "") -> None:
        """Compiles the template.

        Args:
            source: Jinja text.
            bos_token: value of that variable.
            eos_token: value of that variable.

        Raises:
            ModelLoadError: the text is not a valid template.
        """
        if len(source) > MAX_SOURCE:
            raise ModelLoadError(f"chat template: longer than {MAX_SOURCE} characters")
        self.mentions_tools = re.search(r"\btools\b", source) is not None
        self.mentions_tool_calls = "tool_calls" in source
        self._variables = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._template = _Environment().from_string(source)
        except Exception as error:
            # Besides Jinja's own: what Python says to code that is nested too deep, for example.
            raise ModelLoadError(f"chat template: {error}") from error

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> str:
        """Renders messages and the opening of the assistant's reply.

        Args:
            messages: chat messages with "role" and "content".
            tools: descriptions, or None.

        Raises:
            InvalidRequestError: the template refused the messages or did too much work.
        """
        pieces, length = [], 0
        outer_budget = _budget.set(_Budget())
        try:
            for piece in self._template.generate(
                messages=messages, tools=tools, add_generation_prompt=True, **self._variables
            ):
                pieces.append(piece)
                length += len(piece)
                if length > MAX_TEXT:
                    raise _TooMuchWork("the text is too long")
        except Exception as error:
            # A template can make any operation of Python fail.
            raise InvalidRequestError(f"messages: the chat template refused: {error}") from error
        finally:
            _budget.reset(outer_budget)
        return "".join(pieces)


class _TooMuchWork(jinja2.TemplateError):
    """A template exceeded one of the limits of this module."""


class _Budget:
    """What one rendering may still do."""

    def __init__(self) -> None:
        self._left = MAX_WORK

    def spend(self, amount: int) -> None:
        self._left -= amount
        if self._left < 0:
            raise _TooMuchWork("it does too much work")


# Of the rendering that this thread is in: the environment's hooks get no argument to carry it.
_budget: ContextVar[_Budget] = ContextVar("budget of a chat template")


class _CodeGenerator(compiler.CodeGenerator):
    """Sends the operator `~`, which Jinja lets nobody intercept, through a length check."""

    def visit_Concat(self, node: nodes.Concat, frame: compiler.Frame) -> None:
        self.write("environment.join_bounded((")
        for operand in node.nodes:
            self.visit(operand, frame)
            self.write(", ")
        self.write("))")


class _Environment(sandbox.ImmutableSandboxedEnvironment):
    """The sandbox of chat templates, with the helpers templates expect."""

    code_generator_class = _CodeGenerator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols"],
        )
        for name in _PADDING_FILTERS:
            self.filters.pop(name, None)
        self.filters["tojson"] = _to_json
        self.filters["replace"] = _replace
        self.filters[_COUNTED] = _counted
        self.globals.update(
            range=_range, raise_exception=_raise_exception, strftime_now=_strftime_now
        )

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Sends what each loop runs over through a filter that counts the passes."""
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            line = loop.iter.lineno
            loop.iter = nodes.Filter(loop.iter, _COUNTED, [], [], None, None, lineno=line)
        return tree

    def join_bounded(self, values: Iterable[Any]) -> str:
        texts = [str(value) for value in values]
        if sum(map(len, texts)) > MAX_TEXT:
            raise _TooMuchWork("a string is too long")
        return "".join(texts)

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        if operator == "+":
            _bound(_size(left) + _size(right))
        elif operator == "*":
            _bound(_size(left) * _count(right))
            _bound(_size(right) * _count(left))
        elif operator == "%" and isinstance(left, str):
            raise _TooMuchWork("string formatting is not available")
        elif operator == "**":
            _bound(_count(left).bit_length() * _count(right))
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in _PADDING_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    # Names as in the base class: a template may pass an argument called self.
    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        _budget.get().spend(1)
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str) and getattr(__obj, "__name__", "") == "replace":
            return _replace(owner, *args, **kwargs)
        return super().call(__context, __obj, *args, **kwargs)


def _counted(values: Iterable[Any]) -> Iterator[Any]:
    """The values, each of them a pass of a loop."""
    budget = _budget.get()
    for value in values:
        budget.spend(1)
        yield value


def _range(*bounds: int) -> range:
    numbers = range(*bounds)
    # len() itself overflows beyond 2**63.
    _budget.get().spend(abs(numbers.stop - numbers.start) // abs(numbers.step))
    return numbers


def _size(value: Any) -> int:
    """Length of something that grows by + and *; 0 for numbers."""
    return len(value) if isinstance(value, (str, list, tuple)) else 0


def _count(value: Any) -> int:
    """How often `*` would repeat the other side."""
    return abs(value) if isinstance(value, int) else 0


def _bound(size: int) -> None:
    if size > MAX_TEXT:
        raise _TooMuchWork("a value is too large")


def _replace(text: Any, old: str, new: str, count: int = -1) -> str:
    """str.replace with its result bounded beforehand."""
    whole, old, new = str(text), str(old), str(new)
    _bound(len(whole) + whole.count(old) * len(new))
    return whole.replace(old, new, count)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """JSON as templates expect it: not escaped for HTML, not forced to ASCII."""
    if indent is not None and not 0 <= int(indent) <= _MAX_INDENT:
        raise _TooMuchWork(f"tojson: indent {indent} is over {_MAX_INDENT}")
    allowed = {k: v for k, v in options.items() if k in ("ensure_ascii", "separators", "sort_keys")}
    return json.dumps(value, indent=indent, **{"ensure_ascii": False, **allowed})


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(str(pattern)[:256])
