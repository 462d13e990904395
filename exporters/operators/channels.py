# ruff: noqa: D102 (the methods of all operators are described once, in the base class)
"""Channels in another order: concatenation, slices, chunks, shuffles, and their gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .. import layers
from ..nodes import HaloOf, Node
from ..plain import Plain
from .base import (
    SUM_AND_MASK,
    Gradient,
    Operator,
    Port,
    Types,
    blocks_of,
    named_halos,
    stack,
    stack_type,
)

if TYPE_CHECKING:
    from ..autodiff import Tape
    from ..forward import Branch
    from ..fusion import FusedLayer


def _picked(node: Node, types: Types) -> tuple[int, ...]:
    a = node.attributes
    channels = len(a["source"])
    return stack_type(
        blocks_of(node, types), channels, a["height"], a["width"], a["out_halo"], a["lanes"]
    ).dims


class Channels(Operator):
    """Channel i is channel source[i] of the inputs, whose channels lie one input behind the other, or zeros
    for −1."""

    inputs = (Port("parts", variadic=True),)
    outputs = (Port("y", dims=_picked),)
    repetition = "elements"
    any_halo = True

    def lower(self, fused: FusedLayer, sources: list[str], y: str, branch: Branch) -> None:
        branch.as_vector(fused, y)
        counts = [branch.geometry[part][0] for part in sources]
        layer = fused.layer
        source = layer.source if isinstance(layer, layers.Channels) else range(sum(counts))
        attributes: dict[str, Any] = {
            **branch.map(fused),
            "channels": counts,
            "source": list(source),
            "in_halos": [HaloOf(part) for part in sources],
            **named_halos(out_halo=y),
        }
        self.emit(branch.graph, {"parts": sources}, {"y": y}, attributes)

    def differentiate(self, node: Node, dy: str, tape: Tape) -> None:
        a, first = node.attributes, 0
        for part, channels in zip(node.inputs, a["channels"], strict=True):
            if tape.needs(part):
                dx = tape.absorb(part)
                source = [i - first if first <= i < first + channels else -1 for i in a["source"]]
                attributes = {
                    **{key: a[key] for key in ("height", "width", "lanes")},
                    "channels": channels,
                    "source": source,
                    **named_halos(dy_halo=dy, dx_halo=dx.tensor),
                    **dx.mask.attributes,
                }
                ChannelsGrad.emit(tape.graph, {"dy": dy, **dx.inputs}, {"dx": dx.tensor}, attributes)
            first += channels

    def plain(self, layer: layers.Layer) -> list[Plain]:
        joined = [Plain("Concat", attributes={"axis": 1})] if len(layer.inputs) > 1 else []
        if isinstance(layer, layers.Concat):
            return joined
        assert isinstance(layer, layers.Channels)
        source = np.array(layer.source, np.int64)
        if (source < 0).any():
            # A channel of zeros behind the others, which −1, the last, picks.
            pads = np.array([0] * (len(layer.shape) + 2) + [1] + [0] * (len(layer.shape) - 1), np.int64)
            joined.append(Plain("Pad", {"pads": pads}))
        return [*joined, Plain("Gather", {"source": source}, {"axis": 1})]


class ChannelsGrad(Gradient):
    """mask∘(each channel's sum of dy over the channels that are it, + addend)."""

    inputs = (Port("dy"), *SUM_AND_MASK)
    outputs = (Port("dx", dims=stack("", "dx_halo")),)
