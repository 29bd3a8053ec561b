"""Ledger, sampling, stop rules and drafter without an engine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from stateful_kv import ops
from stateful_kv.choosing.params import SamplingParams
from stateful_kv.choosing.sampler import Sampler, keyed_uniform
from stateful_kv.choosing.verify import GreedyTokens, Outcome, verify
from stateful_kv.drafts.ngram import NgramDrafter, propose_all
from stateful_kv.drafts.proposer import ALONE
from stateful_kv.engine.config import EngineConfig
from stateful_kv.errors import BadLogitsError
from stateful_kv.session.ledger import Ledger
from stateful_kv.text.stopping import StopRules, StopStringFinder
from tests.e2e.tiny import COSTS, FIRST_BYTE, ByteDecoder

NO_PROMPT = np.empty(0, dtype=np.int32)


def sampler(vocab_size: int = 32, prompt: np.ndarray = NO_PROMPT, **params: object) -> Sampler:
    settings = SamplingParams(**params)
    return Sampler(settings, settings.seed, vocab_size, prompt)


class TestLedger:
    def test_append_is_visible_without_a_copy(self) -> None:
        ledger = Ledger([1, 2, 3])
        ledger.append(np.arange(1000, dtype=np.int32))
        assert len(ledger) == 1003
        assert ledger.last_token == 999
        assert ledger.tokens.flags["C_CONTIGUOUS"]
        assert ledger.tokens.base is ledger.tokens.base

    def test_truncate_forgets_turns_that_lose_tokens(self) -> None:
        ledger = Ledger()
        for turn in range(3):
            ledger.append([turn] * 10)
            ledger.end_turn(turn * 10, turn * 10 + 4)
        assert [ledger.turn_end(turn) for turn in range(4)] == [0, 10, 20, 30]
        ledger.truncate(20)
        assert ledger.num_turns == 2
        ledger.truncate(19)
        assert ledger.num_turns == 1
        with pytest.raises(ValueError, match=r"expected 0\.\.19, got 20"):
            ledger.truncate(20)

    def test_copy_is_independent(self) -> None:
        ledger = Ledger([1, 2, 3])
        ledger.end_turn(0, 1)
        copy = ledger.copy()
        copy.append([4])
        ledger.truncate(1)
        assert copy.tokens.tolist() == [1, 2, 3, 4]
        assert copy.num_turns == 1


@dataclass(frozen=True)
class Candidate:
    """What `verify` looks at of a sequence."""

    sampler: Sampler
    draft: list[int]
    next_position: int

    @property
    def draft_ids(self) -> np.ndarray:
        return np.array(self.draft, dtype=np.int32)


class TestSampling:
    def test_greedy_takes_the_lowest_id_of_equals(self) -> None:
        row = np.array([0.0, 3.0, 1.0, 3.0], dtype=np.float32)
        assert sampler(4).choose(row, 0) == 1
        choice = verify([Candidate(sampler(4), [], 0)], torch.from_numpy(row)[None])
        assert choice[0].tokens == [1]

    def test_random_numbers_belong_to_seed_and_position(self) -> None:
        numbers = {keyed_uniform(seed, position) for seed in range(50) for position in range(50)}
        assert len(numbers) == 2500
        assert keyed_uniform(2**64 - 1, 7) == keyed_uniform(2**64 - 1, 7)
        assert abs(np.mean(list(numbers)) - 0.5) < 0.03

    def test_frequencies_follow_the_distribution(self) -> None:
        probabilities = np.array([0.5, 0.25, 0.15, 0.1])
        row = np.log(probabilities).astype(np.float32)
        one = sampler(4, temperature=1.0, seed=3)
        counts = np.bincount([one.choose(row, position) for position in range(4000)], minlength=4)
        chi_square = ((counts - 4000 * probabilities) ** 2 / (4000 * probabilities)).sum()
        assert chi_square < 16.3  # three degrees of freedom, p = 0.001

    @pytest.mark.parametrize(
        ("params", "allowed"),
        [
            ({"top_k": 1}, {3}),
            ({"top_k": 2}, {3, 0}),
            ({"top_k": 1000}, {0, 1, 2, 3}),
            ({"top_p": 0.5}, {3}),
            ({"top_p": 0.6}, {3, 0}),
            ({"top_p": 1e-12}, {3}),
            ({"min_p": 0.5}, {3, 0}),
            ({"min_p": 1.0}, {3}),
            ({"top_k": 3, "top_p": 0.99, "min_p": 0.01}, {3, 0, 1}),
        ],
    )
    def test_filters_keep_only_the_likeliest(self, params: dict, allowed: set[int]) -> None:
        row = np.log(np.array([0.3, 0.1, 0.05, 0.55])).astype(np.float32)
        one = sampler(4, temperature=1.0, seed=1, **params)
        assert {one.choose(row, position) for position in range(400)} == allowed

    def test_ties_at_a_border_go_to_lower_ids(self) -> None:
        row = np.zeros(10, dtype=np.float32)
        one = sampler(10, temperature=1.0, seed=1, top_k=3)
        assert {one.choose(row, position) for position in range(200)} == {0, 1, 2}

    @pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-3])
    def test_tiny_temperatures_are_greedy(self, temperature: float) -> None:
        row = np.random.default_rng(0).normal(size=64).astype(np.float32)
        one = sampler(64, temperature=temperature, seed=9, top_p=0.9)
        assert one.choose(row, 5) == int(row.argmax())

    def test_masked_tokens_are_never_drawn(self) -> None:
        row = np.full(64, -np.inf, dtype=np.float32)
        row[[3, 60]] = 1.0
        one = sampler(64, temperature=100.0, seed=9)
        assert {one.choose(row, position) for position in range(100)} == {3, 60}

    def test_penalties_use_prompt_and_output(self) -> None:
        prompt = np.array([1, 1, 2], dtype=np.int32)
        row = np.array([1.0, 1.4, -1.0, 1.2], dtype=np.float32)
        repeated = sampler(4, prompt, repetition_penalty=2.0)
        assert repeated.choose(row, 3) == 3  # 1.4 / 2 is less than 1.2
        repeated.note(3)
        assert repeated.choose(row, 4) == 0
        output_only = sampler(4, prompt, presence_penalty=0.5, frequency_penalty=0.2)
        assert output_only.choose(row, 3) == 1
        output_only.note(1)
        assert output_only.choose(row, 4) == 3

    def test_penalties_inside_a_draft_see_the_draft_before_them(self) -> None:
        rows = np.tile(np.array([1.0, 1.4, 0.0, 1.2], dtype=np.float32), (4, 1))
        one = sampler(4, repetition_penalty=2.0)
        assert one.choose_run(rows, [1, 3, 0], 0) == ([1, 3, 0, 1], None)
        assert one.choose_run(rows, [1, 1, 0], 0) == ([1, 3], None)
        assert one.choose(rows[0], 0) == 1, "a run must not change the context"

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_bad_rows_are_errors(self, bad: float, temperature: float) -> None:
        rows = np.zeros((3, 8), dtype=np.float32)
        rows[:, 5] = 1.0
        rows[1, 2] = bad
        one = sampler(8, temperature=temperature, seed=1, top_k=1)
        tokens, error = one.choose_run(rows, [5, 5], 10)
        assert tokens == [5]
        assert "position 11" in str(error)
        with pytest.raises(BadLogitsError):
            one.choose(np.full(8, -np.inf, dtype=np.float32), 0)
        choice = verify([Candidate(one, [5, 5], 10)], torch.from_numpy(rows))[0]
        assert choice.tokens == [5]
        assert "position 11" in str(choice.error)

    def test_bad_rows_behind_a_refused_draft_do_not_matter(self) -> None:
        rows = torch.zeros(3, 8)
        rows[:, 5] = 1.0
        rows[2] = torch.nan
        assert verify([Candidate(sampler(8), [4, 5], 0)], rows)[0] == Outcome([5], 2, 0)

    def test_greedy_tokens_do_as_well_as_logits(self) -> None:
        logits = torch.randn(7, 8)
        logits[2] = torch.nan
        logits[6] = -torch.inf
        best = logits.argmax(-1).tolist()
        candidates = [
            Candidate(sampler(8), [best[0], best[1], 0], 5),
            Candidate(sampler(8), [(best[4] + 1) % 8], 3),
            Candidate(sampler(8), [], 9),
        ]
        chosen = verify(candidates, GreedyTokens(*ops.argmax(logits)))
        assert [choice.tokens for choice in chosen] == [best[:2], best[4:5], []]
        assert "position 7" in str(chosen[0].error)
        assert chosen[1].error is None
        assert "position 9" in str(chosen[2].error)
        for choice, same in zip(chosen, verify(candidates, logits), strict=True):
            assert (choice.tokens, str(choice.error)) == (same.tokens, str(same.error))
        with pytest.raises(RuntimeError, match="split"):
            verify(candidates, GreedyTokens(*ops.argmax(logits[:6])))

    def test_verify_mixes_greedy_and_sampled(self) -> None:
        logits = torch.randn(6, 16)
        best = logits.argmax(-1).tolist()
        candidates = [
            Candidate(sampler(16), [best[0], best[1]], 4),
            Candidate(sampler(16, temperature=1.0, seed=5, top_k=1), [best[3]], 9),
            Candidate(sampler(16), [], 2),
        ]
        choices = verify(candidates, logits)
        assert [choice.tokens for choice in choices] == [best[:3], best[3:5], best[5:]]

    def test_sampled_neighbours_share_one_draw(self, monkeypatch: pytest.MonkeyPatch) -> None:
        logits = torch.randn(9, 50)
        settings = [
            {"temperature": 0.9, "seed": 2**64 - 1, "top_p": 0.8},
            {"temperature": 1e-320, "seed": 3, "top_k": 2**40},
            {"temperature": 1.3, "seed": 3, "min_p": 0.1, "top_k": 7},
            {"temperature": 0.9, "seed": 4, "presence_penalty": 0.1},
        ]
        starts, drafts = [0, 3, 4, 7], [2, 0, 2, 1]
        samplers = [sampler(50, **params) for params in settings]
        positions = [100, 7, 0, 30]
        expected = []
        for i, sampler_i in enumerate(samplers):
            rows = logits.numpy()[starts[i] :]
            expected.append([sampler_i.choose(row, positions[i] + n) for n, row in enumerate(rows)])
        assert expected[1][0] == int(logits[3].argmax())
        # The first draft is right, the others agree in their first token only.
        proposed = [expected[0][:2], [], [expected[2][0], (expected[2][1] + 1) % 50], [-1]]
        calls = []
        sample = ops.sample

        def counted(*args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            calls.append(len(args[0]))
            return sample(*args)

        monkeypatch.setattr(ops, "sample", counted)
        candidates = [
            Candidate(chooser, draft, position)
            for chooser, draft, position in zip(samplers, proposed, positions, strict=True)
        ]
        assert [len(draft) for draft in proposed] == drafts
        choices = verify(candidates, logits)
        assert calls == [7, 1], "all plain rows together, the penalised one by itself"
        assert [choice.tokens for choice in choices] == [
            expected[0][:3],
            expected[1][:1],
            expected[2][:2],
            expected[3][:1],
        ]

    def test_one_draw_that_fails_spoils_no_other(self, monkeypatch: pytest.MonkeyPatch) -> None:
        logits = torch.randn(4, 20)
        candidates = [
            Candidate(sampler(20, temperature=1.0, seed=seed), [], 5) for seed in (1, 2, 3, 4)
        ]
        expected = [choice.tokens for choice in verify(candidates, logits)]
        sample = ops.sample

        def fail(rows: torch.Tensor, seeds: torch.Tensor, *args: torch.Tensor) -> object:
            if 3 in seeds.tolist():
                raise RuntimeError("boom")
            return sample(rows, seeds, *args)

        monkeypatch.setattr(ops, "sample", fail)
        choices = verify(candidates, logits)
        assert [choice.tokens for choice in choices] == [*expected[:2], [], expected[3]]
        assert [str(choice.error) for choice in choices] == ["None", "None", "boom", "None"]


class TestStopping:
    @pytest.mark.parametrize("size", [1, 2, 3, 100])
    @pytest.mark.parametrize(
        ("text", "stops", "shown"),
        [
            ("hello world", ["wor"], "hello "),
            ("aaab", ["aab"], "a"),
            ("abcbc", ["bc", "abcb"], "a"),
            ("xabcd", ["abcd", "b"], "xa"),
            ("ab", ["abc"], "ab"),
            ("12ab34", ["zz", "b3"], "12a"),
            ("schöne Grüße", ["Grü"], "schöne "),
        ],
    )
    def test_result_does_not_depend_on_the_pieces(
        self, text: str, stops: list[str], shown: str, size: int
    ) -> None:
        finder = StopStringFinder(stops)
        out, found = "", False
        for start in range(0, len(text), size):
            piece, found = finder.push(text[start : start + size])
            out += piece
            if found:
                break
        if not found:
            out += finder.flush()
        assert out == shown
        assert found == (shown != text)

    def test_shown_text_is_never_taken_back(self) -> None:
        finder = StopStringFinder(["<end>"])
        pieces = [finder.push(piece)[0] for piece in ["a<e", "nd", "x", "<", "end"]]
        assert pieces == ["a", "", "<endx", "", ""]

    def test_stop_inside_a_character(self) -> None:
        rules = StopRules(ByteDecoder(), frozenset(), ["ü"])
        tokens = [FIRST_BYTE + byte for byte in "aüb".encode()]
        assert [rules.push(token) for token in tokens[:3]] == [
            ("a", False),
            ("", False),
            ("", True),
        ]

    def test_stop_tokens_add_no_text_and_release_what_was_held(self) -> None:
        rules = StopRules(ByteDecoder(), frozenset({70}), ["no!"])
        assert rules.push(FIRST_BYTE + ord("n")) == ("", False)
        assert rules.push(70) == ("n", True)


class TestDrafter:
    def test_follows_the_ledger(self) -> None:
        def proposed(drafter: NgramDrafter, ledger: Ledger, limit: int) -> list[int]:
            draft = drafter.propose(ledger.tokens, limit)
            whole = drafter.worthwhile(draft, len(ledger), ALONE)
            assert len(whole) <= len(draft)
            return draft.tokens.tolist()

        ledger = Ledger([1, 2, 3, 4, 5, 9, 9, 1, 2, 3])
        drafter = NgramDrafter(7, COSTS)
        assert proposed(drafter, ledger, 2) == [4, 5]
        assert proposed(drafter, ledger, 0) == []
        fork, copy = drafter.fork(), ledger.copy()
        copy.append([4])
        assert proposed(fork, copy, 1) == [5]
        assert proposed(drafter, ledger, 1) == [4]
        ledger.truncate(3)
        drafter.truncate(3)
        ledger.append([7, 8, 1, 2, 3])
        assert proposed(drafter, ledger, 2) == [7, 8]

    def test_a_batch_proposes_what_each_alone_does(self) -> None:
        texts = [[1, 2, 3, 1, 2], [4, 5, 4, 5], [7], [1, 2, 9, 1, 2]]
        ledgers = [Ledger(text) for text in texts]
        alone = [NgramDrafter(7, COSTS).propose(ledger.tokens, 3) for ledger in ledgers]
        drafters = [NgramDrafter(7, COSTS) for _ in texts]
        together = propose_all(drafters, [ledger.tokens for ledger in ledgers], [3, 3, 3, 0])
        assert [d.tokens.tolist() for d in together[:3]] == [d.tokens.tolist() for d in alone[:3]]
        assert [d.match_len for d in together[:3]] == [d.match_len for d in alone[:3]]
        assert (len(together[3]), len(alone[3])) == (0, 3)


class TestConfig:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("temperature", -1.0),
            ("temperature", float("nan")),
            ("temperature", "hot"),
            ("top_k", -1),
            ("top_k", 1.5),
            ("top_p", 0.0),
            ("top_p", 1.5),
            ("min_p", -0.1),
            ("repetition_penalty", 0.0),
            ("repetition_penalty", 1e-40),
            ("temperature", 10**400),
            ("presence_penalty", float("inf")),
            ("frequency_penalty", 1e9),
            ("seed", -1),
            ("seed", 2**64),
            ("stop", ("",)),
            ("stop", (3,)),
            ("stop_token_ids", (-1,)),
            ("ignore_eos", 1),
        ],
    )
    def test_bad_sampling_names_the_field(self, field: str, value: object) -> None:
        with pytest.raises(ValueError, match=field):
            SamplingParams(**{field: value})

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("kv_tokens", 0),
            ("page_size", -4),
            ("kv_dtype", "float8"),
            ("max_batch_tokens", True),
            ("max_draft", 1000),
            ("draft", None),
        ],
    )
    def test_bad_engine_config_names_the_field(self, field: str, value: object) -> None:
        with pytest.raises(ValueError, match=field):
            EngineConfig(**{field: value})

    def test_one_stop_string_need_not_be_a_tuple(self) -> None:
        assert SamplingParams(stop="ab").stop == ("ab",)
