# ruff: noqa: D102 (the methods of all operators are described once, in the base class)
"""The lists by which kernels find a layer's connections."""

from __future__ import annotations

from edge_bcs.targets.cost_model import Walk

from ..nodes import Node
from .base import Connections, Operator, Port, Types


class BuildLists(Operator):
    """The lists by which kernels find a layer's connections, from their indices."""

    inputs = (Port("index", "i32"), Port("lists", "i32"))
    outputs = (Port("lists_out", "i32", shares="lists"),)

    def walks(self, node: Node, types: Types, connections: Connections) -> tuple[Walk, ...]:
        return (Walk("lists", types[node.inputs[0]].dims[0]),)
