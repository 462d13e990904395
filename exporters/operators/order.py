# ruff: noqa: D102 (the methods of all operators are described once, in the base class)
"""Operators that order execution, start and close accumulations, and store activations in half the bytes."""

from __future__ import annotations

from ..nodes import Node
from .base import KEPT, Connections, Operator, Port, Types, fixed, like


class _InPlace(Operator):
    def flops(self, node: Node, types: Types, connections: Connections) -> int:
        return 0

    def bytes_moved(self, node: Node, types: Types, connections: Connections) -> int:
        return 0


class ResetGradient(_InPlace):
    """Zeros the buffer where the flag says so."""

    inputs = (Port("buffer"), Port("lazy_reset_grad", "bool"))
    outputs = (Port("buffer_out", shares="buffer"),)
    early = True

    def bytes_moved(self, node: Node, types: Types, connections: Connections) -> int:
        return types[node.inputs[0]].bytes


class After(_InPlace):
    """x, once the token is there."""

    inputs = (Port("x"), Port("token", "any"))
    outputs = (Port("y", shares="x"),)


class GradientReady(Operator):
    """True, once the buffer is complete."""

    inputs = (Port("buffer"),)
    outputs = (Port("ready", "bool", dims=fixed(1)),)

    def bytes_moved(self, node: Node, types: Types, connections: Connections) -> int:
        return 1


class Narrow(Operator):
    """x f32 → bfloat16, as u16: rounded to nearest, ties to even, but nothing that is not zero to zero."""

    inputs = (Port("x"),)
    outputs = (Port("y", "u16", dims=like(0)),)
    category = KEPT

    def flops(self, node: Node, types: Types, connections: Connections) -> int:
        return types[node.outputs[0]].bytes // 2


class Widen(Operator):
    """bfloat16 as u16 → f32; the token, any tensor, only orders execution."""

    inputs = (Port("x", "u16"), Port("token", "any", optional=True))
    outputs = (Port("y", dims=like(0)),)

    def bytes_moved(self, node: Node, types: Types, connections: Connections) -> int:
        return types[node.inputs[0]].bytes + types[node.outputs[0]].bytes
