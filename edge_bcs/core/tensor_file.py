"""Safetensors files: read with plain reads, straight into the arrays that are to hold their numbers, and
written array by array.

The safetensors package maps a file into memory: a sector that cannot be read, or a file that another process
cuts off, then arrives as a signal that ends this process (SIGBUS), where a read returns an error and another
file can be tried. And nothing is in memory twice, as it is where a file is read whole and then parsed, or put
together and then written.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from edge_bcs.core.metadata import parse_json

_LARGEST_HEADER = 16 << 20
_MOST_AXES = 32
_TYPES = {
    "BOOL": "?", "U8": "u1", "I8": "i1",
    "I16": "<i2", "U16": "<u2", "F16": "<f2",
    "I32": "<i4", "U32": "<u4", "F32": "<f4",
    "F64": "<f8", "I64": "<i8", "U64": "<u8",
}  # fmt: skip
"""Element types in the order of safetensors, which writes the last ones first."""
_KINDS = {np.dtype(numbers): kind for kind, numbers in _TYPES.items()}
_ORDER = {kind: number for number, kind in enumerate(_TYPES)}
_UNREAD = {"BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}  # bytes; numpy has no such element types


def write_tensors(
    stream: IO[bytes], tensors: Mapping[str, np.ndarray[Any, Any]], metadata: Mapping[str, str]
) -> int:
    """Write a safetensors file and return its bytes: the same tensors and metadata give the same file.

    The arrays lie in the order that safetensors has, the metadata in sorted order.
    """
    arrays = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in tensors.items()}
    ordered = sorted(arrays, key=lambda name: (-_ORDER[_KINDS[arrays[name].dtype]], name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in ordered:
        array = arrays[name]
        header[name] = {
            "dtype": _KINDS[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [end, end + array.nbytes],
        }
        end += array.nbytes
    text = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little"))
    stream.write(text)
    for name in ordered:
        if arrays[name].size:
            stream.write(arrays[name].reshape(-1).view(np.uint8).data)
    return 8 + len(text) + end


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in its file: element type as safetensors names it, shape, first byte, bytes."""

    kind: str
    shape: tuple[int, ...]
    offset: int
    size: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """The element type as numpy has it."""
        if self.kind in _UNREAD:
            raise ValueError(f"it holds the element type {self.kind}, which is not read here")
        return np.dtype(_TYPES[self.kind])

    def __str__(self) -> str:
        return f"{self.kind}{list(self.shape)}"


class TensorFile:
    """A safetensors file, open for reading, whose header was checked: closed by leaving its `with` block.

    Checked as by safetensors, and no less: every byte behind the header belongs to exactly one tensor. A name
    that occurs twice, and a header of more than 16 MiB, are refused too.

    Args:
        file: its path, or the file itself, open for reading without a buffer.

    Attributes:
        metadata: the strings that the file holds beside its tensors.
        tensors: name → where it lies, in the order of the file.

    Raises OSError if the file cannot be opened or read, ValueError (one line, without the file's name) if it
    is not such a file; so does `read`.
    """

    def __init__(self, file: Path | io.RawIOBase) -> None:
        self._stream: io.RawIOBase = file.open("rb", buffering=0) if isinstance(file, Path) else file
        try:
            length = int.from_bytes(self._bytes(8), "little")
            size = self._stream.seek(0, os.SEEK_END)
            self._stream.seek(8)
            if length > min(_LARGEST_HEADER, size - 8):
                raise ValueError(f"its header would have {length} bytes")
            self.metadata, self.tensors = _parse(self._bytes(length), 8 + length, size)
        except BaseException:
            self._stream.close()
            raise

    def __enter__(self) -> TensorFile:
        """Return the file itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self._stream.close()

    def read(self, name: str, into: np.ndarray[Any, Any] | None = None) -> np.ndarray[Any, Any]:
        """Return a tensor: a new array, or ``into`` (of its type and shape, contiguous) filled with it."""
        stored = self.tensors[name]
        array = np.empty(stored.shape, stored.dtype) if into is None else into
        if (array.dtype, array.shape) != (stored.dtype, stored.shape):
            raise ValueError(f"{name} is {stored} instead of {array.dtype}{list(array.shape)}")
        self._stream.seek(stored.offset)
        if array.size:
            self._fill(array.reshape(-1).view(np.uint8).data)
        return array

    def read_part(self, name: str, first: int, end: int) -> np.ndarray[Any, Any]:
        """Return the elements [first, end) of a tensor with one axis."""
        stored = self.tensors[name]
        if len(stored.shape) != 1 or not 0 <= first <= end <= stored.shape[0]:
            raise ValueError(f"{name} is {stored}, without the elements {first} to {end}")
        array = np.empty(end - first, stored.dtype)
        self._stream.seek(stored.offset + first * array.itemsize)
        if array.size:
            self._fill(array.view(np.uint8).data)
        return array

    def _bytes(self, count: int) -> bytes:
        content = bytearray(count)
        self._fill(memoryview(content))
        return bytes(content)

    def _fill(self, view: memoryview) -> None:
        while len(view):
            count = self._stream.readinto(view)
            if not count:
                raise ValueError("it ends too early")
            view = view[count:]


def _parse(header: bytes, begin: int, end: int) -> tuple[dict[str, str], dict[str, StoredTensor]]:
    """(metadata, tensors) of a header, whose tensors fill the file from byte ``begin`` to byte ``end``."""
    text = header.decode()
    if text[:1] != "{":
        raise ValueError("its header is not a JSON object")
    entries: dict[str, Any] = parse_json(text, unique=True)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is not made of strings")
    for part in (*entries, *metadata, *metadata.values()):
        part.encode()  # half a surrogate pair is no text
    tensors = {name: _tensor(name, entry, begin) for name, entry in entries.items()}
    ordered = sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].size))
    place = begin
    for name, stored in ordered:
        if stored.offset != place:
            raise ValueError(f"{name[:60]!r} begins at byte {stored.offset} instead of {place}")
        place += stored.size
    if place != end:
        raise ValueError(f"its tensors end at byte {place} of {end}")
    return metadata, dict(ordered)


def _tensor(name: str, entry: Any, begin: int) -> StoredTensor:
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    kind: Any
    shape: Any
    offsets: Any
    kind, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(kind, str) and _counts(shape, _MOST_AXES) and _counts(offsets, 2)):
        raise ValueError(f"its header does not say what {name[:60]!r} is")
    if kind not in _TYPES and kind not in _UNREAD:
        raise ValueError(f"{name[:60]!r} has the element type {kind[:20]!r}, which is not read here")
    size = math.prod(shape) * (_UNREAD.get(kind) or np.dtype(_TYPES[kind]).itemsize)
    if len(offsets) != 2 or offsets[1] - offsets[0] != size:
        raise ValueError(f"{name[:60]!r} does not lie where its header says: {size} bytes at {offsets}")
    return StoredTensor(kind, tuple(shape), begin + offsets[0], size)


def _counts(value: Any, most: int) -> bool:
    """Whether it is a list of up to ``most`` whole numbers of at most 63 bits."""
    return (
        isinstance(value, list)
        and len(value) <= most
        and all(type(number) is int and 0 <= number < 2**63 for number in value)
    )
