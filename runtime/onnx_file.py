"""The little of ONNX's file format that a board needs, without the onnx package: nodes, their attributes,
and the names of a graph's inputs and outputs; read, changed, and written back.

A file is protobuf: each message a run of fields (number, wire type, value). Fields that are not understood
here are carried over byte by byte.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from edge_bcs.core.errors import EdgeBcsError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_GRAPH, _OPSET = 7, 8  # of ModelProto
_PLAIN = {  # fields by message that a graph of operators has; no weights, functions, subgraphs, other files
    "model": {1, 2, 3, 4, 5, 6, _GRAPH, _OPSET, 14},
    "graph": {1, 2, 10, 11, 12, 13, 16},
    "node": {1, 2, 3, 4, 5, 6, 7, 9},
    "attribute": {1, 2, 3, 4, 7, 8, 13, 20},
}
_NODE, _INPUT, _OUTPUT = 1, 11, 12  # of GraphProto
Field = tuple[int, int, Any]
FLOAT, INT64, BOOL = 1, 7, 9  # TensorProto.DataType


@dataclass
class FileNode:
    """One node; ``attributes`` holds numbers, texts and lists of integers, ``raw`` all of them as stored."""

    operator: str
    domain: str
    inputs: list[str]
    outputs: list[str]
    name: str = ""
    attributes: dict[str, Any] = field(default_factory=dict)
    raw: list[bytes] = field(default_factory=list)


@dataclass
class FileModel:
    """A model: its nodes, the names of its inputs and outputs, and everything else as it was."""

    nodes: list[FileNode]
    inputs: list[str]
    outputs: list[str]
    graph_fields: list[Field]
    model_fields: list[Field]

    def add_output(self, name: str, element_type: int) -> None:
        """Make the tensor ``name`` an output, of any shape."""
        self.outputs.append(name)
        self.graph_fields.append((_OUTPUT, _BYTES, value_info(name, element_type)))

    def serialize(self) -> bytes:
        """The file's content; ``nodes`` are written as they are now."""
        nodes: list[Field] = [(_NODE, _BYTES, _encode_node(node)) for node in self.nodes]
        graph = encode(nodes + [item for item in self.graph_fields if item[0] != _NODE])
        return encode([item for item in self.model_fields if item[0] != _GRAPH] + [(_GRAPH, _BYTES, graph)])


def read_model(content: bytes, source: str) -> FileModel:
    """Read a model; EdgeBcsError names ``source`` if the content is truncated, altered or something else."""
    try:
        model = decode(content)
        (graph,) = [decode(value) for number, kind, value in model if number == _GRAPH and kind == _BYTES]
        nodes = [_decode_node(value) for number, _, value in graph if number == _NODE]
        names = {
            key: [_text(decode(value), 1) for number, _, value in graph if number == key]
            for key in (_INPUT, _OUTPUT)
        }
    except (ValueError, struct.error, IndexError, TypeError, AttributeError) as error:
        raise EdgeBcsError(f"{source} is truncated or not an ONNX model ({error}).") from None
    if not nodes:
        raise EdgeBcsError(f"{source} holds an ONNX model without nodes.")
    return FileModel(nodes, names[_INPUT], names[_OUTPUT], graph, model)


def require_operators(content: bytes, domain: str, source: str) -> None:
    """Raise EdgeBcsError unless a model consists of operators of ``domain`` and nothing else.

    So a model from elsewhere can neither loop, nor read files, nor redefine an operator, nor carry weights:
    what it can do is what that domain's operators do. A field that occurs twice, of which protobuf's readers
    use the last, is refused where it would matter.
    """

    def plain(message: bytes, kind: str) -> list[Field]:
        fields = decode(message)
        strange = {number for number, _, _ in fields} - _PLAIN[kind]
        if strange:
            raise EdgeBcsError(
                f"{source} holds more than operators of {domain} (field {min(strange)} of its {kind}), which "
                "is refused; export the artifact again."
            )
        return fields

    def parts(fields: list[Field], number: int) -> list[bytes]:
        found = [(kind, value) for key, kind, value in fields if key == number]
        if any(kind != _BYTES for kind, _ in found):
            raise ValueError(f"field {number} has another wire type")
        return [value for _, value in found]

    try:
        (graph,) = parts(plain(content, "model"), _GRAPH)
        for node in parts(plain(graph, "graph"), _NODE):
            fields = plain(node, "node")
            (operator,), named = parts(fields, 4), parts(fields, 7)
            if named != [domain.encode()]:
                shown = f"{b', '.join(named).decode(errors='replace')}:{operator.decode(errors='replace')}"
                raise EdgeBcsError(f"{source} holds the operator {shown[:80]!r}, which is not of {domain}.")
            for attribute_ in parts(fields, 5):
                plain(attribute_, "attribute")
    except EdgeBcsError:
        raise
    except (ValueError, IndexError) as error:
        raise EdgeBcsError(f"{source} is truncated or not an ONNX model ({error}).") from None


def make_model(
    nodes: Iterable[FileNode], inputs: dict[str, int], outputs: dict[str, int], opsets: dict[str, int]
) -> bytes:
    """A model of its own; ``inputs`` and ``outputs`` map names to element types, and shapes are free."""
    graph: list[Field] = [(_NODE, _BYTES, _encode_node(node)) for node in nodes]
    graph.append((2, _BYTES, b"graph"))
    graph += [(_INPUT, _BYTES, value_info(*item)) for item in inputs.items()]
    graph += [(_OUTPUT, _BYTES, value_info(*item)) for item in outputs.items()]
    imports = [
        (_OPSET, _BYTES, encode([(1, _BYTES, domain.encode()), (2, _VARINT, version)]))
        for domain, version in opsets.items()
    ]
    return encode([(1, _VARINT, 8), (_GRAPH, _BYTES, encode(graph)), *imports])


def value_info(name: str, element_type: int) -> bytes:
    """A ValueInfoProto of a tensor of any shape."""
    tensor = encode([(1, _VARINT, element_type)])
    return encode([(1, _BYTES, name.encode()), (2, _BYTES, encode([(1, _BYTES, tensor)]))])


def attribute(name: str, value: int | float) -> bytes:
    """An AttributeProto that holds an integer or a real number."""
    if isinstance(value, int):
        return encode([(1, _BYTES, name.encode()), (3, _VARINT, value), (20, _VARINT, 2)])
    return encode([(1, _BYTES, name.encode()), (2, _FIXED32, struct.pack("<f", value)), (20, _VARINT, 1)])


# Protobuf


def decode(content: bytes) -> list[Field]:
    """The fields of a message: integers of wire type 0, bytes of the others. ValueError if it is none."""
    fields: list[Field] = []
    position = 0
    while position < len(content):
        key, position = _varint(content, position)
        number, kind = key >> 3, key & 7
        if key >= 1 << 32:
            raise ValueError(f"a field of number {number}")
        value: Any
        if kind == _VARINT:
            value, position = _varint(content, position)
        elif kind in (_BYTES, _FIXED32, _FIXED64):
            length = {_FIXED32: 4, _FIXED64: 8}.get(kind, 0)
            if kind == _BYTES:
                length, position = _varint(content, position)
            if position + length > len(content):
                raise ValueError("a field goes beyond the end")
            value, position = content[position : position + length], position + length
        else:
            raise ValueError(f"a field of wire type {kind}")
        fields.append((number, kind, value))
    return fields


def encode(fields: Iterable[Field]) -> bytes:
    """The message of the given fields."""
    parts = []
    for number, kind, value in fields:
        parts.append(_encode_varint(number << 3 | kind))
        if kind == _VARINT:
            parts.append(_encode_varint(value))
        elif kind == _BYTES:
            parts += [_encode_varint(len(value)), value]
        else:
            parts.append(value)
    return b"".join(parts)


def _varint(content: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number of more than ten bytes")


def _encode_varint(value: int) -> bytes:
    value &= 2**64 - 1
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _text(fields: list[Field], number: int) -> str:
    return next((value.decode() for key, _, value in reversed(fields) if key == number), "")


def _decode_node(content: bytes) -> FileNode:
    fields = decode(content)
    raw = [value for number, _, value in fields if number == 5]
    return FileNode(
        operator=_text(fields, 4),
        domain=_text(fields, 7),
        inputs=[value.decode() for number, _, value in fields if number == 1],
        outputs=[value.decode() for number, _, value in fields if number == 2],
        name=_text(fields, 3),
        attributes=dict(_decode_attribute(value) for value in raw),
        raw=raw,
    )


def _decode_attribute(content: bytes) -> tuple[str, Any]:
    fields = decode(content)
    value: Any = None
    integers: list[int] = []
    for number, kind, item in fields:
        if number == 2 and kind == _FIXED32:
            value = struct.unpack("<f", item)[0]
        elif number == 3 and kind == _VARINT:
            value = _signed(item)
        elif number == 4:
            value = item.decode(errors="replace")
        elif number == 8 and kind == _VARINT:
            integers.append(_signed(item))
        elif number == 8:
            position = 0
            while position < len(item):
                one, position = _varint(item, position)
                integers.append(_signed(one))
    return _text(fields, 1), integers or value


def _encode_node(node: FileNode) -> bytes:
    fields: list[Field] = [(1, _BYTES, name.encode()) for name in node.inputs]
    fields += [(2, _BYTES, name.encode()) for name in node.outputs]
    fields += [(3, _BYTES, node.name.encode()), (4, _BYTES, node.operator.encode())]
    fields += [(5, _BYTES, item) for item in node.raw]
    domain: list[Field] = [(7, _BYTES, node.domain.encode())] if node.domain else []
    return encode(fields + domain)
