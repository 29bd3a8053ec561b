"""LayerStack: what it refuses, and that nothing has changed then."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from stateful_kv._native import _C
from stateful_kv.models.llama import _pass_tensors
from tests.bindings.test_layer_stack import (
    METHODS,
    stack_arguments,
    stack_of,
    through_ops,
    through_stack,
)
from tests.ops.comparing import assert_same_bits
from tests.ops.test_decoder_layers import (
    BATCHES,
    CONFIG,
    PAGE_SIZE,
    PAGES,
    Pools,
    make_batch,
    make_model,
)


def set_value(at: Any, value: int) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[at] = value
        return tensor

    return change


def spread(tensor: Tensor) -> Tensor:
    """The same values with gaps between them."""
    wide = torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)
    wide[..., 0] = tensor
    return wide[..., 0]


BAD_BATCHES: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
    "token_ids": {
        "dtype": Tensor.float,
        "rank": lambda t: t[None],
        "stride": spread,
        "negative": set_value(0, -1),
        "past the end": set_value(1, CONFIG.vocab_size),
        "least": set_value(0, -(2**63)),
        "largest": set_value(0, 2**63 - 1),
    },
    "positions": {
        "dtype": Tensor.long,
        "size": lambda t: t[1:],
        "negative": set_value(0, -(2**31)),
        "past the table": set_value(1, CONFIG.max_position),
    },
    "slots": {
        "dtype": Tensor.int,
        "size": lambda t: t[1:],
        "stride": spread,
        "negative": set_value(0, -2),
        "least": set_value(0, -(2**63)),
        "past the end": set_value(0, PAGES * PAGE_SIZE),
        "largest": set_value(0, 2**63 - 1),
    },
    "page_table": {
        "dtype": Tensor.long,
        "rank": lambda t: t[0],
        "rows": lambda t: t[1:],
        "stride": spread,
        "negative": set_value((0, 0), -1),
        "past the end": set_value((0, 1), PAGES),
        "largest": set_value((0, 0), 2**31 - 1),
    },
    "seq_lens": {
        "dtype": Tensor.long,
        "size": lambda t: t[1:],
        "below the new rows": set_value(0, 4),
        "past the pages": set_value(1, 65),
        "largest": set_value(1, 2**31 - 1),
        "least": set_value(1, -(2**31)),
    },
    "query_offsets": {
        "dtype": Tensor.long,
        "empty": lambda t: t[:0],
        "not from 0": set_value(0, 1),
        "descending": set_value(1, -1),
        "past the rows": set_value(2, 7),
        "largest": set_value(1, 2**31 - 1),
        "least": set_value(1, -(2**31)),
    },
    "logit_rows": {
        "dtype": Tensor.int,
        "rank": lambda t: t[None],
        "negative": set_value(0, -1),
        "past the end": set_value(0, 6),
        "more than rows": lambda t: torch.zeros(7, dtype=torch.int64),
        "very many": lambda t: torch.zeros(1, dtype=torch.int64).expand(2**40),
    },
}
BAD_BATCH_TABLE = [(name, label) for name, changes in BAD_BATCHES.items() for label in changes]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "label"), BAD_BATCH_TABLE)
def test_bad_batch(name: str, label: str, method: str) -> None:
    """Refused before a kernel runs; a pass afterwards is as if nothing had happened."""
    model, batch, pools = make_model("int8"), make_batch(*BATCHES["verify"]), Pools(torch.int8)
    bad = replace(batch, **{name: BAD_BATCHES[name][label](getattr(batch, name))})
    before = deepcopy(pools)
    extra = (5,) if method == "forward_top_k" else ()
    with pytest.raises(
        (TypeError, ValueError, IndexError), match=rf"^LayerStack.{method}: \w+: expected .*, got "
    ) as error:
        getattr(stack_of(model), method)(*_pass_tensors(bad, pools), *extra)
    # Where two sizes contradict each other the message may name either of the two.
    if label not in ("size", "rows", "rank", "empty"):
        assert f": {name}: expected" in str(error.value)
    is_token_value = name == "token_ids" and label not in ("dtype", "rank", "stride")
    assert error.type is (
        TypeError if label == "dtype" else IndexError if is_token_value else ValueError
    )
    for pool, expected in zip(pools.tensors(), before.tensors(), strict=True):
        assert_same_bits(pool, expected)
    for result, other in zip(
        through_stack(model, batch, pools, method),
        through_ops(model, batch, pools, method),
        strict=True,
    ):
        assert_same_bits(result, other)


BAD_POOLS: dict[str, tuple[str, Callable[[Tensor], Tensor | None]]] = {
    "k of another dtype": ("k", Tensor.double),
    "k of fewer layers": ("k", lambda t: t[1:]),
    "k of another rank": ("k", lambda t: t[0]),
    "v of another dtype": ("v", Tensor.half),
    "v of another size": ("v", lambda t: t[:, 1:]),
    "v with gaps": ("v", spread),
    "no k_scales": ("k_scales", lambda t: None),
    "v_scales of another dtype": ("v_scales", Tensor.double),
    "v_scales of another size": ("v_scales", lambda t: t[..., 1:].clone()),
}


@pytest.mark.parametrize("label", BAD_POOLS)
def test_bad_pools(label: str) -> None:
    name, change = BAD_POOLS[label]
    model, batch, pools = make_model("int8"), make_batch(*BATCHES["verify"]), Pools(torch.int8)
    setattr(pools, name, change(getattr(pools, name)))
    with pytest.raises(
        (TypeError, ValueError), match=r"^LayerStack.forward: \w+: expected .*, got"
    ):
        stack_of(model).forward(*_pass_tensors(batch, pools))


@pytest.mark.parametrize("shape", [(3, 12, 1, 16, 32), (3, 12, 2, 16, 48), (2, 12, 2, 16, 32)])
def test_pools_of_another_model(shape: tuple[int, ...]) -> None:
    model, batch, pools = make_model("int8"), make_batch(*BATCHES["verify"]), Pools(torch.float32)
    pools.k, pools.v = torch.zeros(2, *shape)
    with pytest.raises(
        ValueError, match=r"k_pools: expected num_layers = 3, Hk = 2, D = 32, got float32\["
    ):
        stack_of(model).run(*_pass_tensors(batch, pools))


def test_pools_that_share_memory() -> None:
    model, batch, pools = make_model("int8"), make_batch(*BATCHES["verify"]), Pools(torch.float32)
    pools.v = pools.k
    with pytest.raises(ValueError, match="v_pools: expected memory of its own"):
        stack_of(model).run(*_pass_tensors(batch, pools))


@pytest.mark.parametrize("k", [0, -1, 65, CONFIG.vocab_size + 1, 2**62])
def test_bad_k(k: int) -> None:
    model, batch, pools = make_model("int8"), make_batch(*BATCHES["verify"]), Pools(torch.float32)
    with pytest.raises(ValueError, match=r"LayerStack.forward_top_k: k: expected a number"):
        stack_of(model).forward_top_k(*_pass_tensors(batch, pools), k)


@pytest.mark.parametrize("kind", ["without memory", "negated", "sparse", "on another device"])
def test_tensors_that_are_not_plain(kind: str) -> None:
    model, batch, pools = make_model("int8"), make_batch(*BATCHES["verify"]), Pools(torch.float32)
    if kind == "negated":
        pools.k = torch._neg_view(pools.k)
    elif kind == "without memory":
        pools.k = torch._efficientzerotensor(pools.k.shape)
    elif kind == "sparse":
        pools.k = pools.k.to_sparse()
    else:
        pools.k = pools.k.to("meta")
    with pytest.raises(ValueError, match=r"LayerStack.run: k_pools: expected .*, got "):
        stack_of(model).run(*_pass_tensors(batch, pools))


def without(index: int) -> Callable[[list[Any]], list[Any]]:
    return lambda values: [None if i == index else value for i, value in enumerate(values)]


BAD_STACKS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "no layers": ("layers", lambda v: []),
    "a tensor missing": ("layers", lambda v: v[1:]),
    "no attn_norm": ("layers", without(20)),
    "no weight of o": ("layers", without(27)),
    "no scales": ("layers", without(2)),
    "no down": ("layers", without(16)),
    "layers of two sizes": ("layers", lambda v: [*v[:36], v[16][:, 1:].contiguous(), *v[37:]]),
    "q_norm in one layer": ("layers", lambda v: [*v[:5], torch.ones(32), *v[6:]]),
    "a zero tensor": ("layers", lambda v: [torch._efficientzerotensor(96), *v[1:]]),
    "cos_sin of another D": ("cos_sin", lambda v: v[:, :16].contiguous()),
    "cos_sin of an odd D": ("cos_sin", lambda v: v[:, :31].contiguous()),
    "embedding of another E": ("embedding", lambda v: v[:, 32:].contiguous()),
    "embedding in half": ("embedding", Tensor.half),
    "embedding with gaps": ("embedding", spread),
    "norm of another E": ("norm", lambda v: v[1:]),
    "negated norm": ("norm", torch._neg_view),
    "head without weight": ("head", without(0)),
    "head of three": ("head", lambda v: v[1:]),
    "more logits": ("num_logits", lambda v: v + 16),
    "no logits": ("num_logits", lambda v: 0),
    "negative logits": ("num_logits", lambda v: -(2**63)),
    "no heads": ("num_heads", lambda v: 0),
    "many heads": ("num_heads", lambda v: 2**62),
    "heads that do not share": ("num_heads", lambda v: 7),
    "no kv heads": ("num_kv_heads", lambda v: 0),
    "negative kv heads": ("num_kv_heads", lambda v: -2),
    "negative eps": ("norm_eps", lambda v: -1.0),
    "eps infinite as float32": ("norm_eps", lambda v: 1e39),
    "scale not a number": ("scale", lambda v: float("nan")),
    "scale infinite as float32": ("scale", lambda v: -1e39),
    "negative window": ("sliding_window", lambda v: -1),
}


@pytest.mark.parametrize("label", BAD_STACKS)
def test_bad_weights(label: str) -> None:
    name, change = BAD_STACKS[label]
    arguments = stack_arguments(make_model("int8"))
    _C.LayerStack(**arguments)
    arguments[name] = change(arguments[name])
    with pytest.raises((TypeError, ValueError), match=r"^LayerStack: .*expected .*, got "):
        _C.LayerStack(**arguments)
