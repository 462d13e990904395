"""Whether an attack has a half-precision form (two bytes a number, ``runtime/native/ops/stack.h``).

The graph is the same in both precisions, and so is its memory plan: a stack in half precision lies in the
place of the float32 one, and is never larger. Which of them is computed, a board decides when it opens the
artifact.
"""

from __future__ import annotations

from .network import Network
from .nodes import Graph
from .operators import OPERATORS
from .operators.base import Attributes
from .operators.convolution import DEPTHWISE

LANES = (8, 16)
_MOST_WIDTH = 512  # pixels of a row
_MOST_OF_A_WINDOW = 2 * _MOST_WIDTH * 16  # numbers of the rows of a maximum's window
_MOST_OF_A_BAND, _MOST_OF_A_RESULT = 32 << 10, 16 << 10  # numbers of a depthwise layer's rows


def _fits(a: Attributes) -> bool:
    """Whether a row of a depthwise layer, and the rows that it is made of, find room
    (``runtime/native/ops/half_planes.h``)."""
    (kernel, _), (stride, _), (dilation, _), lanes = a["kernel"], a["strides"], a["dilations"], a["lanes"]
    first, last = -a["pads"][0], (kernel - 1) * dilation - a["pads"][0]
    if "dy_halo" in a:
        rows, made = last // stride - first // stride + 1, stride * a["in_width"]
        width, halo, planes = a["out_width"], a["dy_halo"], a["out_channels"] // a["in_channels"]
    else:
        rows, made = last - first + 1, a["out_width"]
        width, halo, planes = a["in_width"], a.get("in_halo", 0), 1
    needed = max(1, planes) * (halo + rows * (width + halo)) * lanes
    return bool(needed <= _MOST_OF_A_BAND and made * lanes <= _MOST_OF_A_RESULT)


def half_fault(network: Network, attack: Graph) -> str:
    """Why the attack of a network has no half-precision form, '' if it has one."""
    for node in attack.nodes:
        a = node.attributes
        if not OPERATORS[node.operator].half:
            return f"the operator {node.operator} has none"
        if a.get("lanes", LANES[0]) not in LANES:
            return f"images lie {a['lanes']} side by side, not 8 or 16: take a micro-batch of 8 or 16"
        widths = [size for name, size in a.items() if name.endswith("width")]
        if max(widths, default=0) > _MOST_WIDTH:
            return f"rows of {max(widths)} pixels are too long"
        if a.get("groups", 1) != 1:
            if a["algorithm"] != DEPTHWISE:
                return "it has layers with groups of several channels"
            if not _fits(a):
                return "its rows are too long for layers whose channels are convolved by themselves"
        if (
            node.operator.startswith("MaxPool")
            and a["kernel"][0] * a["in_width"] * a["lanes"] > _MOST_OF_A_WINDOW
        ):
            return "the windows of a maximum are too large"
    made = {layer.name: layer.geometry for layer in network.attack.layers}
    for layer in network.attack.layers:
        for name in layer.inputs[:1]:
            # With rows of an even width, a map without halo is its own flattened form.
            if made.get(name, layer.source_geometry) != layer.source_geometry and made[name][2] % 2:
                return f"{layer.name} reads a map as a vector whose rows are {made[name][2]} pixels wide"
    return ""
