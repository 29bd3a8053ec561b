"""Messages and tools as callers hand them in, checked; and what a session asks of a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from stateful_kv.errors import InvalidRequestError, shown
from stateful_kv.text.decoding import StreamDecoder
from stateful_kv.types import Message, Messages, TokenArray

ROLES = ("system", "user", "assistant", "tool")
# A system prompt may be empty to replace a default one, and a tool may have nothing to say.
_NEVER_EMPTY = ("user", "assistant")

# Limits of one message, or of all tools of a session. Python values can hold the same list many
# times, so that a few of them stand for more text than any memory holds.
_MAX_NESTING = 64
_MAX_VALUES = 1 << 17
_MAX_CHARACTERS = 1 << 24


class Tokenizer(Protocol):
    """What a session needs of a tokenizer; see `tokenizer.ChatTokenizer`."""

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a reply."""
        ...

    def render_start(
        self, messages: Sequence[Message], tools: Sequence[Message] | None = None
    ) -> TokenArray:
        """Tokens of a whole first prompt."""
        ...

    def render_delta(
        self, messages: Sequence[Message], last_token_id: int | None = None
    ) -> TokenArray:
        """Tokens of new messages behind a reply that ended with `last_token_id`."""
        ...

    def stream_decoder(self) -> StreamDecoder:
        """A decoder for one reply."""
        ...


def as_messages(message: Messages) -> tuple[Message, ...]:
    """Returns what a caller handed to a turn as a tuple of messages.

    Args:
        message: text of a user message, or a message, or several messages.

    Raises:
        InvalidRequestError: something else, or a user message that is empty.
    """
    items: Sequence[Message]
    if isinstance(message, str):
        items = ({"role": "user", "content": message},)
    elif isinstance(message, Mapping):
        items = (message,)
    elif isinstance(message, (list, tuple)) and message:
        items = message
    else:
        raise InvalidRequestError(
            "message: expected text, a message or a non-empty list of messages, "
            f"got {shown(message)}"
        )
    for item in items:
        if not isinstance(item, Mapping):
            raise InvalidRequestError(f"message: expected a dict, got {type(item).__name__}")
        role, content = item.get("role"), item.get("content")
        # Compared only as text: `==` of arrays has no truth value.
        if isinstance(role, str) and isinstance(content, str) and (role, content) == ("user", ""):
            raise InvalidRequestError("message: the content of a user message is empty")
    return tuple(items)


def check_messages(messages: Sequence[Message], *, render_tool_calls: bool) -> list[dict[str, Any]]:
    """Returns copies with text as content.

    Args:
        messages: at least one {"role": ..., "content": ...}.
        render_tool_calls: put tool calls into the content, one JSON object a line.

    Raises:
        InvalidRequestError: a malformed message; the text says which and why.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise InvalidRequestError("messages: expected a non-empty list of messages")
    return [
        _check_message(message, f"messages[{index}]", render_tool_calls)
        for index, message in enumerate(messages)
    ]


def check_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Returns copies of the descriptions, none for None.

    Raises:
        InvalidRequestError: no list of JSON-like dicts.
    """
    if tools is None:
        return []
    if not isinstance(tools, (list, tuple)):
        raise InvalidRequestError(f"tools: expected a list of dicts, got {type(tools).__name__}")
    copier = _JsonCopier()
    copies = []
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise InvalidRequestError(f"tools[{index}]: expected a dict, got {type(tool).__name__}")
        copies.append(copier.copy(tool, f"tools[{index}]"))
    return copies


def put_tools_in_system_prompt(
    messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Appends tool descriptions to the system message, which is made if there is none."""
    listing = "\n".join(["Available tools:", *_json_lines(tools, "tools")])
    if messages[0]["role"] == "system":
        joined = "\n\n".join(text for text in (messages[0]["content"], listing) if text)
        return [{**messages[0], "content": joined}, *messages[1:]]
    return [{"role": "system", "content": listing}, *messages]


def _check_message(message: Message, where: str, render_tool_calls: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequestError(f"{where}: expected a dict, got {type(message).__name__}")
    copy: dict[str, Any] = _JsonCopier().copy(message, where)
    role, content, calls = copy.get("role"), copy.get("content"), copy.get("tool_calls")
    if role not in ROLES:
        raise InvalidRequestError(
            f"{where}: role: expected one of {', '.join(ROLES)}, got {shown(role)}"
        )
    if calls and not isinstance(calls, list):
        raise InvalidRequestError(
            f"{where}: tool_calls: expected a list, got {type(calls).__name__}"
        )
    has_content = "content" in copy
    copy["content"] = _content_text(content, where)
    if calls and render_tool_calls:
        lines = [copy["content"]] if copy["content"] else []
        copy["content"] = "\n".join([*lines, *_json_lines(calls, f"{where}: tool_calls")])
    elif not has_content and not calls:
        raise InvalidRequestError(f"{where}: content: missing")
    elif not copy["content"] and not calls and role in _NEVER_EMPTY:
        raise InvalidRequestError(
            f"{where}: content: expected text that is not empty for role {role!r}, "
            f"got {shown(content)}"
        )
    return copy


def _content_text(content: Any, where: str) -> str:
    """A string, None, or a list of text parts -> a string."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
            return "".join(str(text) for text in texts)
    raise InvalidRequestError(f"{where}: content: expected a string or a list of text parts")


def _json_lines(items: Sequence[Any], where: str) -> list[str]:
    try:
        return [json.dumps(item, ensure_ascii=False) for item in items]
    except ValueError as error:  # an integer with more digits than Python writes
        raise InvalidRequestError(f"{where}: expected JSON-like data: {error}") from error


class _JsonCopier:
    """Copies data that is made of dicts, lists, text, numbers, booleans and None."""

    def __init__(self) -> None:
        self._values_left = _MAX_VALUES
        self._characters_left = _MAX_CHARACTERS

    def copy(self, value: Any, where: str, nesting: int = 0) -> Any:
        """Returns a copy with the types that JSON gives; InvalidRequestError for other types."""
        self._values_left -= 1
        if self._values_left < 0:
            raise InvalidRequestError(f"{where}: expected at most {_MAX_VALUES} values")
        if isinstance(value, str):
            self._characters_left -= len(value)
            if self._characters_left < 0:
                raise InvalidRequestError(f"{where}: expected at most {_MAX_CHARACTERS} characters")
            return value
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if nesting == _MAX_NESTING:
            raise InvalidRequestError(f"{where}: nested deeper than {_MAX_NESTING}")
        if isinstance(value, Mapping):
            return {
                self._key(key, where): self.copy(item, where, nesting + 1)
                for key, item in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self.copy(item, where, nesting + 1) for item in value]
        raise InvalidRequestError(f"{where}: expected JSON-like data, got {type(value).__name__}")

    def _key(self, key: Any, where: str) -> Any:
        """Keys that are numbers, booleans or None become text, as in JSON."""
        if isinstance(key, str):
            return self.copy(key, where)
        if key is not None and not isinstance(key, (bool, int, float)):
            raise InvalidRequestError(f"{where}: expected text as keys, got {type(key).__name__}")
        return _json_lines([key], where)[0]
