"""Arrays of a MATLAB file of level 5 (what SVHN is published as), read as a stream, one piece at a time.

scipy's reader takes a file at its word: a damaged one crashes the process. Here every length is compared with
what contains it, and nothing is read that was not asked for.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from edge_bcs.data.decoding import is_trap

_COMPRESSED, _MATRIX = 15, 14
_NUMBERS: dict[int, np.dtype[Any]] = {
    1: np.dtype("i1"), 2: np.dtype("u1"), 3: np.dtype("<i2"), 4: np.dtype("<u2"), 5: np.dtype("<i4"),
    6: np.dtype("<u4"), 7: np.dtype("<f4"), 9: np.dtype("<f8"), 12: np.dtype("<i8"), 13: np.dtype("<u8"),
}  # fmt: skip
_NUMERIC_CLASSES = range(6, 16)  # double to uint64
_COMPLEX = 0x800
_LONGEST_NAME = 64
_MOST_VARIABLES = 1000


@dataclass(frozen=True)
class MatlabArray:
    """One array of numbers, in column-major order: ``content`` gives its bytes, as often as asked for."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    content: IO[bytes]


class _Inflated(io.RawIOBase):
    """What ``size`` bytes of a file, from its present position on, decompress to."""

    def __init__(self, stream: IO[bytes], size: int) -> None:
        self._stream, self._left, self._inflate = stream, size, zlib.decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._inflate.eof:
            piece = self._inflate.unconsumed_tail
            if not piece:
                piece = self._stream.read(min(self._left, 1 << 16))
                self._left -= len(piece)
            data = self._inflate.decompress(piece, len(target))
            if data:
                target[: len(data)] = data
                return len(data)
            if not piece:
                break
        return 0


def arrays(file: Path) -> Iterator[MatlabArray]:
    """Yield the arrays of numbers in a file, each before the next one is looked for; others are passed over.

    Raises ValueError, zlib.error or OSError for a file that is something else, truncated or damaged.
    """
    with file.open("rb") as stream:
        end = stream.seek(0, 2)
        stream.seek(0)
        header = _exactly(stream, 128)
        if header[124:128] != b"\x00\x01IM":
            raise ValueError("it is not a little-endian MATLAB file of level 5")
        for _ in range(_MOST_VARIABLES):
            position = stream.tell()
            if position == end:
                return
            kind, size = struct.unpack("<II", _exactly(stream, 8))
            if size > end - position - 8:
                raise ValueError("an element goes beyond the end of the file")
            if kind == _COMPRESSED:
                inner: IO[bytes] = io.BufferedReader(_Inflated(stream, size))  # type: ignore[assignment]
                kind, length = struct.unpack("<II", _exactly(inner, 8))
                if is_trap(length, size):
                    raise ValueError(f"{size} packed bytes declare that they are {length}")
                found = _array(inner, length) if kind == _MATRIX else None
            else:
                found = _array(stream, size) if kind == _MATRIX else None
            if found is not None:
                yield found
            stream.seek(position + 8 + size)
        raise ValueError("it has too many variables")


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise ValueError("it is truncated")
    return data


def _tag(stream: IO[bytes]) -> tuple[int, int, bytes]:
    """(kind, size, content if it lies in the tag itself)."""
    head = _exactly(stream, 8)
    kind, size = struct.unpack("<II", head)
    if kind >> 16:
        if kind >> 16 > 4:
            raise ValueError(f"a short element of {kind >> 16} bytes")
        return kind & 0xFFFF, kind >> 16, head[4 : 4 + (kind >> 16)]
    return kind, size, b""


def _part(stream: IO[bytes], largest: int) -> tuple[int, bytes]:
    kind, size, content = _tag(stream)
    if content or not size:
        return kind, content
    if size > largest:
        raise ValueError(f"a part of {size} bytes where at most {largest} are expected")
    return kind, _exactly(stream, -(-size // 8) * 8)[:size]


def _array(stream: IO[bytes], length: int) -> MatlabArray | None:
    """The array of numbers in an element of ``length`` bytes; None if it is of another class."""
    _, flags = _part(stream, 8)
    if len(flags) != 8:
        raise ValueError("an array without flags")
    (word,) = struct.unpack("<I", flags[:4])
    if word & 0xFF not in _NUMERIC_CLASSES or word & _COMPLEX:
        return None
    kind, sizes = _part(stream, 8 * 4)
    if kind != 5 or len(sizes) % 4 or len(sizes) < 8:
        raise ValueError("an array without dimensions")
    shape = struct.unpack(f"<{len(sizes) // 4}i", sizes)
    name = _part(stream, _LONGEST_NAME)[1].decode("ascii", "replace")
    kind, size, content = _tag(stream)
    dtype = _NUMBERS.get(kind)
    if dtype is None or min(shape) < 0 or math.prod(shape) * dtype.itemsize != size or size > length:
        raise ValueError(f"the array {name} of shape {list(shape)} has {size} bytes of kind {kind}")
    return MatlabArray(name, shape, dtype, io.BytesIO(content) if content else stream)
