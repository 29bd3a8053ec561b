"""LayerStack: the bits of the composed ops in every kind of batch, from many threads."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stateful_kv._native import _C
from stateful_kv.kv.batch import Batch
from stateful_kv.models.llama import LlamaModel, _pass_tensors
from tests.ops.comparing import assert_same_bits
from tests.ops.test_decoder_layers import (
    BATCHES,
    CONFIG,
    Pools,
    make_batch,
    make_model,
)
from tests.ops.test_quantized_linear import FORMATS

METHODS = ("run", "forward", "forward_top_k")
Results = tuple[Tensor, ...]


def stack_of(model: LlamaModel) -> _C.LayerStack:
    assert model._stack is not None
    return model._stack


def through_stack(model: LlamaModel, batch: Batch, pools: Pools, method: str) -> Results:
    """What a method gives, and the pools afterwards."""
    own = deepcopy(pools)
    extra = (5,) if method == "forward_top_k" else ()
    result = getattr(stack_of(model), method)(*_pass_tensors(batch, own), *extra)
    return (*(result if isinstance(result, tuple) else (result,)), *own.tensors())


def through_ops(model: LlamaModel, batch: Batch, pools: Pools, method: str) -> Results:
    """The same, op by op."""
    own, weights = deepcopy(pools), model.weights
    hidden = model._run_ops(weights.embedding[batch.token_ids], batch, own)
    result: Results = (hidden,)
    if method == "forward":
        result = (weights.head(hidden, norm_weight=weights.norm, norm_eps=CONFIG.rms_norm_eps),)
    elif method == "forward_top_k":
        result = weights.head.top_k(hidden, 5, weights.norm, CONFIG.rms_norm_eps)
    return (*result, *own.tensors())


def assert_equal_ways(model: LlamaModel, batch: Batch, pools: Pools) -> None:
    for method in METHODS:
        results = through_stack(model, batch, pools, method)
        expected = through_ops(model, batch, pools, method)
        assert len(results) == len(expected)
        for result, other in zip(results, expected, strict=True):
            assert_same_bits(result, other, method)


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("weight_format", FORMATS)
def test_same_bits_as_the_ops(weight_format: str, kind: str) -> None:
    assert_equal_ways(make_model(weight_format), make_batch(*BATCHES[kind]), Pools(torch.float16))


@pytest.mark.parametrize(("biases", "qk_norm"), [(True, False), (False, True), (True, True)])
def test_same_bits_in_every_family(biases: bool, qk_norm: bool) -> None:
    model = make_model("int8", biases, qk_norm)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int8):
        for kind in BATCHES.values():
            assert_equal_ways(model, make_batch(*kind), Pools(dtype))


def test_same_bits_for_every_number_of_rows() -> None:
    """Up and down, so that the kept memory serves smaller and larger passes by turns."""
    model, pools = make_model("int4"), Pools(torch.float16)
    for num_rows in [1, 33, 2, 32, *range(3, 32)]:
        wanted = list(range(0, num_rows, 1 + num_rows // 7))
        assert_equal_ways(model, make_batch([num_rows + 9], [num_rows], wanted), pools)


def test_a_sliding_window() -> None:
    weights = make_model("int8").weights
    model = LlamaModel(replace(CONFIG, sliding_window=11), weights)
    batch, pools = make_batch(*BATCHES["extend"]), Pools(torch.float32)
    assert_equal_ways(model, batch, pools)
    everything = through_stack(LlamaModel(CONFIG, weights), batch, pools, "run")
    assert not torch.equal(through_stack(model, batch, pools, "run")[0], everything[0])


@pytest.mark.parametrize("logit_rows", [[5, 0, 5, 3], [2], [], [0, 1, 2, 3, 4, 5]])
def test_logit_rows_in_any_order(logit_rows: list[int]) -> None:
    batch = make_batch([33, 20], [5, 1], logit_rows)
    assert_equal_ways(make_model("int8"), batch, Pools(torch.float32))


def test_one_layer() -> None:
    """The first layer is the last one as well: its input is memory that the result may take."""
    weights = make_model("int8").weights
    config = replace(CONFIG, num_layers=1)
    model = LlamaModel(config, replace(weights, layers=weights.layers[:1]))
    pools = Pools(torch.float32)
    pools.k, pools.v = pools.k[:1].clone(), pools.v[:1].clone()
    assert_equal_ways(model, make_batch(*BATCHES["verify"]), pools)


def test_threads_do_not_matter(set_num_threads: Callable[[int], None]) -> None:
    model, batch, pools = make_model("int4"), make_batch(*BATCHES["extend"]), Pools(torch.int8)
    results = []
    for threads in (1, 2, 3):
        set_num_threads(threads)
        results.append(through_stack(model, batch, pools, "forward"))
    for other in results[1:]:
        for result, expected in zip(other, results[0], strict=True):
            assert_same_bits(result, expected)


def test_the_model_takes_its_way_through_the_stack() -> None:
    model, batch, pools = make_model("int8"), make_batch(*BATCHES["verify"]), Pools(torch.float16)
    logits = model.forward(batch, deepcopy(pools))
    ids, values = model.forward_top_k(batch, deepcopy(pools), 5)
    assert_same_bits(logits, through_ops(model, batch, pools, "forward")[0])
    expected_ids, expected_values, *_ = through_ops(model, batch, pools, "forward_top_k")
    assert torch.equal(ids, expected_ids)
    assert_same_bits(values, expected_values)
    assert not logits.requires_grad


def test_results_are_not_overwritten_by_the_next_pass() -> None:
    model, pools = make_model("int8"), Pools(torch.float16)
    first = [through_stack(model, make_batch(*BATCHES["verify"]), pools, m)[0] for m in METHODS]
    copies = [result.clone() for result in first]
    for method in METHODS:
        through_stack(model, make_batch(*BATCHES["extend"]), pools, method)
    for result, copy in zip(first, copies, strict=True):
        assert_same_bits(result, copy)


def test_token_ids_of_both_widths() -> None:
    model, batch, pools = make_model("int8"), make_batch(*BATCHES["verify"]), Pools(torch.float32)
    narrow = replace(batch, token_ids=batch.token_ids.int())
    for result, expected in zip(
        through_stack(model, narrow, pools, "run"),
        through_stack(model, batch, pools, "run"),
        strict=True,
    ):
        assert_same_bits(result, expected)


def stack_arguments(model: LlamaModel) -> dict[str, Any]:
    """Arguments of the constructor for a model."""
    layers: list[Tensor | None] = []
    for layer in model.weights.layers:
        layers += layer.tensors() or []
    (part,) = model.weights.head.parts  # type: ignore[union-attr]
    return {
        "layers": layers,
        "cos_sin": model.weights.cos_sin,
        "embedding": model.weights.embedding,
        "norm": model.weights.norm,
        "head": [part.weight, part.scales, part.minimums, None],
        "num_logits": CONFIG.vocab_size,
        "num_heads": CONFIG.num_heads,
        "num_kv_heads": CONFIG.num_kv_heads,
        "norm_eps": 1e-5,
        "scale": 0.1,
        "sliding_window": 0,
    }


def test_weights_stay_alive() -> None:
    """Neither a dropped model nor a tensor that gets other memory takes the weights away."""
    model, batch, pools = make_model("int8"), make_batch(*BATCHES["verify"]), Pools(torch.float32)
    expected = through_ops(model, batch, pools, "forward")
    arguments = stack_arguments(model)
    arguments |= {"norm_eps": CONFIG.rms_norm_eps, "scale": CONFIG.head_dim**-0.5}
    stack = _C.LayerStack(**arguments)
    for tensor in (*arguments["layers"], arguments["embedding"]):
        if tensor is not None:
            tensor.set_(torch.zeros(0, dtype=tensor.dtype))
    del model, arguments, tensor
    gc.collect()
    clutter = [torch.full((1000,), 7.0) for _ in range(100)]
    result = stack.forward(*_pass_tensors(batch, pools))
    assert_same_bits(result, expected[0])
    assert len(clutter) == 100


def test_threads_at_once() -> None:
    """Each with pools of its own: nobody waits, nobody is refused, all bits are right."""
    model = make_model("int4")
    jobs = []
    for kind in ("decode", "verify", "extend", "no logits"):
        batch, pools = make_batch(*BATCHES[kind]), Pools(torch.float16)
        jobs.append((batch, pools, through_ops(model, batch, pools, "forward_top_k")))
    failures: list[str] = []

    def work(number: int) -> None:
        for turn in range(40):
            batch, pools, expected = jobs[(number + turn) % len(jobs)]
            result = through_stack(model, batch, pools, "forward_top_k")
            if not all(
                a.numpy().tobytes() == b.numpy().tobytes()
                for a, b in zip(result, expected, strict=True)
            ):
                failures.append(f"thread {number}, turn {turn}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a fork with threads
def test_a_forked_child_computes_while_a_parent_pass_is_under_way() -> None:
    model, batch, pools = make_model("int8"), make_batch(*BATCHES["extend"]), Pools(torch.float16)
    expected = through_ops(model, batch, pools, "forward")[0].numpy().tobytes()
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            through_stack(model, batch, pools, "forward")

    thread = threading.Thread(target=work)
    thread.start()
    try:
        codes = []
        for _ in range(5):
            child = os.fork()
            if child == 0:
                os._exit(0 if child_result(model, batch, pools) == expected else 1)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    finally:
        stop.set()
        thread.join()
    assert codes == [0] * 5


def child_result(model: LlamaModel, batch: Batch, pools: Pools) -> bytes:
    """Bytes of the logits, without what a fork does not carry over: torch's own threads."""
    result = stack_of(model).forward(*_pass_tensors(batch, pools))
    return np.asarray(result).tobytes()


def test_other_threads_run_during_a_pass() -> None:
    """The GIL is free: a counter in another thread goes on while a long pass computes."""
    model, pools = make_model("fp32"), Pools(torch.float32)
    batch = make_batch([64], [64], list(range(64)))
    count, stop = [0], threading.Event()

    def tick() -> None:
        while not stop.is_set():
            count[0] += 1

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        progress = []
        for _ in range(20):
            before = count[0]
            stack_of(model).forward(*_pass_tensors(batch, pools))
            progress.append(count[0] - before)
    finally:
        stop.set()
        thread.join()
    assert max(progress) > 0
