"""GGUF: blocks against the reference dequantiser, and files that are broken in every way."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from stateful_kv.errors import ModelLoadError
from stateful_kv.models import packing
from stateful_kv.models.files import gguf_blocks
from stateful_kv.models.files.gguf_file import GGUFFile

PACKED = {Type.Q8_0: "int8", Type.Q4_0: "int4", Type.Q4_1: "int4", Type.Q4_K: "int4"}
KINDS = [*PACKED, Type.F32, Type.F16, Type.BF16, Type.Q6_K, Type.Q5_0]


def random_rows(kind: Type, out: int = 24, k: int = 512) -> np.ndarray:
    """Rows of blocks with random bits and finite scales."""
    rng = np.random.default_rng(int(kind))
    if kind not in (Type.Q4_K, Type.Q6_K):
        return gguf.quants.quantize(rng.normal(size=(out, k)).astype(np.float32), kind).view(
            np.uint8
        )
    block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = rng.integers(0, 256, (out, k // 256, block_bytes), dtype=np.uint8)
    for at in (0, 2) if kind == Type.Q4_K else (208,):
        halves = rng.normal(size=(out, k // 256, 1)).astype(np.float16)
        blocks[:, :, at : at + 2] = halves.view(np.uint8)
    return blocks.reshape(out, -1)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_blocks_equal_the_reference(kind: Type, tmp_path: Path) -> None:
    rows = random_rows(kind)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tensor("t", rows, raw_dtype=kind)
    write(writer)
    file = GGUFFile(tmp_path / "t.gguf")
    assert file.tensors["t"].shape == (24, 512)
    got = file.rows("t")
    assert np.array_equal(got, rows)
    want = torch.from_numpy(gguf.quants.dequantize(rows, kind).astype(np.float32))
    assert torch.equal(gguf_blocks.to_float(got, kind), want)
    packed = gguf_blocks.to_packed(got, kind)
    assert (packed.format if packed else None) == PACKED.get(kind)
    if packed is not None:
        # Bit for bit: no second rounding.
        assert torch.equal(packing.unpack(packed), want)


def write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "Ġ日"])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0])
    writer.add_bool("flag", True)
    writer.add_tensor("w", np.arange(64, dtype=np.float32).reshape(2, 32))
    write(writer)
    return path


def test_metadata(small: Path) -> None:
    file = GGUFFile(small)
    assert file.metadata["general.architecture"] == "llama"
    assert file.metadata["tokenizer.ggml.tokens"] == ["a", "bc", "Ġ日"]
    assert file.metadata["tokenizer.ggml.scores"].tolist() == [0.5, -1.0]
    assert file.metadata["flag"] is True
    assert file.rows("w").view(np.float32)[1, 0] == 32


def test_cut_anywhere(small: Path, tmp_path: Path) -> None:
    data, cut = small.read_bytes(), tmp_path / "cut.gguf"
    # The writer pads the last tensor; cutting only that padding leaves a whole file.
    for length in range(len(data)):
        cut.write_bytes(data[:length])
        with pytest.raises(ModelLoadError, match=r"cut\.gguf"):
            GGUFFile(cut)


def test_any_flipped_byte_of_the_header_is_an_error_or_harmless(
    small: Path, tmp_path: Path
) -> None:
    data, path = small.read_bytes(), tmp_path / "flipped.gguf"
    header = GGUFFile(small).header_bytes
    for position in range(header):
        for bits in (0x01, 0x80, 0xFF):
            flipped = bytearray(data)
            flipped[position] ^= bits
            path.write_bytes(flipped)
            try:
                file = GGUFFile(path)
            except ModelLoadError:
                continue
            assert all(t.offset + t.nbytes <= len(data) for t in file.tensors.values())


def header(*parts: bytes, tensors: int = 0, entries: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries) + b"".join(parts)


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def tensor(name: bytes, dims: list[int], kind: int, offset: int) -> bytes:
    sizes = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


PADDING = bytes(4096)
HOSTILE = {
    "not GGUF": (b"PK\x03\x04" + PADDING, "letters GGUF"),
    "version": (header(PADDING, version=9), "version 9"),
    "big endian": (header(PADDING, version=3 << 24), "version"),
    "tensor count": (header(PADDING, tensors=2**60), "tensor count"),
    "metadata count": (header(PADDING, entries=2**63), "metadata count"),
    "key length": (header(text(b"", 2**60), PADDING, entries=1), "string length"),
    "unknown value type": (header(text(b"k"), struct.pack("<I", 77), PADDING, entries=1), "77"),
    "string array": (
        header(text(b"k"), struct.pack("<IIQ", 9, 8, 2**60), PADDING, entries=1),
        "array length",
    ),
    "byte array": (
        header(text(b"k"), struct.pack("<IIQ", 9, 0, 2**62), PADDING, entries=1),
        "array length",
    ),
    "nested arrays": (
        header(
            text(b"k"), struct.pack("<I", 9), struct.pack("<IQ", 9, 1) * 100, PADDING, entries=1
        ),
        "nested too deep",
    ),
    "bad text": (header(text(b"\xff\xfe"), PADDING, entries=1), "codec"),
    "key twice": (header((text(b"k") + struct.pack("<II", 4, 1)) * 2, PADDING, entries=2), "twice"),
    "alignment 0": (
        header(text(b"general.alignment"), struct.pack("<II", 4, 0), PADDING, entries=1),
        "alignment",
    ),
    "alignment huge": (
        header(text(b"general.alignment"), struct.pack("<II", 4, 2**31), PADDING, entries=1),
        "alignment",
    ),
    "dimensions": (header(tensor(b"t", [2] * 9, 0, 0), PADDING, tensors=1), "9 dimensions"),
    "type": (header(tensor(b"t", [32], 250, 0), PADDING, tensors=1), "unknown type 250"),
    "product overflow": (
        header(tensor(b"t", [2**62, 2**62, 2**62], 0, 0), PADDING, tensors=1),
        "is it cut",
    ),
    "offset": (header(tensor(b"t", [32], 0, 2**63), PADDING, tensors=1), "is it cut"),
    "misaligned": (header(tensor(b"t", [32], 0, 4), PADDING, tensors=1), "not aligned"),
    "blocks": (header(tensor(b"t", [33], 8, 0), PADDING, tensors=1), "whole Q8_0 blocks"),
    "tensor twice": (header(tensor(b"t", [32], 0, 0) * 2, PADDING, tensors=2), "twice"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers(case: str, tmp_path: Path) -> None:
    data, reason = HOSTILE[case]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelLoadError, match=reason):
        GGUFFile(path)


def test_no_regular_file(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "empty.gguf").write_bytes(b"")
    for name in ("pipe.gguf", "empty.gguf", "missing.gguf", "."):
        with pytest.raises(ModelLoadError):
            GGUFFile(tmp_path / name)
