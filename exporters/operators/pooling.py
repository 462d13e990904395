# ruff: noqa: D102 (the methods of all operators are described once, in the base class)
"""Maximum and average over windows, and their gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import layers
from ..nodes import Node
from .base import (
    SUM_AND_MASK,
    Attributes,
    Completion,
    Connections,
    Gradient,
    Operator,
    OrtNode,
    Plain,
    Port,
    Types,
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

    def geometry(self, fused: FusedLayer, x: str, y: str, branch: Branch, padding: int) -> dict[str, Any]:
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
            "kernel": layer.kernel,
            "stride": layer.stride,
            "padding": padding,
            "lanes": branch.lanes,
            **named_halos(in_halo=x, out_halo=y),
        }

    def flops(self, node: Node, types: Types, connections: Connections) -> int:
        return super().flops(node, types, connections) * int(node.attributes["kernel"]) ** 2


class MaxPool(_Pool):
    """Maximum over windows; ``choice`` says which element of a window it was."""

    outputs = (
        Port("y", dims=stack("out_", "out_halo")),
        Port("choice", "u8", optional=True, dims=_choice, for_backward=True),
    )
    repetition = "pass"
    takes = frozenset({"relu"})
    ort_gradient = (OrtNode("MaxPoolGrad", ["GO(0)", "O(1)"], ["GI(0)"]),)

    def lower(self, fused: FusedLayer, sources: list[str], y: str, branch: Branch) -> None:
        assert isinstance(fused.layer, layers.MaxPool)
        branch.as_vector(fused, y)
        attributes = self.geometry(fused, sources[0], y, branch, fused.layer.padding)
        self.emit(branch.graph, {"x": sources[0]}, {"y": y}, {**attributes, "relu": int(fused.relu)})

    def differentiate(self, node: Node, dy: str, tape: Tape) -> None:
        x = self.read(node, "x")
        if tape.needs(x):
            dx = tape.contribute(x)
            attributes = {**node.attributes, **named_halos(in_halo=dx, out_halo=dy)}
            MaxPoolGrad.emit(tape.graph, {"dy": dy, **tape.saved(node)}, {"dx": dx}, attributes)

    def plain(self, layer: layers.Layer) -> Plain:
        assert isinstance(layer, layers.MaxPool)
        attributes = {"kernel_shape": [layer.kernel] * 2, "strides": [layer.stride] * 2}
        return Plain("MaxPool", attributes={**attributes, "pads": [layer.padding] * 4})


class MaxPoolGrad(Gradient):
    """dy goes to the element that was chosen."""

    inputs = (Port("dy"), Port("choice", "u8"))
    outputs = (Port("dx", dims=stack("in_", "in_halo")),)


class AveragePool(_Pool):
    """Mean over windows without padding."""

    outputs = (Port("y", dims=stack("out_", "out_halo")),)
    repetition = "product"
    ort_gradient = (OrtNode("AveragePoolGrad", ["GO(0)", "", ""], ["GI(0)"]),)

    def lower(self, fused: FusedLayer, sources: list[str], y: str, branch: Branch) -> None:
        branch.as_vector(fused, y)
        attributes = self.geometry(fused, sources[0], y, branch, 0)
        self.emit(branch.graph, {"x": sources[0]}, {"y": y}, attributes)

    def differentiate(self, node: Node, dy: str, tape: Tape) -> None:
        x = self.read(node, "x")
        if tape.needs(x):
            dx = tape.absorb(x)
            halos = named_halos(in_halo=dx.tensor, out_halo=dy)
            attributes = {**node.attributes, **halos, **dx.mask.attributes}
            AveragePoolGrad.emit(tape.graph, {"dy": dy, **dx.inputs}, {"dx": dx.tensor}, attributes)

    def plain(self, layer: layers.Layer) -> Plain:
        assert isinstance(layer, layers.AveragePool)
        attributes = {"kernel_shape": [layer.kernel] * 2, "strides": [layer.stride] * 2}
        return Plain("AveragePool", attributes=attributes)


class AveragePoolGrad(Gradient):
    """dy spread over its window, with addend and mask."""

    inputs = (Port("dy"), *SUM_AND_MASK)
    outputs = (Port("dx", dims=stack("in_", "in_halo")),)

    def complete(self, forward: Attributes, instance: str) -> Completion:
        return unmasked(forward)
