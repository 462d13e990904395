"""Where the tensors of a phase lie in one block of memory, and the map of address × time.

Each tensor gets the lowest address that is free during its whole life. What decides is the order in which
they are placed, so several are tried and the best is kept: from the largest (greedy by size, as in TensorFlow
Lite Micro), from the longest-lived (what is kept for the backward pass nests like brackets, without a hole),
by bytes × life, from the moment with the most alive (Pisarchyk & Lee, "Efficient Memory Management for Deep
Neural Net Inference", 2020), as they come; then what stands out at the top is placed earlier, as long as that
helps. No block can be smaller than the largest sum of bytes alive at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from edge_bcs.runtime.buffers import ALIGNMENT

from edge_bcs.core.units import format_bytes

from .plans import Allocation, Phase

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_PROMOTIONS = 40  # tries to place the topmost tensor earlier, for each order
_MANY = 4000  # tensors, above which it is not tried: placing them once takes a second

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Layout:
    """Addresses of the tensors of a phase, parallel to ``tensors``, in bytes from the start of the block.

    Attributes:
        extent: bytes of the block. live: the largest sum of bytes alive at once, which no block can undercut;
            both with each tensor rounded up to whole units of the alignment.
    """

    tensors: tuple[Allocation, ...]
    addresses: tuple[int, ...]
    extent: int
    live: int


def layout_of(phase: Phase) -> Layout:
    """Where the tensors of a phase lie; those of an artifact of before 0.2, which has no addresses, are
    placed here."""
    if any(tensor.address < 0 for tensor in phase.allocations):
        return assign(phase.allocations)
    tensors = phase.allocations
    live = _Lives(tensors, ALIGNMENT).most_alive if tensors else 0
    extent = max((tensor.end for tensor in tensors), default=0)
    return Layout(tensors, tuple(tensor.address for tensor in tensors), extent, live)


def assign(tensors: Iterable[Allocation], alignment: int = ALIGNMENT) -> Layout:
    """Place ``tensors`` in one block without overlap in space and time, in the smallest that is found.

    Args:
        alignment: bytes, of which every address is a multiple.
    """
    chosen = tuple(tensors)
    if not chosen:
        return Layout((), (), 0, 0)
    lives = _Lives(chosen, alignment)
    found = lives.best()
    return Layout(chosen, tuple(map(int, found)), lives.extent(found), lives.most_alive)


class _Lives:
    """Sizes and lives of tensors, as arrays."""

    def __init__(self, tensors: tuple[Allocation, ...], alignment: int) -> None:
        sizes = np.array([tensor.bytes for tensor in tensors], np.int64)
        self.sizes: Array = -(-sizes // alignment) * alignment
        self.births: Array = np.array([tensor.birth for tensor in tensors], np.int64)
        self.deaths: Array = np.array([tensor.death for tensor in tensors], np.int64)
        change = np.zeros(int(self.deaths.max()) + 2, np.int64)
        np.add.at(change, self.births, self.sizes)
        np.subtract.at(change, self.deaths + 1, self.sizes)
        self.alive: Array = np.cumsum(change)[:-1]
        self.most_alive = int(self.alive.max())

    def orders(self) -> list[Array]:
        """Orders of placing, each a permutation."""
        spans = self.deaths - self.births + 1
        fullest = [int(self.alive[b : d + 1].max()) for b, d in zip(self.births, self.deaths, strict=True)]
        keys = [  # the last of each counts first
            (self.births, -self.sizes),
            (-self.sizes, self.births, -spans),
            (self.births, -self.sizes * spans),
            (-self.sizes, -np.array(fullest, np.int64)),
            (-self.sizes, self.births),
        ]
        return [np.lexsort(key) for key in keys]

    def best(self) -> Array:
        """The addresses with the smallest extent that is found; none is tried after one without holes."""
        first, *others = self.orders()
        found = self.improved(first)
        for order in others:
            if self.extent(found) == self.most_alive:
                break
            found = min(found, self.improved(order), key=self.extent)
        return found

    def extent(self, addresses: Array) -> int:
        """Bytes of the block."""
        return int((addresses + self.sizes).max())

    def placed(
        self, order: Array, known: Array | None = None, first: int = 0, most: int | None = None
    ) -> Array | None:
        """Addresses, parallel to the tensors; None where the block would be larger than ``most``.

        Args:
            known: addresses of the ``first`` of the order, which are placed already.
        """
        count = len(order)
        starts = np.zeros(count, np.int64)
        lives = list(zip(*(a[order].tolist() for a in (self.sizes, self.births, self.deaths)), strict=True))
        # Of those that are placed, ascending by begin.
        begins, ends, births, deaths = below = np.empty((4, count), np.int64)
        if known is not None:
            starts[:first] = known[order[:first]]
            up = order[:first][starts[:first].argsort(kind="stable")]
            below[:, :first] = known[up], known[up] + self.sizes[up], self.births[up], self.deaths[up]
        for i in range(first, count):
            size, birth, death = lives[i]
            meets = (births[:i] <= death) & (deaths[:i] >= birth)
            low, high = begins[:i][meets], ends[:i][meets]
            start = 0
            if len(low) and low[0] < size:
                # Free from the end of all below to the begin of the next, and above all of them.
                high = np.maximum.accumulate(high)
                fits = low[1:] - high[:-1] >= size
                place = int(fits.argmax()) if len(fits) else 0
                start = int(high[place]) if len(fits) and fits[place] else int(high[-1])
            if most is not None and start + size > most:
                return None
            starts[i] = start
            place = int(begins[:i].searchsorted(start))
            below[:, place + 1 : i + 1] = below[:, place:i]
            begins[place], ends[place], births[place], deaths[place] = start, start + size, birth, death
        addresses = np.empty(count, np.int64)
        addresses[order] = starts
        return addresses

    def improved(self, order: Array) -> Array:
        """`placed`, and again with the topmost tensor placed earlier, as long as that does no harm."""
        best = self.placed(order)
        assert best is not None
        if len(order) > _MANY:
            return best
        tried, same = order, len(order)
        for _ in range(_PROMOTIONS):
            extent = self.extent(best)
            if extent == self.most_alive:
                break
            top = int(np.argmax(best + self.sizes))
            place = int(np.flatnonzero(tried == top)[0])
            if place == 0:
                break
            rest = np.delete(tried, place)
            tried = np.insert(rest, place // 2, top)
            same = min(same, place // 2)  # as many come first in the order of the best, too
            again = self.placed(tried, best, same, extent)
            if again is not None:
                best, same = again, len(order)
        return best


def letters(phases: Iterable[Phase]) -> dict[str, str]:
    """Category → letter, the same in every phase; "." is free memory."""
    categories = sorted({tensor.category for phase in phases for tensor in phase.allocations})
    result: dict[str, str] = {}
    for category in categories:
        initials = [word[0] for word in category.upper().split() if word[0] in _LETTERS and len(word) > 3]
        wanted = [*initials, *_LETTERS]
        result[category] = next((letter for letter in wanted if letter not in result.values()), "?")
    return result


def text_map(phase: Phase, key: dict[str, str], width: int = 64, height: int = 20) -> list[str]:
    """Lines of text: time runs to the right, one column a node (or several); addresses grow downwards.

    A cell shows the letter of the category that holds most of its bytes, "." if more than half of it is free.

    Args:
        phase: whose tensors to show, without the bound buffers.
        key: category → letter (see ``letters``).
        width, height: largest number of columns and rows of the map itself.
    """
    layout = layout_of(phase)
    if not layout.extent:
        return ["(this phase works in the bound buffers alone and allocates nothing)"]
    rows = min(height, layout.extent)
    per_row = -(-layout.extent // rows)
    columns = min(width, len(phase.nodes))
    share: list[list[dict[str, float]]] = [[{} for _ in range(columns)] for _ in range(rows)]
    spans = [
        range(c * len(phase.nodes) // columns, (c + 1) * len(phase.nodes) // columns) for c in range(columns)
    ]
    for tensor, address in zip(layout.tensors, layout.addresses, strict=True):
        for column, span in enumerate(spans):
            steps = min(tensor.death + 1, span.stop) - max(tensor.birth, span.start)
            if steps <= 0:
                continue
            for row in range(address // per_row, -(-(address + tensor.bytes) // per_row)):
                overlap = min(address + tensor.bytes, (row + 1) * per_row) - max(address, row * per_row)
                cell = share[row][column]
                cell[tensor.category] = cell.get(tensor.category, 0.0) + overlap * steps / len(span)
    lines = []
    for row in range(rows):
        cells = []
        for cell in share[row]:
            largest = max(cell, key=cell.__getitem__, default="")
            cells.append(key[largest] if sum(cell.values()) >= per_row / 2 else ".")
        lines.append(f"{format_bytes(row * per_row):>10} │{''.join(cells)}│")
    return lines
