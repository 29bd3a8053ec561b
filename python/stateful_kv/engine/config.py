"""How big an engine is and how it steps."""

from __future__ import annotations

import re
from dataclasses import dataclass

from stateful_kv.errors import require, require_int

KV_DTYPES = ("float16", "float32", "bfloat16", "int8")
# What "auto" stands for, by the type of the device.
_DEFAULT_KV_DTYPES = {"cpu": "float16", "cuda": "bfloat16"}
_DEVICE_NAME = re.compile(r"cpu|cuda(:\d{1,4})?", re.ASCII)
_DEFAULT_STEPS_PER_SYNC = {"cpu": 1, "cuda": 8}
MAX_DRAFT_LIMIT = 63
MAX_STEPS_PER_SYNC = 64


@dataclass(frozen=True)
class EngineConfig:
    """How big an engine is and how it steps.

    Attributes:
        kv_tokens: tokens the KV pool holds (rounded up to whole pages).
        page_size: tokens a page holds.
        kv_dtype: "float16", "float32", "bfloat16" or "int8" (with a scale a vector; half the memory
            of float16, not quite its values). "auto", which is float16 on the CPU and bfloat16 on
            CUDA, is replaced by what it stands for.
        max_batch_tokens: rows of one forward pass, all sessions together.
        draft: propose tokens from the session's own text and verify them in one pass.
        max_draft: longest draft of one session in one step.
        device: "cpu", "cuda" or "cuda:N"; where the KV lies and the model computes.
        num_steps_per_sync: decode steps the device takes before the host looks at them. None, which
            is 1 on the CPU and 8 on CUDA, is replaced by what it stands for.
    """

    kv_tokens: int = 65536
    page_size: int = 64
    kv_dtype: str = "auto"
    max_batch_tokens: int = 1024
    draft: bool = True
    max_draft: int = 7
    device: str = "cpu"
    num_steps_per_sync: int | None = None

    def __post_init__(self) -> None:
        """Checks every field."""
        require_int("kv_tokens", self.kv_tokens, 1)
        require_int("page_size", self.page_size, 1)
        is_device = isinstance(self.device, str) and _DEVICE_NAME.fullmatch(self.device)
        require(bool(is_device), "device", "expected 'cpu', 'cuda' or 'cuda:N'", self.device)
        known = ("auto", *KV_DTYPES)
        require(self.kv_dtype in known, "kv_dtype", f"expected one of {known}", self.kv_dtype)
        if self.kv_dtype == "auto":
            device_type = self.device.partition(":")[0]
            object.__setattr__(self, "kv_dtype", _DEFAULT_KV_DTYPES[device_type])
        require_int("max_batch_tokens", self.max_batch_tokens, 1)
        require(isinstance(self.draft, bool), "draft", "expected a bool", self.draft)
        require_int("max_draft", self.max_draft, 0)
        limit = self.max_draft <= MAX_DRAFT_LIMIT
        require(limit, "max_draft", f"expected at most {MAX_DRAFT_LIMIT}", self.max_draft)
        if self.num_steps_per_sync is None:
            device_type = self.device.partition(":")[0]
            object.__setattr__(self, "num_steps_per_sync", _DEFAULT_STEPS_PER_SYNC[device_type])
        require_int("num_steps_per_sync", self.num_steps_per_sync, 1)
        fits = self.num_steps_per_sync is not None and self.num_steps_per_sync <= MAX_STEPS_PER_SYNC
        rule = f"expected at most {MAX_STEPS_PER_SYNC}"
        require(fits, "num_steps_per_sync", rule, self.num_steps_per_sync)

    @property
    def num_pages(self) -> int:
        """Pages of the pool."""
        return -(-self.kv_tokens // self.page_size)
