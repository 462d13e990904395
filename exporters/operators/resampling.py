# ruff: noqa: D102 (the methods of all operators are described once, in the base class)
"""Maps of other sizes: constants around them or parts of them, interpolation, and their gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .. import layers
from ..nodes import Node
from ..plain import Plain
from .base import (
    SUM_AND_MASK,
    Attributes,
    Completion,
    Gradient,
    Operator,
    OrtNode,
    Port,
    along_both_axes,
    named_halos,
    stack,
)
from .elementwise import unmasked

if TYPE_CHECKING:
    from ..autodiff import Tape
    from ..forward import Branch
    from ..fusion import FusedLayer


class PadGrad(Gradient):
    """The part of dy that was the map, with addend and mask; zeros where that was cut off."""

    inputs = (Port("dy"), *SUM_AND_MASK)
    outputs = (Port("dx", dims=stack("in_", "in_halo")),)

    def complete(self, forward: Attributes, instance: str) -> Completion:
        return unmasked(forward)


class UpsampleGrad(Gradient):
    """The shares of each pixel in dy, summed, with addend and mask."""

    inputs = PadGrad.inputs
    outputs = PadGrad.outputs

    def complete(self, forward: Attributes, instance: str) -> Completion:
        return unmasked(forward)


class _Resampling(Operator):
    inputs = (Port("x"),)
    outputs = (Port("y", dims=stack("out_", "out_halo")),)
    repetition = "elements"
    any_halo = True
    gradient: ClassVar[type[Operator]]

    def attributes(self, layer: layers.Layer) -> dict[str, Any]:
        """Those of the operator's own."""
        raise NotImplementedError

    def lower(self, fused: FusedLayer, sources: list[str], y: str, branch: Branch) -> None:
        branch.as_vector(fused, y)
        channels, in_height, in_width = fused.source_geometry
        _, out_height, out_width = fused.geometry
        attributes = {
            "channels": channels,
            "in_height": in_height,
            "in_width": in_width,
            "out_height": out_height,
            "out_width": out_width,
            "lanes": branch.lanes,
            **self.attributes(fused.layer),
            **named_halos(in_halo=sources[0], out_halo=y),
        }
        self.emit(branch.graph, {"x": sources[0]}, {"y": y}, attributes)

    def differentiate(self, node: Node, dy: str, tape: Tape) -> None:
        x = self.read(node, "x")
        if tape.needs(x):
            dx = tape.absorb(x)
            halos = named_halos(in_halo=dx.tensor, out_halo=dy)
            attributes = {**node.attributes, **halos, **dx.mask.attributes}
            self.gradient.emit(tape.graph, {"dy": dy, **dx.inputs}, {"dx": dx.tensor}, attributes)


class Pad(_Resampling):
    """The map with constant pixels around it, or a part of it."""

    gradient = PadGrad
    ort_gradient = (OrtNode("PadGrad", ["GO(0)", "", ""], ["GI(0)"]),)

    def attributes(self, layer: layers.Layer) -> dict[str, Any]:
        assert isinstance(layer, layers.Pad)
        return {"pads": list(layer.pads), "value": float(layer.value)}

    def plain(self, layer: layers.Layer) -> Plain:
        assert isinstance(layer, layers.Pad)
        pads = np.array([0, 0, *layer.pads[:2], 0, 0, *layer.pads[2:]], np.int64)
        return Plain("Pad", {"pads": pads, "value": np.float32(layer.value)})


class Upsample(_Resampling):
    """The map in another size: each pixel the nearest one, or between the nearest."""

    gradient = UpsampleGrad
    ort_gradient = (OrtNode("UpsampleGrad", ["GO(0)", "", ""], ["GI(0)"]),)

    def attributes(self, layer: layers.Layer) -> dict[str, Any]:
        assert isinstance(layer, layers.Upsample)
        return {
            "linear": int(layer.linear),
            "align_corners": int(layer.align_corners),
            "scale_height": float(layer.scales[0]),
            "scale_width": float(layer.scales[1]),
        }

    def plain(self, layer: layers.Layer) -> list[Plain]:
        assert isinstance(layer, layers.Upsample)
        axes = list(zip(layer.source, layer.shape[1:], layer.scales, strict=True))
        if any(count % size or scale not in (0, size / count) for size, count, scale in axes):
            # What Resize does with sizes that are no multiples depends on who wrote it.
            return along_both_axes(*(_shares(layer, *axis) for axis in axes))
        times = np.array([1, 1, *(count // size for size, count, _ in axes)], np.float32)
        places = "align_corners" if layer.align_corners else "pytorch_half_pixel"
        attributes = {"mode": "linear", "coordinate_transformation_mode": places}
        if not layer.linear:
            attributes = {
                "mode": "nearest",
                "coordinate_transformation_mode": "asymmetric",
                "nearest_mode": "floor",
            }
        return [Plain("Resize", {"": None, "scales": times}, attributes)]


def _shares(layer: layers.Upsample, size: int, count: int, scale: float) -> np.ndarray[Any, Any]:
    """[count, size]: the share of each pixel in each pixel of the result, along one axis."""
    step, o = scale or size / count, np.arange(count)
    if layer.linear and layer.align_corners:
        step = (size - 1) / (count - 1) if count > 1 else 0.0
    place = np.maximum(0, (o + 0.5) * step - 0.5) if layer.linear and not layer.align_corners else o * step
    first = np.minimum(np.floor(place), size - 1).astype(np.int64)
    weight = np.clip(place - first, 0, 1) if layer.linear else np.zeros(count)
    shares = np.zeros((count, size))
    np.add.at(shares, (o, first), 1 - weight)
    np.add.at(shares, (o, np.minimum(first + 1, size - 1)), weight)
    return shares
