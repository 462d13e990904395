"""Graphs of operators under construction: nodes, halo constraints, and their ONNX form.

A halo is chosen only when every reader of a tensor is known, so attributes refer to it as ``HaloOf(tensor)``
until ``Graph.resolve`` replaces each by the smallest halo that satisfies all constraints.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import onnx
from onnx import TensorProto, helper

DOMAIN = "edge_bcs"
IR_VERSION = 10
OPSETS = {"": 21, DOMAIN: 1}

_ONNX_TYPES = {
    "f32": TensorProto.FLOAT,
    "i32": TensorProto.INT32,
    "i64": TensorProto.INT64,
    "u8": TensorProto.UINT8,
    "u16": TensorProto.UINT16,
    "bool": TensorProto.BOOL,
}
BYTES = {"f32": 4, "i32": 4, "i64": 8, "u8": 1, "u16": 2, "bool": 1}


@dataclass(frozen=True)
class TensorType:
    """Element type ("f32", "i32", "i64", "u8", "u16", "bool") and dimensions of a tensor."""

    dtype: str
    dims: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"

    @property
    def bytes(self) -> int:
        """Size of the elements in bytes."""
        total = BYTES[self.dtype]
        for extent in self.dims:
            total *= extent
        return total


@dataclass(frozen=True)
class HaloOf:
    """Stands in an attribute for the halo of ``tensor``."""

    tensor: str


@dataclass
class Node:
    """One operator call; '' stands for an absent optional input or output."""

    operator: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any] = field(default_factory=dict)
    name: str = ""


class HaloConstraints:
    """Lower bounds and equalities on halos; the solution is the largest bound of each set of equals."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}
        self._bound: dict[str, int] = {}
        self._zero: set[str] = set()

    def _root(self, tensor: str) -> str:
        parent = self._parent.setdefault(tensor, tensor)
        if parent != tensor:
            parent = self._parent[tensor] = self._root(parent)
        return parent

    def at_least(self, tensor: str, halo: int) -> None:
        """The halo of ``tensor`` must be ``halo`` or more."""
        root = self._root(tensor)
        self._bound[root] = max(self._bound.get(root, 0), halo)

    def equal(self, first: str, second: str) -> None:
        """Both tensors must have one halo."""
        one, other = self._root(first), self._root(second)
        if one != other:
            self._parent[other] = one
            self._bound[one] = max(self._bound.get(one, 0), self._bound.pop(other, 0))

    def zero(self, tensor: str) -> None:
        """The tensor must have no halo (it is also read as a vector)."""
        self._zero.add(tensor)

    def is_zero(self, tensor: str) -> bool:
        """Whether ``zero`` was asked for this very tensor."""
        return tensor in self._zero

    def solve(self, tensor: str) -> int:
        """The halo of ``tensor``."""
        return self._bound.get(self._root(tensor), 0)

    def check(self) -> None:
        """Fail if a tensor that must have no halo needs one: a defect of the compiler, not of the user's
        network.
        """
        for tensor in self._zero:
            if self.solve(tensor):
                raise AssertionError(
                    f"tensor {tensor} must have no halo but its readers need {self.solve(tensor)}"
                )


@dataclass
class Graph:
    """Nodes in intended order of execution, with typed graph inputs and outputs (dictionaries keep their
    order).
    """

    name: str
    inputs: dict[str, TensorType] = field(default_factory=dict)
    outputs: dict[str, TensorType] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    halos: HaloConstraints = field(default_factory=HaloConstraints)
    _names: dict[str, int] = field(default_factory=dict)

    def unique(self, base: str) -> str:
        """A tensor name not used yet: ``base``, then ``base.2``, …"""
        count = self._names[base] = self._names.get(base, 0) + 1
        return base if count == 1 else f"{base}.{count}"

    def emit(self, operator: str, inputs: Iterable[str], outputs: Iterable[str], **attributes: Any) -> Node:
        """Append a node and return it."""
        node = Node(operator, list(inputs), list(outputs), attributes, f"{len(self.nodes)}.{operator}")
        self.nodes.append(node)
        return node

    def resolve(self) -> None:
        """Replace every ``HaloOf`` by the solved halo."""
        self.halos.check()
        for node in self.nodes:
            node.attributes = {key: self._resolved(value) for key, value in node.attributes.items()}

    def _resolved(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._resolved(item) for item in value]
        return self.halos.solve(value.tensor) if isinstance(value, HaloOf) else value

    def to_onnx(self) -> onnx.ModelProto:
        """The ONNX model; every halo must be resolved.

        Intermediate tensors get no declared shapes on purpose: ONNX Runtime would otherwise keep a dead
        tensor's buffer until a later tensor of the same shape takes it over, which raises the peak.
        """
        nodes = []
        for node in self.nodes:
            outputs = list(node.outputs)
            while outputs and not outputs[-1]:
                outputs.pop()
            inputs = list(node.inputs)
            while inputs and not inputs[-1]:
                inputs.pop()
            nodes.append(
                helper.make_node(node.operator, inputs, outputs, node.name, domain=DOMAIN, **node.attributes)
            )
        graph = helper.make_graph(
            nodes,
            self.name,
            [
                helper.make_tensor_value_info(name, _ONNX_TYPES[t.dtype], t.dims)
                for name, t in self.inputs.items()
            ],
            [
                helper.make_tensor_value_info(name, _ONNX_TYPES[t.dtype], t.dims)
                for name, t in self.outputs.items()
            ],
        )
        opsets = [helper.make_opsetid(domain, version) for domain, version in OPSETS.items()]
        return helper.make_model(graph, ir_version=IR_VERSION, opset_imports=opsets, producer_name="edge-bcs")
