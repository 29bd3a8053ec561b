"""Suite `gpu_attention`: paged attention of one layer on a CUDA device, bf16, from cold L2.

Calls go round copies of K and V that together exceed L2 several times. A result is compared with
attention in float32 of one sequence and, bit for bit, with the first row of each sequence computed
alone. Peers: plain torch on contiguous K and V at its quickest, FlexAttention and FlashInfer; a
decode step of the same sequences beside the verify cases; the same sequences without sharing beside
the shared prefix; our own op under the quickest way to divide its work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import cuda_timing, harness
from bench.gpu_shapes import AttentionInputs, AttentionShape, make_inputs
from bench.harness import Call, Case, Check, Missing, PeerMissingError, Settings, Trial
from bench.peers import flashinfer_attention, own_splits, torch_attention
from bench.peers.torch_attention import relative_error
from bench.selection import Row
from bench.suites import shapes
from stateful_kv import ops

SHAPES = {
    "decode_32x4k": AttentionShape(32, 4095),
    "decode_1x8k": AttentionShape(1, 8191, heads=64),
    "decode_1x1k": AttentionShape(1, 1023),
    "verify_8": AttentionShape(32, 4088, rows=8),
    "verify_16": AttentionShape(32, 4080, rows=16),
    "extend_512_on_32k": AttentionShape(1, 32768, rows=512),
    "extend_64_on_32k": AttentionShape(1, 32768, rows=64),
    "shared_prefix_32x16k": AttentionShape(32, 16384 + 511, shared=16384),
}
TOLERANCE = 1e-2  # relative, bf16 against float32


def attend(inputs: AttentionInputs, index: int) -> Tensor:
    """Our op on one copy."""
    k, v = inputs.pools[index]
    return ops.paged_attention(
        inputs.q, k, v, inputs.page_table, inputs.seq_lens, inputs.query_offsets, inputs.shape.scale
    )


def attend_shared(inputs: AttentionInputs, index: int) -> Tensor:
    """Our op that reads the shared prefix once."""
    k, v = inputs.pools[index]
    return ops.shared_prefix_attention(
        inputs.q,
        k,
        v,
        inputs.page_table,
        inputs.seq_lens,
        inputs.query_offsets,
        inputs.group_offsets,
        inputs.prefix_lens,
        inputs.shape.scale,
    )


def _queries(inputs: AttentionInputs) -> Tensor:
    """[S, H, n, D], contiguous."""
    shape = inputs.shape
    rows = inputs.q.view(shape.sequences, shape.rows, shape.heads, shape.head_dim)
    return rows.transpose(1, 2).contiguous()


def _as_rows(result: Tensor) -> Tensor:
    """[S, H, n, D] -> [N, H, D]."""
    return result.transpose(1, 2).flatten(0, 1)


def reference(inputs: AttentionInputs) -> Tensor:
    """float32[n, H, D]: the rows of the last sequence, one KV head after the other."""
    shape = inputs.shape
    k, v = (tensor[-1].float() for tensor in inputs.contiguous[0])
    q = inputs.q[-shape.rows :].float()
    group = shape.heads // shape.kv_heads
    keys = torch.arange(shape.kv_len, device=q.device)
    seen = keys <= torch.arange(shape.context, shape.kv_len, device=q.device)[:, None]
    parts = []
    for head in range(shape.kv_heads):
        own = q[:, head * group : (head + 1) * group].transpose(0, 1)
        scores = (own @ k[head].T * shape.scale).masked_fill(~seen, -torch.inf)
        parts.append((scores.softmax(dim=-1) @ v[head]).transpose(0, 1))
    return torch.cat(parts, dim=1)


def _first_row_alone(inputs: AttentionInputs) -> Tensor:
    """[1, H, D]: the first row of the last sequence in a decode step of its own."""
    k, v = inputs.pools[0]
    shape, last = inputs.shape, len(inputs.q) - inputs.shape.rows
    return ops.paged_attention(
        inputs.q[last : last + 1],
        k,
        v,
        inputs.page_table[-1:].contiguous(),
        inputs.seq_lens[-1:] - (shape.rows - 1),
        torch.tensor([0, 1], dtype=torch.int32, device=inputs.q.device),
        shape.scale,
    )


class _Peers:
    """The peers of a case, and what the result file says of their settings."""

    def __init__(self, inputs: AttentionInputs, settings: Settings) -> None:
        self.calls: dict[str, Call | Missing] = {}
        self.details: dict[str, dict[str, Any]] = {}
        # By peer: turns its result into rows in our layout, maybe fewer than we compute.
        self.rows: dict[str, Callable[[Any], Tensor]] = {}
        self._inputs = inputs
        shape = inputs.shape
        if shape.shared:
            self._add("not_shared", lambda: partial(attend, inputs))
        elif 1 < shape.rows <= 16:
            self._add("decode_step", lambda: partial(attend, inputs.last_rows(1)))
        if settings.asks_for("own_splits"):
            self._add("own_splits", self._own_splits)
        if settings.asks_for("own_wgmma"):
            self._add("own_wgmma", self._own_wgmma)
        self._add("torch_sdpa", self._sdpa, _as_rows)
        if settings.asks_for("flex_attention"):
            self._add("flex_attention", self._flex, _as_rows)
        if settings.asks_for("flashinfer"):
            self._add("flashinfer", lambda: flashinfer_attention.prepare(inputs))

    def _add(
        self, name: str, make: Callable[[], Call], rows: Callable[[Any], Tensor] = lambda x: x
    ) -> None:
        try:
            self.calls[name] = make()
            self.rows[name] = rows
        except PeerMissingError as error:
            self.calls[name] = Missing(str(error))

    def _sdpa(self) -> Call:
        inputs, shape = self._inputs, self._inputs.shape
        on_cuda = inputs.q.is_cuda
        backends = torch_attention.BACKENDS if on_cuda else ()
        ways = torch_attention.formulations(
            _queries(inputs), shape.kv_heads, shape.kv_len, shape.scale, backends
        )
        if on_cuda:
            name, way, seconds = torch_attention.quickest(ways, *inputs.contiguous[0])
        else:
            (name, way), seconds = next(iter(ways.items())), {}
        self.details["torch_sdpa"] = {"peer_setting": name, "seconds_by_setting": seconds}
        return lambda index: way(*inputs.contiguous[index])

    def _own_splits(self) -> Call:
        inputs, shape = self._inputs, self._inputs.shape
        if not inputs.q.is_cuda:
            raise PeerMissingError("work is divided in several ways on a CUDA device only")
        call = partial(attend_shared if shape.shared else attend, inputs)
        num_rows = shape.rows * shape.heads // shape.kv_heads
        if shape.shared:
            num_rows *= shape.sequences
        seconds_of = partial(cuda_timing.graph_seconds, rotations=len(inputs.pools))
        name, quickest, seconds = own_splits.best(call, num_rows, seconds_of)
        self.details["own_splits"] = {"peer_setting": name, "seconds_by_setting": seconds}
        return quickest

    def _own_wgmma(self) -> Call:
        """Our own op by other products, which may become the default if the bits are equal."""
        inputs, shape = self._inputs, self._inputs.shape
        if not inputs.q.is_cuda or torch.cuda.get_device_capability(inputs.q.device) != (9, 0):
            raise PeerMissingError("warpgroup products need compute capability 9.0")
        if shape.shared or shape.rows * shape.heads // shape.kv_heads < 64:
            raise PeerMissingError("warpgroup products need 64 rows of a KV head")
        call = partial(attend, inputs)

        def run(index: int) -> object:
            with own_splits.by_warpgroups():
                return call(index)

        return run

    def _flex(self) -> Call:
        inputs = self._inputs
        way = torch_attention.flex(_queries(inputs), inputs.shape.kv_len, inputs.shape.scale)
        return lambda index: way(*inputs.contiguous[index])


def _setup(shape: AttentionShape, settings: Settings) -> Trial:
    on_cuda = settings.device == "cuda"
    if settings.smoke:
        shape = shape.small()
    kv_dtype = torch.bfloat16
    q_dtype = kv_dtype if on_cuda else torch.float32  # what the CPU kernel takes
    kv_bytes = shape.kv_bytes(kv_dtype.itemsize)
    copies = shapes.rotations(kv_bytes, settings.cold_bytes)
    inputs = make_inputs(shape, copies, settings.device, q_dtype, kv_dtype)
    ours = partial(attend_shared if shape.shared else attend, inputs)
    peers = _Peers(inputs, settings)

    def check(peer: str) -> Check:
        result = ours(0)
        error = relative_error(result[-shape.rows :], reference(inputs))
        first = len(result) - shape.rows
        bits = torch.equal(_first_row_alone(inputs), result[first : first + 1])
        if peer == "not_shared":
            bits = bits and torch.equal(result, attend(inputs, 0))
        elif peer == "decode_step":
            # The peer computed only the last row of each sequence.
            bits = bits and torch.equal(result[shape.rows - 1 :: shape.rows], _run(peers, peer))
        elif peer in ("own_splits", "own_wgmma"):
            bits = bits and torch.equal(result, _run(peers, peer))
        elif peer:
            error = max(error, relative_error(_run(peers, peer), result))
        return Check(error <= TOLERANCE and bits, error, TOLERANCE, bits)

    return Trial(
        ours=ours,
        peers=peers.calls,
        check=check,
        work=shape.work(q_dtype.itemsize if q_dtype == kv_dtype else kv_dtype.itemsize),
        rotations=copies,
        rotation_bytes=copies * kv_bytes,
        is_captured=on_cuda,
        details=lambda peer: peers.details.get(peer, {}),
    )


def _run(peers: _Peers, name: str) -> Tensor:
    call = peers.calls[name]
    assert not isinstance(call, Missing)
    return peers.rows[name](call(0))


def cases(settings: Settings) -> Iterator[Case]:
    """One case a shape, by the names of `bench.targets`."""
    for name, shape in SHAPES.items():
        real = shape.small() if settings.smoke else shape
        axes: dict[str, int | float | str] = {
            "S": real.sequences,
            "rows": real.rows,
            "L": real.kv_len,
            "heads": f"{real.heads}/{real.kv_heads}x{real.head_dim}",
            "page": real.page_size,
        }
        if real.shared:
            axes["shared"] = real.shared
        yield Case(name, axes, partial(_setup, shape))


def rows(settings: Settings) -> list[Row]:
    """Names and axes of all cases."""
    return harness.rows_of(cases(settings))


def run(settings: Settings, roofs: dict[str, Any], emit: Callable[[dict[str, Any]], None]) -> None:
    """Run the suite; a case that fails does not keep the others from running."""
    torch.manual_seed(0)
    with torch.inference_mode():
        harness.run_each("gpu_attention", cases(settings), settings, roofs, emit)
