"""Where the tensors of a phase would lie in one block of memory, and the map of address × time.

Tensors are placed from the largest to the smallest, each at the lowest address that is free during its
whole life (greedy by size, as in TensorFlow Lite Micro; Pisarchyk & Lee, "Efficient Memory Management
for Deep Neural Net Inference", 2020). ONNX Runtime allocates from a heap instead and places tensors as
they come, so the map shows how little one block could hold; the budget is about the sum of live bytes,
which no placement changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from edge_bcs.core.units import format_bytes

from .plans import Allocation, Phase

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Layout:
    """Addresses of the tensors of a phase, parallel to ``tensors``, in bytes from the start of the block.

    Attributes:
        extent: bytes of the block. live: the largest sum of bytes alive at once, which no block can undercut.
    """

    tensors: tuple[Allocation, ...]
    addresses: tuple[int, ...]
    extent: int
    live: int


def assign(tensors: Iterable[Allocation]) -> Layout:
    """Place ``tensors`` in one block without overlap in space and time."""
    chosen = tuple(tensors)
    addresses = [0] * len(chosen)
    placed: list[int] = []
    for position in sorted(range(len(chosen)), key=lambda i: (-chosen[i].bytes, chosen[i].birth)):
        tensor = chosen[position]
        address = 0
        neighbours = [
            other
            for other in placed
            if chosen[other].birth <= tensor.death and tensor.birth <= chosen[other].death
        ]
        for other in sorted(neighbours, key=addresses.__getitem__):
            if addresses[other] - address >= tensor.bytes:
                break
            address = max(address, addresses[other] + chosen[other].bytes)
        addresses[position] = address
        placed.append(position)
    extent = max((a + tensor.bytes for a, tensor in zip(addresses, chosen, strict=True)), default=0)
    moments = {tensor.birth for tensor in chosen}
    live = max((sum(t.bytes for t in chosen if t.birth <= m <= t.death) for m in moments), default=0)
    return Layout(chosen, tuple(addresses), extent, live)


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
    layout = assign(phase.allocations)
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
