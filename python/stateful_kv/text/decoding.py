"""From tokens back to text, one token at a time and never half a character."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from stateful_kv.errors import ModelLoadError

if TYPE_CHECKING:  # slow to import, and a session does not need it
    from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


class StreamDecoder(Protocol):
    """Turns the tokens of one reply into text; never gives half a character."""

    def push(self, token_id: int) -> str:
        """Takes one token; returns the text that became complete with it."""
        ...

    def flush(self) -> str:
        """Returns what is left (bytes that never became a character, if any)."""
        ...


class Utf8StreamDecoder:
    """The `StreamDecoder` of a tokenizer whose tokens are bytes of UTF-8."""

    def __init__(self, token_bytes: TokenBytes, skipped_ids: frozenset[int]) -> None:
        """Starts an empty text.

        Args:
            token_bytes: the bytes of each token.
            skipped_ids: tokens that add no text.
        """
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


class TokenBytes:
    """Bytes of each token, looked up once per token.

    Attributes:
        strips_first_space: the text of a reply loses one leading space (SentencePiece).
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Reads how the tokenizer writes bytes.

        Args:
            tokenizer: where tokens are looked up.
            vocab_size: ids from 0 to this have a token; others have no bytes.

        Raises:
            ModelLoadError: a decoder this class does not know.
        """
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
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
        """Returns the bytes of a token, none for an id without a token."""
        if not 0 <= token_id < self._vocab_size:
            return b""
        piece = self._known.get(token_id)
        if piece is None:
            token = self._tokenizer.id_to_token(token_id)
            if token is None:
                piece = b""
            elif token_id in self._added:
                piece = token.encode()
            else:
                piece = self._to_bytes(token)
            self._known[token_id] = piece
        return piece


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
