# ruff: noqa: D102 (the methods of all operators are described once, in the base class)
"""The update of the state, in place: rewiring, and the dense parameters."""

from __future__ import annotations

from edge_bcs.targets.cost_model import Walk

from ..nodes import Node
from .base import Connections, Operator, Port, Types


class RewireStep(Operator):
    """Algorithm 1's lines 9 to 15: update, deaths, draws, merge."""

    inputs = (
        Port("value"),
        Port("index", "i32"),
        Port("momentum"),
        Port("gradient"),
        Port("hyper"),
        Port("counter", "i64"),
    )
    outputs = (
        Port("value_out", shares="value"),
        Port("index_out", "i32", shares="index"),
        Port("momentum_out", shares="momentum"),
        Port("gradient_out", shares="gradient"),
    )

    def walks(self, node: Node, types: Types, connections: Connections) -> tuple[Walk, ...]:
        return (Walk("rewire", types[node.inputs[0]].dims[0]),)

    def flops(self, node: Node, types: Types, connections: Connections) -> int:
        return 8 * types[node.inputs[0]].dims[0]


class DenseStep(Operator):
    """Momentum descent with decay on the dense parameters."""

    inputs = (Port("value"), Port("momentum"), Port("gradient"), Port("hyper"))
    outputs = (Port("value_out", shares="value"), Port("momentum_out", shares="momentum"))

    def flops(self, node: Node, types: Types, connections: Connections) -> int:
        return 5 * types[node.inputs[0]].dims[0]
