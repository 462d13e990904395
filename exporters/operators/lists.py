# ruff: noqa: D102 (the methods of all operators are described once, in the base class)
"""The lists by which kernels find a layer's connections."""

from __future__ import annotations

from edge_bcs.targets.cost_model import Walk

from ..nodes import Node
from .base import LISTS, Connections, Operator, Port, Types


class BuildLists(Operator):
    """The lists by which kernels find a layer's connections, from their indices."""

    inputs = (Port("index", "i32"), Port("lists", "i32"))
    outputs = (Port("lists_out", "i32", shares="lists"),)

    def walks(self, node: Node, types: Types, connections: Connections) -> tuple[Walk, ...]:
        return (Walk("lists", types[node.inputs[0]].dims[0]),)


LAYER_INTEGERS = 14
"""Of a layer in the attribute: offset, O, I, kernel (2), strides (2), pads (4), dilations (2), groups."""


def _whole(node: Node, types: Types) -> tuple[int, ...]:
    flat, length = node.attributes["layers"], 3 * types[node.inputs[0]].dims[0]
    for first in range(0, len(flat), LAYER_INTEGERS):
        outputs, channels, strides = flat[first + 1], flat[first + 2], flat[first + 5 : first + 7]
        length += outputs + 1 + channels * strides[0] * strides[1] + 1
    return (length,)


class MakeLists(Operator):
    """The same of all layers, in memory of their own: for an attack that training does without."""

    half = True
    inputs = (Port("index", "i32"),)
    outputs = (Port("lists", "i32", dims=_whole),)
    category = LISTS
    early = True

    def walks(self, node: Node, types: Types, connections: Connections) -> tuple[Walk, ...]:
        return (Walk("lists", types[node.inputs[0]].dims[0]),)
