"""`generate` of transformers on paged KV says what it says on a `DynamicCache`, token for token.

The models are tiny and random, with weights large enough that their greedy text does not repeat.
"""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stateful_kv.errors import OutOfPagesError

transformers = pytest.importorskip("transformers")
from stateful_kv.adapters import hf  # noqa: E402  (needs transformers)

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = 24
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {}),
    # Every other layer sees a window; scores and logits are capped.
    "gemma2": ("Gemma2", {"sliding_window": WINDOW, "query_pre_attn_scalar": 20}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
}
NUM_NEW = 12


def make_model(family: str, attention: str, **more: Any) -> Any:
    """Equal weights for equal arguments; `eager` is the attention that knows soft caps."""
    name, extra = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **extra, **more})
    torch.manual_seed(7)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    model.set_attn_implementation(attention)
    return model


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def paged(model: Any, kv_tokens: int = 1024, page_size: int = 16, **more: Any) -> Any:
    return hf.PagedCache(model.config, kv_tokens, page_size, **more)


def dynamic(model: Any) -> Any:
    return transformers.DynamicCache(config=model.config)


def text(seed: int, *shape: int) -> Tensor:
    return torch.randint(3, 300, shape, generator=torch.Generator().manual_seed(seed))


def say(model: Any, cache: Any, ids: Tensor, mask: Tensor | None = None, **more: Any) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"do_sample": False, "max_new_tokens": NUM_NEW, **more}
    options["min_new_tokens"] = options["max_new_tokens"]
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **options)


def turns(model: Any, cache: Any) -> list[Tensor]:
    """Three turns, and after the second one a branch that takes another third turn."""
    ids, said = text(0, 1, 61), []
    for turn in range(3):
        if turn == 2:
            branch, other = copy.deepcopy(cache), torch.cat([ids, text(9, 1, 7)], 1)
            said.append(say(model, branch, other))
        ids = say(model, cache, torch.cat([ids, text(turn + 1, 1, 5)], 1))
        said.append(ids)
    return [*said, say(model, branch, torch.cat([said[2], text(4, 1, 3)], 1))]


def test_turns_and_forks_say_the_same(family: str) -> None:
    cache_of: Callable[[Any], Any]
    said = []
    for attention, cache_of in (("eager", dynamic), ("stateful_kv", paged)):
        model = make_model(family, attention)
        said.append(turns(model, cache_of(model)))
    assert [ids.tolist() for ids in said[0]] == [ids.tolist() for ids in said[1]]
    assert len(set(said[0][-1][0, -NUM_NEW:].tolist())) > NUM_NEW // 2


def padded(lens: list[int], seed: int) -> tuple[Tensor, Tensor]:
    """A batch that is padded on the left, and its mask."""
    mask = torch.stack([(torch.arange(max(lens)) >= max(lens) - n).long() for n in lens])
    return text(seed, len(lens), max(lens)) * mask, mask


def padded_turns(model: Any, cache: Any) -> list[Tensor]:
    """Two turns; the messages of the second are of unequal lengths too."""
    ids, mask = padded([5, 31, 17], 3)
    first = say(model, cache, ids, mask)
    more, more_mask = padded([9, 2, 4], 4)
    mask = torch.cat([mask, torch.ones(3, NUM_NEW, dtype=torch.long), more_mask], 1)
    return [first, say(model, cache, torch.cat([first, more], 1), mask)]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_padded_batches_say_the_same(name: str) -> None:
    model = make_model(name, "eager")
    expected = padded_turns(model, dynamic(model))
    model.set_attn_implementation("stateful_kv")
    cache = paged(model)
    got = padded_turns(model, cache)
    assert [ids.tolist() for ids in got] == [ids.tolist() for ids in expected]
    # Only tokens are in the pool; the last one that was chosen has no KV.
    lens = [cache._batch.shared.kv.committed_len(i) for i in cache._batch._ids]
    assert lens == [5 + 9 + 2 * NUM_NEW - 1, 31 + 2 + 2 * NUM_NEW - 1, 17 + 4 + 2 * NUM_NEW - 1]
    assert cache.get_seq_length() == 31 + 9 + 2 * NUM_NEW - 1
    assert cache._batch.shared.kv.check_integrity() is None


@pytest.mark.parametrize("name", ["gemma2", "mistral"])
def test_windows_of_padded_batches_say_the_same(name: str) -> None:
    """One turn: behind padding in the middle, windows of a `DynamicCache` count the padding too."""
    ids, mask = padded([5, 31, 40], 3)
    model = make_model(name, "eager")
    expected = say(model, dynamic(model), ids, mask)
    model.set_attn_implementation("stateful_kv")
    assert torch.equal(say(model, paged(model), ids, mask), expected)


def test_a_row_says_what_it_says_alone() -> None:
    model = make_model("llama", "stateful_kv")
    ids, mask = padded([5, 31, 17], 3)
    together = say(model, paged(model), ids, mask)
    for row, length in enumerate([5, 31, 17]):
        alone = say(model, paged(model), ids[row : row + 1, -length:])
        assert torch.equal(together[row, -NUM_NEW:], alone[0, -NUM_NEW:])


@pytest.mark.parametrize("is_tied", [False, True])
def test_drafts_are_taken_back(family: str, is_tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tied weights the Gemma repeats itself, so that all its drafts are accepted."""
    ids = text(0, 1, 15).repeat(1, 3)
    model = make_model(family, "eager", tie_word_embeddings=is_tied)
    expected = say(model, dynamic(model), ids)
    model.set_attn_implementation("stateful_kv")
    cache, passes, crop = paged(model), [], hf.PagedCache.crop

    def record(self: Any, num: int) -> None:
        passes.append(num)
        crop(self, num)

    monkeypatch.setattr(hf.PagedCache, "crop", record)
    got = say(model, cache, ids, prompt_lookup_num_tokens=4)
    assert got.tolist() == expected.tolist()
    assert any(num != 0 for num in passes)
    if is_tied and family == "gemma2":
        assert len(passes) < NUM_NEW / 2  # which takes a pass for each token without drafts
    assert cache.get_seq_length() == got.shape[1] - 1
    # And a turn without drafts from the cache that was cropped.
    longer = torch.cat([got, text(1, 1, 5)], 1)
    again = say(model, cache, longer)
    model.set_attn_implementation("eager")
    assert torch.equal(again, say(model, dynamic(model), longer))


def test_beams_and_samples_say_the_same() -> None:
    model = make_model("llama", "eager")
    ids = text(0, 2, 21)
    ways = ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3, "top_k": 20})
    said: list[list[Tensor]] = []
    for attention, cache_of in (("eager", dynamic), ("stateful_kv", paged)):
        model.set_attn_implementation(attention)
        said.append([])
        for way in ways:
            torch.manual_seed(1)
            said[-1].append(say(model, cache_of(model), ids, **way))
    assert [ids.tolist() for ids in said[0]] == [ids.tolist() for ids in said[1]]


def test_crop_takes_both_conventions() -> None:
    model = make_model("llama", "stateful_kv")
    cache = paged(model)
    ids, mask = padded([5, 9], 3)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        cache.crop(-2)
        assert cache.get_seq_length() == 7
        cache.crop(0)
        cache.crop(50)
        assert cache.get_seq_length() == 7
        cache.crop(3)  # the first row has no token there
        lens = [cache._batch.shared.kv.committed_len(i) for i in cache._batch._ids]
        assert (cache.get_seq_length(), lens) == (3, [0, 3])
        again = model(ids[:, 3:], attention_mask=mask, past_key_values=cache).logits
        whole = model(ids, attention_mask=mask, past_key_values=paged(model)).logits
    assert torch.equal(again[:, -1], whole[:, -1])
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(say(model, cache, ids[1:]), say(model, paged(model), ids[1:]))


def test_rows_can_be_chosen_and_repeated() -> None:
    model = make_model("llama", "stateful_kv")
    ids, more = text(0, 3, 20), text(1, 3, 2)
    with torch.no_grad():
        logits = []
        for rows in ([2, 2, 0], [0, 1, 2]):
            cache = paged(model)
            model(ids[rows] if rows[0] == 0 else ids, past_key_values=cache)
            if rows[0] != 0:
                cache.batch_select_indices(torch.tensor(rows))
            logits.append(model(more[rows], past_key_values=cache).logits)
        assert torch.equal(logits[0][[1, 2]], logits[1][[2, 0]])
        cache.batch_repeat_interleave(2)
        assert len(model(text(2, 6, 1), past_key_values=cache).logits) == 6
    assert cache._batch.shared.kv.check_integrity() is None


def test_forks_share_pages_and_give_them_back() -> None:
    model = make_model("llama", "stateful_kv")
    cache = paged(model, kv_tokens=256)
    say(model, cache, text(0, 1, 100), max_new_tokens=2)
    kv = cache._batch.shared.kv
    free = kv.num_free_pages
    forks = [cache.fork() for _ in range(20)]  # 20 copies would not fit into the pool
    assert kv.num_free_pages == free
    with torch.no_grad():
        model(text(1, 1, 1), past_key_values=forks[3])  # writes to a shared page: copies that one
    assert kv.num_free_pages == free - 1
    forks.clear()
    gc.collect()
    with torch.no_grad():
        model(text(1, 1, 1), past_key_values=cache)
    assert kv.num_free_pages == free
    assert kv.check_integrity() is None


def test_caches_work_in_and_out_of_inference_mode() -> None:
    model = make_model("llama", "stateful_kv")
    first, second = paged(model), paged(model)
    with torch.inference_mode():
        ids = say(model, first, text(0, 1, 20)).clone()
    ids = torch.tensor(ids.tolist())
    again = say(model, second, text(0, 1, 20))
    assert torch.equal(ids, again)
    ids = torch.cat([ids, text(1, 1, 4)], 1)
    said = say(model, first, ids)
    with torch.inference_mode():
        assert torch.equal(say(model, second, ids), said)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
def test_16_bit_models_and_small_pools(dtype: torch.dtype) -> None:
    model = make_model("llama", "eager").bfloat16()
    ids, mask = padded([40, 23], 0)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits[:, -1].float()
        model.set_attn_implementation("stateful_kv")
        cache = paged(model, dtype=dtype)
        got = model(ids, attention_mask=mask, past_key_values=cache).logits[:, -1]
    assert got.dtype == torch.bfloat16
    assert cache._batch.shared.kv.k.dtype == dtype
    likeness = torch.nn.functional.cosine_similarity(got.float(), expected)
    assert likeness.min() > 0.99


def test_a_full_pool_leaves_the_cache_as_it_was() -> None:
    model = make_model("llama", "stateful_kv")
    cache = paged(model, kv_tokens=48)
    ids = text(0, 2, 16)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        with pytest.raises(OutOfPagesError, match="raise kv_tokens"):
            model(text(1, 2, 4), past_key_values=cache)
        assert cache.get_seq_length() == 16
        assert cache._batch.shared.kv.num_free_pages == 1
        cache.batch_select_indices(torch.tensor([1]))
        more = text(2, 1, 20)
        got = model(more, past_key_values=cache).logits
        with pytest.raises(OutOfPagesError):
            model(text(1, 1, 40), past_key_values=paged(model, kv_tokens=32))
        whole = model(torch.cat([ids[1:], more], 1), past_key_values=paged(model)).logits
    assert torch.equal(got[:, -1], whole[:, -1])


def test_a_pass_that_is_cut_off_never_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama", "stateful_kv")
    cache, ids, more = paged(model), text(0, 1, 20), text(1, 1, 5)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        with monkeypatch.context() as patch:
            patch.setattr(model.model.layers[1].mlp, "forward", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(text(2, 1, 30), past_key_values=cache)
        assert cache.get_seq_length() == 20
        fork = cache.fork()
        logits = [model(more, past_key_values=each).logits for each in (cache, fork)]
        whole = model(torch.cat([ids, more], 1), past_key_values=paged(model)).logits
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0][:, -1], whole[:, -1])


def test_errors_of_the_setup() -> None:
    model = make_model("llama", "eager")
    switch = r"call model.set_attn_implementation\('stateful_kv'\)"
    with pytest.raises(ValueError, match=f"config: expected .*{switch}.*, got 'eager'"):
        paged(model)
    model.set_attn_implementation("stateful_kv")
    with pytest.raises(ValueError, match="kv_tokens: expected an integer >= 1, got 0"):
        paged(model, kv_tokens=0)
    with pytest.raises(ValueError, match="page_size: expected an integer >= 1"):
        paged(model, page_size=2.5)  # type: ignore[arg-type]
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"expected keys of a PagedCache \(pass past_key"):
            model(text(0, 1, 4))
        cache = paged(model)
        model.set_attn_implementation("eager")
        with pytest.raises(ValueError, match=f"layer 1: expected 'stateful_kv'.*{switch}"):
            model(text(0, 1, 4), past_key_values=cache)
    model.config.layer_types = ["full_attention", "linear_attention", "chunked_attention"]
    model.set_attn_implementation("stateful_kv")
    with pytest.raises(ValueError, match=r"layer_types.*\['chunked_attention', 'linear_att"):
        paged(model)
    model.config.layer_types = None
    model.config.num_kv_shared_layers = 2
    with pytest.raises(ValueError, match="num_kv_shared_layers: expected 0, got 2"):
        paged(model)


@torch.no_grad()
def test_errors_of_a_pass() -> None:
    model = make_model("llama", "stateful_kv")
    cache = paged(model)
    ids, mask = padded([5, 9], 3)
    model(ids, attention_mask=mask, past_key_values=cache)
    more, ones = text(0, 2, 3), torch.ones(2, 3, dtype=torch.long)
    bad: list[tuple[str, Tensor, Tensor | None]] = [
        ("batch size: expected 2, got 3", text(0, 3, 3), None),
        (r"attention_mask: expected \[2, 12\].*got None", more, None),
        (r"expected \[2, 12\], for the 9 cached.*got \[2, 3\]", more, ones),
        (r"with the earlier values, got \[2, 12\]", more, torch.cat([1 - mask, ones], 1)),
        (r"expected \[batch, tokens\].*got \[2, 1, 3, 12\]", more, torch.ones(2, 1, 3, 12)),
    ]
    for message, tokens, its_mask in bad:
        with pytest.raises(ValueError, match=message):
            model(tokens, attention_mask=its_mask, past_key_values=cache)
    model(more, attention_mask=torch.cat([mask, ones], 1), past_key_values=cache)
    assert cache.get_seq_length() == 12


def test_other_attention_is_refused() -> None:
    model = make_model("llama", "stateful_kv")
    module, cache = model.model.layers[0].self_attn, paged(model)
    heads = torch.zeros(1, 2, 3, 16)
    key, value = cache.update(heads, heads.clone(), 0)
    for argument, given in {"s_aux": heads, "is_causal": False, "dropout": 0.1}.items():
        with pytest.raises(ValueError, match=f"{argument}: expected"):
            hf.attention(module, heads, key, value, None, **{argument: given})
    with pytest.raises(ValueError, match="tensor without gradient"):
        model(text(0, 1, 4), past_key_values=cache)


def test_without_transformers_the_message_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "try: import stateful_kv.adapters.hf\n"
        "except ImportError as error: print(error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert "needs transformers 4.57 or later: pip install 'stateful-kv[hf]'" in run.stdout
