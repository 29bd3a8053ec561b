"""Dense weights on a device: read one tensor at a time and converted, if its memory suffices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from stateful_kv.errors import ModelLoadError
from stateful_kv.models.config import ModelConfig
from stateful_kv.models.dense import DenseLinear, RowCountTable
from stateful_kv.models.files.weights import WeightSource
from stateful_kv.system.device import free_memory

# As `HeadDims` in csrc/kernels/cuda/kernels.h.
CUDA_HEAD_DIMS = (64, 96, 128, 256)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class DenseBuilder:
    """Puts the weights on a device in one dtype; norms and the rotary table stay float32."""

    def __init__(self, source: WeightSource, dtype: torch.dtype, device: torch.device) -> None:
        """Keeps all three.

        Args:
            source: where the tensors come from.
            dtype: of weights and activations.
            device: where both lie.
        """
        self._source = source
        self._dtype = dtype
        self._device = device
        self._rows = RowCountTable()

    def values(self, tensor: Tensor) -> Tensor:
        """Puts them on the device."""
        return tensor.to(self._device)

    def embedding(self, name: str, shape: tuple[int, int]) -> Tensor:
        """Reads it."""
        return self._join([name], shape, iter([self._source.dense(name, shape)]))

    def linear(
        self,
        parts: Sequence[tuple[str, int]],
        in_features: int,
        biases: Sequence[Tensor | None],
        *,
        has_silu_mul: bool = False,
    ) -> DenseLinear:
        """Reads projections of one input, one below the other."""
        names, out_features = [name for name, _ in parts], sum(width for _, width in parts)
        pieces = (self._source.dense(name, (width, in_features)) for name, width in parts)
        weight = self._join(names, (out_features, in_features), pieces)
        bias = None
        if any(part_bias is not None for part_bias in biases):
            filled = (
                torch.zeros(width) if part_bias is None else part_bias
                for (_, width), part_bias in zip(parts, biases, strict=True)
            )
            bias = self._join([f"{name}.bias" for name in names], (out_features,), filled)
        return self._rows.linear(weight, bias, has_silu_mul=has_silu_mul)

    def head(self, name: str, embedding: Tensor) -> DenseLinear:
        """Reads the head; a tied one is the embedding itself."""
        vocab_size, hidden = embedding.shape
        bias = f"{name}.bias"
        biases = [self._source.dense(bias, (vocab_size,)) if self._source.has(bias) else None]
        if name == "embedding" and biases == [None]:
            return self._rows.linear(embedding)
        return self.linear([(name, vocab_size)], hidden, biases)

    def _join(
        self, names: Sequence[str], shape: tuple[int, ...], pieces: Iterator[Tensor]
    ) -> Tensor:
        """Joins pieces in one tensor on the device; each is read, converted and copied alone."""
        result = torch.empty(shape, dtype=self._dtype, device=self._device)
        start = 0
        for name, piece in zip(names, pieces, strict=True):
            converted = piece.to(self._dtype)
            if not torch.isfinite(converted).all():
                raise ModelLoadError(
                    f"tensor {name!r}: expected values that {self._dtype} can hold, got "
                    f"{float(piece.abs().max())}; load it with another dtype"
                )
            result[start : start + piece.shape[0]] = converted
            start += piece.shape[0]
        return result


def check_kernels(config: ModelConfig, device: torch.device, name: str) -> None:
    """ModelLoadError if the attention of CUDA is not built for this model."""
    if device.type == "cuda" and config.head_dim not in CUDA_HEAD_DIMS:
        raise ModelLoadError(
            f"{name}: head_dim: expected one of {CUDA_HEAD_DIMS} on {device}, got {config.head_dim}"
        )


def check_memory(config: ModelConfig, dtype: torch.dtype, device: torch.device, name: str) -> None:
    """ModelLoadError if the weights do not fit into the free memory of a CUDA device."""
    if device.type != "cuda":
        return
    wanted, free = weight_bytes(config, dtype), free_memory(device)
    if wanted > free:
        raise ModelLoadError(
            f"{name}: its weights in {dtype} take {wanted} bytes, but {device} has only {free} "
            "bytes free"
        )


def weight_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of the dense weights of a model, the small float32 ones included."""
    hidden, width = config.hidden_size, config.head_dim
    q_width, kv_width = config.num_heads * width, config.num_kv_heads * width
    layer = hidden * (2 * q_width + 2 * kv_width) + 3 * hidden * config.intermediate_size
    tables = 1 if config.tie_word_embeddings else 2
    weights = config.num_layers * layer + tables * config.vocab_size * hidden
    small = (2 * config.num_layers + 1) * hidden + config.max_position * width
    return weights * dtype.itemsize + small * torch.float32.itemsize
