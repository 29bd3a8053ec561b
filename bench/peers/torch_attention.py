"""Attention of plain torch: every formulation that gives the result, and on a GPU the quickest one.

The peer is spared the paging: K and V of each sequence lie contiguous, masks are built beforehand.
Of formulations and backends the quickest is timed, so that torch is compared at its best. A
formulation takes K and V, [S, Hk, L, D], and returns [S, H, n, D].
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as sdpa

from bench import cuda_timing
from bench.harness import PeerMissingError
from bench.peers.torch_sdpa import causal_mask

Formulation = Callable[[Tensor, Tensor], Tensor]
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
AGREE = 2e-2  # relative error between formulations that compute the same


def formulations(
    q: Tensor,
    kv_heads: int,
    kv_len: int,
    scale: float,
    backends: Sequence[SDPBackend] = (),
) -> dict[str, Formulation]:
    """Ways to say it to torch.

    Args:
        q: [S, H, n, D], contiguous, the last n rows of sequences of kv_len tokens.
        kv_heads: Hk.
        kv_len: L.
        scale: factor of the scores.
        backends: each is asked for as well, besides the one that torch takes by itself.
    """
    sequences, heads, rows, head_dim = q.shape
    group = heads // kv_heads
    packed = q.view(sequences, kv_heads, group * rows, head_dim)
    found = causal_mask(rows, kv_len)
    mask = None if found is None else found.to(q.device)
    tall = None if mask is None else mask.repeat(group, 1)

    def gqa(k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)

    def packed_heads(k: Tensor, v: Tensor) -> Tensor:
        return sdpa(packed, k, v, attn_mask=tall, scale=scale).view(q.shape)

    ways = {"gqa": gqa, "heads packed into rows": packed_heads}
    if mask is not None:
        lower_right = causal_lower_right(rows, kv_len)

        def causal(k: Tensor, v: Tensor) -> Tensor:
            return sdpa(q, k, v, attn_mask=lower_right, scale=scale, enable_gqa=True)

        ways["lower right causal"] = causal
    if mask is not None and not q.is_cuda:
        ways |= _with_additive_mask(q, packed, mask, scale)
    for name, way in list(ways.items()):
        for backend in backends:
            ways[f"{name}, {backend.name.lower()}"] = _with_backend(way, backend)
    return ways


def _with_additive_mask(
    q: Tensor, packed: Tensor, mask: Tensor, scale: float
) -> dict[str, Formulation]:
    """The first two with 0 and -inf for the mask, which the CPU's kernel makes of it anyway."""
    bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
    tall = bias.repeat(packed.shape[2] // q.shape[2], 1)

    def gqa(k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v, attn_mask=bias, scale=scale, enable_gqa=True)

    def packed_heads(k: Tensor, v: Tensor) -> Tensor:
        return sdpa(packed, k, v, attn_mask=tall, scale=scale).view(q.shape)

    return {"gqa, additive mask": gqa, "heads packed into rows, additive mask": packed_heads}


def _with_backend(way: Formulation, backend: SDPBackend) -> Formulation:
    def call(k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return way(k, v)

    return call


def quickest(
    ways: dict[str, Formulation],
    k: Tensor,
    v: Tensor,
    seconds_of: Callable[[Callable[[], object]], float] = cuda_timing.quick_seconds,
) -> tuple[str, Formulation, dict[str, float]]:
    """The quickest of those that run and agree with the first one.

    Returns:
        name: of the way.
        call: the way.
        seconds: of each.
    """
    expected = next(iter(ways.values()))(k, v)
    seconds = {}
    for name, way in ways.items():
        try:
            if relative_error(way(k, v), expected) <= AGREE:
                seconds[name] = seconds_of(lambda call=way: call(k, v))
        except RuntimeError:
            continue  # this backend does not take these shapes
    best = min(seconds, key=seconds.__getitem__)
    return best, ways[best], seconds


def relative_error(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over the norm of b; NaN where either has one."""
    reference = b.double()
    return float((a.double() - reference).norm() / reference.norm())


def flex(q: Tensor, kv_len: int, scale: float) -> Formulation:
    """FlexAttention, compiled, with the same mask.

    Raises:
        PeerMissingError: it cannot be imported or q is not on a CUDA device.
    """
    if not q.is_cuda:
        raise PeerMissingError("FlexAttention is compared on a CUDA device only")
    try:
        module: Any = importlib.import_module("torch.nn.attention.flex_attention")
        importlib.import_module("triton")
    except ImportError as error:
        raise PeerMissingError(f"{error.name} cannot be imported") from error
    rows = q.shape[2]
    compiled = torch.compile(module.flex_attention, dynamic=False)

    def sees(_batch: Tensor, _head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return key <= row + (kv_len - rows)

    mask = module.create_block_mask(sees, None, None, rows, kv_len, device=q.device)

    def call(k: Tensor, v: Tensor) -> Tensor:
        result: Tensor = compiled(q, k, v, block_mask=mask, scale=scale, enable_gqa=True)
        return result

    return call
