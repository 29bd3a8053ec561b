"""From messages to tokens and back: rendering of first prompts and of deltas, streaming text.

A session never renders its history again. `render_start` makes the tokens of the first prompt and
`render_delta` those that follow the reply the model just gave; the model's own tokens stand between
them as they were generated. Text of messages can never become a special token: strings that look
like one are replaced by placeholders before the template sees them, and tokenised as plain text.
"""

from __future__ import annotations

import codecs
import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from stateful_kv.errors import InvalidRequestError, ModelLoadError
from stateful_kv.text.template import ChatTemplate

TokenIds = NDArray[np.int32]
Message = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool")
# A system prompt may be empty to replace a default one, and a tool may have nothing to say.
_NEVER_EMPTY = ("user", "assistant")

# Private-use characters: borders of a placeholder, and the reply of the made-up conversation.
_OPEN, _CLOSE = "\ue000", "\ue001"
_SENTINEL = "\ue002reply\ue002"
_PLACEHOLDER = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")
_MAX_NESTING = 64
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


class ChatTokenizer:
    """Tokenizer and chat template of one model.

    Attributes:
        eos_token_ids: tokens that end a reply.
        special_ids: control tokens; plain text never becomes one of them.
        vocab_size: largest token id + 1.
        supports_tools: the template renders tool descriptions itself; otherwise they are put
            into the system prompt, one JSON object a line below "Available tools:".
    """

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate | None, eos_token_ids: Iterable[int]
    ) -> None:
        """Wraps a tokenizer.

        Args:
            tokenizer: with its special tokens marked special.
            template: None if the model has none; rendering is then an InvalidRequestError.
            eos_token_ids: tokens that end a reply.

        Raises:
            ModelLoadError: a decoder this class does not know.
        """
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self._template = template
        # Guards the tokenizer's one mutable switch, `encode_special_tokens`.
        self._lock = threading.Lock()
        specials = {i: t for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
        self.special_ids = frozenset(specials)
        self.eos_token_ids = frozenset(eos_token_ids)
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.supports_tools = template is not None and template.mentions_tools
        self._token_bytes = _ByteTable(tokenizer)
        contents = sorted((t.content for t in specials.values()), key=len, reverse=True)
        self._special_ids_by_content = {t.content: i for i, t in specials.items()}
        self._special_pattern = _alternatives(contents)
        self._mask_pattern = _alternatives([*contents, _OPEN, _CLOSE])

    def encode(self, text: str, allow_special: bool = False) -> TokenIds:
        """Tokenises text as it stands; no token is added around it.

        Args:
            text: any text.
            allow_special: turn special-token strings into those tokens; else they stay text.

        Raises:
            InvalidRequestError: not text, or text with a lone surrogate.
        """
        if not isinstance(text, str):
            raise InvalidRequestError(f"text: expected str, got {type(text).__name__}")
        ids = self._encode(text, allow_special) if allow_special else self._encode_plain(text)
        return np.array(ids, dtype=np.int32)

    def decode(self, token_ids: Iterable[int], skip_special: bool = True) -> str:
        """Returns the text of tokens; bytes that are no UTF-8 become U+FFFD.

        Args:
            token_ids: any ids; those without a token give no text.
            skip_special: leave special tokens out.
        """
        stream = StreamDecoder(self._token_bytes, self.special_ids if skip_special else frozenset())
        return "".join([*(stream.push(int(i)) for i in token_ids), stream.flush()])

    def stream_decoder(self) -> StreamDecoder:
        """Returns a decoder whose pieces, joined, are `decode` of all tokens pushed."""
        return StreamDecoder(self._token_bytes, self.special_ids)

    def render_start(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> TokenIds:
        """Returns the tokens of a whole first prompt, up to the opening of the reply.

        Args:
            messages: at least one {"role": ..., "content": ...}.
            tools: descriptions of callable tools, JSON-like.

        Raises:
            InvalidRequestError: malformed messages, no template, or the template refused them.
        """
        template, checked = self._prepare(messages)
        if tools:
            if not template.mentions_tools:
                checked, tools = _tools_in_system_prompt(checked, tools), None
        else:
            tools = None
        mask = _Mask(self._mask_pattern)
        text = template.render(mask.apply(checked), mask.apply(tools))
        return self._tokenise(text, mask)

    def render_delta(
        self, messages: Sequence[Message], last_token_id: int | None = None
    ) -> TokenIds:
        """Returns the tokens that follow a reply: its closing, new messages, the next opening.

        The new messages are rendered behind a made-up two-message conversation, and what
        follows its reply is kept. That starts with the model's end-of-turn token, which is
        left out if the model generated it itself.

        Args:
            messages: at least one new message.
            last_token_id: last token of the reply, None if it has none.

        Raises:
            InvalidRequestError: malformed messages, no template, or the template refused them.
        """
        template, checked = self._prepare(messages)
        mask = _Mask(self._mask_pattern)
        before = [{"role": "user", "content": "u"}, {"role": "assistant", "content": _SENTINEL}]
        text = template.render([*before, *mask.apply(checked)], None)
        _, found, delta = text.partition(_SENTINEL)
        if not found:
            raise InvalidRequestError("messages: the chat template does not keep earlier replies")
        opening = self._special_pattern.match(delta.lstrip())
        if opening is not None:
            delta = delta.lstrip()
            if self._special_ids_by_content.get(opening.group()) == last_token_id:
                delta = delta[opening.end() :]
        return self._tokenise(delta, mask)

    def _prepare(self, messages: Sequence[Message]) -> tuple[ChatTemplate, list[dict[str, Any]]]:
        if self._template is None:
            raise InvalidRequestError("messages: this model has no chat template")
        calls = self._template.mentions_tool_calls
        return self._template, _check_messages(messages, render_tool_calls=not calls)

    def _tokenise(self, text: str, mask: _Mask) -> TokenIds:
        """Tokenises rendered text; what the mask hid comes back as plain text."""
        if not mask.hidden:
            return np.array(self._encode(text, True), dtype=np.int32)
        ids: list[int] = []
        start = 0
        for match in self._special_pattern.finditer(text):
            ids += self._encode_plain(mask.restore(text[start : match.start()]))
            ids.append(self._special_ids_by_content[match.group()])
            start = match.end()
        ids += self._encode_plain(mask.restore(text[start:]))
        return np.array(ids, dtype=np.int32)

    def _encode_plain(self, text: str) -> list[int]:
        ids = self._encode(text, False)
        if self._special_pattern.search(text) is None or self.special_ids.isdisjoint(ids):
            return ids
        # Merges built the special token letter by letter: cut each such string in two.
        cuts = [match.start() + 1 for match in self._special_pattern.finditer(text)]
        pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        ids = [i for piece in pieces for i in self._encode(piece, False)]
        if not self.special_ids.isdisjoint(ids):
            raise InvalidRequestError("text: it cannot be tokenised without a special token")
        return ids

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        if not text:
            return []
        try:
            with self._lock:
                self._tokenizer.encode_special_tokens = not parse_special
                return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        except (UnicodeError, TypeError) as error:
            raise InvalidRequestError(f"text: cannot be tokenised: {error}") from error


class StreamDecoder:
    """Turns tokens into text one by one and never emits half a character."""

    def __init__(self, token_bytes: _ByteTable, skipped_ids: frozenset[int]) -> None:
        """Starts an empty text."""
        self._token_bytes = token_bytes
        self._skipped_ids = skipped_ids
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_next = token_bytes.strips_first_space

    def push(self, token_id: int) -> str:
        """Returns the text that became certain with this token, maybe none."""
        if token_id in self._skipped_ids:
            return ""
        piece = self._token_bytes(token_id)
        if self._strip_next and piece:
            self._strip_next = False
            piece = piece.removeprefix(b" ")
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """Ends the text; an unfinished character becomes U+FFFD."""
        return self._utf8.decode(b"", True)


class _ByteTable:
    """Bytes of each token, looked up once per token.

    Attributes:
        strips_first_space: the text of a reply loses one leading space (SentencePiece).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}
        self._added = set(tokenizer.get_added_tokens_decoder())
        state = tokenizer.decoder.__getstate__() if tokenizer.decoder is not None else b"{}"
        decoder = json.loads(state)
        steps = decoder.get("decoders", [decoder]) or [{}]
        kinds = {step.get("type") for step in steps}
        self._to_bytes: Callable[[str], bytes]
        self.strips_first_space = False
        if "ByteLevel" in kinds:
            self._to_bytes = _byte_level_bytes
        elif kinds & {"Metaspace", "ByteFallback"}:
            self._to_bytes = _sentence_piece_bytes
            self.strips_first_space = any(
                step.get("prepend_scheme", "never") != "never" or step.get("start", 0) > 0
                for step in steps
            )
        else:
            names = ", ".join(sorted(str(kind) for kind in kinds))
            raise ModelLoadError(f"tokenizer: decoder {names} is not supported")

    def __call__(self, token_id: int) -> bytes:
        piece = self._known.get(token_id)
        if piece is None:
            token = self._tokenizer.id_to_token(token_id) if token_id >= 0 else None
            if token is None:
                piece = b""
            elif token_id in self._added:
                piece = token.encode()
            else:
                piece = self._to_bytes(token)
            self._known[token_id] = piece
        return piece


class _Mask:
    """Replaces special-token strings in messages by placeholders, and puts them back.

    The placeholder characters are replaced too where they occur, so what stands in a rendered
    text is ours.
    """

    def __init__(self, pattern: re.Pattern[str]) -> None:
        self._pattern = pattern
        self.hidden: list[str] = []

    def apply(self, value: Any, nesting: int = 0) -> Any:
        """Returns a copy of JSON-like data with all its strings masked."""
        if isinstance(value, str):
            return self._pattern.sub(self._hide, value)
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if nesting == _MAX_NESTING:
            raise InvalidRequestError(f"messages: nested deeper than {_MAX_NESTING}")
        if isinstance(value, Mapping):
            items = value.items()
            return {self.apply(str(k)): self.apply(v, nesting + 1) for k, v in items}
        if isinstance(value, (list, tuple)):
            return [self.apply(item, nesting + 1) for item in value]
        raise InvalidRequestError(f"messages: expected JSON-like data, got {type(value).__name__}")

    def restore(self, text: str) -> str:
        """Returns the text with what was hidden."""
        return _PLACEHOLDER.sub(lambda match: self.hidden[int(match[1])], text)

    def _hide(self, match: re.Match[str]) -> str:
        self.hidden.append(match.group())
        return f"{_OPEN}{len(self.hidden) - 1}{_CLOSE}"


def _alternatives(strings: Sequence[str]) -> re.Pattern[str]:
    """Matches any of the strings, the longest first; nothing if there is none."""
    return re.compile("|".join(map(re.escape, strings)) or r"(?!)")


def _check_messages(messages: Sequence[Message], render_tool_calls: bool) -> list[dict[str, Any]]:
    """Returns copies with string contents; InvalidRequestError names what is malformed."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise InvalidRequestError("messages: expected a non-empty list of messages")
    checked = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise InvalidRequestError(f"{where}: expected a dict, got {type(message).__name__}")
        role = message.get("role")
        if role not in ROLES:
            raise InvalidRequestError(
                f"{where}: role: expected one of {', '.join(ROLES)}, got {role!r}"
            )
        copy = dict(message)
        copy["content"] = _content_text(message.get("content"), where)
        if message.get("tool_calls") and render_tool_calls:
            lines = [copy["content"]] if copy["content"] else []
            copy["content"] = "\n".join([*lines, *_json_lines(message["tool_calls"])])
        elif "content" not in message and not message.get("tool_calls"):
            raise InvalidRequestError(f"{where}: content: missing")
        elif not copy["content"] and not message.get("tool_calls") and role in _NEVER_EMPTY:
            raise InvalidRequestError(
                f"{where}: content: expected text that is not empty for role {role!r}, "
                f"got {message['content']!r}"
            )
        checked.append(copy)
    return checked


def _content_text(content: Any, where: str) -> str:
    """A string, None, or a list of text parts -> a string."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, (list, tuple)):
        texts = [part.get("text") for part in content if isinstance(part, Mapping)]
        if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
            return "".join(str(text) for text in texts)
    raise InvalidRequestError(f"{where}: content: expected a string or a list of text parts")


def _tools_in_system_prompt(
    messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Appends tool descriptions to the system message, which is made if there is none."""
    listing = "\n".join(["Available tools:", *_json_lines(tools)])
    if messages[0]["role"] == "system":
        joined = "\n\n".join(text for text in (messages[0]["content"], listing) if text)
        return [{**messages[0], "content": joined}, *messages[1:]]
    return [{"role": "system", "content": listing}, *messages]


def _json_lines(items: Any) -> list[str]:
    try:
        return [json.dumps(item, ensure_ascii=False) for item in items]
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"tools: expected JSON-like data: {error}") from error


def _byte_level_characters() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies, inverted."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_level_characters()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        return token.encode()


def _sentence_piece_bytes(token: str) -> bytes:
    match = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else token.replace("\u2581", " ").encode()
