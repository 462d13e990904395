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
    SUM_AND_MASK,
    Attributes,
    Completion,
    Connections,
    Gradient,
    Operator,
    OrtNode,
    Port,
    Types,
    along_both_axes,
    blocks_of,
    named_halos,
    stack,
)
from .elementwise import unmasked

if TYPE_CHECKING:
    from ..autodiff import Tape
    from ..forward import Branch
    from ..fusion import FusedLayer


def _choice(node: Node, types: Types) -> tuple[int, ...]:
    a = node.attributes
    return blocks_of(node, types), a["channels"] * a["out_height"] * a["out_width"], a["lanes"]


class _Pool(Operator):
    inputs = (Port("x"),)
    any_halo = True

    def geometry(self, fused: FusedLayer, x: str, y: str, branch: Branch) -> dict[str, Any]:
        """Attributes that every pooling has."""
        layer = fused.layer
        assert isinstance(layer, layers.MaxPool | layers.AveragePool)
        channels, in_height, in_width = fused.source_geometry
        _, out_height, out_width = fused.geometry
        return {
            "channels": channels,
            "in_height": in_height,
            "in_width": in_width,
            "out_height": out_height,
            "out_width": out_width,
            "kernel": list(layer.kernel),
            "strides": list(layer.strides),
            "pads": list(layer.pads),
            "lanes": branch.lanes,
            **named_halos(in_halo=x, out_halo=y),
        }

    def flops(self, node: Node, types: Types, connections: Connections) -> int:
        window: int = prod(node.attributes["kernel"])
        return super().flops(node, types, connections) * window


def _shares(size: int, count: int) -> np.ndarray[Any, Any]:
    """[count, size]: the weight of each pixel in the mean of each adaptive window."""
    x = np.arange(size)
    return np.array([((begin <= x) & (x < end)) / (end - begin) for begin, end in layers.shares(size, count)])


class MaxPool(_Pool):
    """Maximum over windows; ``choice`` says which element of a window it was."""

    outputs = (
        Port("y", dims=stack("out_", "out_halo")),
        Port("choice", "u8", optional=True, dims=_choice, for_backward=True),
    )
    repetition = "pass"
    takes = frozenset({"clipping"})
    ort_gradient = (OrtNode("MaxPoolGrad", ["GO(0)", "O(1)"], ["GI(0)"]),)

    def lower(self, fused: FusedLayer, sources: list[str], y: str, branch: Branch) -> None:
        branch.as_vector(fused, y)
        attributes = self.geometry(fused, sources[0], y, branch)
        self.emit(branch.graph, {"x": sources[0]}, {"y": y}, {**attributes, **fused.activation})

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

    inputs = (Port("dy"), Port("choice", "u8"))
    outputs = (Port("dx", dims=stack("in_", "in_halo")),)


class AveragePool(_Pool):
    """Mean over windows."""

    outputs = (Port("y", dims=stack("out_", "out_halo")),)
    repetition = "product"
    ort_gradient = (OrtNode("AveragePoolGrad", ["GO(0)", "", ""], ["GI(0)"]),)

    def lower(self, fused: FusedLayer, sources: list[str], y: str, branch: Branch) -> None:
        branch.as_vector(fused, y)
        layer = fused.layer
        assert isinstance(layer, layers.AveragePool)
        attributes = self.geometry(fused, sources[0], y, branch)
        attributes |= {"count_include_pad": int(layer.count_include_pad), "adaptive": int(layer.adaptive)}
        self.emit(branch.graph, {"x": sources[0]}, {"y": y}, attributes)

    def differentiate(self, node: Node, dy: str, tape: Tape) -> None:
        x = self.read(node, "x")
        if tape.needs(x):
            dx = tape.absorb(x)
            halos = named_halos(in_halo=dx.tensor, out_halo=dy)
            attributes = {**node.attributes, **halos, **dx.mask.attributes}
            AveragePoolGrad.emit(tape.graph, {"dy": dy, **dx.inputs}, {"dx": dx.tensor}, attributes)

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


class AveragePoolGrad(Gradient):
    """dy spread over its window, with addend and mask."""

    inputs = (Port("dy"), *SUM_AND_MASK)
    outputs = (Port("dx", dims=stack("in_", "in_halo")),)

    def complete(self, forward: Attributes, instance: str) -> Completion:
        return unmasked(forward)
