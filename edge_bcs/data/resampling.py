"""Images brought to another size by the operator library: the same bits with every version of Pillow, and in
programs without Python."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from types import TracebackType
from typing import Any

import numpy as np

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.library import load
from edge_bcs.core.resizing import Box

Array = np.ndarray[Any, Any]


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    number, place = ctypes.c_int, ctypes.c_void_p
    return load(
        {
            "edge_bcs_resizer_open": (place, [number, number, number, place, number, number]),
            "edge_bcs_resizer_take": (None, [place, place, number, place]),
            "edge_bcs_resizer_close": (None, [place]),
        }
    )


class Resizer:
    """Makes one image of another size, bilinearly over all pixels that fall into one, from its rows.

    Args:
        image: (width, height) of the image. channels: of it.
        box: the part of it that is taken, (left, top, right, bottom) in its pixels.
        size: (width, height) of the result.

    Attributes:
        result: u8 [height, width, channels], once all rows were taken.

    Raises:
        EdgeBcsError: the library is missing, or memory does not suffice.
    """

    result: Array

    def __init__(self, image: tuple[int, int], channels: int, box: Box, size: tuple[int, int]) -> None:
        part = np.array(box, np.float32)
        self._row = image[0] * channels
        self.result = np.empty((size[1], size[0], channels), np.uint8)
        self._library = _library()
        self._handle = self._library.edge_bcs_resizer_open(
            image[1], image[0], channels, part.ctypes.data, size[1], size[0]
        )
        if not self._handle:
            raise EdgeBcsError("there is not enough memory to resize an image.")

    def take(self, rows: Array) -> None:
        """Take the next rows, u8 [n, width, channels]; the last axis may be missing where there is one."""
        rows = np.ascontiguousarray(rows)
        count, rest = divmod(rows.size, self._row)
        if rows.dtype != np.uint8 or rest or not self._handle:
            raise ValueError("rows are u8, whole, and taken before the resizer is closed")
        self._library.edge_bcs_resizer_take(self._handle, rows.ctypes.data, count, self.result.ctypes.data)

    def __enter__(self) -> Resizer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._library.edge_bcs_resizer_close(self._handle)
        self._handle = None
