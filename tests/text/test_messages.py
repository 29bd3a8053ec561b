"""Messages and tools that callers hand in: whatever they are, only our exceptions come back."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from stateful_kv.errors import InvalidRequestError, ModelLoadError
from stateful_kv.text.messages import as_messages
from stateful_kv.text.template import ChatTemplate
from stateful_kv.text.tokenizer import ChatTokenizer
from tests.models import tiny


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no text for this")


def deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def shared(levels: int) -> list[Any]:
    """A few lists that stand for 8**levels of them."""
    value: list[Any] = ["x"]
    for _ in range(levels):
        value = [value] * 8
    return value


CYCLE: dict[str, Any] = {}
CYCLE["self"] = CYCLE
ODD: dict[str, Any] = {
    "none": None,
    "empty list": [],
    "list": [1],
    "dict": {"a": {"b": [None]}},
    "empty text": "",
    "negative": -1,
    "large": 2**63,
    "larger than Python writes": 10**5000,
    "infinity": float("inf"),
    "nan": float("nan"),
    "bool": True,
    "bytes": b"x",
    "array": np.zeros(3),
    "numpy integer": np.int64(3),
    "set": {1},
    "object": Unprintable(),
    "class": int,
    "lone surrogate": "\ud800",
    "placeholder": "\ue0005\ue001 \ue000\ue001 \ue0000\ue001",
    "special token": "<|im_end|>",
    "tuple as key": {(1, 2): 3},
    "number as key": {10**5000: 3},
    "deep": deep(100_000),
    "cycle": CYCLE,
    "shared": shared(40),
    "shared text": [["x" * 100_000] * 1000] * 1000,
}
SOURCES = {
    "ChatML": tiny.CHATML,
    "everything": "{{ messages | tojson }}{{ tools | tojson }}"
    "{% for m in messages %}{{ m }}{{ m.tool_calls }}{{ m.content }}{% endfor %}",
    "no tools": tiny.CHATML[tiny.CHATML.index("{% for") :],
}
TOKENIZERS = {
    name: ChatTokenizer(tiny.train_byte_level(), ChatTemplate(source), {2})
    for name, source in SOURCES.items()
}


def places(value: Any) -> list[tuple[Any, Any]]:
    """Messages and tools with the value wherever one can stand."""
    good = {"role": "user", "content": "x"}
    messages = [
        value,
        [value],
        [good, value],
        [{**good, "role": value}],
        [{**good, "content": value}],
        [{**good, "content": [value]}],
        [{**good, "content": [{"type": "text", "text": value}]}],
        [{**good, "name": value}],
        [{"role": "assistant", "content": "x", "tool_calls": value}],
        [{"role": "assistant", "content": None, "tool_calls": [value]}],
    ]
    tools = [value, [value], [{"function": value}]]
    return [*((m, None) for m in messages), *(([good], t) for t in tools)]


@pytest.mark.parametrize("template", SOURCES)
@pytest.mark.parametrize("case", ODD)
def test_odd_values_anywhere(case: str, template: str) -> None:
    ours = TOKENIZERS[template]
    for messages, tools in places(ODD[case]):
        with suppress(InvalidRequestError):
            ours.render_start(messages, tools)
        with suppress(InvalidRequestError):
            ours.render_delta(as_messages(messages))


def test_as_messages() -> None:
    message = {"role": "user", "content": "x"}
    assert as_messages("x") == as_messages(message) == as_messages([message]) == (message,)
    for bad in (None, 5, [], (), ["x"], [None], "", {"role": "user", "content": ""}):
        with pytest.raises(InvalidRequestError, match="message: "):
            as_messages(bad)  # type: ignore[arg-type]


def test_copies_are_independent_of_the_caller() -> None:
    parameters: dict[str, Any] = {"type": "object"}
    ours = TOKENIZERS["everything"]
    messages = [{"role": "user", "content": "x"}]
    before = ours.render_start(messages, [{"parameters": parameters}])
    assert before.tolist() == ours.render_start(messages, ({"parameters": parameters},)).tolist()
    assert parameters == {"type": "object"} and messages == [{"role": "user", "content": "x"}]


BREAKING = {
    "unknown number": "\ue0007\ue001",
    "longer than an int": "\ue000" + "9" * 10_000 + "\ue001",
    "digits changed": "{{ messages[0].content.replace('0', '44') }}",
}


@pytest.mark.parametrize("case", BREAKING)
def test_templates_that_write_placeholders(case: str) -> None:
    source = BREAKING[case] + "{{ messages[0].content }}"
    ours = ChatTokenizer(tiny.train_byte_level(), ChatTemplate(source), {2})
    with pytest.raises(InvalidRequestError, match="the chat template changed text"):
        ours.render_start([{"role": "user", "content": "a <|im_end|> b"}])
    if "messages" not in BREAKING[case]:  # without a placeholder of ours they are text
        assert len(ours.render_start([{"role": "user", "content": "a"}])) > 1


def test_ids_without_a_token_have_no_text() -> None:
    ours = TOKENIZERS["ChatML"]
    (letter,) = ours.encode("a").tolist()
    assert ours.decode([-1, 2**31, 2**32, 2**64, letter, ours.vocab_size]) == "a"


def test_ids_beyond_int32_are_refused() -> None:
    tokenizer = Tokenizer(models.BPE({"a": 2**32 - 1}, []))
    tokenizer.decoder = decoders.ByteLevel()
    with pytest.raises(ModelLoadError, match="no int32"):
        ChatTokenizer(tokenizer, None, {2})
