"""From messages to tokens and back: rendering of first prompts and of deltas, streaming text.

A session never renders its history again. `render_start` makes the tokens of the first prompt and
`render_delta` those that follow the reply the model just gave; the model's own tokens stand between
them as they were generated. Text of messages can never become a special token: strings that look
like one are replaced by placeholders before the template sees them, and tokenised as plain text.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from stateful_kv._extras import needs
from stateful_kv.errors import InvalidRequestError, ModelLoadError
from stateful_kv.text.decoding import TokenBytes, Utf8StreamDecoder
from stateful_kv.text.messages import check_messages, check_tools, put_tools_in_system_prompt
from stateful_kv.text.template import ChatTemplate
from stateful_kv.types import Message, TokenArray

with needs("engine", "the engine"):
    from tokenizers import Tokenizer

# Private-use characters: borders of a placeholder, and the reply of the made-up conversation.
_OPEN, _CLOSE = "\ue000", "\ue001"
_SENTINEL = "\ue002reply\ue002"
_PLACEHOLDER = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")
# Ids are int32, and every special token makes the search for them in a text longer.
_MAX_VOCAB = 1 << 31
_MAX_SPECIALS = 1 << 15


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
            ModelLoadError: a decoder this class does not know, or too many tokens.
        """
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self._template = template
        # Guards the tokenizer's one mutable switch, `encode_special_tokens`.
        self._lock = threading.Lock()
        added = tokenizer.get_added_tokens_decoder().items()
        specials = {i: token for i, token in added if token.special and token.content}
        if len(specials) > _MAX_SPECIALS:
            raise ModelLoadError(f"tokenizer: more than {_MAX_SPECIALS} special tokens")
        self.special_ids = frozenset(specials)
        self.eos_token_ids = frozenset(eos_token_ids)
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if self.vocab_size > _MAX_VOCAB:
            raise ModelLoadError(f"tokenizer: token ids up to {self.vocab_size - 1} are no int32")
        self.supports_tools = template is not None and template.mentions_tools
        self._token_bytes = TokenBytes(tokenizer, self.vocab_size)
        contents = sorted((t.content for t in specials.values()), key=len, reverse=True)
        self._special_ids_by_content = {t.content: i for i, t in specials.items()}
        self._special_pattern = _alternatives(contents)
        self._mask_pattern = _alternatives([*contents, _OPEN, _CLOSE])

    def encode(self, text: str, allow_special: bool = False) -> TokenArray:
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
        skipped = self.special_ids if skip_special else frozenset()
        stream = Utf8StreamDecoder(self._token_bytes, skipped)
        return "".join([*(stream.push(int(i)) for i in token_ids), stream.flush()])

    def stream_decoder(self) -> Utf8StreamDecoder:
        """Returns a decoder whose pieces, joined, are `decode` of all tokens pushed."""
        return Utf8StreamDecoder(self._token_bytes, self.special_ids)

    def render_start(
        self, messages: Sequence[Message], tools: Sequence[Message] | None = None
    ) -> TokenArray:
        """Returns the tokens of a whole first prompt, up to the opening of the reply.

        Args:
            messages: at least one {"role": ..., "content": ...}.
            tools: descriptions of callable tools, JSON-like.

        Raises:
            InvalidRequestError: malformed messages, no template, or the template refused them.
        """
        template, checked = self._prepare(messages)
        listed = check_tools(tools)
        if listed and not template.mentions_tools:
            checked, listed = put_tools_in_system_prompt(checked, listed), []
        mask = _Mask(self._mask_pattern)
        text = template.render(mask.apply(checked), mask.apply(listed) or None)
        return self._tokenise(text, mask)

    def render_delta(
        self, messages: Sequence[Message], last_token_id: int | None = None
    ) -> TokenArray:
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
        return self._template, check_messages(messages, render_tool_calls=not calls)

    def _tokenise(self, text: str, mask: _Mask) -> TokenArray:
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
        except Exception as error:
            # Lone surrogates; and `tokenizers` raises plain Exception for text it cannot do.
            raise InvalidRequestError(f"text: cannot be tokenised: {error}") from error


class _Mask:
    """Replaces special-token strings in messages by placeholders, and puts them back.

    The placeholder characters are replaced too where they occur, so what stands in a rendered
    text is ours.
    """

    def __init__(self, pattern: re.Pattern[str]) -> None:
        self._pattern = pattern
        self.hidden: list[str] = []

    def apply(self, value: Any) -> Any:
        """Returns a copy of checked JSON-like data with all its strings masked."""
        if isinstance(value, str):
            return self._pattern.sub(self._hide, value)
        if isinstance(value, dict):
            return {self.apply(key): self.apply(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.apply(item) for item in value]
        return value

    def restore(self, text: str) -> str:
        """Returns the text with what was hidden; InvalidRequestError for a foreign placeholder."""
        return _PLACEHOLDER.sub(self._show, text)

    def _show(self, match: re.Match[str]) -> str:
        # A template can write such characters itself, or change the digits between ours.
        digits, largest = match[1], str(len(self.hidden) - 1)
        if len(digits) > len(largest) or int(digits) >= len(self.hidden):
            raise InvalidRequestError("messages: the chat template changed text it should keep")
        return self.hidden[int(digits)]

    def _hide(self, match: re.Match[str]) -> str:
        self.hidden.append(match.group())
        return f"{_OPEN}{len(self.hidden) - 1}{_CLOSE}"


def _alternatives(strings: Sequence[str]) -> re.Pattern[str]:
    """Matches any of the strings, the longest first; nothing if there is none."""
    return re.compile("|".join(map(re.escape, strings)) or r"(?!)")
