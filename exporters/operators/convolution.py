# ruff: noqa: D102 (the methods of all operators are described once, in the base class)
"""Convolutions and linear layers, over connections or with all weights, and their gradients."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from edge_bcs.targets.cost_model import WINOGRAD, Walk

from ..activations import unactivated
from ..layers import Convolution, Layer, Window
from ..nodes import HaloOf, Node
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
    Port,
    Types,
    bits,
    blocks_of,
    named_halos,
    stack,
)
from .elementwise import masked_before

if TYPE_CHECKING:
    from ..autodiff import Gradients, Tape
    from ..forward import Branch, Lowering
    from ..fusion import FusedLayer


DEPTHWISE = "depthwise"


def window_of(attributes: Attributes) -> Window:
    """The windows of a convolution that a node's attributes describe."""
    return Window.of(*(attributes[name] for name in ("kernel", "strides", "pads", "dilations")))


def gradient_halo(attributes: Attributes) -> int:
    """Halo that the transposed convolution needs of the output's gradient, the largest over both axes and
    sides.
    """
    a, window = attributes, window_of(attributes)
    return max(
        window.down.gradient_halo(a["in_height"], a["out_height"]),
        window.across.gradient_halo(a["in_width"], a["out_width"]),
    )


def algorithm(layer: str, attributes: Attributes, side: str) -> str:
    """The attribute ``algorithm`` of an operator, by which the kernels choose how to make the pixels of its
    result: "sparse" (over the connections), "dense" (over all weights), "winograd" (the same with Winograd's
    products) or "depthwise" (plane by plane, where each channel of the input is a group). What it works in
    and what it costs follow from this alone.

    Winograd's F(2, 3) makes two pixels of the result from four products instead of six, where three weights
    lie side by side. The kernels (``kernels/winograd.cpp``) can compute it for

    - kernels three positions wide, at stride 1 and dilation 1;
    - rows of a multiple of four pixels, because they make two pairs at once;
    - a multiple of 16 images side by side, so that a pixel is whole vectors with every instruction set.

    And it should be done for

    - rows of at least eight pixels: on four, each weight is used too seldom for a third more of them to be
      packed and read;
    - at least eight planes (of a group) on both sides. A sum that is zero because its weights meet nothing
      but zeros (a few weights at the border of an image, say) comes out as a rounding error, which a ReLU may
      let pass; with several planes no sum has so few weights. And with few planes of the result, bringing the
      input into its form is not shared.

    Connections of a layer with groups are always visited one by one.

    Args:
        layer: "sparse", or anything else for a layer of which all weights are visited.
        attributes: of the operator, or of another one of its layer.
        side: of whose pixels the result is made: "out_" forwards, "in_" for the gradient of the input; "" for
            the gradient of the weights alone, whose result has no pixels.
    """
    a = attributes
    if layer == "sparse":
        return "sparse"
    if a["in_channels"] == a["groups"] > 1:
        return DEPTHWISE
    if not side:
        return "dense"
    plain = a["kernel"][1] == 3 and {*a["strides"], *a["dilations"]} == {1}
    can = plain and a[f"{side}width"] % 4 == 0 and a["lanes"] % 16 == 0
    should = a[f"{side}width"] >= 8 and min(a["in_channels"], a["out_channels"]) >= 8 * a["groups"]
    return WINOGRAD if can and should else "dense"


class _Convolutional(Operator):
    """What the three operators of a family share; here of connections."""

    products = 1  # of the layer's weights with the micro-batch that the operator performs
    place_bytes = 4  # of what says where a weight acts

    def entries(self, node: Node, connections: Connections) -> int:
        """Weights that there are."""
        return connections(node)

    def work_bytes(self, node: Node, types: Types) -> int:
        """Packed weights; four numbers for three in Winograd's form."""
        weights = {"dense": self.weights(node), WINOGRAD: self.weights(node) // 3 * 4}
        return 4 * weights.get(node.attributes["algorithm"], 0)

    def without_work(self, node: Node) -> Node | None:
        """The sparse kernel, which reads connections where they lie."""
        if node.attributes["algorithm"] == "sparse":
            return None
        return replace(node, attributes={**node.attributes, "algorithm": "sparse"})

    @staticmethod
    def weights(node: Node) -> int:
        """Positions of the layer, active or dormant."""
        return int(
            node.attributes["out_channels"]
            * node.attributes["in_channels"]
            // node.attributes["groups"]
            * prod(node.attributes["kernel"])
        )

    def kernels(self, node: Node) -> tuple[str, ...]:
        """The kernels that run, of `cost_model.KERNELS` or `cost_model.WINOGRAD`; depthwise ones cost what
        dense ones do: both use what they load several times."""
        kernel = node.attributes["algorithm"]
        return ("dense" if kernel == DEPTHWISE else kernel,)

    def walks(self, node: Node, types: Types, connections: Connections) -> tuple[Walk, ...]:
        """A gradient with respect to the input is a walk for each phase of the strides; each entry is in one
        of them, and all together they cover as many pixels as the output has."""
        a = node.attributes
        sparse = a["algorithm"] == "sparse"
        # A pixel of the output meets those of its group alone.
        entries = self.entries(node, connections) if sparse else self.weights(node)
        floats = a["out_width"] * a["lanes"]
        run = floats if a["strides"][1] == 1 else a["lanes"]
        rows = blocks_of(node, types) * a["out_height"]
        return tuple(Walk(kernel, entries, rows, floats, run, a["lanes"]) for kernel in self.kernels(node))

    def flops(self, node: Node, types: Types, connections: Connections) -> int:
        walks = self.walks(node, types, connections)
        products = sum(2 * walk.entries * walk.rows * walk.floats for walk in walks)
        return products + self.function_flops(node, types)

    def bytes_moved(self, node: Node, types: Types, connections: Connections) -> int:
        """Stacks and masks whole, but of the buffers of all layers only this layer's part: for each product a
        value and its place in the lists, a gradient's sum read and written, unpacked weights likewise."""
        stacks = {name for name in (*node.inputs, *node.outputs) if name and len(types[name].dims) > 1}
        entry = (4 + self.place_bytes) * (2 * self.products - 1)
        entries = entry * self.entries(node, connections)
        return sum(types[name].bytes for name in stacks) + entries + 2 * self.work_bytes(node, types)


class _InputGrad(_Convolutional, Gradient):
    """mask∘(convᵀ(scale·dy) + addend)."""

    outputs = (Port("dx", dims=stack("in_", "dx_halo")),)


class _Grad(_Convolutional, Gradient):
    """The same, and the gradients of weights, scale and shift, accumulated in place.

    Attributes:
        accumulated: the port of the gradient of all weights.
    """

    accumulated: ClassVar[str]
    products = 2

    def kernels(self, node: Node) -> tuple[str, ...]:
        """To the input, with the attribute's kernel, and to the values."""
        (kernel,) = super().kernels(node)
        to_values = "sparse_gradient" if kernel == "sparse" else "dense_gradient"
        return (kernel, to_values) if node.outputs[0] else (to_values,)

    def complete(self, forward: Attributes, instance: str) -> Completion:
        found = masked_before(forward, "out_", gradient_halo(forward), spare=False)
        found.attributes["algorithm"] = algorithm(forward["algorithm"], forward, "in_")
        return found


class _Forward(_Convolutional):
    """act(scale·conv(x) + shift + residual).

    Attributes:
        to_input, to_all: the operators of its gradients.
    """

    to_input: ClassVar[type[_InputGrad]]
    to_all: ClassVar[type[_Grad]]
    outputs = (
        Port("y", dims=stack("out_", "out_halo")),
        Port("bits", "u8", optional=True, dims=bits("out_")),
        Port("pre", optional=True, dims=stack("out_", "pre_halo")),
    )
    parameters = True
    keeps = "x"
    repetition = "product"
    takes = frozenset({"norm", "addition", "activation"})

    def place(self, layer: Convolution, lowering: Lowering) -> tuple[dict[str, str], dict[str, Any]]:
        """Inputs and attributes that say where the weights are, and how they are visited: "sparse" or not."""
        raise NotImplementedError

    def kernel_learns(self, node: Node, learned: Learned) -> bool:
        """Whether the weights are trained."""
        raise NotImplementedError

    def accumulate(self, node: Node, gradients: Gradients) -> tuple[str, str, dict[str, Any]]:
        """(current, next) tensor of the chain that accumulates the gradient of the weights, and attributes
        that say where it lies there if not all is trained."""
        raise NotImplementedError

    def learns(self, node: Node, learned: Learned) -> bool:
        return self.kernel_learns(node, learned) or node.attributes["affine"] in learned.slots

    def read_again(self, node: Node, learned: Learned) -> bool:
        """A shift's gradient needs no input."""
        return self.kernel_learns(node, learned)

    def lower(self, fused: FusedLayer, sources: list[str], y: str, branch: Branch) -> None:
        layer = fused.layer
        assert isinstance(layer, Convolution)
        (x,) = sources
        in_channels, in_height, in_width = fused.source_geometry
        out_channels, out_height, out_width = fused.geometry
        down, across = layer.window.down, layer.window.across
        branch.graph.halos.at_least(
            x, max(down.halo(in_height, out_height), across.halo(in_width, out_width))
        )
        residual = branch.residual(fused)
        if residual:
            branch.graph.halos.equal(residual, y)
        inputs, place = self.place(layer, branch.lowering)
        inputs |= {"x": x, "affine": branch.affine if fused.slot else "", "residual": residual}
        attributes: dict[str, Any] = {
            **place,
            "in_channels": in_channels,
            "in_height": in_height,
            "in_width": in_width,
            "out_channels": out_channels,
            "out_height": out_height,
            "out_width": out_width,
            "kernel": list(layer.kernel),
            "strides": list(layer.strides),
            "pads": list(layer.pads),
            "dilations": list(layer.dilations),
            "groups": layer.groups,
            "lanes": branch.lanes,
            "affine": fused.affine,
            **fused.activation,
            **named_halos(in_halo=x, out_halo=y),
        }
        attributes["algorithm"] = algorithm(place["algorithm"], attributes, "out_")
        self.emit(branch.graph, inputs, {"y": y}, attributes)

    def differentiate(self, node: Node, dy: str, tape: Tape) -> None:
        x, affine, residual = (self.read(node, port) for port in ("x", "affine", "residual"))
        if residual:
            tape.pass_on(residual, dy)
        attributes = {**unactivated(node.attributes), **named_halos(dy_halo=dy)}
        dx = tape.no_contribution
        if tape.needs(x):
            tape.graph.halos.at_least(dy, gradient_halo(attributes))
            dx = tape.absorb(x)
        attributes |= {**named_halos(dx_halo=dx.tensor), **dx.mask.attributes}
        attributes["algorithm"] = algorithm(attributes["algorithm"], attributes, "in_" if dx.tensor else "")
        inputs = {
            port.name: self.read(node, port.name)
            for port in self.to_input.inputs
            if self.has_input(port.name)
        }
        inputs |= {"dy": dy, **dx.inputs}
        if tape.gradients and tape.reads_again(node):
            learns = affine and tape.slot_learns(attributes["affine"])
            affine_grad, affine_out = tape.gradients.step_affine() if learns else ("", "")
            grad, out, place = self.accumulate(node, tape.gradients)
            inputs |= {"x": x, self.to_all.accumulated: grad, "affine_grad": affine_grad}
            outputs = {"dx": dx.tensor, f"{self.to_all.accumulated}_out": out, "affine_grad_out": affine_out}
            self.to_all.emit(tape.graph, inputs, outputs, {**attributes, **place})
            return
        if tape.learns(node):
            tape.add_shift(node, dy)
        if dx.tensor:
            self.to_input.emit(tape.graph, inputs, {"dx": dx.tensor}, attributes)

    def pre_halo(self, node: Node) -> int | HaloOf:
        """That of the output where something is added, which then has it, too."""
        halo: int | HaloOf = node.attributes["out_halo"] if self.read(node, "residual") else 0
        return halo

    def plain(self, layer: Layer) -> Plain:
        assert isinstance(layer, Convolution)
        if len(layer.shape) == 1:
            return Plain("Gemm", attributes={"transB": 1})
        attributes = {
            "kernel_shape": list(layer.kernel),
            "strides": list(layer.strides),
            "pads": list(layer.pads),
            "dilations": list(layer.dilations),
            "group": layer.groups,
        }
        return Plain("Conv", attributes=attributes)


# Connections


class ConvInputGrad(_InputGrad):
    """mask∘(convᵀ(scale·dy) + addend)."""

    half = True
    inputs = (
        Port("dy"),
        Port("value"),
        Port("affine", optional=True),
        *SUM_AND_MASK,
        Port("lists", "i32"),
    )


class ConvGrad(_Grad):
    """ConvInputGrad, and the gradients of values, scale and shift, accumulated in place."""

    accumulated = "coo_grad"
    inputs = (
        Port("dy"),
        Port("x"),
        Port("value"),
        Port("affine", optional=True),
        *SUM_AND_MASK,
        Port("coo_grad"),
        Port("affine_grad", optional=True),
        Port("lists", "i32"),
    )
    outputs = (
        Port("dx", optional=True, dims=stack("in_", "dx_halo")),
        Port("coo_grad_out", shares="coo_grad"),
        Port("affine_grad_out", optional=True, shares="affine_grad"),
    )


class Conv(_Forward):
    """act(scale·conv(x) + shift + residual), with weights among the connections."""

    half = True
    to_input, to_all = ConvInputGrad, ConvGrad
    inputs = (
        Port("x"),
        Port("value"),
        Port("affine", optional=True),
        Port("residual", optional=True),
        Port("lists", "i32"),
    )
    ort_gradient = (
        OrtNode(
            "ConvGrad",
            ["GO(0)", "I(0)", "I(1)", "I(2)", "", "", "I(1)", "I(2)", "I(4)"],
            ["GI(0)", "GI(1)", "GI(2)"],
        ),
    )

    def place(self, layer: Convolution, lowering: Lowering) -> tuple[dict[str, str], dict[str, Any]]:
        kernel, lists = lowering.network.kernels[layer.module], lowering.passed.lists
        forward, backwards = lists.pointers[layer.module]
        attributes = {
            "layer_offset": kernel.offset,
            "forward_pointer": forward,
            "transpose_pointer": backwards,
            "algorithm": "sparse" if layer.groups > 1 else kernel.algorithm,
            **({"transposed": lists.transposed} if lists.partial else {}),
        }
        return {"value": "coo.value", "lists": lists.tensor}, attributes

    def kernel_learns(self, node: Node, learned: Learned) -> bool:
        return node.attributes["layer_offset"] in learned.kernels

    def accumulate(self, node: Node, gradients: Gradients) -> tuple[str, str, dict[str, Any]]:
        return *gradients.step_coo(), gradients.place_among_connections(node.attributes["layer_offset"])


# All weights


class _AllWeights(_Convolutional):
    place_bytes = 0

    def entries(self, node: Node, connections: Connections) -> int:
        return self.weights(node)

    def without_work(self, node: Node) -> Node | None:
        return None


class DenseConvInputGrad(_AllWeights, _InputGrad):
    """mask∘(convᵀ(scale·dy) + addend)."""

    half = True
    inputs = (Port("dy"), Port("dense"), Port("affine", optional=True), *SUM_AND_MASK)


class DenseConvGrad(_AllWeights, _Grad):
    """DenseConvInputGrad, and the gradients of weights, scale and shift, accumulated in place."""

    accumulated = "dense_grad"
    inputs = (
        Port("dy"),
        Port("x"),
        Port("dense"),
        Port("affine", optional=True),
        *SUM_AND_MASK,
        Port("dense_grad"),
        Port("affine_grad", optional=True),
    )
    outputs = (
        Port("dx", optional=True, dims=stack("in_", "dx_halo")),
        Port("dense_grad_out", shares="dense_grad"),
        Port("affine_grad_out", optional=True, shares="affine_grad"),
    )


class DenseConv(_AllWeights, _Forward):
    """act(scale·conv(x) + shift + residual), with weights in ``dense.value``."""

    half = True
    to_input, to_all = DenseConvInputGrad, DenseConvGrad
    inputs = (Port("x"), Port("dense"), Port("affine", optional=True), Port("residual", optional=True))
    ort_gradient = (
        OrtNode(
            "DenseConvGrad",
            ["GO(0)", "I(0)", "I(1)", "I(2)", "", "", "I(1)", "I(2)"],
            ["GI(0)", "GI(1)", "GI(2)"],
        ),
    )

    def place(self, layer: Convolution, lowering: Lowering) -> tuple[dict[str, str], dict[str, Any]]:
        weight = lowering.network.dense[f"{layer.module}.weight"]
        return {"dense": "dense.value"}, {"weight": weight.offset, "algorithm": "dense"}

    def kernel_learns(self, node: Node, learned: Learned) -> bool:
        return node.attributes["weight"] in learned.dense

    def accumulate(self, node: Node, gradients: Gradients) -> tuple[str, str, dict[str, Any]]:
        return *gradients.step_dense(), gradients.place_among_dense(node.attributes["weight"])
