"""Reads `program.bin` with the `flatbuffers` package alone, and looks for what lies at one place at one time.

Nothing of the compiler or of the runner is used: slots are counted in runtime/native/runner/program.fbs.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import flatbuffers.encode
import flatbuffers.number_types as numbers
import flatbuffers.packer
import flatbuffers.table


@dataclass(frozen=True)
class Tensor:
    name: str
    type: int
    dims: tuple[int, ...]
    address: int

    @property
    def end(self) -> int:
        size = {1: 4, 2: 1, 4: 2, 6: 4, 7: 8, 9: 1}[self.type]
        for extent in self.dims:
            size *= extent
        return self.address + size


@dataclass(frozen=True)
class Node:
    name: str
    operator: str
    attributes: dict[str, Any]
    inputs: list[int]
    outputs: list[int]
    work: tuple[int, int]


@dataclass(frozen=True)
class Graph:
    name: str
    tensors: list[Tensor]
    nodes: list[Node]


@dataclass(frozen=True)
class Program:
    arena: int
    buffers: list[Tensor]
    graphs: list[Graph]


class _Table:
    def __init__(self, content: bytes, position: int) -> None:
        self._content, self._table = content, flatbuffers.table.Table(content, position)

    def number(self, slot: int, flags: Any) -> int:
        offset = self._table.Offset(4 + 2 * slot)
        return int(self._table.Get(flags, self._table.Pos + offset)) if offset else 0

    def text(self, slot: int) -> str:
        offset = self._table.Offset(4 + 2 * slot)
        return self._table.String(self._table.Pos + offset).decode() if offset else ""

    def numbers(self, slot: int, flags: Any) -> list[Any]:
        offset = self._table.Offset(4 + 2 * slot)
        if not offset:
            return []
        first, count = self._table.Vector(offset), self._table.VectorLen(offset)
        return [self._table.Get(flags, first + i * flags.bytewidth) for i in range(count)]

    def tables(self, slot: int) -> list[_Table]:
        offset = self._table.Offset(4 + 2 * slot)
        if not offset:
            return []
        first, count = self._table.Vector(offset), self._table.VectorLen(offset)
        return [_Table(self._content, self._table.Indirect(first + 4 * i)) for i in range(count)]


def _attribute(table: _Table) -> Any:
    integers, reals = table.numbers(2, numbers.Int64Flags), table.numbers(3, numbers.Float32Flags)
    kind = table.number(1, numbers.Int8Flags)
    return [lambda: integers[0], lambda: reals[0], lambda: integers, lambda: reals, lambda: table.text(4)][
        kind
    ]()


def _tensor(table: _Table) -> Tensor:
    return Tensor(
        table.text(0),
        table.number(1, numbers.Int8Flags),
        tuple(table.numbers(2, numbers.Int64Flags)),
        table.number(3, numbers.Uint64Flags),
    )


def _node(table: _Table) -> Node:
    work = (table.number(5, numbers.Uint64Flags), table.number(6, numbers.Uint64Flags))
    return Node(
        table.text(0),
        table.text(1),
        {entry.text(0): _attribute(entry) for entry in table.tables(2)},
        table.numbers(3, numbers.Int32Flags),
        table.numbers(4, numbers.Int32Flags),
        (work[0], work[0] + work[1]),
    )


def read_program(content: bytes) -> Program:
    assert content[4:8] == b"EBCS"
    root = _Table(content, flatbuffers.encode.Get(flatbuffers.packer.uoffset, content, 0))
    graphs = [
        Graph(table.text(0), [_tensor(t) for t in table.tables(1)], [_node(n) for n in table.tables(2)])
        for table in root.tables(3)
    ]
    return Program(root.number(1, numbers.Uint64Flags), [_tensor(t) for t in root.tables(2)], graphs)


def faults(program: Program) -> list[str]:
    """Sentences about what does not lie in the arena, or where something else is still needed."""
    found = []
    for tensor in program.buffers:
        if tensor.end > program.arena or tensor.address % 64:
            found.append(f"{tensor.name} does not lie in the arena, or not on a line")
    for one, other in combinations([b for b in program.buffers if b.end > b.address], 2):
        if one.address < other.end and other.address < one.end:
            found.append(f"{one.name} and {other.name} overlap")
    bound = {(b.address, b.end, b.type) for b in program.buffers}
    bound_end = max(b.end for b in program.buffers)
    for graph in program.graphs:
        # (begin, end, first node, last node, name) of all that the graph allocates. What is updated in
        # place goes on living under another name.
        lives: list[list[Any]] = []
        of: dict[int, list[Any]] = {}
        for step, node in enumerate(graph.nodes):
            for place in node.inputs:
                if place >= 0 and place in of:
                    of[place][3] = step
            for place in node.outputs:
                if place < 0:
                    continue
                tensor = graph.tensors[place]
                if tensor.address < bound_end:
                    if tensor.end > tensor.address and (tensor.address, tensor.end, tensor.type) not in bound:
                        found.append(f"{graph.name}: {tensor.name} lies across a buffer")
                    continue
                continued = [
                    of[i] for i in node.inputs
                    if i in of and graph.tensors[i].address == tensor.address and of[i][3] == step
                ]  # fmt: skip
                if continued:
                    of[place] = continued[0]
                else:
                    of[place] = [tensor.address, tensor.end, step, step, tensor.name]
                    lives.append(of[place])
            if node.work[1] > node.work[0]:
                lives.append([*node.work, step, step, f"{node.name}.work"])
        read = {place for node in graph.nodes for place in node.inputs}
        for place, life in of.items():
            if place not in read:  # nobody reads it: it lives until the end
                life[3] = max(life[3], life[2])
        for life in lives:
            if life[1] > program.arena or life[0] < bound_end:
                found.append(f"{graph.name}: {life[4]} does not lie in the arena's free part")
        for first, second in combinations(lives, 2):
            together = first[2] <= second[3] and second[2] <= first[3]
            if together and first[0] < second[1] and second[0] < first[1]:
                found.append(f"{graph.name}: {first[4]} and {second[4]} overlap")
    return found
