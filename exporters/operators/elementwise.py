# ruff: noqa: D102 (the methods of all operators are described once, in the base class)
"""Operators that look at each element by itself: scale and shift, sums, and their gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..activations import FUNCTIONS, applied, masked, unactivated
from ..layers import Activation, Layer, Scale
from ..nodes import Node
from ..plain import Plain
from .base import (
    SUM_AND_MASK,
    Attributes,
    Completion,
    Connections,
    Gradient,
    Learned,
    Operator,
    OrtNode,
    Parameter,
    Port,
    Types,
    bits,
    map_of,
    named_halos,
    stack,
)

if TYPE_CHECKING:
    from ..autodiff import Tape
    from ..forward import Branch
    from ..fusion import FusedLayer


# Gradients for ONNX Runtime's builder, whose graph keeps a tensor's gradient in that tensor's own halo


def masking(forward: Attributes, side: str, halo: int) -> dict[str, Any]:
    """Attributes of the MaskedAdd that takes a gradient through the forward node's activation and gives it a
    halo."""
    function = applied(forward)
    channels, height, width = map_of(forward, side)
    kept = "out_halo" if function is None or function.kept != "pre" else "pre_halo"
    return {
        "channels": channels,
        "height": height,
        "width": width,
        "lanes": forward["lanes"],
        "a_halo": forward["out_halo"],
        "b_halo": 0,
        "out_halo": halo,
        "mask_kind": int(function is not None),
        "mask_halo": forward.get(kept, forward.get("in_halo", 0)) if function else 0,
        **masked(forward),
    }


def masked_before(forward: Attributes, side: str, halo: int, spare: bool = True) -> Completion:
    """A gradient operator that masks nothing that it is given, and takes it with the halo ``halo``."""
    attributes = {**unactivated(forward), "mask_kind": 0, "mask_halo": 0, "dy_halo": halo}
    attributes["dx_halo"] = forward["in_halo"]
    needed = applied(forward) or halo != forward["out_halo"]
    return Completion(attributes, masking(forward, side, halo) if needed else None, spare=spare)


# Scale and shift


class Affine(Operator):
    """act(scale·x + shift)."""

    half = True
    inputs = (Port("x"), Port("affine"))
    outputs = (
        Port("y", dims=stack("", "out_halo")),
        Port("bits", "u8", optional=True, dims=bits("")),
        Port("pre", optional=True, dims=stack("", "pre_halo")),
    )
    parameters = True
    keeps = "x"
    repetition = "elements"
    takes = frozenset({"activation"})
    ort_gradient = (OrtNode("AffineGrad", ["GO(0)", "I(0)", "I(1)", "", "", "I(1)"], ["GI(0)", "GI(1)"]),)

    def lower(self, fused: FusedLayer, sources: list[str], y: str, branch: Branch) -> None:
        attributes = {
            **branch.map(fused),
            "affine": fused.affine,
            **fused.activation,
            **named_halos(in_halo=sources[0], out_halo=y),
        }
        self.emit(branch.graph, {"x": sources[0], "affine": branch.affine}, {"y": y}, attributes)

    def learns(self, node: Node, learned: Learned) -> bool:
        return node.attributes["affine"] in learned.slots

    def read_again(self, node: Node, learned: Learned) -> bool:
        """A shift's gradient needs no input."""
        return node.attributes["affine"] in learned.scales

    def differentiate(self, node: Node, dy: str, tape: Tape) -> None:
        x, learned = self.read(node, "x"), tape.learns(node)
        if learned and not tape.reads_again(node):
            tape.add_shift(node, dy)
            learned = False
        if not (learned or tape.needs(x)):
            return
        # A scale directly on the image still needs a tensor for the gradient that nobody reads.
        dx = tape.absorb(x) if tape.needs(x) else tape.unread(x)
        halos = named_halos(out_halo=dy, dy_halo=dy, dx_halo=dx.tensor)
        attributes = {**unactivated(node.attributes), **halos, **dx.mask.attributes}
        inputs = {"dy": dy, "affine": self.read(node, "affine"), **dx.inputs}
        if tape.gradients and learned:
            affine_grad, out = tape.gradients.step_affine()
            inputs |= {"x": x, "affine_grad": affine_grad}
            AffineGrad.emit(tape.graph, inputs, {"dx": dx.tensor, "affine_grad_out": out}, attributes)
        else:
            AffineInputGrad.emit(tape.graph, inputs, {"dx": dx.tensor}, attributes)

    def plain(self, layer: Layer) -> Plain:
        assert isinstance(layer, Scale)
        shape = (layer.shape[0], *[1] * (len(layer.shape) - 1))
        return Plain("Mul", {"scale": Parameter(layer.parameter, shape)})


class AffineInputGrad(Gradient):
    """mask∘(scale·dy + addend)."""

    half = True
    inputs = (Port("dy"), Port("affine"), *SUM_AND_MASK)
    outputs = (Port("dx", dims=stack("", "dx_halo")),)


class AffineGrad(Gradient):
    """AffineInputGrad, and the gradients of scale and shift, accumulated."""

    inputs = (Port("dy"), Port("x"), Port("affine"), *SUM_AND_MASK, Port("affine_grad"))
    outputs = (Port("dx", dims=stack("", "dx_halo")), Port("affine_grad_out", shares="affine_grad"))

    def complete(self, forward: Attributes, instance: str) -> Completion:
        return masked_before(forward, "", forward["out_halo"])


class ShiftGrad(Gradient):
    """The gradient of a shift alone, Σ dy over images and pixels, accumulated. No layer's input is read."""

    inputs = (Port("dy"), Port("affine_grad"))
    outputs = (Port("affine_grad_out", shares="affine_grad"),)

    def flops(self, node: Node, types: Types, connections: Connections) -> int:
        return types[node.inputs[0]].bytes // 4

    def bytes_moved(self, node: Node, types: Types, connections: Connections) -> int:
        return types[node.inputs[0]].bytes


# Activations that no other operator applies


class Activate(Operator):
    """act(x). The gradient of y, masked, is that of x, so that it needs no operator; "pre" is x itself."""

    half = True
    inputs = (Port("x"),)
    outputs = (Port("y", dims=stack("", "out_halo")), Port("bits", "u8", optional=True, dims=bits("")))
    repetition = "elements"
    ort_gradient = (OrtNode("MaskedAdd", ["GO(0)", "", "O(0)"], ["GI(0)"]),)

    def lower(self, fused: FusedLayer, sources: list[str], y: str, branch: Branch) -> None:
        halos = named_halos(in_halo=sources[0], out_halo=y)
        self.emit(
            branch.graph, {"x": sources[0]}, {"y": y}, {**branch.map(fused), **fused.activation, **halos}
        )

    def differentiate(self, node: Node, dy: str, tape: Tape) -> None:
        tape.pass_on(self.read(node, "x"), dy)

    def plain(self, layer: Layer) -> Plain:
        assert isinstance(layer, Activation)
        return FUNCTIONS[layer.kind].plain(layer.attributes)


# Sums


class Add(Operator):
    """act(a + b)."""

    half = True
    inputs = (Port("a"), Port("b"))
    outputs = (
        Port("y", dims=stack("", "out_halo")),
        Port("bits", "u8", optional=True, dims=bits("")),
        Port("pre", optional=True, dims=stack("", "pre_halo")),
    )
    repetition = "elements"
    takes = frozenset({"activation"})
    commutative = True
    ort_gradient = tuple(OrtNode("MaskedAdd", ["GO(0)", "", "O(0)"], [f"GI({i})"]) for i in (0, 1))

    def lower(self, fused: FusedLayer, sources: list[str], y: str, branch: Branch) -> None:
        halos = named_halos(a_halo=sources[0], b_halo=sources[1], out_halo=y)
        attributes = {**branch.map(fused), **fused.activation, **halos}
        self.emit(branch.graph, {"a": sources[0], "b": sources[1]}, {"y": y}, attributes)

    def differentiate(self, node: Node, dy: str, tape: Tape) -> None:
        for tensor in node.inputs:
            if tape.needs(tensor):
                tape.pass_on(tensor, dy)

    def plain(self, layer: Layer) -> Plain:
        return Plain("Add")


class MaskedAdd(Gradient):
    """mask∘(a + b)."""

    half = True
    inputs = (Port("a"), Port("b", optional=True), Port("mask", "any", optional=True))
    outputs = (Port("y", dims=stack("", "out_halo")),)

    def complete(self, forward: Attributes, instance: str) -> Completion:
        # Of an addition, whose gradient is one node for each input (the builder numbers them from 0), or of a
        # lone activation.
        port = "in_halo" if "in_halo" in forward else "a_halo" if instance.endswith("_0") else "b_halo"
        return Completion(masking(forward, "", forward[port]), inputs=None if applied(forward) else 1)
