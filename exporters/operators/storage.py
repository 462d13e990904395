# ruff: noqa: D102 (the methods of all operators are described once, in the base class)
"""Half-size storage: activations as bfloat16 between their two uses."""

from __future__ import annotations

from ..nodes import Node
from .base import KEPT, Connections, Operator, Port, Types, same_as_input


class Narrow(Operator):
    """x f32 → bfloat16, as u16: rounded to nearest, ties to even, but nothing that is not zero to zero."""

    inputs = (Port("x"),)
    outputs = (Port("y", "u16", dims=same_as_input(0)),)
    category = KEPT

    def flops(self, node: Node, types: Types, connections: Connections) -> int:
        return types[node.outputs[0]].bytes // 2


class Widen(Operator):
    """bfloat16 as u16 → f32; the token, any tensor, only orders execution."""

    inputs = (Port("x", "u16"), Port("token", "any", optional=True))
    outputs = (Port("y", dims=same_as_input(0)),)

    def bytes_moved(self, node: Node, types: Types, connections: Connections) -> int:
        return types[node.inputs[0]].bytes + types[node.outputs[0]].bytes
