# ruff: noqa: D102 (the methods of all operators are described once, in the base class)
"""Images in, logits out, and the attack's step on the images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..layers import Input
from ..nodes import Node
from .base import Attributes, Completion, Operator, OrtNode, Port, Types, named_halos, stack_type

if TYPE_CHECKING:
    from ..autodiff import Tape
    from ..forward import Branch
    from ..fusion import FusedLayer


def _packed(node: Node, types: Types) -> tuple[int, ...]:
    n, channels, height, width = types[node.inputs[0]].dims
    lanes = node.attributes["lanes"]
    return stack_type(n // lanes, channels, height, width, node.attributes["halo"], lanes).dims


def _unpacked(node: Node, types: Types) -> tuple[int, ...]:
    blocks, classes, lanes = types[node.inputs[0]].dims
    return blocks * lanes, classes


class PackInput(Operator):
    """Images f32 [n, C, H, W] → stack, scale·x + shift for each channel where pixels are normalised."""

    half = True
    inputs = (Port("x"),)
    outputs = (Port("stack", dims=_packed),)
    repetition = "product"
    any_halo = True

    def lower(self, fused: FusedLayer, sources: list[str], y: str, branch: Branch) -> None:
        layer = fused.layer
        assert isinstance(layer, Input)
        branch.as_vector(fused, y)
        attributes: dict[str, Any] = {"lanes": branch.lanes, **named_halos(halo=y)}
        if layer.scale:
            attributes |= {"scale": list(layer.scale), "shift": list(layer.shift)}
        self.emit(branch.graph, {"x": branch.image}, {"stack": y}, attributes)

    def differentiate(self, node: Node, dy: str, tape: Tape) -> None:
        """The image's gradient stays a stack, which PgdStep reads. It lacks the factor of a normalisation,
        which is positive: the step takes signs."""
        tape.image_gradient = dy

    def complete(self, forward: Attributes, instance: str) -> Completion:
        return Completion({"lanes": forward["lanes"], "halo": 0})


class UnpackOutput(Operator):
    """Logits stack [NB, K, B] → f32 [n, K]."""

    inputs = (Port("stack"),)
    outputs = (Port("y", dims=_unpacked),)
    ort_gradient = (
        OrtNode("onnx:Constant", [], ["axes"], axes=(2, 3)),
        OrtNode("onnx:Unsqueeze", ["GO(0)", "axes"], ["image"]),
        OrtNode("PackInput", ["image"], ["GI(0)"]),
    )


class PgdStep(Operator):
    """One step of projected gradient descent: x_adv, x, dx, step_size, epsilon → x_adv."""

    half = True
    inputs = (Port("x_adv"), Port("x"), Port("dx"), Port("step_size"), Port("epsilon"))
    outputs = (Port("x_adv_out", shares="x_adv"),)
