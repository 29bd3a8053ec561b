"""The small ops and the head against torch: norms, activation, rotary, pages, drafts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bench import harness
from bench.harness import Case, Settings, Trial, Work
from bench.peers import text_scan, torch_composites
from bench.suites import shapes, texts
from stateful_kv import ops
from stateful_kv.models import packing

EPS = 1e-5
TOLERANCE = 1e-4


def _rows(num_rows: int, width: int, settings: Settings) -> tuple[list[Tensor], int]:
    """Rotating inputs float32[num_rows, width] and their bytes."""
    each = 4 * num_rows * width
    copies = shapes.rotations(each, settings.cold_bytes)
    return list(torch.randn(copies, num_rows, width).unbind(0)), each * copies


def _rms_norm(num_rows: int, settings: Settings) -> Trial:
    inputs, rotation_bytes = _rows(num_rows, shapes.HIDDEN, settings)
    weight = torch.rand(shapes.HIDDEN)

    def check(_peer: str) -> harness.Check:
        together = ops.rms_norm(inputs[0], weight, EPS)
        bits = torch.equal(ops.rms_norm(inputs[0][-1:], weight, EPS), together[-1:])
        expected = torch_composites.rms_norm(inputs[0], weight, EPS)
        return harness.compare(together, expected, TOLERANCE, bits)

    return Trial(
        ours=lambda i: ops.rms_norm(inputs[i], weight, EPS),
        peers={"torch": lambda i: torch_composites.rms_norm(inputs[i], weight, EPS)},
        check=check,
        work=Work(2 * 4 * num_rows * shapes.HIDDEN, 4 * num_rows * shapes.HIDDEN),
        rotations=len(inputs),
        rotation_bytes=rotation_bytes,
    )


def _rms_norm_residual(num_rows: int, settings: Settings) -> Trial:
    """Residual sum and norm in one op; a residual that grows over the runs stays finite."""
    inputs, rotation_bytes = _rows(num_rows, shapes.HIDDEN, settings)
    residuals = [torch.randn_like(x) for x in inputs]
    theirs = [residual.clone() for residual in residuals]
    weight = torch.rand(shapes.HIDDEN)

    def peer(index: int) -> Tensor:
        return torch_composites.add_rms_norm(inputs[index], weight, EPS, theirs[index])

    def check(_peer: str) -> harness.Check:
        sums, plain_sums = residuals[0].clone(), residuals[0].clone()
        last = sums[-1:].clone()
        together = ops.rms_norm(inputs[0], weight, EPS, sums)
        bits = torch.equal(ops.rms_norm(inputs[0][-1:], weight, EPS, last), together[-1:])
        expected = torch_composites.add_rms_norm(inputs[0], weight, EPS, plain_sums)
        return harness.compare((together, sums), (expected, plain_sums), TOLERANCE, bits)

    return Trial(
        ours=lambda i: ops.rms_norm(inputs[i], weight, EPS, residuals[i]),
        peers={"torch": peer},
        check=check,
        work=Work(4 * 4 * num_rows * shapes.HIDDEN, 5 * num_rows * shapes.HIDDEN),
        rotations=len(inputs),
        rotation_bytes=2 * rotation_bytes,
    )


def _silu_mul(num_rows: int, settings: Settings) -> Trial:
    inputs, rotation_bytes = _rows(num_rows, 2 * shapes.INTERMEDIATE, settings)

    def check(_peer: str) -> harness.Check:
        together = ops.silu_mul(inputs[0])
        bits = torch.equal(ops.silu_mul(inputs[0][-1:]), together[-1:])
        return harness.compare(together, torch_composites.silu_mul(inputs[0]), TOLERANCE, bits)

    return Trial(
        ours=lambda i: ops.silu_mul(inputs[i]),
        peers={"torch": lambda i: torch_composites.silu_mul(inputs[i])},
        check=check,
        work=Work(3 * 4 * num_rows * shapes.INTERMEDIATE, 4 * num_rows * shapes.INTERMEDIATE),
        rotations=len(inputs),
        rotation_bytes=rotation_bytes,
    )


def _qkv(num_rows: int, settings: Settings) -> tuple[list[tuple[Tensor, Tensor, Tensor]], int]:
    """Views q, k, v of rotating fused rows, as the model hands them over."""
    heads = shapes.NUM_HEADS, shapes.NUM_KV_HEADS, shapes.NUM_KV_HEADS
    rows, num_bytes = _rows(num_rows, sum(heads) * shapes.HEAD_DIM, settings)
    views = []
    for row in rows:
        q, k, v = row.view(num_rows, sum(heads), shapes.HEAD_DIM).split(heads, dim=1)
        views.append((q, k, v))
    return views, num_bytes


def _pools(settings: Settings) -> tuple[Tensor, Tensor]:
    num_pages = 16 if settings.smoke else 1024
    pool = shapes.kv_pool(1, num_pages, torch.float16)[0]
    return pool, pool.clone()


def _slots(num_rows: int, k_pool: Tensor) -> Tensor:
    return torch.randperm(k_pool.shape[0] * shapes.PAGE_SIZE)[:num_rows].contiguous()


def _append_kv(num_rows: int, settings: Settings) -> Trial:
    inputs, rotation_bytes = _qkv(num_rows, settings)
    k_pool, v_pool = _pools(settings)
    slots = _slots(num_rows, k_pool)

    def check(_peer: str) -> harness.Check:
        (_, k, v), expected = inputs[0], (k_pool.clone(), v_pool.clone())
        ops.append_kv(k, v, slots, k_pool, v_pool)
        torch_composites.append_kv(k, v, slots, *expected)
        return harness.compare((k_pool, v_pool), expected, 0.0)

    row_bytes = 2 * shapes.NUM_KV_HEADS * shapes.HEAD_DIM

    def call(append, index: int) -> None:
        append(*inputs[index][1:], slots, k_pool, v_pool)

    return Trial(
        ours=partial(call, ops.append_kv),
        peers={"torch": partial(call, torch_composites.append_kv)},
        check=check,
        work=Work(num_rows * row_bytes * (4 + 2)),
        rotations=len(inputs),
        rotation_bytes=rotation_bytes,
    )


def _rope_append_kv(num_rows: int, settings: Settings) -> Trial:
    inputs, rotation_bytes = _qkv(num_rows, settings)
    k_pool, v_pool = _pools(settings)
    slots = _slots(num_rows, k_pool)
    positions = torch.arange(100, 100 + num_rows, dtype=torch.int32)
    table = shapes.rope_table(2048)

    def call(rope, index: int) -> None:
        q, k, v = inputs[index]
        rope(q, k, v, positions, table, slots, k_pool, v_pool)

    def check(_peer: str) -> harness.Check:
        q, k, v = inputs[0]
        ours = q.clone(), k_pool.clone(), v_pool.clone()
        peer = q.clone(), k_pool.clone(), v_pool.clone()
        ops.rope_append_kv(ours[0], k, v, positions, table, slots, *ours[1:])
        torch_composites.rope_append_kv(peer[0], k, v, positions, table, slots, *peer[1:])
        # Half-precision pools: one unit in the last place where the float32 values round apart.
        return harness.compare(ours, peer, 1e-3)

    heads = 2 * shapes.NUM_HEADS + 2 * shapes.NUM_KV_HEADS
    stored = 2 * shapes.NUM_KV_HEADS * 2
    rotated = shapes.NUM_HEADS + shapes.NUM_KV_HEADS
    return Trial(
        ours=partial(call, ops.rope_append_kv),
        peers={"torch": partial(call, torch_composites.rope_append_kv)},
        check=check,
        work=Work(
            num_rows * shapes.HEAD_DIM * (4 * heads + stored),
            3 * num_rows * shapes.HEAD_DIM * rotated,
        ),
        rotations=len(inputs),
        rotation_bytes=rotation_bytes,
    )


def _copy_pages(num_copies: int, settings: Settings) -> Trial:
    layers = 2 if settings.smoke else shapes.NUM_LAYERS
    groups = 4 if settings.smoke else 48
    k_pool = shapes.kv_pool(layers, 2 * num_copies * groups, torch.float16)
    v_pool = k_pool.clone()
    copies = torch.randperm(2 * num_copies * groups).to(torch.int32).view(groups, num_copies, 2)
    pairs = list(copies.unbind(0))

    def check(_peer: str) -> harness.Check:
        expected = k_pool.clone(), v_pool.clone()
        ops.copy_pages(pairs[0], k_pool, v_pool)
        torch_composites.copy_pages(pairs[0], *expected)
        return harness.compare((k_pool, v_pool), expected, 0.0)

    page_bytes = 2 * 2 * layers * shapes.NUM_KV_HEADS * shapes.PAGE_SIZE * shapes.HEAD_DIM
    return Trial(
        ours=lambda i: ops.copy_pages(pairs[i], k_pool, v_pool),
        peers={"torch": lambda i: torch_composites.copy_pages(pairs[i], k_pool, v_pool)},
        check=check,
        work=Work(2 * num_copies * page_bytes),
        rotations=groups,
        rotation_bytes=2 * groups * num_copies * page_bytes,
        units=num_copies,
        unit="page",
    )


def _argmax(num_rows: int, settings: Settings) -> Trial:
    inputs, rotation_bytes = _rows(num_rows, shapes.VOCAB, settings)

    def check(_peer: str) -> harness.Check:
        ids, values = ops.argmax(inputs[0])
        bits = torch.equal(ops.argmax(inputs[0][-1:])[1], values[-1:])
        largest = torch.max(inputs[0], dim=-1).values
        # A tie may go to another index in torch: the value there is what counts.
        bits = bits and torch.equal(inputs[0].gather(1, ids[:, None])[:, 0], values)
        return harness.compare(values, largest, 0.0, bits)

    return Trial(
        ours=lambda i: ops.argmax(inputs[i]),
        peers={"torch": lambda i: torch.max(inputs[i], dim=-1)},
        check=check,
        work=Work(4 * num_rows * shapes.VOCAB),
        rotations=len(inputs),
        rotation_bytes=rotation_bytes,
    )


SAMPLE_TEMPERATURE = 0.7


def _sample(num_rows: int, k: int, p: float, settings: Settings) -> Trial:
    inputs, rotation_bytes = _rows(num_rows, shapes.VOCAB, settings)
    seeds, positions = torch.arange(num_rows), torch.arange(num_rows) + 100
    rest = (
        torch.full((num_rows,), SAMPLE_TEMPERATURE),
        torch.full((num_rows,), k, dtype=torch.int32),
        torch.full((num_rows,), p),
        torch.zeros(num_rows),
    )

    def check(_peer: str) -> harness.Check:
        ids, values = ops.sample(inputs[0], seeds, positions, *rest)
        alone = ops.sample(
            inputs[0][-1:], seeds[-1:], positions[-1:], *(tensor[-1:] for tensor in rest)
        )
        bits = torch.equal(alone[0], ids[-1:]) and torch.equal(alone[1], values[-1:])
        # Random numbers differ: our token must be one of those that the peer could have drawn.
        _, kept = torch_composites.sample(inputs[0], SAMPLE_TEMPERATURE, k, p)
        bits = bits and bool((kept == ids[:, None]).any(dim=1).all())
        return harness.compare(values, torch.max(inputs[0], dim=-1).values, 0.0, bits)

    return Trial(
        ours=lambda i: ops.sample(inputs[i], seeds, positions, *rest),
        peers={"torch": lambda i: torch_composites.sample(inputs[i], SAMPLE_TEMPERATURE, k, p)},
        check=check,
        work=Work(4 * num_rows * shapes.VOCAB),
        rotations=len(inputs),
        rotation_bytes=rotation_bytes,
    )


TOP_K = 5


def _linear_top_k(num_rows: int, k: int, settings: Settings) -> Trial:
    """The head of the model, int8: larger than a cache, so one weight is all it needs."""
    vocab = 4096 if settings.smoke else shapes.VOCAB
    inputs, rotation_bytes = _rows(num_rows, shapes.HIDDEN, settings)
    packed = packing.pack_int8(*packing.quantize_int8(torch.randn(vocab, shapes.HIDDEN)))
    parts = packed.weight, packed.scales, packed.minimums, None, vocab
    plain = packing.unpack(packed)
    num_bytes = packed.weight.nbytes + (0 if packed.scales is None else packed.scales.nbytes)

    def peer(index: int) -> tuple[Tensor, Tensor]:
        logits = torch.nn.functional.linear(inputs[index], plain)
        values, ids = torch.topk(logits, k)
        return ids, values

    def check(_peer: str) -> harness.Check:
        ids, values = ops.linear_top_k(inputs[0], *parts, k)
        full = ops.quantized_linear(inputs[0], *parts)
        bits = torch.equal(full.gather(1, ids), values)
        bits = bits and torch.equal(torch.topk(full, k).values, values)
        return harness.compare(values, peer(0)[1], TOLERANCE, bits)

    return Trial(
        ours=lambda i: ops.linear_top_k(inputs[i], *parts, k),
        peers={"torch": peer},
        check=check,
        work=Work(num_bytes, 2 * num_rows * vocab * shapes.HIDDEN),
        rotations=len(inputs),
        rotation_bytes=rotation_bytes + num_bytes,
    )


def _ngram_lookup(length: int, settings: Settings) -> Trial:
    copies = shapes.rotations(4 * length, settings.cold_bytes, most=64)
    inputs = [texts.repeating_text(length, seed) for seed in range(copies)]
    arrays = [tokens.numpy() for tokens in inputs]
    offsets = torch.tensor([0, length], dtype=torch.int32)
    limits = texts.MIN_N, texts.MAX_N, texts.DRAFT

    def check(_peer: str) -> harness.Check:
        draft, count = ops.ngram_lookup(inputs[0], offsets, *limits)
        expected = torch.from_numpy(text_scan.propose(arrays[0], *limits).copy())
        return harness.compare(draft[0, : int(count[0])], expected, 0.0)

    return Trial(
        ours=lambda i: ops.ngram_lookup(inputs[i], offsets, *limits),
        peers={"numpy_scan": lambda i: text_scan.propose(arrays[i], *limits)},
        check=check,
        work=Work(4 * length),
        rotations=copies,
        rotation_bytes=4 * length * copies,
        units=length,
        unit="token",
    )


def _verify_draft(num_sequences: int, _settings: Settings) -> Trial:
    num_draft = texts.DRAFT
    draft = torch.randint(0, 3, (num_sequences * num_draft,), dtype=torch.int32)
    target = torch.randint(0, 3, (num_sequences * (num_draft + 1),), dtype=torch.int32)
    offsets = torch.arange(num_sequences + 1, dtype=torch.int32) * num_draft

    def peer(_index: int) -> tuple[Tensor, Tensor]:
        return torch_composites.verify_draft(draft, target, num_sequences, num_draft)

    return Trial(
        ours=lambda _: ops.verify_draft(draft, target, offsets),
        peers={"torch": peer},
        check=lambda _: harness.compare(ops.verify_draft(draft, target, offsets), peer(0), 0.0),
        work=Work(4 * (draft.numel() + target.numel())),
    )


LOOP_PAGE, LOOP_CAPACITY = 64, 4096


def _loop_state(num_sequences: int) -> tuple[Tensor, Tensor, Tensor]:
    """History, lengths and num_left of sequences in the middle of their replies."""
    history = torch.randint(0, 1000, (num_sequences, LOOP_CAPACITY), dtype=torch.int32)
    lengths = torch.randint(100, LOOP_CAPACITY - 64, (num_sequences,), dtype=torch.int32)
    return history, lengths, torch.full((num_sequences,), 100, dtype=torch.int32)


def _fill_rows(num_sequences: int, _settings: Settings) -> Trial:
    history, lengths, num_left = _loop_state(num_sequences)
    draft = torch.randint(0, 1000, (num_sequences, texts.DRAFT), dtype=torch.int32)
    num_draft = torch.randint(0, texts.DRAFT + 1, (num_sequences,), dtype=torch.int32)
    pages = torch.arange(num_sequences * LOOP_CAPACITY // LOOP_PAGE, dtype=torch.int32)
    limits = torch.full_like(lengths, LOOP_CAPACITY)
    table = pages.view(num_sequences, -1)
    arguments = (history, lengths, num_left, limits, draft, num_draft, table, LOOP_PAGE)

    def check(_peer: str) -> harness.Check:
        rows = ops.fill_rows(*arguments)
        ours = rows.token_ids, rows.slots, rows.query_offsets[1:]
        return harness.compare(ours, torch_composites.fill_rows(*arguments), 0.0)

    return Trial(
        ours=lambda _: ops.fill_rows(*arguments),
        peers={"torch": lambda _: torch_composites.fill_rows(*arguments)},
        check=check,
        work=Work(32 * num_sequences * (texts.DRAFT + 1)),
    )


def _advance_sequences(num_sequences: int, _settings: Settings) -> Trial:
    num_rows = num_sequences * (texts.DRAFT + 1)
    fed, targets = torch.randint(0, 3, (2, num_rows))
    values, stop_ids = torch.randn(num_rows), torch.full((num_sequences, 4), 2, dtype=torch.int32)
    offsets = torch.arange(num_sequences + 1, dtype=torch.int32) * (texts.DRAFT + 1)
    counts = torch.zeros(num_sequences, 3, dtype=torch.int32)
    history, begin, most = _loop_state(num_sequences)

    def ours(_: int) -> tuple[Tensor, Tensor, Tensor]:
        state = history, begin.clone(), most.clone()  # else they would soon be at their end
        ops.advance_sequences(fed, targets, values, offsets, stop_ids, *state, counts)
        return state

    def peer(_: int) -> tuple[Tensor, Tensor, Tensor]:
        state = history, begin.clone(), most.clone()
        torch_composites.advance_sequences(fed, targets, stop_ids, *state)
        return state

    def check(_peer: str) -> harness.Check:
        expected = tuple(tensor.clone() for tensor in peer(0))
        return harness.compare(ours(0), expected, 0.0)

    return Trial(
        ours=ours, peers={"torch": peer}, check=check, work=Work(20 * num_rows + 16 * num_sequences)
    )


def cases(settings: Settings) -> Iterator[Case]:
    """Rows of a decode, a verify and a prefill chunk for each op."""
    rows = (1, 8) if settings.smoke else (1, 8, 512)
    for name, setup in (
        ("rms_norm", _rms_norm),
        ("rms_norm_residual", _rms_norm_residual),
        ("silu_mul", _silu_mul),
        ("rope_append_kv", _rope_append_kv),
        ("append_kv", _append_kv),
    ):
        for num_rows in rows:
            yield Case(name, {"N": num_rows}, partial(setup, num_rows))
    # Decode, verify and a full batch of decodes: a prefill chunk has one row of logits a sequence.
    for num_rows in (1, 8) if settings.smoke else (1, 8, 32):
        yield Case("argmax", {"R": num_rows}, partial(_argmax, num_rows))
        for k, p in ((0, 0.9), (50, 1.0)):
            labels = {"R": num_rows, "k": k, "p": p}
            yield Case("sample", labels, partial(_sample, num_rows, k, p))
        for k in (1, TOP_K):
            yield Case("linear_top_k", {"N": num_rows, "k": k}, partial(_linear_top_k, num_rows, k))
    for num_copies in (1, 8):
        yield Case("copy_pages", {"pages": num_copies}, partial(_copy_pages, num_copies))
    for length in (256,) if settings.smoke else (1024, 8192):
        yield Case("ngram_lookup", {"T": length}, partial(_ngram_lookup, length))
    for num_sequences in (1, 32):
        yield Case("verify_draft", {"S": num_sequences}, partial(_verify_draft, num_sequences))
        yield Case("fill_rows", {"S": num_sequences}, partial(_fill_rows, num_sequences))
        yield Case(
            "advance_sequences", {"S": num_sequences}, partial(_advance_sequences, num_sequences)
        )
