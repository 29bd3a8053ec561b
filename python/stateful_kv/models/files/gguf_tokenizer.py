"""The tokenizer and chat template that a GGUF file carries in its metadata."""

from __future__ import annotations

from typing import Any

import numpy as np

from stateful_kv._extras import needs
from stateful_kv.errors import ModelLoadError, shown
from stateful_kv.models.files.fields import Fields
from stateful_kv.models.files.gguf_file import GGUFFile
from stateful_kv.text.template import ChatTemplate
from stateful_kv.text.tokenizer import ChatTokenizer

with needs("engine", "the engine"):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_SPACE = "\u2581"
# Some four times what published models have.
_MAX_TOKENS = 1 << 20
_MAX_PIECE, _MAX_PIECES = 512, 1 << 23
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
_LLAMA3, _QWEN2, _SMOLLM, _GPT2 = "llama3", "qwen2", "smollm", "gpt2"
_PRE_TOKENIZERS = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "smollm": _SMOLLM,
    "gpt-2": _GPT2,
    "default": _GPT2,
}
# Control tokens that end a reply in any model whose vocabulary has them.
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>")


def read_tokenizer(file: GGUFFile) -> ChatTokenizer:
    """Builds the tokenizer.

    Raises:
        ModelLoadError: missing or contradictory metadata, or a kind that is not supported.
    """
    try:
        return _Reader(file).build()
    except ModelLoadError:
        raise
    except Exception as error:
        # `tokenizers` raises plain Exception for a vocabulary it refuses.
        raise ModelLoadError(f"{file.path}: tokenizer: {error}") from error


class _Reader:
    """The steps of `read_tokenizer` around the metadata they share."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        self._fields = Fields(file.metadata, str(file.path), "tokenizer.ggml.")
        self._tokens = self._strings("tokens")
        if not self._tokens:
            raise self._failure("tokenizer.ggml.tokens: missing")
        if len(self._tokens) > _MAX_TOKENS:
            raise self._failure(f"tokenizer.ggml.tokens: more than {_MAX_TOKENS}")
        self._types = self._numbers("token_type", "iu") or [_NORMAL] * len(self._tokens)
        if len(self._types) != len(self._tokens):
            raise self._failure("tokenizer.ggml.token_type: not one per token")

    def build(self) -> ChatTokenizer:
        kind = self._fields.text("model")
        if kind == "gpt2":
            tokenizer = self._byte_level()
        elif kind == "llama":
            tokenizer = self._sentence_piece()
        else:
            raise self._failure(f"tokenizer.ggml.model: {shown(kind)} is not supported")
        added = [
            AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
            for token, kind in zip(self._tokens, self._types, strict=True)
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) and token
        ]
        tokenizer.add_special_tokens([token for token in added if token.special])
        tokenizer.add_tokens([token for token in added if not token.special])
        source = Fields(self._file.metadata, str(self._file.path)).text("tokenizer.chat_template")
        template = None
        if source is not None:
            bos, eos = self._token("bos_token_id"), self._token("eos_token_id")
            template = ChatTemplate(source, bos, eos)
        return ChatTokenizer(tokenizer, template, self._end_ids())

    def _byte_level(self) -> Tokenizer:
        pre = self._fields.text("pre") or "default"
        rule = _PRE_TOKENIZERS.get(pre)
        if rule is None:
            known = ", ".join(_PRE_TOKENIZERS)
            raise self._failure(f"tokenizer.ggml.pre: {shown(pre)} is not supported ({known} are)")
        tokenizer = Tokenizer(
            BPE(self._vocab(), self._merges(), fuse_unk=False, ignore_merges=rule == _LLAMA3)
        )
        spaced = self._fields.flag("add_space_prefix")
        steps: list[Any] = []
        if rule == _SMOLLM:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        if rule in (_LLAMA3, _QWEN2):
            words = _LLAMA3_WORDS if rule == _LLAMA3 else _QWEN2_WORDS
            steps.append(pre_tokenizers.Split(Regex(words), "isolated", invert=False))
        own_words = rule in (_SMOLLM, _GPT2)
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=spaced, use_regex=own_words))
        if rule == _QWEN2:
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def _sentence_piece(self) -> Tokenizer:
        scores = self._numbers("scores", "f")
        if len(scores) != len(self._tokens):
            raise self._failure("tokenizer.ggml.scores: not one per token")
        # Below, every place where a token can be cut is tried.
        if max(map(len, self._tokens)) > _MAX_PIECE or sum(map(len, self._tokens)) > _MAX_PIECES:
            raise self._failure(
                f"tokenizer.ggml.tokens: expected at most {_MAX_PIECE} characters in a token and "
                f"{_MAX_PIECES} in all"
            )
        unknown = [t for t, kind in zip(self._tokens, self._types, strict=True) if kind == _UNKNOWN]
        tokenizer = Tokenizer(
            BPE(
                self._vocab(),
                self._merges_of_scores(scores),
                unk_token=unknown[0] if unknown else None,
                fuse_unk=True,
                byte_fallback=True,
            )
        )
        replace = normalizers.Replace(" ", _SPACE)
        restore: list[Any] = [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
        ]
        is_missing = self._fields.get("add_space_prefix") is None
        if not (is_missing or self._fields.flag("add_space_prefix")):
            tokenizer.normalizer = replace
        else:
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace])
            restore.append(decoders.Strip(" ", 1, 0))
        tokenizer.decoder = decoders.Sequence(restore)
        return tokenizer

    def _vocab(self) -> dict[str, int]:
        """Token -> id; of equal tokens the first counts."""
        return {token: i for i, token in reversed(list(enumerate(self._tokens)))}

    def _merges(self) -> list[tuple[str, str]]:
        merges = [tuple(line.split(" ")) for line in self._strings("merges")]
        if any(len(pair) != 2 for pair in merges):
            raise self._failure("tokenizer.ggml.merges: expected two tokens each")
        return [(left, right) for left, right in merges]

    def _merges_of_scores(self, scores: list[float]) -> list[tuple[str, str]]:
        """Every way to join two pieces into a third, in the order SentencePiece would do it.

        Control tokens are left out, so that no text merges into one.
        """
        pieces = {
            token: (score, index)
            for index, (token, score, kind) in enumerate(
                zip(self._tokens, scores, self._types, strict=True)
            )
            if kind in (_NORMAL, _USER_DEFINED)
        }
        ranked = []
        for token, (score, _) in pieces.items():
            splits = ((token[:i], token[i:]) for i in range(1, len(token)))
            pairs = [(a, b) for a, b in splits if a in pieces and b in pieces]
            pairs.sort(key=lambda pair: (pieces[pair[0]][1], pieces[pair[1]][1]))
            ranked += [(score, len(a), len(b), a, b) for a, b in pairs]
        ranked.sort(key=lambda merge: merge[:3], reverse=True)
        return [(a, b) for *_, a, b in ranked]

    def _end_ids(self) -> set[int]:
        ids = {self._id(key) for key in ("eos_token_id", "eot_token_id", "eom_token_id")}
        control = {
            token: index
            for index, (token, kind) in enumerate(zip(self._tokens, self._types, strict=True))
            if kind == _CONTROL
        }
        ids |= {control.get(token) for token in _END_OF_TURN}
        return {i for i in ids if i is not None}

    def _id(self, key: str) -> int | None:
        if self._fields.get(key) is None:
            return None
        value = self._fields.integer(key)
        if not 0 <= value < len(self._tokens):
            raise self._failure(f"tokenizer.ggml.{key}: {value} is no token")
        return value

    def _token(self, key: str) -> str:
        index = self._id(key)
        return "" if index is None else self._tokens[index]

    def _strings(self, key: str) -> list[str]:
        values = self._fields.get(key)
        if values is None:
            return []
        if not isinstance(values, list) or any(type(value) is not str for value in values):
            raise self._fields.unsupported(key, "a list of text")
        return values

    def _numbers(self, key: str, kinds: str) -> list[Any]:
        """Values of an array whose dtype is of one of these kinds (letters of numpy)."""
        values = self._fields.get(key)
        if values is None:
            return []
        if not isinstance(values, np.ndarray) or values.dtype.kind not in kinds:
            raise self._fields.unsupported(key, "an array of numbers")
        numbers: list[Any] = values.tolist()
        return numbers

    def _failure(self, reason: str) -> ModelLoadError:
        return ModelLoadError(f"{self._file.path}: {reason}")
