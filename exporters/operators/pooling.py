# ruff: noqa: D102 (the methods of all operators are described once, in the base class)
"""Maximum and average over windows, and their gradients."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import layers
from ..nodes import Node
from ..plain import Plain
from .base import (
    Connections,
    Gradient,
    OrtNode,
    Port,
    Resizing,
    ResizingGrad,
    Types,
    along_both_axes,
    blocks_of,
    named_halos,
    stack,
)

if TYPE_CHECKING:
    from ..autodiff import Tape


def _choice(node: Node, types: Types) -> tuple[int, ...]:
    a = node.attributes
    return blocks_of(node, types), a["channels"] * a["out_height"] * a["out_width"], a["lanes"]


class _Pool(Resizing):
    def own(self, layer: layers.Layer) -> dict[str, Any]:
        assert isinstance(layer, layers.MaxPool | layers.AveragePool)
        return {"kernel": list(layer.kernel), "strides": list(layer.strides), "pads": list(layer.pads)}

    def flops(self, node: Node, types: Types, connections: Connections) -> int:
        window: int = prod(node.attributes["kernel"])
        return super().flops(node, types, connections) * window


def _shares(size: int, count: int) -> np.ndarray[Any, Any]:
    """[count, size]: the weight of each pixel in the mean of each adaptive window."""
    x = np.arange(size)
    return np.array([((begin <= x) & (x < end)) / (end - begin) for begin, end in layers.shares(size, count)])


class MaxPool(_Pool):
    """Maximum over windows; ``choice`` says which element of a window it was."""

    half = True
    outputs = (
        Port("y", dims=stack("out_", "out_halo")),
        Port("choice", "u8", optional=True, dims=_choice, for_backward=True),
    )
    repetition = "pass"
    takes = frozenset({"clipping"})
    ort_gradient = (OrtNode("MaxPoolGrad", ["GO(0)", "O(1)"], ["GI(0)"]),)

    def differentiate(self, node: Node, dy: str, tape: Tape) -> None:
        x = self.read(node, "x")
        if tape.needs(x):
            dx = tape.contribute(x)
            attributes = {**node.attributes, **named_halos(in_halo=dx, out_halo=dy)}
            MaxPoolGrad.emit(tape.graph, {"dy": dy, **tape.saved(node)}, {"dx": dx}, attributes)

    def plain(self, layer: layers.Layer) -> Plain:
        assert isinstance(layer, layers.MaxPool)
        attributes = {"kernel_shape": list(layer.kernel), "strides": list(layer.strides)}
        pads = [a + b for a, b in zip(layer.pads, (0, 0, *layer.beyond), strict=True)]
        return Plain("MaxPool", attributes={**attributes, "pads": pads})


class MaxPoolGrad(Gradient):
    """dy goes to the element that was chosen."""

    half = True
    inputs = (Port("dy"), Port("choice", "u8"))
    outputs = (Port("dx", dims=stack("in_", "in_halo")),)


class AveragePoolGrad(ResizingGrad):
    """dy spread over its window, with addend and mask."""

    half = True


class AveragePool(_Pool):
    """Mean over windows."""

    half = True
    repetition = "product"
    gradient = AveragePoolGrad
    ort_gradient = (OrtNode("AveragePoolGrad", ["GO(0)", "", ""], ["GI(0)"]),)

    def own(self, layer: layers.Layer) -> dict[str, Any]:
        assert isinstance(layer, layers.AveragePool)
        counted = {"count_include_pad": int(layer.count_include_pad), "adaptive": int(layer.adaptive)}
        return super().own(layer) | counted

    def plain(self, layer: layers.Layer) -> list[Plain]:
        assert isinstance(layer, layers.AveragePool)
        if layer.adaptive:
            return along_both_axes(
                *(_shares(*sizes) for sizes in zip(layer.source, layer.shape[1:], strict=True))
            )
        nodes, pads = [], list(layer.pads)
        if any(layer.beyond) and any(pads) and layer.count_include_pad:
            # Pads that count become pixels, so that only what lies beyond them does not.
            nodes.append(Plain("Pad", {"pads": np.array([0, 0, *pads[:2], 0, 0, *pads[2:]], np.int64)}))
            pads = [0] * 4
        included = layer.count_include_pad and not any(layer.beyond)
        attributes = {"kernel_shape": list(layer.kernel), "strides": list(layer.strides), "pads": pads}
        return [*nodes, Plain("AveragePool", attributes={**attributes, "count_include_pad": int(included)})]
