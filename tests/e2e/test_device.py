"""Where an engine computes: names of devices, errors, and tensors moved in one copy."""

from __future__ import annotations

from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch

from stateful_kv import _native
from stateful_kv.drafts import cost_file
from stateful_kv.engine.config import EngineConfig
from stateful_kv.engine.engine import Engine
from stateful_kv.errors import DeviceUnavailableError, InvalidRequestError
from stateful_kv.kv import pools
from stateful_kv.kv.batch import Batch
from stateful_kv.kv.cache import KVCache
from stateful_kv.models.llama import LlamaModel
from stateful_kv.system.device import device_name, joined, split, to_device, to_host
from tests.e2e.test_calibrate import costs_of
from tests.e2e.tiny import COSTS, ByteTokenizer, CountingUp

CPU = torch.device("cpu")


@pytest.fixture
def cuda_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build with CUDA kernels, as far as `check_device` can tell."""
    info = {**_native.build_info(), "cuda": True}
    monkeypatch.setattr(_native._C, "build_info", lambda: info)


class TestNames:
    @pytest.mark.parametrize(
        "name",
        ["", "gpu", "CUDA", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "mps", "cuda:0 ", None, 0],
    )
    def test_a_config_refuses_what_is_no_device(self, name: object) -> None:
        with pytest.raises(ValueError, match=r"device: expected 'cpu', 'cuda' or 'cuda:N', got"):
            EngineConfig(device=name)

    @pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:-1", "cpu:0", "mps", None, 0])
    def test_so_does_a_cache(self, name: object) -> None:
        with pytest.raises(DeviceUnavailableError, match="expected cpu or cuda or cuda:N"):
            KVCache(1, 1, 16, 1, 16, device=name)

    @pytest.mark.parametrize(
        ("device", "kv_dtype"), [("cpu", "float16"), ("cuda", "bfloat16"), ("cuda:1", "bfloat16")]
    )
    def test_auto_stands_for_a_kv_dtype(self, device: str, kv_dtype: str) -> None:
        assert EngineConfig(device=device).kv_dtype == kv_dtype
        assert EngineConfig(device=device, kv_dtype="float32").kv_dtype == "float32"
        assert replace(EngineConfig(device=device), page_size=32).kv_dtype == kv_dtype


class TestUnavailable:
    def test_a_build_without_cuda_says_how_to_get_one(self) -> None:
        if _native.build_info()["cuda"]:
            pytest.skip("this build has CUDA")
        with pytest.raises(
            DeviceUnavailableError, match=r"built without CUDA.*STATEFUL_KV_CUDA=ON"
        ):
            Engine(CountingUp(), ByteTokenizer(), EngineConfig(device="cuda"), cost_curve=COSTS)

    @pytest.mark.parametrize(
        ("cuda", "count", "name", "hint"),
        [
            (None, 0, "cuda", "built without CUDA; install a CUDA build"),
            ("13.0", 0, "cuda", r"check the driver \(nvidia-smi\) and CUDA_VISIBLE_DEVICES"),
            ("13.0", 2, "cuda:2", "expected cuda:0 to cuda:1"),
        ],
    )
    def test_the_message_says_what_to_do(
        self,
        cuda_build: None,
        monkeypatch: pytest.MonkeyPatch,
        cuda: str | None,
        count: int,
        name: str,
        hint: str,
    ) -> None:
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        with pytest.raises(
            DeviceUnavailableError, match=f"torch sees {count} CUDA devices; .*{hint}"
        ):
            Engine(CountingUp(), ByteTokenizer(), EngineConfig(device=name), cost_curve=COSTS)

    def test_cuda_gets_the_index_that_its_tensors_have(
        self, cuda_build: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
        assert _native.check_device("cuda") == torch.device("cuda:3")
        assert _native.check_device("cuda:1") == torch.device("cuda:1")

    @pytest.mark.parametrize("name", ["cuda:128", "cuda:256", "cuda:9999"])
    def test_a_number_that_torch_cannot_hold_is_no_other_device(
        self, cuda_build: None, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
        with pytest.raises(DeviceUnavailableError, match=f"device {name}: "):
            _native.check_device(name)

    def test_a_model_elsewhere_is_refused(self) -> None:
        model = CountingUp()
        model.device = torch.device("cuda:1")
        with pytest.raises(InvalidRequestError, match=r"expected weights on cpu.*model on cuda:1"):
            Engine(model, ByteTokenizer(), EngineConfig(), cost_curve=COSTS)

    def test_a_pool_larger_than_the_device_names_both_sizes(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pools, "free_memory", lambda device: 1000)
        with pytest.raises(InvalidRequestError) as caught:
            pools.make_pools((1, 4, 1, 16, 32), torch.bfloat16, torch.device("cuda:0"))
        assert "the free memory of cuda:0 (1000 bytes)" in str(caught.value)
        assert "4 pages of 16 tokens (8192 bytes)" in str(caught.value)


class TestLoading:
    @pytest.mark.parametrize(
        ("arguments", "kv_dtype"),
        [
            ({}, "float16"),
            ({"device": "cuda:1"}, "bfloat16"),
            ({"device": "cuda:1", "dtype": "float16"}, "float16"),
            ({"device": "cuda:1", "dtype": "float16", "kv_dtype": "int8"}, "int8"),
            ({"device": "cuda:1", "dtype": "float32"}, "bfloat16"),
        ],
    )
    def test_the_model_is_loaded_where_the_engine_is(
        self, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, str], kv_dtype: str
    ) -> None:
        asked: list[object] = []

        def load(name: str, weight_format: str, *, device: str, dtype: str) -> SimpleNamespace:
            asked.append((name, weight_format, device, dtype))
            return SimpleNamespace(model="a model", tokenizer="its tokenizer")

        def init(
            self: Engine, model: str, tokenizer: str, config: EngineConfig, **_: object
        ) -> None:
            asked.append((model, tokenizer, config.device, config.kv_dtype))

        monkeypatch.setattr("stateful_kv.models.files.loading.load_model", load)
        monkeypatch.setattr(Engine, "__init__", init)
        Engine.load("m", weight_format="dense", **arguments)
        device, dtype = arguments.get("device", "cpu"), arguments.get("dtype", "auto")
        assert asked == [
            ("m", "dense", device, dtype),
            ("a model", "its tokenizer", device, kv_dtype),
        ]


class TestCopies:
    TENSORS = (
        torch.arange(7),
        torch.arange(5, dtype=torch.int32),
        torch.empty(0, dtype=torch.int64),
        torch.tensor([[1.5, float("nan")], [-0.0, 2.0]]),
        torch.arange(12, dtype=torch.int32).view(3, 4).t(),
        torch.ones(3, dtype=torch.bfloat16),
    )

    def test_what_is_joined_comes_apart_again(self) -> None:
        views = split(joined(self.TENSORS), self.TENSORS)
        for view, tensor in zip(views, self.TENSORS, strict=True):
            assert view.dtype == tensor.dtype
            assert torch.equal(view.view(-1).view(torch.uint8), tensor.flatten().view(torch.uint8))
            assert view.is_contiguous()
            assert view.data_ptr() % 16 == 0

    def test_nothing_is_copied_on_the_cpu(self) -> None:
        assert all(a is b for a, b in zip(to_device(self.TENSORS, CPU), self.TENSORS, strict=True))
        assert all(a is b for a, b in zip(to_host(self.TENSORS), self.TENSORS, strict=True))
        assert to_host([]) == []
        batch = _batch()
        assert batch.to(CPU) is batch

    @pytest.mark.cuda
    def test_there_and_back(self) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        there = to_device(self.TENSORS, device)
        assert all(tensor.device == device for tensor in there)
        for back, tensor in zip(to_host(there), self.TENSORS, strict=True):
            assert not back.is_cuda
            assert torch.equal(back.flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))

    @pytest.mark.cuda
    def test_a_batch_goes_up_as_a_whole(self) -> None:
        batch, device = _batch(), torch.device("cuda", torch.cuda.current_device())
        there = batch.to(device)
        for field in fields(batch):
            tensor = getattr(there, field.name)
            assert tensor.device == device
            assert torch.equal(tensor.cpu(), getattr(batch, field.name))


def _batch() -> Batch:
    return Batch(
        token_ids=torch.tensor([3, 4, 5]),
        positions=torch.tensor([0, 1, 7], dtype=torch.int32),
        query_offsets=torch.tensor([0, 2, 3], dtype=torch.int32),
        page_table=torch.tensor([[2, 0], [1, 3]], dtype=torch.int32),
        seq_lens=torch.tensor([2, 8], dtype=torch.int32),
        slots=torch.tensor([8, 9, 15]),
        logit_rows=torch.tensor([1, 2]),
    )


def test_stored_costs_are_those_of_the_device(
    llama: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[cost_file.Key] = []
    monkeypatch.setattr(cost_file, "store", lambda key, curve: keys.append(key))
    monkeypatch.setattr("stateful_kv.drafts.calibrate.measure", lambda *_: COSTS)
    monkeypatch.setattr("stateful_kv.drafts.calibrate.check_device", torch.device)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU at {device}")
    for name in ("cpu", "cuda:1"):
        costs_of(llama, EngineConfig(device=name), "measure").curve()
    assert keys[0]["device"] == device_name(CPU)
    assert keys[1]["device"] == "a GPU at cuda:1"
