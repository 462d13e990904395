"""A checker of memory plans that shares nothing with the planner: it reads the ONNX file and the
manifest alone.

Shapes follow from the attributes by the definition of a stack, lives from who writes and who reads, and every
disagreement with the plan is reported as a sentence.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import onnx

# Output position → input position of what is updated in place.
IN_PLACE: dict[str, dict[int, int]] = {
    "ConvGrad": {1: 6, 2: 7},
    "AffineGrad": {1: 5},
    "BatchNorm": {2: 3, 3: 4},
    "BatchNormGrad": {1: 7},
    "FoldAffineGrad": {0: 4},
    "PgdStep": {0: 0},
    "ResetGradient": {0: 0},
    "After": {0: 0},
    "BuildLists": {0: 1},
    "RewireStep": {0: 0, 1: 1, 2: 2, 3: 3},
    "DenseStep": {0: 0, 1: 1},
}
# Operator → (prefix of its output's geometry, attribute with its halo) for outputs that are stacks.
STACKS = {
    "Conv": ("out_", "out_halo"),
    "ConvInputGrad": ("in_", "dx_halo"),
    "ConvGrad": ("in_", "dx_halo"),
    "MaxPool": ("out_", "out_halo"),
    "MaxPoolGrad": ("in_", "in_halo"),
    "AveragePool": ("out_", "out_halo"),
    "AveragePoolGrad": ("in_", "in_halo"),
    "Affine": ("", "out_halo"),
    "AffineInputGrad": ("", "dx_halo"),
    "AffineGrad": ("", "dx_halo"),
    "Add": ("", "out_halo"),
    "MaskedAdd": ("", "out_halo"),
    "BatchNorm": ("", "out_halo"),
    "BatchNormGrad": ("", "dx_halo"),
}
BITS = {"Conv": 1, "Affine": 1, "Add": 1, "BatchNorm": 4}


def _stack_bytes(images: int, channels: int, height: int, width: int, halo: int) -> int:
    """A row is followed by the halo, a plane by a row of it, and a row and a halo come first; lanes
    change nothing."""
    row = width + halo
    return 4 * images * (halo * row + halo + channels * (height + halo) * row)


class Checker:
    """Replays one graph; ``faults`` collects what is wrong, ``peak`` is the end of the highest tensor, in
    whole lines of 64 bytes."""

    def __init__(self, model: onnx.ModelProto, tensors: list[list[Any]]) -> None:
        self.nodes = model.graph.node
        self.size: dict[str, int] = {}  # bytes of every tensor
        self.images, self.image = 0, [0, 0, 0]
        for value in model.graph.input:
            shape = [extent.dim_value for extent in value.type.tensor_type.shape.dim]
            item = {onnx.TensorProto.INT64: 8, onnx.TensorProto.BOOL: 1}.get(
                value.type.tensor_type.elem_type, 4
            )
            self.size[value.name] = item * math.prod(shape)
            if value.name in ("input", "adversarial"):
                self.images, *self.image = shape
        self.bound = set(self.size) | {value.name for value in model.graph.output}
        self.faults: list[str] = []
        self.peak = 0
        self._lives: dict[str, tuple[int, int, int]] = {}
        self._replay({name: (size, birth, death) for name, size, _, birth, death, *_ in tensors})
        self._places({name: rest[1] for name, _, _, _, _, *rest in tensors if rest})

    def _attributes(self, node: onnx.NodeProto) -> dict[str, Any]:
        return {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}

    def _output_bytes(self, node: onnx.NodeProto, position: int) -> int:
        a, operator = self._attributes(node), node.op_type
        prefix, halo = STACKS.get(operator, ("", ""))

        def geometry(name: str) -> int:
            return int(a.get(prefix + name, a.get(name, 0)))

        channels, height, width = geometry("channels"), geometry("height"), geometry("width")
        if operator in STACKS and position == 0:
            return _stack_bytes(self.images, channels, height, width, a[halo])
        if operator in BITS and position == BITS[operator]:
            return self.images // a["lanes"] * channels * height * math.ceil(width * a["lanes"] / 8)
        if operator == "MaxPool":
            return self.images * channels * height * width
        if operator == "BatchNorm":
            return 2 * 4 * channels
        first = self.size[node.input[0]]
        if operator == "PackInput":
            channels, height, width = self.image
            return _stack_bytes(self.images, channels, height, width, a["halo"])
        if operator == "FoldAffine":
            return 2 * 4 * sum(a["entries"][1::6])
        if operator in ("ZeroAffine", "SoftmaxDifference", "UnpackOutput"):
            return first
        if operator in ("Narrow", "Widen"):
            return first // 2 if operator == "Narrow" else 2 * first
        if operator in ("CrossEntropy", "Trades", "Mart"):
            return first  # only the gradients of the logits are not bound
        raise AssertionError(f"{operator} output {position} is not bound and has no rule")

    def _replay(self, planned: dict[str, tuple[int, int, int]]) -> None:
        memory = {name: name for name in self.bound}  # tensor → the allocation that holds it
        stale: set[str] = set()  # names whose memory was overwritten under a new name
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        unread: set[str] = set()
        work: dict[int, int] = {}
        for step, node in enumerate(self.nodes):
            for name in filter(None, node.input):
                if name not in memory:
                    self.faults.append(f"{node.name} reads {name}, which nothing has written")
                elif name in stale:
                    self.faults.append(f"{node.name} reads {name}, which was overwritten in place")
                else:
                    last[memory[name]] = step
                    unread.discard(memory[name])
            for position, name in enumerate(node.output):
                source = IN_PLACE.get(node.op_type, {}).get(position)
                if name and source is not None:
                    memory[name] = memory.get(node.input[source], name)
                    self.size[name] = self.size.get(node.input[source], 0)
                    last[memory[name]] = step
                    if node.op_type != "After":
                        stale.add(node.input[source])
                elif name and name not in self.bound:
                    memory[name] = name
                    first[name] = last[name] = step
                    unread.add(name)
                    self.size[name] = self._output_bytes(node, position)
            a = self._attributes(node)
            if a.get("algorithm") in (b"dense", b"winograd"):
                channels = a["out_channels"] * a["in_channels"] // a["groups"]
                work[step] = 4 * channels * math.prod(a["kernel"])
            if a.get("algorithm") == b"winograd":
                work[step] += work[step] // 3  # its form of three weights is four numbers
                width = a["in_width"] if node.op_type.endswith("Grad") else a["out_width"]
                steps = {*a["strides"], *a["dilations"]}
                if (a["kernel"][1], steps, width % 4, a["lanes"] % 16) != (3, {1}, 0, 0):
                    self.faults.append(f"{node.name} cannot be computed with Winograd's products")
        last |= dict.fromkeys(unread, len(self.nodes) - 1)  # ONNX Runtime frees them when the run ends
        lives = {name: (self.size[name], first[name], last[name]) for name in first}
        lives |= {f"{self.nodes[step].name}.work": (size, step, step) for step, size in work.items()}
        for name in sorted(lives.keys() | planned.keys()):
            size, birth, death = planned.get(name, (0, 0, -1))
            found = lives.get(name)
            if found is None:
                self.faults.append(f"{name} is planned and does not exist")
            elif name not in planned:
                self.faults.append(f"{name} exists and is not planned")
            elif birth > found[1]:
                self.faults.append(f"{name} is written at {found[1]}, before its memory exists at {birth}")
            elif death < found[2]:
                self.faults.append(f"{name} is used at {found[2]}, after it was freed at {death}")
            elif (size, birth, death) != found:
                self.faults.append(f"{name} is planned as {(size, birth, death)} and is {found}")
        self._lives = lives

    def _places(self, address: dict[str, int]) -> None:
        """Where tensors lie, against how long they are found to live."""
        placed = [
            (address[name], address[name] + size, birth, death, name)
            for name, (size, birth, death) in self._lives.items()
            if name in address
        ]
        for first, second in itertools.combinations(placed, 2):
            meet = first[0] < second[1] and second[0] < first[1]
            if meet and first[2] <= second[3] and second[2] <= first[3]:
                self.faults.append(f"{first[4]} and {second[4]} lie at one place at one time")
        self.faults += [f"{name} does not begin on a line" for begin, *_, name in placed if begin % 64]
        self.peak = max((-(-end // 64) * 64 for _, end, *_ in placed), default=0)
