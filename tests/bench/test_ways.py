"""Peers at their best: the choice between ways, and that all ways of each peer do the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench import harness, report, ways
from bench.harness import Case, Check, Settings, Trial, Work
from bench.peers import (
    block_hash,
    loop_composites,
    text_scan,
    torch_attention,
    torch_composites,
    torch_linear,
    torch_sampling,
)
from bench.suites import peer_ways, texts
from bench.ways import Ways
from stateful_kv import ops

ROOF = {"read_bytes_per_s": 1e10, "fp32_flops_per_s": 1e11}


def _sampler(seconds: dict):
    """Takes times from lists by call instead of a clock."""
    return lambda call: lambda: seconds[call].pop(0)


def test_the_quickest_way_counts_and_one_slow_moment_does_not():
    calls = {"plain": lambda _: 1, "better": lambda _: 1, "worse": lambda _: 1}
    times = {
        calls["plain"]: [2.0, 2.0, 2.0],
        calls["better"]: [9.0, 1.0, 9.0],
        calls["worse"]: [3.0, 3.0, 3.0],
    }
    choice = ways.quickest(Ways(calls, lambda _: True), _sampler(times))
    assert choice.name == "better" and choice.call is calls["better"]
    assert choice.details() == {
        "peer_setting": "better",
        "seconds_by_setting": {"plain": 2.0, "better": 1.0, "worse": 3.0},
    }


def test_ways_that_differ_or_fail_are_left_out_and_named():
    calls = {name: (lambda _: 1) for name in ("plain", "wrong", "broken", "cannot start")}
    calls = {name: (lambda _, name=name: name) for name in calls}

    def agrees(name: str) -> bool:
        if name == "broken":
            raise RuntimeError("no compiler\nmore")
        return name != "wrong"

    def sampler(call):
        if call is calls["cannot start"]:
            raise ValueError("not here")
        return lambda: 5.0

    choice = ways.quickest(Ways(calls, agrees), sampler)
    assert choice.name == "plain" and choice.seconds == {}
    assert choice.details()["settings_left_out"] == {
        "wrong": "its result differs",
        "broken": "RuntimeError: no compiler",
        "cannot start": "ValueError: not here",
    }


def test_without_the_plain_way_there_is_no_peer():
    def sampler(_call):
        raise ValueError("not here")

    with pytest.raises(ValueError, match="not here"):
        ways.quickest(Ways({"plain": lambda _: 1}, lambda _: True), sampler)


def test_a_result_names_the_way_that_was_timed():
    timed: list[str] = []
    calls = {
        "slow": lambda _: [timed.append("slow"), *(sum(range(3000)) for _ in range(9))],
        "quick": lambda _: timed.append("quick"),
    }
    trial = Trial(
        ours=lambda _: None,
        peers={"torch": Ways(calls, lambda _: True)},
        check=lambda _: Check(True),
        work=Work(8),
        details=lambda _: {"more": 1},
    )
    results: list[dict] = []
    case = Case("c", {"n": 1}, lambda _: trial)
    harness.run_cases("s", [case], Settings(smoke=True), ROOF, results.append)
    (result,) = results
    assert result["details"]["peer_setting"] == "quick" and result["details"]["more"] == 1
    assert set(result["details"]["seconds_by_setting"]) == {"slow", "quick"}
    assert timed[-1] == "quick" and result["peer"]["n"] == 3
    assert "vs torch (quick) " in report.line(result)


def test_a_compiled_way_is_tried_where_it_is_asked_for():
    tried = peer_ways.ways(
        {"plain": torch.neg}, lambda f: f, lambda f: f(torch.ones(3)), 0.0, compiles=True
    )
    assert list(tried.calls) == ["plain", peer_ways.COMPILED]
    plain = peer_ways.ways({"plain": torch.neg}, lambda f: f, lambda f: f(torch.ones(3)), 0.0)
    assert list(plain.calls) == ["plain"] and plain.plain is torch.neg


@pytest.mark.parametrize("rows", [1, 5])
def test_ways_of_the_small_ops_agree(rows):
    x, weight = torch.randn(rows, 64), torch.rand(64)
    for norm in torch_composites.RMS_NORM.values():
        torch.testing.assert_close(norm(x, weight, 1e-5), ops.rms_norm(x, weight, 1e-5))
        added = torch_composites.adding(norm)(x, torch.ones(rows, 64), weight, 1e-5)
        torch.testing.assert_close(added, ops.add_rms_norm(x, torch.ones(rows, 64), weight, 1e-5))
    for silu_mul in torch_composites.SILU_MUL.values():
        torch.testing.assert_close(silu_mul(x), ops.silu_mul(x))
    logits = torch.randn(rows, 1024)
    for argmax in torch_composites.ARGMAX.values():
        ids, values = argmax(logits)
        assert torch.equal(values, logits.amax(1)) and torch.equal(ids, logits.argmax(1))


@pytest.mark.parametrize("rows", [1, 5, 20])
def test_ways_to_write_kv_agree(rows):
    heads, kv_heads, width, size = 4, 2, 8, 4
    pool = torch.zeros(9, kv_heads, size, width, dtype=torch.float16)
    slots = torch.randperm(9 * size)[:rows]
    at = torch_composites.places_of(slots, pool)
    fused = torch.randn(rows, heads + 2 * kv_heads, width)
    q, k, v = fused.split((heads, kv_heads, kv_heads), dim=1)
    expected = pool.clone(), pool.clone()
    ops.append_kv(k, v, slots, *expected)
    for name, append in torch_composites.append_ways(rows).items():
        pools = pool.clone(), pool.clone()
        append(k, v, at, *pools)
        assert torch.equal(pools[0], expected[0]) and torch.equal(pools[1], expected[1]), name
    assert ("row by row" in torch_composites.append_ways(rows)) == (rows <= 8)
    positions = torch.arange(rows, dtype=torch.int32)
    angles = torch.rand(rows, width // 2)
    table = torch.cat([angles.cos(), angles.sin()], dim=1)
    cos, sin = torch_composites.cos_and_sin(positions, table)
    turned = q.clone()
    expected = pool.clone(), pool.clone()
    ops.rope_append_kv(turned, k, v, positions, table, slots, *expected)
    for name, rope in torch_composites.rope_ways(rows).items():
        qk, pools = fused[:, : heads + kv_heads].clone(), (pool.clone(), pool.clone())
        rope(qk, heads, v, cos, sin, at, *pools)
        torch.testing.assert_close(qk[:, :heads], turned, msg=name)
        torch.testing.assert_close(pools, expected, msg=name)


def test_ways_to_copy_pages_agree():
    pools = torch.randn(2, 3, 10, 2, 4, 8).unbind(0)
    pairs = torch.randperm(10).to(torch.int32).view(5, 2)[:3]
    expected = pools[0].clone(), pools[1].clone()
    ops.copy_pages(pairs, *expected)
    for name, copy in torch_composites.COPY_PAGES.items():
        ours = pools[0].clone(), pools[1].clone()
        copy(pairs, *ours)
        assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1]), name


@pytest.mark.parametrize("sequences", [1, 7])
def test_ways_of_the_decode_loop_agree(sequences):
    draft = torch.randint(0, 2, (sequences * 3,), dtype=torch.int32)
    target = torch.randint(0, 2, (sequences * 4,), dtype=torch.int32)
    results = [f(draft, target, sequences, 3) for f in torch_composites.VERIFY_DRAFT.values()]
    for accepted, tokens in results[1:]:
        assert accepted.tolist() == results[0][0].tolist()
        assert tokens.tolist() == results[0][1].tolist()
    history = torch.randint(0, 9, (sequences, 64), dtype=torch.int32)
    lengths = torch.randint(5, 50, (sequences,), dtype=torch.int32)
    left = torch.randint(0, 6, (sequences,), dtype=torch.int32)
    limits = torch.full_like(lengths, 52)
    drafts = torch.randint(0, 9, (sequences, 4), dtype=torch.int32)
    num_draft = torch.randint(0, 5, (sequences,), dtype=torch.int32)
    table = torch.randperm(sequences * 8, dtype=torch.int32).view(sequences, 8)
    arguments = (history, lengths, left, limits, drafts, num_draft, table, 8)
    first, second = (fill(*arguments) for fill in loop_composites.FILL_ROWS.values())
    for a, b in zip(first, second, strict=True):
        assert a.tolist() == b.tolist()
    fed, targets = torch.randint(0, 3, (2, sequences * 5))
    stops = torch.full((sequences, 2), 2, dtype=torch.int32)
    states = []
    for advance in loop_composites.ADVANCE_SEQUENCES.values():
        states.append((history.clone(), lengths.clone(), left.clone() + 1))
        advance(fed, targets, stops, *states[-1])
    for a, b in zip(*states, strict=True):
        assert torch.equal(a, b)


def _expected_chances(logits: torch.Tensor, temperature: float, k: int, p: float) -> torch.Tensor:
    """float64, one row, by the definition: sorted, cut at k, cut where p is reached."""
    order = torch.argsort(logits.double(), descending=True)
    chosen = order[: k or len(order)]
    chances = torch.softmax(logits.double()[chosen] / temperature, 0)
    kept = 1 + int((chances.cumsum(0) < p).sum())
    full = torch.zeros(len(logits), dtype=torch.float64)
    full[chosen[:kept]] = chances[:kept] / chances[:kept].sum()
    return full


@pytest.mark.parametrize(
    ("name", "k", "p"),
    [(name, 5, 1.0) for name in torch_sampling.TOP_K]
    + [(name, 5, 0.8) for name in torch_sampling.TOP_K]
    + [(name, 0, 0.8) for name in torch_sampling.TOP_P],
)
def test_ways_to_sample_draw_from_the_same_distribution(name, k, p):
    torch.manual_seed(3)
    row, draws = torch.randn(128) * 2, 20_000
    logits = row.expand(draws, -1).contiguous()
    sample = {**torch_sampling.TOP_K, **torch_sampling.TOP_P}[name]
    seen = torch.bincount(sample(logits, 0.9, k, p), minlength=128) / draws
    expected = _expected_chances(row, 0.9, k, p)
    # Five standard deviations of a count; tokens that may not be drawn never are.
    allowed = 5 * (expected * (1 - expected) / draws).sqrt()
    assert ((seen - expected).abs() <= allowed).all()
    kept = torch_sampling.kept_mask(row[None], 0.9, k, p)[0]
    assert torch.equal(kept, expected > 0)


def test_top_k_of_blocks_finds_neighbours_in_one_block():
    logits = torch.randn(3, 1024)
    logits[:, 70:90] += 100  # many of the largest in one block of 64 columns
    for k in (1, 8, 30):
        values, ids = torch_sampling.top_k_of_blocks(logits, k)
        assert torch.equal(values, torch.topk(logits, k).values)
        assert torch.equal(logits.gather(1, ids), values)


def test_ways_to_scan_a_text_agree():
    random = np.random.default_rng(0)
    for case in range(300):
        length = int(random.integers(1, 60))
        tokens = random.integers(0, 3 if case % 2 else 300, length, dtype=np.int32)
        drafts = {name: f(tokens, 2, 5, 4).tolist() for name, f in text_scan.WAYS.items()}
        assert len({tuple(draft) for draft in drafts.values()}) == 1, (tokens.tolist(), drafts)
    tokens = texts.repeating_text(2000, 1).numpy()
    assert all(len(f(tokens, 2, 8, 16)) == 16 for f in text_scan.WAYS.values())


def test_a_suffix_between_tokens_is_no_match():
    # The bytes of 0x01010101 occur at every byte of this text, the pair only at whole tokens.
    tokens = np.array([0x01010100, 0x01010101, 0x00010101, 7, 0x01010101, 0x00010101], np.int32)
    for name, propose in text_scan.WAYS.items():
        assert propose(tokens, 1, 2, 2).tolist() == [7, 0x01010101], name
    shifted = np.array([0x02010000, 0x04030000, 0x00000201, 0x00000403], np.int32)
    shifted = np.concatenate([shifted, np.array([0x01000002, 0x03000002], np.int32)])
    found = {tuple(f(shifted, 1, 2, 2).tolist()) for f in text_scan.WAYS.values()}
    assert found == {()}


def test_ways_to_hash_blocks_agree():
    random = np.random.default_rng(0)
    tokens = random.integers(0, 50000, 1000, dtype=np.int32)
    for index in block_hash.all_ways(64).values():
        index.insert(tokens, np.arange(20, dtype=np.int32))
        assert index.match(tokens) == list(range(1000 // 64))
        other = tokens.copy()
        other[64 * 7 + 3] += 1
        assert index.match(other) == list(range(7))
        assert index.match(np.roll(tokens, 64)) == []
        longer = np.concatenate([tokens[:960], tokens[:960]])
        assert index.match(longer) == list(range(15))
        index.clear()
        assert index.match(tokens) == []


def test_ways_of_a_product_agree():
    weight, x = torch.randn(96, 64), torch.randn(5, 64)
    expected = x @ weight.T
    found = torch_linear.head_ways(weight)
    assert list(found) == ["float32", "bfloat16", "int8"]
    for multiply in found.values():
        assert harness.compare(multiply(x), expected, torch_linear.TOLERANCE).ok


def test_a_walk_of_products_agrees_in_every_dtype():
    weights = [torch.randn(64, 96), torch.randn(96, 64), torch.randn(128, 64)]
    exact = torch_linear.TorchLinear(weights, torch.float32)
    others = {
        "bf16": torch_linear.TorchLinear(weights, torch.bfloat16),
        "int8": torch_linear.TorchInt8Linear(weights),
        "int4": torch_linear.TorchInt4Linear([*map(_of_16_values, weights[:2]), weights[2]]),
    }
    for name, multiply in others.items():
        plain = exact
        if name == "int4":
            rounded = [*map(_of_16_values, weights[:2]), weights[2]]
            plain = torch_linear.TorchLinear(rounded, torch.float32)
        for index, weight in enumerate(weights):
            x = torch.randn(3, weight.shape[1])
            found = harness.compare(
                multiply(index, x).float(), plain(index, x), torch_linear.TOLERANCE
            )
            assert found.ok, (name, index, found)


def _of_16_values(weight: torch.Tensor) -> torch.Tensor:
    """Rounded as a 4-bit file has it: 16 values in each 32 inputs."""
    groups = weight.view(len(weight), -1, 32)
    least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    steps = ((groups - least) / (most - least) * 15).round()
    return (least + steps * (most - least) / 15).view(weight.shape)


def test_formulations_on_the_cpu_have_masks_to_add():
    q = torch.randn(1, 4, 3, 16)
    assert "gqa, additive mask" in torch_attention.formulations(q, 2, 20, 0.25)
    assert len(torch_attention.formulations(q[:, :, :1].contiguous(), 2, 20, 0.25)) == 2
