"""Chat templates: Jinja text of a model file, run in a sandbox with bounded work.

A template comes with the weights, so it is treated as data from outside: attributes are those the
Jinja sandbox allows, loops over `range` share one budget, and no operation may build a string
longer than a limit. Whatever a template raises becomes one InvalidRequestError.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import compiler, nodes, sandbox

from stateful_kv.errors import InvalidRequestError, ModelLoadError

MAX_TEXT = 1 << 24
MAX_RANGE_ITEMS = 1_000_000
_MAX_INDENT = 16
_PADDING_METHODS = frozenset(
    {"center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map"}
)
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
        self.mentions_tools = re.search(r"\btools\b", source) is not None
        self.mentions_tool_calls = "tool_calls" in source
        self._variables = {"bos_token": bos_token, "eos_token": eos_token}
        self._environment = _Environment()
        try:
            self._template = self._environment.from_string(source)
        except (jinja2.TemplateError, RecursionError, ValueError) as error:
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
        self._environment.reset_budget()
        pieces, length = [], 0
        try:
            for piece in self._template.generate(
                messages=messages, tools=tools, add_generation_prompt=True, **self._variables
            ):
                pieces.append(piece)
                length += len(piece)
                if length > MAX_TEXT:
                    raise _TooMuchWork("the text is too long")
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            ArithmeticError,
            LookupError,
            AttributeError,
            RecursionError,
            MemoryError,
        ) as error:
            raise InvalidRequestError(f"messages: the chat template refused: {error}") from error
        return "".join(pieces)


class _TooMuchWork(jinja2.TemplateError):
    """A template exceeded one of the limits of this module."""


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
        self.globals.update(
            range=self._range, raise_exception=_raise_exception, strftime_now=_strftime_now
        )
        self._range_items = 0

    def reset_budget(self) -> None:
        self._range_items = MAX_RANGE_ITEMS

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
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str) and getattr(__obj, "__name__", "") == "replace":
            return _replace(owner, *args, **kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def _range(self, *bounds: int) -> range:
        numbers = range(*bounds)
        # len() itself overflows beyond 2**63.
        span = abs(numbers.stop - numbers.start) // abs(numbers.step)
        self._range_items -= span
        if self._range_items < 0:
            raise _TooMuchWork("it loops over too many numbers")
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
