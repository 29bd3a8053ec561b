"""A verify of 1..33 rows gives each row the logits of a plain decode, on one to three threads.

On a small random model and on the default one: the forward pass as the engine calls it, without
the engine.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stateful_kv.models.files.loading import load_model
from stateful_kv.models.llama import LlamaModel
from tests.e2e.tiny import tiny_llama
from tests.models.tiny import PlainCache, plain_batch, plain_cache
from tests.ops.comparing import assert_same_bits

PAST = 45  # tokens before the rows; pages of 16 are left at many places
MOST = 33
THREADS = (1, 2, 3)

SetThreads = Callable[[int], None]


def logits_of(model: LlamaModel, cache: PlainCache, tokens: list[int], past: int) -> Tensor:
    """Logits of all rows of an extend, decode or verify after `past` tokens."""
    return model.forward(plain_batch(cache, [tokens], [past]), cache)


def check_verify_equals_decode(
    model: LlamaModel, set_num_threads: SetThreads, kv_dtype: torch.dtype = torch.float32
) -> None:
    random = torch.Generator().manual_seed(7)
    tokens = torch.randint(8, model.config.vocab_size, (PAST + MOST,), generator=random).tolist()
    pools = plain_cache(model.config, num_pages=-(-len(tokens) // 16))
    cache = PlainCache(pools.k.to(kv_dtype), pools.v.to(kv_dtype))
    set_num_threads(1)
    logits_of(model, cache, tokens[:PAST], 0)
    decoded = torch.cat(
        [logits_of(model, cache, [tokens[at]], at) for at in range(PAST, PAST + MOST)]
    )
    for threads in THREADS:
        set_num_threads(threads)
        for rows in range(1, MOST + 1):
            # Another part of the text each time; what lies behind it is not there yet.
            start = PAST + 11 * (rows + threads) % (MOST - rows + 1)
            pools = PlainCache(cache.k.clone(), cache.v.clone())
            forget_from(pools, start)
            verified = logits_of(model, pools, tokens[start : start + rows], start)
            expected = decoded[start - PAST : start - PAST + rows]
            assert_same_bits(verified, expected, f"{rows} rows on {threads} threads")


def forget_from(cache: PlainCache, length: int) -> None:
    """Makes the slots of all tokens from this position on NaN."""
    page, offset = divmod(length, cache.k.shape[3])
    for pool in (cache.k, cache.v):
        pool[:, page, :, offset:] = torch.nan
        pool[:, page + 1 :] = torch.nan


def test_small_model(set_num_threads: SetThreads) -> None:
    check_verify_equals_decode(tiny_llama(), set_num_threads)


def test_default_model(set_num_threads: SetThreads) -> None:
    check_verify_equals_decode(load_model("smollm2").model, set_num_threads, torch.float16)


@pytest.mark.parametrize("rows", [7, 24])
def test_planted_bug_is_caught(rows: int, set_num_threads: SetThreads) -> None:
    """A model that rounds its logits otherwise for one number of rows."""
    model = tiny_llama()

    class Broken(LlamaModel):
        def forward(self, batch, cache):  # type: ignore[no-untyped-def]
            logits = super().forward(batch, cache)
            return logits * (1 + 1e-6) if len(logits) == rows else logits

    with pytest.raises(AssertionError, match=f"{rows} rows on 1 threads"):
        check_verify_equals_decode(Broken(model.config, model.weights), set_num_threads)
