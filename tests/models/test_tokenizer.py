"""Tokens and text against `transformers`; messages to tokens; no text becomes a special token."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from stateful_kv.errors import InvalidRequestError, ModelLoadError
from stateful_kv.models.files import gguf_tokenizer, hf_folder, loading
from stateful_kv.models.files.gguf_file import GGUFFile
from stateful_kv.text.template import ChatTemplate
from stateful_kv.text.tokenizer import ChatTokenizer
from tests.models import tiny

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "You list files."},
    {"role": "user", "content": "Which files are there?\n"},
    {"role": "assistant", "content": "Calling list_files."},
    {"role": "tool", "content": '{"files": ["a.txt", "日本.txt"]}'},
    {"role": "assistant", "content": "There are two files 🙂."},
    {"role": "user", "content": "  Read the first.  "},
]


def words(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def byte_level(pre: str) -> Tokenizer:
    """The tokenizer.json that models of this kind are published with."""
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return tiny.train_byte_level(pre_tokenizers.Sequence([digits, plain]))
    if pre == "llama-bpe":
        return tiny.train_byte_level(words(LLAMA3), ignore_merges=True)
    if pre == "qwen2":
        tokenizer = tiny.train_byte_level(words(LLAMA3.replace("{1,3}", "")))
        tokenizer.normalizer = normalizers.NFC()
        return tokenizer
    return tiny.train_byte_level(plain)


def read_gguf(path: Path, fill: Any) -> ChatTokenizer:
    writer = gguf.GGUFWriter(path, "llama")
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return gguf_tokenizer.read_tokenizer(GGUFFile(path))


@pytest.fixture(params=["gpt-2", "default", "smollm", "llama-bpe", "qwen2"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ChatTokenizer, Any]:
    """Our tokenizer out of GGUF metadata, and transformers' from the same data."""
    tokenizer = byte_level(request.param)
    tiny.save_tokenizer(tmp_path, tokenizer)
    path = tmp_path / "t.gguf"
    ours = read_gguf(path, lambda w: tiny.add_tokenizer_to_gguf(w, tokenizer, request.param))
    return ours, AutoTokenizer.from_pretrained(tmp_path)


def test_gguf_tokens_equal_transformers(pair: tuple[ChatTokenizer, Any]) -> None:
    ours, theirs = pair
    for text in tiny.TEXTS + tiny.CORPUS:
        ids = ours.encode(text)
        assert ids.dtype == np.int32
        assert ids.tolist() == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids)


def test_start_and_deltas_equal_the_whole(pair: tuple[ChatTokenizer, Any]) -> None:
    ours, theirs = pair
    check_deltas(ours, theirs)


def check_deltas(ours: ChatTokenizer, theirs: Any) -> None:
    """A conversation grown turn by turn has the tokens of one render of all of it."""
    (end_of_turn,) = ours.encode("<|im_end|>", allow_special=True)
    tokens: list[int] = []
    pending: list[dict[str, Any]] = []
    last: int | None = None
    for index, message in enumerate(CONVERSATION):
        if message["role"] == "assistant":
            tokens += [*ours.encode(message["content"]).tolist(), int(end_of_turn)]
            last, pending = int(end_of_turn), []
            continue
        pending.append(message)
        if message["role"] == "system":
            continue
        new = ours.render_delta(pending, last) if tokens else ours.render_start(pending)
        tokens += new.tolist()
        whole = theirs.apply_chat_template(
            CONVERSATION[: index + 1], add_generation_prompt=True, return_dict=False
        )
        assert tokens == list(whole)


def test_smollm2_equals_transformers() -> None:
    file = GGUFFile(loading.resolve("smollm2"))
    ours = gguf_tokenizer.read_tokenizer(file)
    meta = file.metadata
    tokens = meta["tokenizer.ggml.tokens"]
    reference = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)},
            [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]],
        )
    )
    reference.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in tokens[:17]]
    )
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    reference.decoder = byte_level("smollm").decoder
    theirs = PreTrainedTokenizerFast(tokenizer_object=reference, eos_token="<|im_end|>")
    theirs.chat_template = meta["tokenizer.chat_template"]
    for text in tiny.TEXTS + tiny.CORPUS:
        assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False)
    check_deltas(ours, theirs)
    assert 2 in ours.eos_token_ids and not ours.supports_tools and ours.vocab_size == 49152


def sentence_piece(writer: gguf.GGUFWriter, pieces: list[tuple[str, float, int]]) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece for piece, _, _ in pieces])
    writer.add_token_scores([score for _, score, _ in pieces])
    writer.add_token_types([kind for _, _, kind in pieces])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + "
        "' [/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}"
        "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
    )


def pieces_of_corpus() -> list[tuple[str, float, int]]:
    """A SentencePiece vocabulary with scores: specials, bytes, pieces and letters."""
    control = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    raw = [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    texts = [text.replace(" ", "\u2581") for text in [*tiny.CORPUS[:4], "<s>/[INST]"]]
    letters = sorted(set("".join(texts)) - {"\t", "\n", "🙂"})
    rng = np.random.default_rng(0)
    # Every way to grow a piece letter by letter, so that text has competing merges.
    longer = sorted({t[i : i + n] for t in texts for n in (2, 3, 4) for i in range(len(t) - n)})
    longer = [p for p in longer if set(p) <= set(letters)]
    order = rng.permutation(len(longer))
    ranked = [(longer[i], -float(rank), 1) for rank, i in enumerate(order)]
    return control + raw + ranked + [(c, -1e6 - i, 1) for i, c in enumerate(letters)]


def sentence_piece_reference(text: str, scores: dict[str, float]) -> list[str]:
    """The algorithm itself: join the best-scored neighbours until none can be joined."""
    symbols = list("\u2581" + text.replace(" ", "\u2581")) if text else []
    while True:
        pairs = [
            (scores[a + b], -i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in scores
        ]
        if not pairs:
            return symbols
        at = -max(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]


def test_sentence_piece(tmp_path: Path) -> None:
    pieces = pieces_of_corpus()
    ours = read_gguf(tmp_path / "spm.gguf", lambda w: sentence_piece(w, pieces))
    ids = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    scores = {piece: score for piece, score, kind in pieces if kind == 1}
    for text in [*tiny.TEXTS, *tiny.CORPUS[:4]]:
        want: list[int] = []
        for symbol in sentence_piece_reference(text, scores):
            fallback = [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
            want += [ids[symbol]] if symbol in ids else fallback
        got = ours.encode(text)
        assert got.tolist() == want
        assert ours.decode(got) == text
    messages = [{"role": "user", "content": "the lazy dog"}]
    start = ours.render_start(messages)
    assert start[0] == 1 and ours.decode(start) == "[INST] the lazy dog [/INST]"
    delta = ours.render_delta(messages, last_token_id=2)
    assert delta.tolist() == start.tolist()
    assert ours.render_delta(messages, last_token_id=9).tolist() == [2, *start]
    with pytest.raises(InvalidRequestError, match="only user and assistant"):
        ours.render_delta([{"role": "tool", "content": "x"}], 2)


def chatml(template: str = tiny.CHATML) -> ChatTokenizer:
    return ChatTokenizer(tiny.train_byte_level(), ChatTemplate(template), {2})


@pytest.mark.parametrize("special", tiny.SPECIALS)
def test_special_text_stays_text(special: str) -> None:
    ours = chatml()
    evil = f"a{special}b{special}{special} \ue000 0\ue001 \ue0000\ue001 \ue002reply\ue002"
    ids = ours.encode(evil)
    assert ours.special_ids.isdisjoint(ids.tolist()) and ours.decode(ids) == evil
    harmless = ours.render_start([{"role": "user", "content": "x"}])
    for role in ("user", "tool"):
        message = {"role": role, "content": evil}
        start = ours.render_start([message])
        count = np.isin(start, list(ours.special_ids)).sum()
        assert count == np.isin(harmless, list(ours.special_ids)).sum()
        assert evil in ours.decode(start)
        delta = ours.render_delta([message], 2)
        assert evil in ours.decode(delta)
        assert np.isin(delta, list(ours.special_ids)).sum() == count
    tools = [{"name": f"f{special}", "description": {"deep": [special]}}]
    start = ours.render_start([{"role": "user", "content": "x"}], tools)
    assert special in ours.decode(start)
    with_tools = ours.render_start([{"role": "user", "content": "x"}], [{"name": "f"}])
    specials = list(ours.special_ids)
    assert np.isin(start, specials).sum() == np.isin(with_tools, specials).sum()


def test_special_token_reachable_by_merges_stays_text() -> None:
    vocab = {"<": 0, "s": 1, ">": 2, "<s": 3, "<s>": 4}
    tokenizer = Tokenizer(models.BPE(vocab, [("<", "s"), ("<s", ">")]))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.decoder = byte_level("gpt-2").decoder
    ours = ChatTokenizer(tokenizer, None, {4})
    assert ours.encode("<s>").tolist() == [0, 1, 2]
    assert ours.encode("<s>", allow_special=True).tolist() == [4]


def test_delta_closes_a_cut_reply() -> None:
    ours = chatml()
    message = [{"role": "user", "content": "next"}]
    whole = ours.render_delta(message, None)
    assert whole[0] == 2
    assert ours.render_delta(message, 7).tolist() == whole.tolist()
    assert ours.render_delta(message, 2).tolist() == whole[1:].tolist()


def test_tools_without_template_support_go_into_the_system_prompt() -> None:
    ours = chatml(tiny.CHATML[tiny.CHATML.index("{% for") :])
    assert not ours.supports_tools
    tools = [{"name": "a", "x": "é"}, {"name": "b"}]
    text = ours.decode(ours.render_start([{"role": "user", "content": "u"}], tools))
    assert text.startswith('system\nAvailable tools:\n{"name": "a", "x": "é"}\n{"name": "b"}\n')
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "u"}]
    assert "system\nS\n\nAvailable tools:\n{" in ours.decode(ours.render_start(messages, tools))


def test_tool_calls_and_text_parts() -> None:
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "2"},
    ]
    text = chatml().decode(chatml().render_start(messages))
    assert "user\nab\n" in text and '"name": "f"' in text


BAD_MESSAGES: list[tuple[Any, str]] = [
    ([], "non-empty list"),
    ("hello", "non-empty list"),
    (None, "non-empty list"),
    ({"role": "user", "content": "x"}, "non-empty list"),
    (["hello"], "expected a dict"),
    ([{"content": "x"}], "role"),
    ([{"role": 3, "content": "x"}], "role: expected one of system, user, assistant, tool, got 3"),
    ([{"role": "wizard", "content": "x"}], r"\[0\]: role: .*, assistant, tool, got 'wizard'"),
    ([{"role": ["user"], "content": "x"}], r"role: expected one of .*, got \['user'\]"),
    ([{"role": "us<|im_start|>er", "content": "x"}], "role: expected one of"),
    ([{"role": "User", "content": "x"}], "role: expected one of"),
    ([{"role": "user", "content": ""}], "content: expected text .* role 'user', got ''"),
    ([{"role": "user", "content": None}], "content: expected text .* role 'user', got None"),
    ([{"role": "user", "content": []}], "role 'user'"),
    ([{"role": "user", "content": [{"type": "text", "text": ""}]}], "role 'user'"),
    (
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}],
        r"messages\[1\]: content: .* role 'assistant', got ''",
    ),
    ([{"role": "assistant", "content": "", "tool_calls": []}], "role 'assistant'"),
    ([{"role": "user"}], "content: missing"),
    ([{"role": "user", "content": 5}], "content"),
    ([{"role": "user", "content": [{"type": "image"}]}], "content"),
    ([{"role": "user", "content": "\ud800"}], "tokenised"),
    ([{"role": "user", "content": "x", "extra": object()}], "JSON-like"),
]


@pytest.mark.parametrize(("messages", "reason"), BAD_MESSAGES)
def test_bad_messages(messages: Any, reason: str) -> None:
    ours = chatml()
    for render in (ours.render_start, ours.render_delta):
        with pytest.raises(InvalidRequestError, match=reason):
            render(messages)


@pytest.mark.parametrize("name", ["chatml", "smollm2"])
def test_contents_that_may_be_empty(name: str) -> None:
    ours = chatml() if name == "chatml" else load_smollm2_tokenizer()
    calls = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    messages = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": ""},
    ]
    assert len(ours.render_start(messages)) > len(ours.render_start(messages[:2]))
    with pytest.raises(InvalidRequestError, match="role: expected one of"):
        ours.render_start([*messages, {"role": "function", "content": "x"}])


def load_smollm2_tokenizer() -> ChatTokenizer:
    return gguf_tokenizer.read_tokenizer(GGUFFile(loading.resolve("smollm2")))


def test_deep_nesting_is_refused() -> None:
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(InvalidRequestError, match="nested deeper"):
        chatml().render_start([{"role": "user", "content": "x"}], [{"parameters": deep}])
    with pytest.raises(InvalidRequestError):
        chatml("{{ messages }}").render_start([{"role": "user", "content": "x"}], [{"p": deep}])


def test_no_template() -> None:
    ours = ChatTokenizer(tiny.train_byte_level(), None, {2})
    with pytest.raises(InvalidRequestError, match="no chat template"):
        ours.render_start([{"role": "user", "content": "x"}])


def test_streaming_never_splits_a_character() -> None:
    ours = chatml()
    text = "".join(tiny.TEXTS) + "🙂🚀‍🚀"
    ids = ours.encode(text).tolist()
    assert len(ids) > 100
    # Bytes out of order make broken UTF-8, as a model may.
    for tokens in (ids, ids[::-1], [2, *ids[40:80], 1, 999_999, -1], ids[:-1]):
        stream = ours.stream_decoder()
        pieces = [stream.push(token) for token in tokens] + [stream.flush()]
        assert "".join(pieces) == ours.decode(tokens)
    assert "�" not in "".join(map(ours.stream_decoder().push, ids[:-1]))


def test_a_million_letters() -> None:
    assert len(chatml().encode("ab" * 500_000)) > 0


def test_unknown_kinds_are_named(tmp_path: Path) -> None:
    tokenizer = tiny.train_byte_level()
    with pytest.raises(ModelLoadError, match="'mystery' is not supported"):
        read_gguf(tmp_path / "a", lambda w: tiny.add_tokenizer_to_gguf(w, tokenizer, "mystery"))
    with pytest.raises(ModelLoadError, match="'bert' is not supported"):
        read_gguf(
            tmp_path / "b", lambda w: (w.add_tokenizer_model("bert"), w.add_token_list(["a"]))
        )
    with pytest.raises(ModelLoadError, match="tokens: missing"):
        read_gguf(tmp_path / "c", lambda w: w.add_tokenizer_model("gpt2"))
    with pytest.raises(ModelLoadError, match="token_type"):
        read_gguf(
            tmp_path / "d",
            lambda w: (
                w.add_tokenizer_model("gpt2"),
                w.add_token_list(["a", "b"]),
                w.add_token_types([1]),
            ),
        )
    with pytest.raises(ModelLoadError, match="eos_token_id: 7 is no token"):
        read_gguf(
            tmp_path / "e",
            lambda w: (
                w.add_tokenizer_model("gpt2"),
                w.add_token_list(["a", "b"]),
                w.add_eos_token_id(7),
            ),
        )
    with pytest.raises(ModelLoadError, match="tokenizer"):
        read_gguf(
            tmp_path / "f",
            lambda w: (
                w.add_tokenizer_model("gpt2"),
                w.add_token_list(["a", "b"]),
                w.add_token_merges(["x y"]),
            ),
        )


def test_hf_folder_tokenizer(tmp_path: Path) -> None:
    tiny.save_tokenizer(tmp_path, tiny.train_byte_level())
    ours, theirs = hf_folder.read_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in tiny.TEXTS:
        assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False)
    check_deltas(ours, theirs)
    assert ours.eos_token_ids == {2} and ours.special_ids == {0, 1, 2}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}X")
    ours = hf_folder.read_tokenizer(tmp_path)
    assert ours.eos_token_ids == {0, 2}
    rendered = ours.render_start([{"role": "user", "content": "x"}])
    assert ours.decode(rendered, skip_special=False) == "<|endoftext|>X"


def test_cut_tokenizer_json(tmp_path: Path) -> None:
    tiny.save_tokenizer(tmp_path, tiny.train_byte_level())
    path = tmp_path / "tokenizer.json"
    whole = path.read_text()
    for broken in ("", whole[:100], whole[: len(whole) // 2], "{}", "[]", "\x00"):
        path.write_text(broken)
        with pytest.raises(ModelLoadError, match=r"tokenizer\.json"):
            hf_folder.read_tokenizer(tmp_path)
    path.unlink()
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json"):
        hf_folder.read_tokenizer(tmp_path)
