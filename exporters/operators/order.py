# ruff: noqa: D102 (the methods of all operators are described once, in the base class)
"""Operators that order execution, and that begin and close the accumulation of gradients."""

from __future__ import annotations

from ..nodes import Node
from .base import Connections, Operator, Port, Types, fixed


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
