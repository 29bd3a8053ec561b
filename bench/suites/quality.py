"""Suite `quality`: what quantised weights and rounded KV cost, on the text shipped with the tests.

Every variant predicts the same tokens: our packings and KV dtypes, and llama.cpp on the same GGUF
file where its Python package is installed. The yardstick is our engine with the file's weights
expanded to fp32 and KV in fp32. Seconds are of one pass with the logits of every token computed;
they are no measure of speed, for the variants take turns chunk by chunk.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench import harness, perplexity
from bench.harness import PeerMissingError, Settings
from bench.peers.llama_cpp_model import LlamaCppContext, LlamaCppModel, check_runs
from bench.selection import Row
from stateful_kv.kv.pools import DTYPES
from stateful_kv.models.files.loading import LoadedModel, load_model, resolve

MODEL = "smollm2"
PEER = "llama_cpp"
REFERENCE = ("fp32", "float32")
# (weight format, KV dtype); "auto" is the file's own blocks, the default.
VARIANTS = (
    ("auto", "float16"),
    ("auto", "bfloat16"),
    ("auto", "float32"),
    ("int8", "float16"),
    ("int4", "float16"),
    ("fp32", "float16"),
    ("auto", "int8"),
)
SMOKE_VARIANTS, SMOKE_TOKENS = VARIANTS[:1], 48
# Largest part by which the perplexity of the file's own weights may differ from llama.cpp's.
LLAMA_CPP_TOLERANCE = 0.01
FLASH_ATTENTION = True  # of llama.cpp; what it chooses itself on a CPU


@dataclass
class Reading:
    """What is collected of one variant while the text goes by."""

    chunks: Iterator[Tensor]
    losses: list[Tensor] = field(default_factory=list)
    distance: perplexity.Distance = field(default_factory=perplexity.Distance)
    seconds: float = 0.0

    def read(self, next_tokens: Sequence[int]) -> Tensor:
        """Takes in the next chunk; returns its logits."""
        began = time.perf_counter()
        logits = next(self.chunks)
        self.seconds += time.perf_counter() - began
        self.losses.append(perplexity.losses(logits, next_tokens))
        return logits

    @property
    def perplexity(self) -> float:
        """Of the whole text."""
        return perplexity.perplexity(self.losses)


def measure(reference: Reading, others: Sequence[Reading], tokens: Sequence[int]) -> None:
    """Reads the text through all of them side by side; each chunk is compared with `reference`."""
    for start in range(0, len(tokens), perplexity.CHUNK):
        next_tokens = tokens[start + 1 : start + 1 + perplexity.CHUNK]
        expected = reference.read(next_tokens)
        for other in others:
            other.distance.add(other.read(next_tokens), expected)


def checks(
    variant: tuple[str, str], ours: float, fp32: float, llama_cpp: float | None
) -> dict[str, bool]:
    """What must hold for the perplexity of a variant; `llama_cpp` None leaves that peer out."""
    weights, kv_dtype = variant
    held = {"finite": bool(torch.tensor(ours).isfinite())}
    if weights in ("auto", "fp32"):
        # These weights equal those of fp32 up to the order of two roundings; only KV differs.
        percent = 0.2 if kv_dtype == "int8" else 0.1
        held[f"within_{percent}_percent_of_fp32"] = abs(ours / fp32 - 1) <= percent / 100
    if weights == "auto" and llama_cpp is not None:
        held["within_1_percent_of_llama_cpp"] = abs(ours / llama_cpp - 1) <= LLAMA_CPP_TOLERANCE
    return held


def _result(
    variant: tuple[str, str], reading: Reading, fp32: Reading, num_tokens: int, peer: dict[str, Any]
) -> dict[str, Any]:
    weights, kv_dtype = variant
    ours, reference = reading.perplexity, fp32.perplexity
    against = peer if weights == "auto" and peer else {}
    note = f"perplexity {ours:.4f}, {ours / reference - 1:+.3%} to fp32"
    if against:
        note += f", {ours / against['perplexity'] - 1:+.3%} to {PEER}"
    result = {
        "suite": "quality",
        "name": "perplexity",
        "axes": {"weights": weights, "kv": kv_dtype},
        "peer_name": PEER if against else None,
        "model": MODEL,
        "text": {
            "file": "tests/data/" + perplexity.TEXT.name,
            "sha256": hashlib.sha256(perplexity.TEXT.read_bytes()).hexdigest(),
            "num_tokens": num_tokens,
        },
        # A smoke run has too few tokens to compare two programs that round differently.
        "checks": checks(
            variant,
            ours,
            reference,
            against.get("perplexity") if num_tokens > SMOKE_TOKENS else None,
        ),
        "note": note,
        "perplexity": ours,
        "fp32_perplexity": reference,
        "ratio_to_fp32": ours / reference,
        "from_fp32": reading.distance.to_json(),
        "ours": harness.statistics_of([reading.seconds]),
        "unit": "token",
        "units_per_call": num_tokens,
        "ns_per_unit": reading.seconds * 1e9 / num_tokens,
    }
    if against:
        result["ratio_to_llama_cpp"] = ours / against["perplexity"]
        result["llama_cpp"] = against
    return result


def _measure_with_peer(
    fp32: Reading, ours: Sequence[Reading], tokens: Sequence[int]
) -> dict[str, Any]:
    """As `measure`, llama.cpp among the others; returns what was found of it."""
    path = resolve(MODEL)
    num_threads = torch.get_num_threads()
    with (
        closing(LlamaCppModel(path)) as model,
        closing(
            LlamaCppContext(model, len(tokens), num_threads, flash_attention=FLASH_ATTENTION)
        ) as context,
    ):
        theirs = Reading(_chunks_of(context, tokens))
        measure(fp32, [*ours, theirs], tokens)
        about = context.about
    return {
        "perplexity": theirs.perplexity,
        "ratio_to_fp32": theirs.perplexity / fp32.perplexity,
        "from_fp32": theirs.distance.to_json(),
        "file": path.name,
        "settings": {**about, "kv": "f16", "flash_attention": FLASH_ATTENTION},
    }


def _chunks_of(context: LlamaCppContext, tokens: Sequence[int]) -> Iterator[Tensor]:
    """Logits of a text, float32[up to CHUNK, V] at a time."""
    ids = torch.tensor(tokens)
    for part in torch.split(ids, perplexity.CHUNK):
        context.run(part, len(part))
        yield context.logits()


def _has_peer(settings: Settings) -> bool:
    """Whether llama.cpp is there; an error if it is not and was asked for by name."""
    try:
        check_runs(resolve(MODEL))
        LlamaCppModel(resolve(MODEL)).close()
    except PeerMissingError as error:
        if settings.peer == PEER:
            raise harness.CheckFailedError(f"quality: {PEER}: {error}") from error
        return False
    return True


def _text(loaded: LoadedModel, settings: Settings) -> list[int]:
    tokens: list[int] = loaded.tokenizer.encode(perplexity.TEXT.read_text("utf-8")).tolist()
    return tokens[:SMOKE_TOKENS] if settings.smoke else tokens


def rows(settings: Settings) -> list[Row]:
    """A row for each variant; `--only` goes by weights/kv."""
    return [
        Row("perplexity", {"weights": weights, "kv": kv}, label=f"{weights}/{kv}")
        for weights, kv in (SMOKE_VARIANTS if settings.smoke else VARIANTS)
    ]


def run(settings: Settings, _roofs: dict[str, Any], emit: Callable[[dict[str, Any]], None]) -> None:
    """Run the suite; a broken check is an error."""
    chosen = tuple(
        (str(row.axes["weights"]), str(row.axes["kv"]))
        for row in rows(settings)
        if settings.selection.takes(str(row.label), row.axes)
    )
    if not chosen:
        return
    with_peer = settings.peer in (None, "all", PEER) and _has_peer(settings)
    loaded = {name: load_model(MODEL, name) for name in {REFERENCE[0], *(v[0] for v in chosen)}}
    tokens = _text(loaded[REFERENCE[0]], settings)

    def reading(variant: tuple[str, str]) -> Reading:
        model = loaded[variant[0]].model
        return Reading(perplexity.chunks_of(model, tokens, DTYPES[variant[1]]))

    fp32, ours = reading(REFERENCE), {variant: reading(variant) for variant in chosen}
    if with_peer:
        peer = _measure_with_peer(fp32, list(ours.values()), tokens)
    else:
        peer = {}
        measure(fp32, list(ours.values()), tokens)
    for variant, evaluation in ours.items():
        result = _result(variant, evaluation, fp32, len(tokens), peer)
        emit(result)
        if broken := [name for name, holds in result["checks"].items() if not holds]:
            label = "/".join(variant)
            raise harness.CheckFailedError(
                f"quality: {label}: {', '.join(broken)}: {result['note']}"
            )
