"""GGUF container: metadata and tensor directory, every size checked before anything is read.

The header is walked with our own bounds checks, because the file may come from anywhere: a count
of 2**60 strings must be an error, not a loop or an allocation. So that a small file cannot become
many Python objects, arrays of numbers stay arrays and the number of everything else is limited.
Type numbers and block sizes come from the `gguf` package. Tensor data stays memory-mapped; only
the rows asked for are touched.
"""

from __future__ import annotations

import math
import mmap
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stateful_kv._extras import needs
from stateful_kv.errors import ModelLoadError, shown
from stateful_kv.models.files.gguf_blocks import Blocks

with needs("engine", "the engine"):
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

# Letters of `struct` and of numpy.
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_MAX_ARRAY_NESTING = 4
_MAX_DIMENSIONS = 4
_MAX_ALIGNMENT = 1 << 20
# Least bytes of a metadata entry (key length, type, one byte), a tensor entry and an array.
_MIN_ENTRY = 8 + 4 + 1
_MIN_TENSOR = 8 + 4 + 8 + 4 + 8
_MIN_ARRAY = 4 + 8
# Our own limits, several times what published models have. A header within them takes some hundred
# megabytes as Python objects and is read in a few seconds.
_MAX_HEADER_BYTES = 1 << 26
_MAX_ENTRIES = 1 << 15  # metadata keys; nested arrays
_MAX_TENSORS = 1 << 15
_MAX_STRINGS = 1 << 21  # in all arrays together


@dataclass(frozen=True)
class GGUFTensor:
    """Directory entry of one tensor.

    Attributes:
        name: as in the file.
        shape: outermost dimension first, so a weight matrix is (out, in).
        kind: block type.
        offset: first byte, from the start of the file.
        row_bytes: bytes of one run of the innermost dimension.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    row_bytes: int

    @property
    def num_rows(self) -> int:
        """Rows of the tensor seen as a matrix."""
        return math.prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return self.num_rows * self.row_bytes


class GGUFFile:
    """A mapped GGUF file of version 2 or 3.

    Attributes:
        path: of the file.
        metadata: key -> int, float, bool, str, a numpy array of numbers or booleans, or a list
            of str or of such arrays and lists.
        tensors: name -> directory entry; every entry lies wholly within the file.
        header_bytes: size of metadata and directory.
    """

    def __init__(self, path: Path) -> None:
        """Maps the file and reads its header.

        Raises:
            ModelLoadError: not a regular file, not GGUF, cut, or with impossible sizes.
        """
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        self._data = _map(path)
        reader = _HeaderReader(self._data, path)
        try:
            self._read_header(reader)
        except (struct.error, UnicodeDecodeError, ValueError, OverflowError) as error:
            raise reader.failure(str(error)) from error

    def rows(self, name: str) -> Blocks:
        """Returns a tensor's data as uint8[rows, bytes per row], a view of the mapped file."""
        tensor = self.tensors[name]
        flat: Blocks = np.frombuffer(self._data, np.uint8, tensor.nbytes, tensor.offset)
        return flat.reshape(tensor.num_rows, tensor.row_bytes)

    def sample(self, num_pieces: int, piece: int) -> list[bytes]:
        """Returns the header and evenly spread pieces of the data, for a fingerprint."""
        size, step = len(self._data), max(piece, len(self._data) // num_pieces)
        starts = range(self.header_bytes, size, step)
        return [self._data[: self.header_bytes], *(self._data[i : i + piece] for i in starts)]

    def _read_header(self, reader: _HeaderReader) -> None:
        if reader.take(4) != b"GGUF":
            raise reader.failure("it does not start with the letters GGUF")
        version = reader.scalar("I")
        if version not in (2, 3):
            raise reader.failure(f"version {version} is not supported (2 and 3 are)")
        num_tensors = reader.count(_MIN_TENSOR, "tensor count", most=_MAX_TENSORS)
        num_entries = reader.count(_MIN_ENTRY, "metadata count", most=_MAX_ENTRIES)
        for _ in range(num_entries):
            key = reader.string()
            if key in self.metadata:
                raise reader.failure(f"metadata key {shown(key)} is there twice")
            self.metadata[key] = reader.value(reader.scalar("I"))
        entries = [_read_tensor_entry(reader) for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if (
            not isinstance(alignment, int)
            or not 8 <= alignment <= _MAX_ALIGNMENT
            or alignment & (alignment - 1)
        ):
            raise reader.failure(f"general.alignment {shown(alignment)} is not a sane power of two")
        self.header_bytes = reader.position
        data_start = -(-reader.position // alignment) * alignment
        for entry in entries:
            self._add_tensor(reader, entry, data_start, alignment)

    def _add_tensor(
        self, reader: _HeaderReader, entry: GGUFTensor, data_start: int, alignment: int
    ) -> None:
        if entry.name in self.tensors:
            raise reader.failure(f"tensor {shown(entry.name)} is there twice")
        if entry.offset % alignment:
            raise reader.failure(
                f"tensor {shown(entry.name)}: offset {entry.offset} is not aligned"
            )
        start = data_start + entry.offset
        if start + entry.nbytes > len(self._data):
            raise reader.failure(
                f"tensor {shown(entry.name)} needs bytes {start} to {start + entry.nbytes}, "
                f"the file has {len(self._data)}; is it cut?"
            )
        self.tensors[entry.name] = GGUFTensor(
            entry.name, entry.shape, entry.kind, start, entry.row_bytes
        )


class _HeaderReader:
    """Walks the header; every length is compared with what is left before it is used."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data = data
        self._path = path
        self._strings_left = _MAX_STRINGS
        self._arrays_left = _MAX_ENTRIES
        self.position = 0

    def failure(self, reason: str) -> ModelLoadError:
        return ModelLoadError(f"{self._path}: bad GGUF file: {reason} (byte {self.position})")

    def skip(self, num_bytes: int) -> int:
        """Goes over bytes that are there; returns where they start."""
        start, end = self.position, self.position + num_bytes
        if end > len(self._data):
            raise self.failure(f"{num_bytes} bytes wanted past the end; is the file cut?")
        if end > _MAX_HEADER_BYTES:
            raise self.failure(f"its header is longer than {_MAX_HEADER_BYTES} bytes")
        self.position = end
        return start

    def take(self, num_bytes: int) -> bytes:
        start = self.skip(num_bytes)
        return self._data[start : self.position]

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, item_bytes: int, what: str, most: int | None = None) -> int:
        value = int(self.scalar("Q"))
        if value * item_bytes > len(self._data) - self.position:
            raise self.failure(f"{what} {value} does not fit in the file")
        if most is not None and value > most:
            raise self.failure(f"{what} {value} is over the limit of {most}")
        return value

    def string(self) -> str:
        return self.take(self.count(1, "string length")).decode("utf-8")

    def value(self, kind: int, nesting: int = 0) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.failure(f"unknown metadata type {kind}")
        if nesting == _MAX_ARRAY_NESTING:
            raise self.failure("arrays are nested too deep")
        return self._array(nesting)

    def _array(self, nesting: int) -> NDArray[Any] | list[Any]:
        kind = self.scalar("I")
        if kind in _SCALARS:
            dtype = np.dtype("<" + _SCALARS[kind])
            count = self.count(dtype.itemsize, "array length")
            start = self.skip(count * dtype.itemsize)
            if dtype == np.bool_:  # any byte but 0 is true
                return np.frombuffer(self._data, np.uint8, count, start).astype(np.bool_)
            return np.frombuffer(self._data, dtype, count, start)
        if kind == _STRING:
            count = self.count(8, "array length", most=self._strings_left)
            self._strings_left -= count
            return self._strings(count)
        count = self.count(_MIN_ARRAY, "array length", most=self._arrays_left)
        self._arrays_left -= count
        return [self.value(kind, nesting + 1) for _ in range(count)]

    def _strings(self, count: int) -> list[str]:
        # A vocabulary is 100,000 of these: the loop of `string` by hand, without its calls.
        data, position = self._data, self.position
        size = min(len(data), _MAX_HEADER_BYTES)
        unpack = struct.Struct("<Q").unpack_from
        strings = []
        for _ in range(count):
            (length,) = unpack(data, position)
            position += 8
            if length > size - position:
                self.position = position
                raise self.failure(f"string length {length} does not fit in the header")
            strings.append(data[position : position + length].decode("utf-8"))
            position += length
        self.position = position
        return strings


def _read_tensor_entry(reader: _HeaderReader) -> GGUFTensor:
    """Reads one directory entry; its offset is still relative to the data section."""
    name = reader.string()
    num_dimensions = reader.scalar("I")
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise reader.failure(f"tensor {shown(name)} has {num_dimensions} dimensions")
    inner_first = [int(reader.scalar("Q")) for _ in range(num_dimensions)]
    type_number = reader.scalar("I")
    try:
        kind = GGMLQuantizationType(type_number)
    except ValueError:
        raise reader.failure(f"tensor {shown(name)} has unknown type {type_number}") from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if inner_first[0] % block:
        raise reader.failure(
            f"tensor {shown(name)}: {inner_first[0]} is not whole {kind.name} blocks"
        )
    row_bytes = inner_first[0] // block * block_bytes
    shape = tuple(reversed(inner_first))
    return GGUFTensor(name, shape, kind, int(reader.scalar("Q")), row_bytes)


def _map(path: Path) -> mmap.mmap:
    """Maps a regular file read-only."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ModelLoadError(f"{path}: not a regular file")
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path}: cannot be read: {error}") from error
