"""`program.bin`: the graphs of an artifact as lists of operator calls, each tensor at its place in one arena.

What ONNX Runtime does when it loads a graph (order, memory) is done here, once: the runner in C++
(`runtime/native/runner`) only follows it. The format is FlatBuffers, and `program.fbs` there its schema.

The bound buffers lie at the start of the arena, one after the other; behind them every graph has the same
block for what it allocates, since one graph runs at a time. Every address is a multiple of 64 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flatbuffers
from edge_bcs.runtime.buffers import aligned, buffer_behind
from edge_bcs.targets.plans import Allocation, MemoryPlan, Phase

from .memory.replay import Replay
from .nodes import Node, TensorType
from .operators import OPERATORS

VERSION = 1
_IDENTIFIER = b"EBCS"
_TYPES = {"f32": 1, "u8": 2, "u16": 4, "i32": 6, "i64": 7, "bool": 9}
_INTEGER, _REAL, _INTEGERS, _REALS, _TEXT = range(5)


@dataclass(frozen=True)
class Placed:
    """A tensor at an address, in bytes from the start of the arena."""

    name: str
    type: TensorType
    address: int


@dataclass(frozen=True)
class PlacedNode:
    """A node; its tensors are positions in `PlacedGraph.tensors`, -1 where one is left out."""

    node: Node
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    work_address: int
    work_bytes: int


@dataclass(frozen=True)
class PlacedGraph:
    """A graph whose tensors have addresses. ``arena_bytes``: from the first buffer to its last tensor."""

    name: str
    tensors: tuple[Placed, ...]
    nodes: tuple[PlacedNode, ...]
    arena_bytes: int


@dataclass(frozen=True)
class Program:
    """What `program.bin` holds.

    Attributes:
        buffers: the bound buffers. arena_bytes: in which every graph has room.
    """

    buffers: tuple[Placed, ...]
    graphs: tuple[PlacedGraph, ...]
    arena_bytes: int

    def dump(self) -> bytes:
        """The content of the file."""
        builder = flatbuffers.Builder(1 << 16)
        graphs = [_graph(builder, graph) for graph in self.graphs]
        buffers = [_tensor(builder, buffer) for buffer in self.buffers]
        tables = [_offsets(builder, entries) for entries in (buffers, graphs)]
        builder.StartObject(4)
        builder.PrependUint32Slot(0, VERSION, 0)
        builder.PrependUint64Slot(1, self.arena_bytes, 0)
        builder.PrependUOffsetTRelativeSlot(2, tables[0], 0)
        builder.PrependUOffsetTRelativeSlot(3, tables[1], 0)
        builder.Finish(builder.EndObject(), file_identifier=_IDENTIFIER)
        return bytes(builder.Output())


def place(
    replays: Mapping[str, Replay], memory: MemoryPlan, buffers: Mapping[str, TensorType], training_input: str
) -> Program:
    """Write down every tensor's address.

    Args:
        replays: graph → its nodes. memory: where their tensors lie.
        buffers: the bound buffers, see ``Network.buffers``.
        training_input: the buffer whose images the training graph reads.
    """
    bound: dict[str, Placed] = {}
    end = 0
    for name, type_ in buffers.items():
        bound[name] = Placed(name, type_, end)
        end += aligned(type_.bytes)
    graphs = tuple(
        _placed(memory.phases[phase], replay, bound, training_input, end) for phase, replay in replays.items()
    )
    return Program(tuple(bound.values()), graphs, max(graph.arena_bytes for graph in graphs))


def _placed(
    phase: Phase, replay: Replay, bound: Mapping[str, Placed], training_input: str, start: int
) -> PlacedGraph:
    address = {tensor.name: start + tensor.address for tensor in phase.allocations}
    work = {tensor.name: tensor for tensor in phase.allocations}
    graph = replay.graph
    for name in (*graph.inputs, *graph.outputs):
        address[name] = bound[buffer_behind(phase.name, name, bound, training_input)].address
    positions: dict[str, int] = {}
    tensors: list[Placed] = []

    def position(name: str) -> int:
        if not name:
            return -1
        if name not in positions:
            positions[name] = len(tensors)
            tensors.append(Placed(name, replay.types[name], address[name]))
        return positions[name]

    nodes = []
    for node in graph.nodes:
        for output, source in OPERATORS[node.operator].aliases.items():
            if output < len(node.outputs) and node.outputs[output] and node.outputs[output] not in address:
                address[node.outputs[output]] = address[node.inputs[source]]
        needed = work.get(f"{node.name}.work", Allocation("", 0, "", 0, 0))
        nodes.append(
            PlacedNode(
                node,
                tuple(map(position, _without_absent(node.inputs))),
                tuple(map(position, _without_absent(node.outputs))),
                address.get(needed.name, 0),
                needed.bytes,
            )
        )
    return PlacedGraph(phase.name, tuple(tensors), tuple(nodes), phase.peak_bytes)


def _without_absent(names: Sequence[str]) -> Sequence[str]:
    """The names without those at the end that are absent."""
    count = len(names)
    while count and not names[count - 1]:
        count -= 1
    return names[:count]


# The tables of the schema; slots are numbered in its order.


def _vector(builder: Any, width: int, prepend: Callable[[Any], None], entries: Sequence[Any]) -> int:
    """A vector of entries of ``width`` bytes, each written by ``prepend``."""
    builder.StartVector(width, len(entries), width)
    for entry in reversed(entries):
        prepend(entry)
    return int(builder.EndVector())


def _offsets(builder: Any, entries: Sequence[int]) -> int:
    return _vector(builder, 4, builder.PrependUOffsetTRelative, entries)


def _longs(builder: Any, numbers: Sequence[int]) -> int:
    return _vector(builder, 8, builder.PrependInt64, numbers)


def _ints(builder: Any, numbers: Sequence[int]) -> int:
    return _vector(builder, 4, builder.PrependInt32, numbers)


def _floats(builder: Any, numbers: Sequence[float]) -> int:
    return _vector(builder, 4, builder.PrependFloat32, numbers)


def _attribute(builder: Any, name: str, value: Any) -> int:
    many = isinstance(value, (list, tuple))
    values = list(value) if many else [value]
    text = builder.CreateString(value) if isinstance(value, str) else 0
    key = builder.CreateString(name)
    integers = reals = 0
    if text:
        kind = _TEXT
    elif all(isinstance(number, int) for number in values):
        kind, integers = (_INTEGERS if many else _INTEGER), _longs(builder, values)
    else:
        kind, reals = (_REALS if many else _REAL), _floats(builder, values)
    builder.StartObject(5)
    builder.PrependUOffsetTRelativeSlot(0, key, 0)
    builder.PrependInt8Slot(1, kind, 0)
    builder.PrependUOffsetTRelativeSlot(2, integers, 0)
    builder.PrependUOffsetTRelativeSlot(3, reals, 0)
    builder.PrependUOffsetTRelativeSlot(4, text, 0)
    return int(builder.EndObject())


def _tensor(builder: Any, tensor: Placed) -> int:
    name, dims = builder.CreateString(tensor.name), _longs(builder, tensor.type.dims)
    builder.StartObject(4)
    builder.PrependUOffsetTRelativeSlot(0, name, 0)
    builder.PrependInt8Slot(1, _TYPES[tensor.type.dtype], 0)
    builder.PrependUOffsetTRelativeSlot(2, dims, 0)
    builder.PrependUint64Slot(3, tensor.address, 0)
    return int(builder.EndObject())


def _node(builder: Any, placed: PlacedNode) -> int:
    node = placed.node
    name, operator = builder.CreateString(node.name), builder.CreateString(node.operator)
    attributes = _offsets(
        builder, [_attribute(builder, key, value) for key, value in node.attributes.items()]
    )
    inputs, outputs = _ints(builder, placed.inputs), _ints(builder, placed.outputs)
    builder.StartObject(7)
    for slot, table in enumerate((name, operator, attributes, inputs, outputs)):
        builder.PrependUOffsetTRelativeSlot(slot, table, 0)
    builder.PrependUint64Slot(5, placed.work_address, 0)
    builder.PrependUint64Slot(6, placed.work_bytes, 0)
    return int(builder.EndObject())


def _graph(builder: Any, graph: PlacedGraph) -> int:
    tensors = _offsets(builder, [_tensor(builder, tensor) for tensor in graph.tensors])
    nodes = _offsets(builder, [_node(builder, node) for node in graph.nodes])
    name = builder.CreateString(graph.name)
    builder.StartObject(3)
    for slot, table in enumerate((name, tensors, nodes)):
        builder.PrependUOffsetTRelativeSlot(slot, table, 0)
    return int(builder.EndObject())
