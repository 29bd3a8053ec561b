"""Measuring a cost curve, finding the one an engine needs, and engines that draft by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stateful_kv.drafts import calibrate, cost_file
from stateful_kv.drafts.calibrate import Costs, fingerprint
from stateful_kv.drafts.costs import CostCurve
from stateful_kv.drafts.ngram import NgramDrafter
from stateful_kv.drafts.proposer import NO_DRAFT, Draft, StepLoad
from stateful_kv.engine import batching
from stateful_kv.engine.config import EngineConfig
from stateful_kv.errors import InvalidRequestError
from stateful_kv.kv.batch import Batch
from stateful_kv.kv.cache import KVCache
from stateful_kv.models.llama import LlamaModel
from stateful_kv.session.turn import Turn
from tests.e2e.conftest import MakeEngine
from tests.e2e.tiny import COSTS, CountingUp, TopKOfLogits, tiny_llama

CURVE = CostCurve((1, 2, 4), (8.0, 9.0, 13.0), 0.25, 0.5, noise=0.1)
DRAFT_ALL = CostCurve((1, 8), (8e-3, 8.1e-3))
DRAFT_NONE = CostCurve((1, 2), (8e-3, 80e-3))
CONFIG = EngineConfig(page_size=16, max_draft=7)


def measure(model: Any, config: EngineConfig) -> CostCurve:
    """What an engine of this size would measure."""
    return calibrate.measure(
        model, config.kv_dtype, config.page_size, config.max_draft + 1, config.device
    )


def costs_of(model: Any, config: EngineConfig, choice: Any) -> Costs:
    """What an engine of this size would have."""
    return Costs(
        model,
        choice,
        kv_dtype=config.kv_dtype,
        page_size=config.page_size,
        max_draft=config.max_draft,
        device=config.device,
    )


class Timed(TopKOfLogits):
    """A model whose passes take as long as a curve says, on a clock of its own."""

    def __init__(self, curve: CostCurve, monkeypatch: pytest.MonkeyPatch) -> None:
        self.config = tiny_llama().config
        self.curve = curve
        self.now = 0.0
        self.num_passes = 0
        self.slower = 1.0
        monkeypatch.setattr(calibrate.time, "perf_counter", lambda: self.now)

    def forward(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        rows = batch.num_tokens
        assert batch.logit_rows.tolist() == list(range(rows))
        self.now += self.slower * self.curve.total(rows, int(batch.seq_lens[0]) - rows)
        self.num_passes += 1
        return torch.zeros(rows, 1)


class TestMeasure:
    TRUE = CostCurve((1, 2, 3, 4, 6, 8), (8e-3, 9e-3, 9.5e-3, 10e-3, 14e-3, 15e-3), 2e-6, 4e-7)

    def test_finds_the_true_curve_in_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = Timed(self.TRUE, monkeypatch)
        curve = measure(model, CONFIG)
        assert curve.rows == self.TRUE.rows
        assert curve.seconds == pytest.approx(self.TRUE.seconds)
        assert curve.per_token == pytest.approx(self.TRUE.per_token)
        assert curve.per_row_token == pytest.approx(self.TRUE.per_row_token)
        assert curve.noise == pytest.approx(0.0, abs=1e-9)
        assert 0.4 < model.now <= calibrate.BUDGET_S

    def test_a_slow_model_is_measured_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = Timed(replace(self.TRUE, seconds=[s * 100 for s in self.TRUE.seconds]), monkeypatch)
        assert measure(model, CONFIG).seconds[0] == pytest.approx(0.8)
        assert model.num_passes == len(self.TRUE.rows) + 4

    def test_one_round_on_a_busy_machine_is_seen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = Timed(replace(self.TRUE, seconds=[s * 100 for s in self.TRUE.seconds]), monkeypatch)
        forward = model.forward

        def ever_slower(batch: Batch, cache: KVCache) -> torch.Tensor:
            model.slower *= 1.3
            return forward(batch, cache)

        model.forward = ever_slower  # type: ignore[method-assign]
        assert measure(model, CONFIG).noise > calibrate.MAX_STORED_NOISE

    def test_an_outlier_does_not_move_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = Timed(self.TRUE, monkeypatch)
        forward = model.forward

        def disturbed(batch: Batch, cache: KVCache) -> torch.Tensor:
            model.slower = 5.0 if model.num_passes in (0, 3, 9) else 1.0
            return forward(batch, cache)

        model.forward = disturbed  # type: ignore[method-assign]
        assert measure(model, CONFIG).seconds == pytest.approx(self.TRUE.seconds)

    def test_a_tiny_model(self, llama: LlamaModel) -> None:
        for max_draft in (1, 7, 20):
            config = EngineConfig(page_size=16, max_draft=max_draft)
            curve = measure(llama, config)
            assert curve.rows[-1] == max_draft + 1
            assert 0 < curve.seconds[0] < 1.0

    @pytest.mark.parametrize("max_position", [1, 8, 9, 30])
    def test_a_short_context(self, monkeypatch: pytest.MonkeyPatch, max_position: int) -> None:
        model = Timed(self.TRUE, monkeypatch)
        model.config = replace(model.config, max_position=max_position)
        curve = measure(model, CONFIG)
        num_points = 1 if max_position == 1 else len(self.TRUE.rows)
        assert curve.rows == self.TRUE.rows[:num_points]
        assert curve.seconds == pytest.approx(self.TRUE.seconds[:num_points])

    @pytest.mark.parametrize("max_position", [1, 2, 5])
    def test_a_context_shorter_than_a_draft(
        self, make_engine: MakeEngine, max_position: int
    ) -> None:
        model = tiny_llama()
        config = replace(model.config, max_position=max_position)
        weights = replace(model.weights, cos_sin=model.weights.cos_sin[:max_position].clone())
        engine = make_engine(LlamaModel(config, weights), cost_curve="measure", max_draft=7)
        engine.session()
        assert engine.costs.curve().rows[-1] == max_position

    @pytest.mark.parametrize("page_size", [1, 16, 64])
    def test_int8_is_measured_on_the_values_of_floats(
        self, llama: LlamaModel, page_size: int
    ) -> None:
        caches = [
            calibrate._Scratch(llama, kv_dtype, page_size, 8, "cpu").cache
            for kv_dtype in ("float32", "int8")
        ]
        exact, rounded = caches
        assert rounded.k_scales is not None and rounded.v_scales is not None
        for pool, scales, expected in (
            (rounded.k, rounded.k_scales, exact.k),
            (rounded.v, rounded.v_scales, exact.v),
        ):
            torch.testing.assert_close(pool * scales[..., None], expected, rtol=0, atol=0.51 / 127)

    def test_a_sliding_window_is_not_measured_behind(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = Timed(replace(self.TRUE, window=50), monkeypatch)
        model.config = replace(model.config, sliding_window=50)
        curve = measure(model, CONFIG)
        assert curve.window == 50
        assert curve.attention(1, 10**6) == pytest.approx(self.TRUE.attention(1, 50))


class TestCosts:
    def count(self, monkeypatch: pytest.MonkeyPatch, curve: CostCurve = COSTS) -> list[Any]:
        """Replaces measuring by `curve`; returns the list of models it was asked for."""
        calls: list[Any] = []

        def fake(model: Any, *_: Any) -> CostCurve:
            calls.append(model)
            return curve

        monkeypatch.setattr(calibrate, "measure", fake)
        return calls

    def test_measured_once_then_from_the_file(
        self, folder: Path, llama: LlamaModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = self.count(monkeypatch)
        first = costs_of(llama, CONFIG, "auto")
        assert first.source == "" and not calls
        assert first.curve() == first.curve() == COSTS
        assert (first.source, len(calls)) == ("measured", 1)
        second = costs_of(llama, CONFIG, "auto")
        assert (second.curve(), second.source, len(calls)) == (COSTS, "file", 1)
        third = costs_of(llama, CONFIG, "measure")
        assert (third.curve(), third.source, len(calls)) == (COSTS, "measured", 2)
        ((key, stored),) = cost_file.stored_here()
        assert stored == COSTS and key["max_rows"] == 8

    @pytest.mark.parametrize("what", ["threads", "cpu", "kv_dtype", "max_draft", "library"])
    def test_another_setting_is_measured_anew(
        self, folder: Path, llama: LlamaModel, monkeypatch: pytest.MonkeyPatch, what: str
    ) -> None:
        calls = self.count(monkeypatch)
        costs_of(llama, CONFIG, "auto").curve()
        config = CONFIG
        if what == "threads":
            torch.set_num_threads(2)
        elif what == "cpu":
            monkeypatch.setattr(cost_file, "cpu_name", lambda: "another")
        elif what == "library":
            here = cost_file.machine_key()
            monkeypatch.setattr(cost_file, "machine_key", lambda: {**here, "library": "rebuilt"})
        elif what == "kv_dtype":
            config = replace(config, kv_dtype="float32")
        else:
            config = replace(config, max_draft=3)
        costs_of(llama, config, "auto").curve()
        assert len(calls) == 2

    def test_a_noisy_measurement_is_not_stored(
        self, folder: Path, llama: LlamaModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        noisy = replace(COSTS, noise=calibrate.MAX_STORED_NOISE * 1.01)
        self.count(monkeypatch, noisy)
        assert costs_of(llama, CONFIG, "auto").curve() == noisy
        assert not folder.exists()

    def test_a_model_without_weights_is_not_stored(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.count(monkeypatch)
        assert costs_of(CountingUp(), CONFIG, "auto").curve() == COSTS
        assert not folder.exists()

    def test_a_given_curve_asks_nobody(
        self, folder: Path, llama: LlamaModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = self.count(monkeypatch)
        given = costs_of(llama, CONFIG, CURVE)
        assert (given.curve(), given.source, calls) == (CURVE, "given", [])
        assert not folder.exists()

    @pytest.mark.parametrize("choice", [None, "never", 3])
    def test_a_bad_choice_is_named(self, llama: LlamaModel, choice: Any) -> None:
        with pytest.raises(InvalidRequestError, match="cost_curve: expected a CostCurve"):
            costs_of(llama, CONFIG, choice)

    def test_fingerprints(self, llama: LlamaModel) -> None:
        layers = llama.weights.layers
        other = replace(
            llama.weights, layers=(*layers[:-1], replace(layers[-1], o=layers[-1].down))
        )
        assert fingerprint(llama) == fingerprint(tiny_llama())
        assert fingerprint(LlamaModel(llama.config, other)) != fingerprint(llama)
        longer = replace(llama.config, max_position=llama.config.max_position + 1)
        assert fingerprint(LlamaModel(longer, llama.weights)) != fingerprint(llama)


class TestEngine:
    @pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 3}])
    def test_curves_change_nothing_but_steps(
        self, make_engine: MakeEngine, sampling: dict[str, Any]
    ) -> None:
        texts, drafted = [], []
        for curve in (DRAFT_ALL, COSTS, DRAFT_NONE, "measure"):
            engine = make_engine(cost_curve=curve)
            session = engine.session(system="You are terse.")
            replies = [
                session.turn(message, max_tokens=40, ignore_eos=True, **sampling)
                for message in ("list the files", "again", "once more")
            ]
            texts.append(session.token_ids)
            drafted.append(sum(reply.receipt.drafted_tokens for reply in replies))
        assert texts.count(texts[0]) == len(texts)
        assert drafted[0] > drafted[2] == 0

    def test_nothing_is_measured_without_drafts(
        self, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*args: object) -> None:
            raise AssertionError("measured")

        monkeypatch.setattr(calibrate, "measure", fail)
        for config in ({"draft": False}, {"max_draft": 0}):
            engine = make_engine(cost_curve="measure", **config)
            engine.session().turn("hello", max_tokens=3)
        engine = make_engine(cost_curve="measure")
        engine.session(draft=False).turn("hello", max_tokens=3)
        with pytest.raises(AssertionError, match="measured"):
            engine.session()

    def test_measuring_leaves_the_engine_alone(self, make_engine: MakeEngine) -> None:
        engine = make_engine(cost_curve="measure")
        before = engine.cache.k.clone()
        engine.session()
        assert engine.costs.source == "measured"
        assert engine.cache.num_sequences == 0
        assert torch.equal(engine.cache.k, before)

    def test_steps_tell_the_policy_what_they_hold(
        self, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loads = []

        def spy(self: NgramDrafter, draft: Draft, context: int, load: StepLoad) -> Draft:
            loads.append(tuple(load))
            return NO_DRAFT

        monkeypatch.setattr(NgramDrafter, "worthwhile", spy)
        engine = make_engine(max_batch_tokens=16)
        one, two = engine.session(), engine.session()
        engine.gather([(one, "a"), (two, "b")], max_tokens=3)
        assert set(loads) <= {(1, 1), (2, 2), (1, 2), (1, 3)} and (2, 2) in loads
        loads.clear()
        with one.stream("short", max_tokens=8, ignore_eos=True) as stream:
            next(stream)
            two.turn("long " * 20, max_tokens=1)
        # 16 rows a step: one decodes, the prompt takes the others.
        assert (1, 16) in loads

    def test_drafts_of_a_step_count_for_later_ones(
        self, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loads = []

        def worthwhile(self: NgramDrafter, draft: Draft, context: int, load: StepLoad) -> Draft:
            loads.append(tuple(load))
            return draft

        def propose(turns: Sequence[Turn], max_draft: int) -> list[Draft]:
            limits = [max(0, min(max_draft, turn.num_left - 1)) for turn in turns]
            return [Draft(np.array([40, 41, 42][:limit], dtype=np.int32)) for limit in limits]

        monkeypatch.setattr(NgramDrafter, "worthwhile", worthwhile)
        monkeypatch.setattr(batching, "propose", propose)
        engine = make_engine()
        sessions = [engine.session() for _ in range(3)]
        engine.gather([(session, "a") for session in sessions], max_tokens=5, ignore_eos=True)
        assert loads.index((3, 3)) < loads.index((3, 6)) < loads.index((3, 9))
