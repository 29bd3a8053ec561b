"""Greedy steps take the largest logit from the head itself: same tokens, and no row of logits.

The engines here run models as they are; `Recorder`, which the other tests put around them, has to
see all logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch.autograd.profiler import profile

from stateful_kv.choosing.params import SamplingParams
from stateful_kv.engine.config import EngineConfig
from stateful_kv.engine.engine import Engine
from stateful_kv.models.files.loading import LoadedModel, load_model
from stateful_kv.models.llama import LlamaModel
from tests.e2e.conftest import MakeEngine
from tests.e2e.tiny import COSTS, ByteTokenizer, Recorder
from tests.models.tiny import plain_batch, plain_cache
from tests.ops.comparing import assert_same_bits

MESSAGES = ("list the files, please", "read a.txt and read a.txt again", "ok")
SAMPLED: dict[str, Any] = {"temperature": 0.8, "seed": 5, "top_k": 20}


class Spy:
    """A model, and the shapes of what it gave."""

    def __init__(self, model: LlamaModel) -> None:
        self._model = model
        self.config = model.config
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, *arguments: Any) -> torch.Tensor:
        logits = self._model.forward(*arguments)
        self.shapes.append(tuple(logits.shape))
        return logits

    def forward_top_k(self, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ids, values = self._model.forward_top_k(*arguments)
        self.shapes += [tuple(ids.shape), tuple(values.shape)]
        return ids, values

    @property
    def has_given_logits(self) -> bool:
        return any(shape[1] == self.config.vocab_size for shape in self.shapes)


@pytest.fixture
def bare(llama: LlamaModel) -> Iterator[tuple[Engine, Spy]]:
    spy = Spy(llama)
    config = EngineConfig(kv_tokens=4096, page_size=16)
    with Engine(spy, ByteTokenizer(), config, cost_curve=COSTS) as engine:
        yield engine, spy
        assert engine.check_integrity() is None


def play(engine: Engine, messages: Sequence[str] = MESSAGES) -> tuple[list[list[int]], int]:
    """Tokens of two sessions, first one by one, then in one batch; tokens that drafts gave."""
    one, other = engine.session(), engine.session()
    replies = [one.turn(message, max_tokens=30, ignore_eos=True) for message in messages]
    replies += engine.gather([(one, "a"), (other, "b")], max_tokens=30, ignore_eos=True)
    accepted = sum(reply.receipt.accepted_tokens for reply in replies)
    return [one.token_ids, other.token_ids], accepted


@pytest.mark.parametrize("num_threads", [1, 3])
def test_tokens_are_those_of_full_logits(
    bare: tuple[Engine, Spy], make_engine: MakeEngine, set_num_threads: Any, num_threads: int
) -> None:
    expected = play(make_engine())
    set_num_threads(num_threads)
    assert play(bare[0]) == expected
    assert expected[1] > 0, "drafts are verified by this path too"
    assert not bare[1].has_given_logits


def test_logits_are_made_for_who_needs_them(bare: tuple[Engine, Spy]) -> None:
    engine, spy = bare
    greedy = engine.session()
    sampled = engine.session(sampling=SamplingParams(**SAMPLED))
    alone = [session.fork().turn("x", max_tokens=9).token_ids for session in (greedy, sampled)]
    assert spy.has_given_logits
    pairs = [(greedy, "x"), (sampled, "x")]
    assert [reply.token_ids for reply in engine.gather(pairs, max_tokens=9)] == alone
    spy.shapes.clear()
    engine.session().turn("x", max_tokens=3, repetition_penalty=1.2)
    assert spy.has_given_logits
    spy.shapes.clear()
    greedy.turn("y", max_tokens=3)
    assert not spy.has_given_logits


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    return load_model("smollm2")


def num_logit_heads(profiled: profile, num_layers: int) -> int:
    """Products that a profile saw beside those of the layers: heads that wrote rows of logits."""
    counts = {event.key: event.count for event in profiled.key_averages()}
    num_products: int = counts["stateful_kv::quantized_linear"]
    num_passes: int = counts["stateful_kv::decoder_layers"]
    return num_products - 4 * num_layers * num_passes


def test_the_default_model_writes_no_logits(smollm2: LoadedModel) -> None:
    num_layers, config = smollm2.config.num_layers, EngineConfig(kv_tokens=1024)
    replies = []
    for model in (smollm2.model, Recorder(smollm2.model)):
        with Engine(model, smollm2.tokenizer, config, cost_curve=COSTS) as engine:
            session = engine.session(system="Answer with one line of code.")
            with profile() as profiled:
                reply = session.turn("Print 1, 2, 3 in Python.", max_tokens=24)
            replies.append(reply.token_ids)
            if model is smollm2.model:
                assert num_logit_heads(profiled, num_layers) == 0
                with profile() as profiled:
                    session.turn("Again.", max_tokens=1, **SAMPLED)
                assert num_logit_heads(profiled, num_layers) > 0, "logits of a draw are seen"
    assert replies[0] == replies[1]


@pytest.mark.parametrize("num_rows", [1, 5, 13, 33])
@pytest.mark.parametrize("k", [1, 5, 64])
def test_the_largest_logits_have_the_bits_of_all(llama: LlamaModel, num_rows: int, k: int) -> None:
    tokens = torch.randint(8, llama.config.vocab_size, (num_rows,)).tolist()
    cache = plain_cache(llama.config, num_pages=4)
    batch = plain_batch(cache, [tokens], [0])
    logits = llama.forward(batch, cache)
    ids, values = llama.forward_top_k(batch, cache, k)
    expected_values, expected_ids = torch.sort(logits, dim=1, descending=True, stable=True)
    assert ids.tolist() == expected_ids[:, :k].tolist()
    assert_same_bits(values, expected_values[:, :k])
