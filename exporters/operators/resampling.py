# ruff: noqa: D102 (the methods of all operators are described once, in the base class)
"""Maps of other sizes: constants around them or parts of them, interpolation, and their gradients."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import layers
from ..plain import Plain
from .base import OrtNode, Resizing, ResizingGrad, along_both_axes


class PadGrad(ResizingGrad):
    """The part of dy that was the map, with addend and mask; zeros where that was cut off."""


class UpsampleGrad(ResizingGrad):
    """The shares of each pixel in dy, summed, with addend and mask."""


class Pad(Resizing):
    """The map with constant pixels around it, or a part of it."""

    repetition = "elements"
    gradient = PadGrad
    ort_gradient = (OrtNode("PadGrad", ["GO(0)", "", ""], ["GI(0)"]),)

    def own(self, layer: layers.Layer) -> dict[str, Any]:
        assert isinstance(layer, layers.Pad)
        return {"pads": list(layer.pads), "value": float(layer.value)}

    def plain(self, layer: layers.Layer) -> Plain:
        assert isinstance(layer, layers.Pad)
        pads = np.array([0, 0, *layer.pads[:2], 0, 0, *layer.pads[2:]], np.int64)
        return Plain("Pad", {"pads": pads, "value": np.float32(layer.value)})


class Upsample(Resizing):
    """The map in another size: each pixel the nearest one, or between the nearest."""

    repetition = "elements"
    gradient = UpsampleGrad
    ort_gradient = (OrtNode("UpsampleGrad", ["GO(0)", "", ""], ["GI(0)"]),)

    def own(self, layer: layers.Layer) -> dict[str, Any]:
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
