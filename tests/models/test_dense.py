"""Models with dense weights: how they are loaded, what they compute, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stateful_kv import _native
from stateful_kv.engine.engine import Engine
from stateful_kv.errors import DeviceUnavailableError, ModelLoadError
from stateful_kv.models.dense import DenseLinear
from stateful_kv.models.files import dense_weights, hf_folder, loading
from stateful_kv.models.files.dense_weights import (
    CUDA_HEAD_DIMS,
    DenseBuilder,
    check_kernels,
    check_memory,
    weight_bytes,
)
from stateful_kv.models.files.loading import load_model
from stateful_kv.models.files.weights import build_weights
from stateful_kv.models.llama import LlamaModel
from tests.e2e.tiny import DenseForm, tiny_config, tiny_llama
from tests.models import tiny
from tests.models.prompts import PROMPTS
from tests.models.test_small_models import CASES, save_model

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA build that sees three devices, as far as `check_device` can tell."""
    info = {**_native.build_info(), "cuda": True}
    monkeypatch.setattr(_native._C, "build_info", lambda: info)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


class TestLoading:
    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_weights_are_those_of_the_file(
        self, case: str, dtype: torch.dtype, tmp_path: Path
    ) -> None:
        state = save_model(case, tmp_path).state_dict()
        config = hf_folder.read_config(tmp_path)
        source = hf_folder.HFSource(tmp_path)
        weights = build_weights(source, config, DenseBuilder(source, dtype, CPU))
        prefix = "model.layers.1."
        layer = weights.layers[1]

        def joined(*names: str) -> torch.Tensor:
            return torch.cat([state[prefix + name] for name in names]).to(dtype)

        attention = [f"self_attn.{part}_proj" for part in "qkv"]
        expected = {
            "qkv": joined(*(f"{name}.weight" for name in attention)),
            "o": joined("self_attn.o_proj.weight"),
            "gate_up": joined("mlp.gate_proj.weight", "mlp.up_proj.weight"),
            "down": joined("mlp.down_proj.weight"),
        }
        for name, weight in expected.items():
            linear = getattr(layer, name)
            assert isinstance(linear, DenseLinear)
            assert torch.equal(linear.weight, weight)
            assert linear.has_silu_mul is (name == "gate_up")
        if config.attention_bias:
            assert layer.qkv.bias is not None
            assert torch.equal(layer.qkv.bias, joined(*(f"{name}.bias" for name in attention)))
        assert layer.attn_norm.dtype == weights.cos_sin.dtype == torch.float32
        assert torch.equal(weights.embedding, state["model.embed_tokens.weight"].to(dtype))
        assert torch.equal(weights.head.weight, state["lm_head.weight"].to(dtype))
        is_shared = weights.head.weight.data_ptr() == weights.embedding.data_ptr()
        assert is_shared is config.tie_word_embeddings
        small = [layer.qkv.bias, layer.o.bias, layer.gate_up.bias, layer.down.bias]
        if small == [None] * 4 and not config.qk_norm:
            tensors = [weights.embedding, weights.norm, weights.cos_sin]
            for each in weights.layers:
                tensors += [each.attn_norm, each.ffn_norm]
                tensors += [x.weight for x in (each.qkv, each.o, each.gate_up, each.down)]
            tensors += [] if is_shared else [weights.head.weight]
            assert weight_bytes(config, dtype) == sum(t.numel() * t.element_size() for t in tensors)

    def test_forms_have_fingerprints_of_their_own(self, tmp_path: Path) -> None:
        save_model("llama", tmp_path)
        forms = ("auto", "fp32", "dense")
        assert len({load_model(tmp_path, form).fingerprint for form in forms}) == 3

    def test_a_value_too_large_for_the_dtype_names_its_tensor(self, tmp_path: Path) -> None:
        save_model("llama", tmp_path)
        path = tmp_path / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = -1e5
        save_file(tensors, path, {"format": "pt"})
        source, config = hf_folder.HFSource(tmp_path), hf_folder.read_config(tmp_path)
        message = r"'layers.2.up'.*torch.float16 can hold, got 100000.0; load it with another dtype"
        with pytest.raises(ModelLoadError, match=message):
            build_weights(source, config, DenseBuilder(source, torch.float16, CPU))
        build_weights(source, config, DenseBuilder(source, torch.bfloat16, CPU))

    def test_a_device_that_is_too_small_names_both_sizes(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = replace(tiny_config(), tie_word_embeddings=True)
        wanted = weight_bytes(config, torch.bfloat16)
        for free, fits in ((wanted, True), (wanted - 1, False)):
            monkeypatch.setattr(dense_weights, "free_memory", lambda device, free=free: free)
            check_memory(config, torch.bfloat16, CPU, "m")
            if fits:
                check_memory(config, torch.bfloat16, torch.device("cuda:1"), "m")
                continue
            message = f"m: its weights in torch.bfloat16 take {wanted} bytes, but cuda:1 has only"
            with pytest.raises(ModelLoadError, match=f"{message} {free} bytes free"):
                check_memory(config, torch.bfloat16, torch.device("cuda:1"), "m")

    def test_heads_without_a_kernel_on_cuda(self) -> None:
        text = (ROOT / "csrc/kernels/cuda/kernels.h").read_text()
        built = re.search(r"HeadDims = std::integer_sequence<int, ([\d, ]+)>", text)
        assert built is not None
        assert built[1] == ", ".join(map(str, CUDA_HEAD_DIMS))
        cuda = torch.device("cuda:0")
        check_kernels(replace(tiny_config(), head_dim=96), cuda, "m")
        check_kernels(tiny_config(), CPU, "m")
        message = "m: head_dim: expected one of (64, 96, 128, 256) on cuda:0, got 32"
        with pytest.raises(ModelLoadError, match=re.escape(message)):
            check_kernels(tiny_config(), cuda, "m")

    def test_memory_that_runs_out_on_the_way_is_a_load_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def build(*_: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

        save_model("llama", tmp_path)
        monkeypatch.setattr(loading, "build_weights", build)
        with pytest.raises(ModelLoadError, match="cannot be loaded: CUDA out of memory"):
            load_model(tmp_path, "dense")


class TestRefusals:
    @pytest.mark.parametrize("load", [load_model, Engine.load])
    def test_a_device_that_is_missing_comes_before_the_model(self, load: object) -> None:
        with pytest.raises(DeviceUnavailableError, match="device cuda:63: "):
            load("no such model", device="cuda:63")

    @pytest.mark.parametrize("weight_format", ["int4", "int8", "fp32"])
    def test_packed_weights_on_cuda(self, three_gpus: None, weight_format: str) -> None:
        message = (
            r"expected 'auto' or 'dense' on cuda:2, where packed weights are not supported yet"
        )
        with pytest.raises(ValueError, match=f"weight_format: {message}, got '{weight_format}'"):
            load_model("smollm2", weight_format, device="cuda:2")

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_other_activations_than_those_of_the_cpu(self, dtype: str) -> None:
        with pytest.raises(ValueError, match=f"dtype: expected float32.*CPU, got '{dtype}'"):
            load_model("smollm2", "dense", dtype=dtype)

    @pytest.mark.parametrize("dtype", ["int8", "half", "", None])
    def test_a_dtype_that_is_none(self, dtype: str) -> None:
        with pytest.raises(ValueError, match=r"dtype: expected one of \('auto', .*, got"):
            load_model("smollm2", dtype=dtype)

    def test_what_auto_stands_for(self, three_gpus: None) -> None:
        on_cuda = loading._form("auto", torch.device("cuda:0"), "auto")
        assert (on_cuda.weight_format, on_cuda.dtype) == ("dense", torch.bfloat16)
        assert loading._form("dense", torch.device("cuda:0"), "float16").dtype == torch.float16
        assert loading._form("auto", CPU, "float32").weight_format == "auto"


class TestForward:
    def test_both_flows_give_the_same_bits(self) -> None:
        """What a projection adds goes into the next norm, or is added at once."""
        model = tiny_llama(form=DenseForm())
        tokens = torch.randint(0, 272, (37,)).tolist()
        outputs = []
        for run in (model._run_dense, model._run_ops):
            cache = tiny.plain_cache(model.config, num_pages=8)
            batch = tiny.plain_batch(cache, [tokens, tokens[:5]], [0, 0], all_rows=True)
            x = model.weights.embedding.index_select(0, batch.token_ids)
            outputs.append(run(x, batch, cache))
        assert torch.equal(*outputs)

    @pytest.mark.parametrize("k", [1, 3])
    def test_the_largest_are_those_of_the_logits(self, k: int) -> None:
        model = tiny_llama(form=DenseForm())
        cache = tiny.plain_cache(model.config, num_pages=8)
        batch = tiny.plain_batch(cache, [[5, 6, 7], [9]], [0, 0], all_rows=True)
        logits = model.forward(batch, cache)
        ids, values = model.forward_top_k(batch, cache, k)
        assert ids.shape == values.shape == (4, k)
        assert torch.equal(logits.gather(1, ids), values)
        assert torch.equal(values, logits.sort(dim=1, descending=True).values[:, :k])

    def test_rows_are_padded_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The products get row counts that all of them allow, from the batch on."""
        model = tiny_llama(form=DenseForm())
        seen: list[int] = []
        product = DenseLinear._product

        def note(linear: DenseLinear, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.shape[0])
            return product(linear, x)

        monkeypatch.setattr(DenseLinear, "_product", note)
        cache = tiny.plain_cache(model.config, num_pages=8)
        for sizes, all_rows in (([3, 1], False), ([1], False), ([65], True), ([33, 2], False)):
            seen.clear()
            tokens = [[7] * size for size in sizes]
            batch = tiny.plain_batch(cache, tokens, [0] * len(sizes), all_rows)
            assert model.forward(batch, cache).shape == (len(batch.logit_rows), 272)
            num_rows = model.padded_rows(len(batch.logit_rows))
            assert seen == [model.padded_rows(sum(sizes))] * 5 + [num_rows] * 4
            assert all(counts.padded(n) == n for n in seen for counts in model.row_counts.values())
        assert tiny_llama().padded_rows(3) == 3

    def test_a_model_says_where_and_in_what_it_computes(self) -> None:
        dense = tiny_llama(form=DenseForm(dtype=torch.bfloat16))
        assert (dense.device, dense.dtype) == (CPU, torch.bfloat16)
        assert sorted(dense.row_counts) == ["192x64", "256x64", "272x64", "64x128", "64x96"]
        assert tiny_llama().row_counts == {}
        assert tiny_llama().dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "tolerance"), [("cpu", 1e-4), pytest.param("cuda", 0.05, marks=pytest.mark.cuda)]
)
def test_the_default_model_dense(device: str, tolerance: float) -> None:
    """Products of the library against our own of the same weights in float32 and on the CPU."""
    dense, packed = load_model("smollm2", "dense", device=device), load_model("smollm2", "fp32")
    tokens = dense.tokenizer.render_start([{"role": "user", "content": PROMPTS[0] * 4}]).tolist()

    def logits(model: LlamaModel, sizes: list[int]) -> torch.Tensor:
        options = {"dtype": model.dtype, "device": model.device}
        cache = tiny.plain_cache(model.config, len(tokens) // 16 + 1, **options)
        rows, start = [], 0
        for size in [*sizes, len(tokens) - sum(sizes)]:
            batch = tiny.plain_batch(cache, [tokens[start : start + size]], [start])
            rows.append(model.forward(batch.to(model.device), cache))
            start += size
        return torch.cat(rows).cpu()

    whole, expected = logits(dense.model, []), logits(packed.model, [])
    # In bfloat16 the difference is some 3 % of the spread of the logits.
    assert (whole - expected).std() < tolerance * expected.std()
    for sizes in ([1, 2, 3, 4, 5], [17, 1, 1, 8, 1], [len(tokens) - 1]):
        assert torch.equal(logits(dense.model, sizes), whole)
