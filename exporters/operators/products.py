# ruff: noqa: D102 (the methods of all operators are described once, in the base class)
"""Products: of two stacks, of a stack and a number for each of its channels, of a stack and a constant."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
    blocks_of,
    named_halos,
    stack,
    stack_type,
)

if TYPE_CHECKING:
    from ..autodiff import Tape
    from ..forward import Branch
    from ..fusion import FusedLayer


class MultiplyGrad(Gradient):
    """mask∘(dy∘other + addend), where ``other`` is the other factor."""

    inputs = (Port("dy"), Port("other"), *SUM_AND_MASK)
    outputs = (Port("dx", dims=stack("", "dx_halo")),)

    def complete(self, forward: Attributes, instance: str) -> Completion:
        # The builder numbers the nodes from 0, one for each input.
        mine, other = ("a", "b") if instance.endswith("_0") else ("b", "a")
        return _completion(forward, dx=forward[f"{mine}_halo"], other=forward[f"{other}_halo"])


class GateInputGrad(Gradient):
    """mask∘(dy∘other + addend), where ``other`` has a number for each channel."""

    inputs = MultiplyGrad.inputs
    outputs = MultiplyGrad.outputs

    def complete(self, forward: Attributes, instance: str) -> Completion:
        return _completion(forward, dx=forward["a_halo"], other=forward["b_halo"])


def _pixel(node: Node, types: Any) -> tuple[int, ...]:
    a = node.attributes
    return stack_type(blocks_of(node, types), a["channels"], 1, 1, a["dx_halo"], a["lanes"]).dims


class GateFactorGrad(Gradient):
    """mask∘(Σ over the pixels of dy∘a + addend): a number for each channel."""

    inputs = (Port("dy"), Port("a"), *SUM_AND_MASK)
    outputs = (Port("dx", dims=_pixel),)

    def complete(self, forward: Attributes, instance: str) -> Completion:
        return _completion(forward, dx=forward["b_halo"])


def _completion(forward: Attributes, **halos: int) -> Completion:
    named = {f"{name}_halo": halo for name, halo in halos.items()}
    return Completion({**forward, "dy_halo": forward["out_halo"], **named, "mask_kind": 0, "mask_halo": 0})


class _Product(Operator):
    inputs = (Port("a"), Port("b"))
    outputs = (Port("y", dims=stack("", "out_halo")),)
    repetition = "elements"
    any_halo = True

    def lower(self, fused: FusedLayer, sources: list[str], y: str, branch: Branch) -> None:
        branch.as_vector(fused, y)
        a, b = sources
        halos = named_halos(a_halo=a, b_halo=b, out_halo=y)
        self.emit(branch.graph, {"a": a, "b": b}, {"y": y}, {**branch.map(fused), **halos})

    def plain(self, layer: layers.Layer) -> Plain:
        return Plain("Mul")

    def _back(self, rule: type[Operator], node: Node, dy: str, x: str, other: str, tape: Tape) -> None:
        """Emit the gradient ``rule`` of the factor ``x``, whose last input is the other factor."""
        if tape.needs(x):
            dx, port = tape.absorb(x), rule.inputs[1].name
            halos = named_halos(dy_halo=dy, dx_halo=dx.tensor, **{f"{port}_halo": other})
            attributes = {**node.attributes, **halos, **dx.mask.attributes}
            rule.emit(tape.graph, {"dy": dy, port: other, **dx.inputs}, {"dx": dx.tensor}, attributes)


class Multiply(_Product):
    """a∘b."""

    ort_gradient = tuple(OrtNode("MultiplyGrad", ["GO(0)", f"I({1 - i})"], [f"GI({i})"]) for i in (0, 1))

    def differentiate(self, node: Node, dy: str, tape: Tape) -> None:
        a, b = node.inputs
        self._back(MultiplyGrad, node, dy, a, b, tape)
        self._back(MultiplyGrad, node, dy, b, a, tape)


class Gate(_Product):
    """a∘b, where b has a number for each channel (squeeze-and-excite)."""

    ort_gradient = (
        OrtNode("GateInputGrad", ["GO(0)", "I(1)"], ["GI(0)"]),
        OrtNode("GateFactorGrad", ["GO(0)", "I(0)"], ["GI(1)"]),
    )

    def differentiate(self, node: Node, dy: str, tape: Tape) -> None:
        a, b = node.inputs
        self._back(GateInputGrad, node, dy, a, b, tape)
        self._back(GateFactorGrad, node, dy, b, a, tape)


class RescaleGrad(Gradient):
    """mask∘(factor·dy + addend)."""

    inputs = (Port("dy"), *SUM_AND_MASK)
    outputs = (Port("dx", dims=stack("", "dx_halo")),)

    def complete(self, forward: Attributes, instance: str) -> Completion:
        return _completion(forward, dx=forward["in_halo"])


class Rescale(Operator):
    """factor·x + offset, two constants."""

    inputs = (Port("x"),)
    outputs = (Port("y", dims=stack("", "out_halo")),)
    repetition = "elements"
    any_halo = True
    ort_gradient = (OrtNode("RescaleGrad", ["GO(0)"], ["GI(0)"]),)

    def lower(self, fused: FusedLayer, sources: list[str], y: str, branch: Branch) -> None:
        layer = fused.layer
        assert isinstance(layer, layers.Rescale)
        branch.as_vector(fused, y)
        attributes = {**branch.map(fused), "factor": float(layer.factor), "offset": float(layer.offset)}
        halos = named_halos(in_halo=sources[0], out_halo=y)
        self.emit(branch.graph, {"x": sources[0]}, {"y": y}, {**attributes, **halos})

    def differentiate(self, node: Node, dy: str, tape: Tape) -> None:
        x = self.read(node, "x")
        if tape.needs(x):
            dx = tape.absorb(x)
            halos = named_halos(dy_halo=dy, dx_halo=dx.tensor)
            attributes = {**node.attributes, **halos, **dx.mask.attributes}
            RescaleGrad.emit(tape.graph, {"dy": dy, **dx.inputs}, {"dx": dx.tensor}, attributes)

    def plain(self, layer: layers.Layer) -> list[Plain]:
        assert isinstance(layer, layers.Rescale)
        return [
            Plain("Mul", {"factor": layer.factor}),
            Plain("Add", {"offset": layer.offset}),
        ]
