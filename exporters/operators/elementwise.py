# ruff: noqa: D102 (the methods of all operators are described once, in the base class)
"""Operators that look at each element by itself: scale and shift, sums, and their gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from ..layers import Elementwise, Layer, Scale
from ..nodes import Node
from .base import (
    SUM_AND_MASK,
    Attributes,
    Completion,
    Gradient,
    Operator,
    OrtNode,
    Parameter,
    Plain,
    Port,
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
    """Attributes of the MaskedAdd that rectifies a gradient as the forward node did and gives it a halo."""
    rectified = int(forward["relu"])
    channels, height, width = map_of(forward, side)
    return {
        "channels": channels,
        "height": height,
        "width": width,
        "lanes": forward["lanes"],
        "a_halo": forward["out_halo"],
        "b_halo": 0,
        "out_halo": halo,
        "mask_kind": rectified,
        "mask_halo": forward["out_halo"] * rectified,
    }


def unmasked(forward: Attributes) -> Completion:
    """The forward node's attributes, and no mask."""
    return Completion({**forward, "mask_kind": 0, "mask_halo": 0})


def masked_before(forward: Attributes, side: str, halo: int, spare: bool = True) -> Completion:
    """A gradient operator that rectifies nothing that it is given, and takes it with the halo ``halo``."""
    attributes = {**forward, "relu": 0, "mask_kind": 0, "mask_halo": 0, "dy_halo": halo}
    attributes["dx_halo"] = forward["in_halo"]
    needed = forward["relu"] or halo != forward["out_halo"]
    return Completion(attributes, masking(forward, side, halo) if needed else None, spare=spare)


# Scale and shift


class Affine(Operator):
    """act(scale·x + shift)."""

    inputs = (Port("x"), Port("affine"))
    outputs = (
        Port("y", dims=stack("", "out_halo")),
        Port("bits", "u8", optional=True, dims=bits("")),
        Port("pre", optional=True, dims=stack("", "pre_halo")),
    )
    parameters = True
    keeps = "x"
    repetition = "elements"
    takes = frozenset({"relu"})
    ort_gradient = (OrtNode("AffineGrad", ["GO(0)", "I(0)", "I(1)", "", "", "I(1)"], ["GI(0)", "GI(1)"]),)

    def learns(self, node: Node, learned_slots: frozenset[int]) -> bool:
        """A plain rectification has a slot without parameters."""
        return node.attributes["affine"] in learned_slots

    def lower(self, fused: FusedLayer, sources: list[str], y: str, branch: Branch) -> None:
        attributes = {
            **branch.map(fused),
            "affine": fused.affine,
            "relu": int(fused.relu),
            **named_halos(in_halo=sources[0], out_halo=y),
        }
        self.emit(branch.graph, {"x": sources[0], "affine": branch.affine}, {"y": y}, attributes)

    def differentiate(self, node: Node, dy: str, tape: Tape) -> None:
        x, learned = self.read(node, "x"), tape.learns(node)
        if not (learned or tape.needs(x)):
            return
        # A scale directly on the image still needs a tensor for the gradient that nobody reads.
        dx = tape.absorb(x) if tape.needs(x) else tape.unread(x)
        halos = named_halos(out_halo=dy, dy_halo=dy, dx_halo=dx.tensor)
        attributes = {**node.attributes, "relu": 0, **halos, **dx.mask.attributes}
        inputs = {"dy": dy, "affine": self.read(node, "affine"), **dx.inputs}
        if tape.gradients and learned:
            affine_grad, out = tape.gradients.step_affine()
            inputs |= {"x": x, "affine_grad": affine_grad}
            AffineGrad.emit(tape.graph, inputs, {"dx": dx.tensor, "affine_grad_out": out}, attributes)
        else:
            AffineInputGrad.emit(tape.graph, inputs, {"dx": dx.tensor}, attributes)

    def plain(self, layer: Layer) -> Plain:
        if isinstance(layer, Scale):
            shape = (layer.shape[0], *[1] * (len(layer.shape) - 1))
            return Plain("Mul", {"scale": Parameter(layer.parameter, shape)})
        return Plain("Relu")


class AffineInputGrad(Gradient):
    """mask∘(scale·dy + addend)."""

    inputs = (Port("dy"), Port("affine"), *SUM_AND_MASK)
    outputs = (Port("dx", dims=stack("", "dx_halo")),)


class AffineGrad(Gradient):
    """AffineInputGrad, and the gradients of scale and shift, accumulated."""

    inputs = (Port("dy"), Port("x"), Port("affine"), *SUM_AND_MASK, Port("affine_grad"))
    outputs = (Port("dx", dims=stack("", "dx_halo")), Port("affine_grad_out", shares="affine_grad"))

    def complete(self, forward: Attributes, instance: str) -> Completion:
        return masked_before(forward, "", forward["out_halo"])


# Functions of one element


class Activate(Operator):
    """act(x); its gradient is that of y, masked, so that it needs no operator."""

    inputs = (Port("x"),)
    outputs = (Port("y", dims=stack("", "out_halo")), Port("bits", "u8", optional=True, dims=bits("")))
    repetition = "elements"


class _Function(Operator):
    """Base of such an operator: attributes of its own, and an output for its gradient if that needs one."""

    inputs = (Port("x"),)
    repetition = "elements"
    any_halo = True
    gradient: ClassVar[type[Operator]]  # dy, and the outputs for the backward pass → dx

    def lower(self, fused: FusedLayer, sources: list[str], y: str, branch: Branch) -> None:
        layer = fused.layer
        assert isinstance(layer, Elementwise)
        branch.as_vector(fused, y)
        halos = named_halos(in_halo=sources[0], out_halo=y)
        attributes = {**branch.map(fused), **layer.attributes, **halos}
        self.emit(branch.graph, {"x": sources[0]}, {"y": y}, attributes)

    def differentiate(self, node: Node, dy: str, tape: Tape) -> None:
        x = self.read(node, "x")
        if tape.needs(x):
            dx = tape.contribute(x)
            attributes = {**node.attributes, **named_halos(dy_halo=dy, dx_halo=dx)}
            self.gradient.emit(tape.graph, {"dy": dy, **tape.saved(node)}, {"dx": dx}, attributes)


class LeakyReLUGrad(Gradient):
    """dy where the bit is set, slope·dy elsewhere."""

    inputs = (Port("dy"), Port("signs", "u8"))
    outputs = (Port("dx", dims=stack("", "dx_halo")),)

    def complete(self, forward: Attributes, instance: str) -> Completion:
        return Completion({**forward, "dy_halo": forward["out_halo"], "dx_halo": forward["in_halo"]})


class LeakyReLU(_Function):
    """x where it is positive, slope·x elsewhere; ``signs`` has a bit for each element that is positive."""

    outputs = (
        Port("y", dims=stack("", "out_halo")),
        Port("signs", "u8", optional=True, dims=bits(""), for_backward=True),
    )
    gradient = LeakyReLUGrad
    ort_gradient = (OrtNode("LeakyReLUGrad", ["GO(0)", "O(1)"], ["GI(0)"]),)

    def plain(self, layer: Layer) -> Plain:
        assert isinstance(layer, Elementwise)
        return Plain("LeakyRelu", attributes={"alpha": layer.attributes["slope"]})


# Sums


class Add(Operator):
    """act(a + b)."""

    inputs = (Port("a"), Port("b"))
    outputs = (
        Port("y", dims=stack("", "out_halo")),
        Port("bits", "u8", optional=True, dims=bits("")),
        Port("pre", optional=True, dims=stack("", "pre_halo")),
    )
    repetition = "elements"
    takes = frozenset({"relu"})
    commutative = True
    ort_gradient = tuple(OrtNode("MaskedAdd", ["GO(0)", "", "O(0)"], [f"GI({i})"]) for i in (0, 1))

    def lower(self, fused: FusedLayer, sources: list[str], y: str, branch: Branch) -> None:
        halos = named_halos(a_halo=sources[0], b_halo=sources[1], out_halo=y)
        attributes = {**branch.map(fused), "relu": int(fused.relu), **halos}
        self.emit(branch.graph, {"a": sources[0], "b": sources[1]}, {"y": y}, attributes)

    def differentiate(self, node: Node, dy: str, tape: Tape) -> None:
        for tensor in node.inputs:
            if tape.needs(tensor):
                tape.pass_on(tensor, dy)

    def plain(self, layer: Layer) -> Plain:
        return Plain("Add")


class MaskedAdd(Gradient):
    """mask∘(a + b)."""

    inputs = (Port("a"), Port("b", optional=True), Port("mask", "any", optional=True))
    outputs = (Port("y", dims=stack("", "out_halo")),)

    def complete(self, forward: Attributes, instance: str) -> Completion:
        # Of an addition, whose gradient is one node for each input; the builder numbers them from 0.
        halo = forward["a_halo"] if instance.endswith("_0") else forward["b_halo"]
        return Completion(masking(forward, "", halo), inputs=None if forward["relu"] else 1)
