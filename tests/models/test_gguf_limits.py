"""Crafted GGUF headers: a small file stays small in memory, and is read or refused soon."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stateful_kv.errors import ModelLoadError
from stateful_kv.models.files.gguf_file import GGUFFile
from tests.models.test_gguf_file import header, text

UINT8, INT16, STRING, ARRAY = 0, 3, 8, 9
MEBI = 1 << 20


def number(value: int, num_bytes: int) -> bytes:
    return value.to_bytes(num_bytes, "little")


def array(kind: int, count: int, data: bytes) -> bytes:
    return number(ARRAY, 4) + number(kind, 4) + number(count, 8) + data


def with_arrays(*arrays: bytes) -> bytes:
    entries = [text(b"k%d" % index) + value for index, value in enumerate(arrays)]
    return header(*entries, bytes(64), entries=len(entries))


def keys(count: int) -> bytes:
    entries = [text(b"%07d" % index) + number(UINT8, 4) + b"\0" for index in range(count)]
    return header(*entries, entries=count)


def tensors(count: int) -> bytes:
    entries = [
        text(b"%07d" % index) + number(1, 4) + number(32, 8) + number(0, 4) + number(0, 8)
        for index in range(count)
    ]
    return header(*entries, bytes(4096), tensors=count)


MILLION = 1_000_000
# Name: the file, and whether it is read or refused.
CRAFTED = {
    "a million strings of two letters": (
        lambda: with_arrays(array(STRING, MILLION, text(b"\xc3\xa9\xc3\xa9") * MILLION)),
        "read",
    ),
    "four million empty strings": (
        lambda: with_arrays(array(STRING, 4 * MILLION, bytes(32 * MILLION))),
        "refused",
    ),
    "strings in several arrays": (
        lambda: with_arrays(*[array(STRING, MILLION, bytes(8 * MILLION))] * 4),
        "refused",
    ),
    "thirty million small integers": (
        lambda: with_arrays(array(INT16, 30 * MILLION, b"\x39\x30" * (30 * MILLION))),
        "read",
    ),
    "two hundred million bytes": (
        lambda: with_arrays(array(UINT8, 200 * MILLION, bytes(200 * MILLION))),
        "refused",
    ),
    "one long string": (lambda: header(text(bytes(100 * MILLION)), entries=1), "refused"),
    "a million arrays in an array": (
        lambda: with_arrays(array(ARRAY, MILLION, (number(UINT8, 4) + bytes(8)) * MILLION)),
        "refused",
    ),
    "arrays that double": (
        lambda: with_arrays(
            array(ARRAY, 2, (number(ARRAY, 4) + number(20_000, 8) + bytes(12 * 20_000)) * 2)
        ),
        "refused",
    ),
    "a thousand million strings": (
        lambda: with_arrays(array(STRING, 10**9, bytes(MILLION))),
        "refused",
    ),
    "ten thousand keys": (lambda: keys(10_000), "read"),
    "a million keys": (lambda: keys(1_000_000), "refused"),
    "a million tensors": (lambda: tensors(1_000_000), "refused"),
}


def footprint(value: Any) -> int:
    """Bytes of a value with all it holds; shared values count each time."""
    if isinstance(value, dict):
        return sys.getsizeof(value) + sum(footprint(k) + footprint(v) for k, v in value.items())
    if isinstance(value, list):
        return sys.getsizeof(value) + sum(map(footprint, value))
    return sys.getsizeof(value)


@pytest.mark.parametrize("case", CRAFTED)
def test_memory_and_time(case: str, tmp_path: Path) -> None:
    make, wanted = CRAFTED[case]
    path = tmp_path / "crafted.gguf"
    path.write_bytes(make())
    began_at = time.process_time()
    try:
        metadata = GGUFFile(path).metadata
        outcome = "read"
    except ModelLoadError as error:
        metadata = {}
        outcome = "refused"
        assert len(str(error)) < 2000
    assert time.process_time() - began_at < 10
    assert outcome == wanted
    assert footprint(metadata) < 100 * MEBI


def test_arrays_of_numbers_and_booleans(tmp_path: Path) -> None:
    path = tmp_path / "arrays.gguf"
    path.write_bytes(
        with_arrays(
            array(INT16, 3, np.array([1, -2, 300], "<i2").tobytes()),
            array(7, 3, b"\0\1\2"),
            array(UINT8, 0, b""),
            array(ARRAY, 2, array(UINT8, 1, b"\7")[4:] + array(STRING, 1, text(b"x"))[4:]),
        )
    )
    values = list(GGUFFile(path).metadata.values())
    assert values[0].tolist() == [1, -2, 300]
    assert values[1].tolist() == [False, True, True]
    assert values[2].tolist() == []
    assert [list(part) for part in values[3]] == [[7], ["x"]]
