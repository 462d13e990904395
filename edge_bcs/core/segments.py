"""A named run of numbers in a flat buffer: a kernel, a parameter, the statistics of a batch norm."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Segment:
    """[offset, offset + size) of a buffer, which holds an array of ``shape``, row-major, under a name."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def span(self) -> slice:
        """Where it lies in the buffer."""
        return slice(self.offset, self.offset + self.size)
