# ruff: noqa: D102 (the methods of all operators are described once, in the base class)
"""Convolutions and linear layers over active connections, and their gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edge_bcs.targets.cost_model import WINOGRAD, Walk

from ..layers import Convolution, Layer
from ..nodes import Node
from .base import (
    SUM_AND_MASK,
    Attributes,
    Completion,
    Connections,
    Gradient,
    Operator,
    OrtNode,
    Plain,
    Port,
    Types,
    bits,
    blocks_of,
    named_halos,
    stack,
)
from .elementwise import masked_before

if TYPE_CHECKING:
    from ..autodiff import Tape
    from ..forward import Branch
    from ..fusion import FusedLayer


def gradient_halo(attributes: Attributes) -> int:
    """Halo that the transposed convolution needs of the output's gradient, the largest over both axes and
    sides.
    """
    stride, padding = attributes["stride"], attributes["padding"]
    halo = 0
    for kernel, size, extent in zip(
        attributes["kernel"],
        (attributes["in_height"], attributes["in_width"]),
        (attributes["out_height"], attributes["out_width"]),
        strict=True,
    ):
        low = -((padding + 1 - kernel) // stride)  # ceil((kernel - 1 - padding) / stride)
        high = (size - 1 + padding) // stride - (extent - 1)
        halo = max(halo, low, high)
    return halo


def algorithm(layer: str, attributes: Attributes, side: str) -> str:
    """The attribute ``algorithm`` of an operator, by which the kernels choose how to make the pixels of its
    result: "sparse" (over the connections), "dense" (over all weights) or "winograd" (the same with
    Winograd's products). What it works in and what it costs follow from this alone.

    Winograd's F(2, 3) makes two pixels of the result from four products instead of six, where three weights
    lie side by side. The kernels (``kernels/winograd.cpp``) can compute it for

    - kernels three positions wide, at stride 1;
    - rows of a multiple of four pixels, because they make two pairs at once;
    - a multiple of 16 images side by side, so that a pixel is whole vectors with every instruction set.

    And it should be done for

    - rows of at least eight pixels: on four, each weight is used too seldom for a third more of them to be
      packed and read;
    - at least eight planes on both sides. A sum that is zero because its weights meet nothing but zeros (a
      few weights at the border of an image, say) comes out as a rounding error, which a ReLU may let pass;
      with several planes no sum has so few weights. And with few planes of the result, bringing the input
      into its form is not shared.

    Args:
        layer: "sparse", or anything else for a layer of which all weights are visited.
        attributes: of the operator, or of another one of its layer.
        side: of whose pixels the result is made: "out_" forwards, "in_" for the gradient of the input; "" for
            the gradient of the weights alone, whose result has no pixels.
    """
    if layer == "sparse":
        return "sparse"
    if not side:
        return "dense"
    a = attributes
    can = a["kernel"][1] == 3 and a["stride"] == 1 and a[f"{side}width"] % 4 == 0 and a["lanes"] % 16 == 0
    should = a[f"{side}width"] >= 8 and min(a["in_channels"], a["out_channels"]) >= 8
    return WINOGRAD if can and should else "dense"


class _Convolutional(Operator):
    products = 1  # sparse-dense products of the layer's size that the operator performs

    def work_bytes(self, node: Node, types: Types) -> int:
        """Packed weights; four numbers for three in Winograd's form."""
        weights = {"sparse": 0, "dense": self.weights(node), WINOGRAD: self.weights(node) // 3 * 4}
        return 4 * weights[node.attributes["algorithm"]]

    def without_work(self, node: Node) -> Node | None:
        """The sparse kernel, which reads connections where they lie."""
        if node.attributes["algorithm"] == "sparse":
            return None
        return replace(node, attributes={**node.attributes, "algorithm": "sparse"})

    @staticmethod
    def weights(node: Node) -> int:
        """Positions of the layer, active or dormant."""
        a = node.attributes
        return int(a["out_channels"] * a["in_channels"] * a["kernel"][0] * a["kernel"][1])

    def kernels(self, node: Node) -> tuple[str, ...]:
        """The kernels that run, of `cost_model.KERNELS` or `cost_model.WINOGRAD`."""
        return (node.attributes["algorithm"],)

    def walks(self, node: Node, types: Types, connections: Connections) -> tuple[Walk, ...]:
        """A gradient with respect to the input is a walk for each phase of the stride; each entry is in one
        of them, and all together they cover as many pixels as the output has."""
        a = node.attributes
        entries = connections(node) if a["algorithm"] == "sparse" else self.weights(node)
        floats = a["out_width"] * a["lanes"]
        run = floats if a["stride"] == 1 else a["lanes"]
        rows = blocks_of(node, types) * a["out_height"]
        return tuple(Walk(kernel, entries, rows, floats, run, a["lanes"]) for kernel in self.kernels(node))

    def flops(self, node: Node, types: Types, connections: Connections) -> int:
        walks = self.walks(node, types, connections)
        return sum(2 * walk.entries * walk.rows * walk.floats for walk in walks)

    def bytes_moved(self, node: Node, types: Types, connections: Connections) -> int:
        """Stacks and masks whole, but of the buffers of all layers only this layer's part: for each product a
        value and its place in the lists, a gradient's sum read and written, unpacked weights likewise."""
        stacks = {name for name in (*node.inputs, *node.outputs) if name and len(types[name].dims) > 1}
        entries = 8 * connections(node) * (2 * self.products - 1)
        return sum(types[name].bytes for name in stacks) + entries + 2 * self.work_bytes(node, types)


class Conv(_Convolutional):
    """act(scale·conv(x) + shift + residual)."""

    inputs = (
        Port("x"),
        Port("value"),
        Port("affine", optional=True),
        Port("residual", optional=True),
        Port("lists", "i32"),
    )
    outputs = (
        Port("y", dims=stack("out_", "out_halo")),
        Port("bits", "u8", optional=True, dims=bits("out_")),
        Port("pre", optional=True, dims=stack("out_", "pre_halo")),
    )
    parameters = True
    keeps = "x"
    repetition = "product"
    takes = frozenset({"norm", "addition", "relu"})
    ort_gradient = (
        OrtNode(
            "ConvGrad",
            ["GO(0)", "I(0)", "I(1)", "I(2)", "", "", "I(1)", "I(2)", "I(4)"],
            ["GI(0)", "GI(1)", "GI(2)"],
        ),
    )

    def lower(self, fused: FusedLayer, sources: list[str], y: str, branch: Branch) -> None:
        layer = fused.layer
        assert isinstance(layer, Convolution)
        kernel = branch.network.kernels[layer.module]
        (x,) = sources
        branch.graph.halos.at_least(x, layer.padding)
        residual = branch.residual(fused)
        if residual:
            branch.graph.halos.equal(residual, y)
        in_channels, in_height, in_width = fused.source_geometry
        out_channels, out_height, out_width = fused.geometry
        affine = branch.affine if fused.slot else ""
        inputs = {"x": x, "value": "coo.value", "affine": affine, "residual": residual, "lists": "coo.lists"}
        attributes: dict[str, Any] = {
            "layer_offset": kernel.offset,
            "in_channels": in_channels,
            "in_height": in_height,
            "in_width": in_width,
            "out_channels": out_channels,
            "out_height": out_height,
            "out_width": out_width,
            "kernel": list(layer.kernel),
            "stride": layer.stride,
            "padding": layer.padding,
            "lanes": branch.lanes,
            "forward_pointer": kernel.forward,
            "transpose_pointer": kernel.transpose,
            "affine": fused.affine,
            "relu": int(fused.relu),
            **named_halos(in_halo=x, out_halo=y),
        }
        attributes["algorithm"] = algorithm(kernel.algorithm, attributes, "out_")
        self.emit(branch.graph, inputs, {"y": y}, attributes)

    def differentiate(self, node: Node, dy: str, tape: Tape) -> None:
        x, affine, residual = (self.read(node, port) for port in ("x", "affine", "residual"))
        if residual:
            tape.pass_on(residual, dy)
        attributes = {**node.attributes, "relu": 0, **named_halos(dy_halo=dy)}
        dx = tape.no_contribution
        if tape.needs(x):
            tape.graph.halos.at_least(dy, gradient_halo(attributes))
            dx = tape.absorb(x)
        attributes |= {**named_halos(dx_halo=dx.tensor), **dx.mask.attributes}
        attributes["algorithm"] = algorithm(attributes["algorithm"], attributes, "in_" if dx.tensor else "")
        inputs = {port: self.read(node, port) for port in ("value", "affine", "lists")}
        inputs |= {"dy": dy, **dx.inputs}
        if tape.gradients:
            affine_grad, affine_out = tape.gradients.step_affine() if affine else ("", "")
            coo_grad, coo_out = tape.gradients.step_coo()
            inputs |= {"x": x, "coo_grad": coo_grad, "affine_grad": affine_grad}
            outputs = {"dx": dx.tensor, "coo_grad_out": coo_out, "affine_grad_out": affine_out}
            ConvGrad.emit(tape.graph, inputs, outputs, attributes)
        elif dx.tensor:
            ConvInputGrad.emit(tape.graph, inputs, {"dx": dx.tensor}, attributes)

    def plain(self, layer: Layer) -> Plain:
        assert isinstance(layer, Convolution)
        if len(layer.shape) == 1:
            return Plain("Gemm", attributes={"transB": 1})
        geometry = {"kernel_shape": list(layer.kernel), "strides": [layer.stride] * 2}
        return Plain("Conv", attributes={**geometry, "pads": [layer.padding] * 4})


class ConvInputGrad(_Convolutional, Gradient):
    """mask∘(convᵀ(scale·dy) + addend)."""

    inputs = (
        Port("dy"),
        Port("value"),
        Port("affine", optional=True),
        *SUM_AND_MASK,
        Port("lists", "i32"),
    )
    outputs = (Port("dx", dims=stack("in_", "dx_halo")),)


class ConvGrad(_Convolutional, Gradient):
    """ConvInputGrad, and the gradients of values, scale and shift, accumulated in place."""

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
    products = 2

    def kernels(self, node: Node) -> tuple[str, ...]:
        """To the input, with the attribute's kernel, and to the values."""
        kernel = node.attributes["algorithm"]
        to_values = "sparse_gradient" if kernel == "sparse" else "dense_gradient"
        return (kernel, to_values) if node.outputs[0] else (to_values,)

    def complete(self, forward: Attributes, instance: str) -> Completion:
        found = masked_before(forward, "out_", max(gradient_halo(forward), 0), spare=False)
        found.attributes["algorithm"] = algorithm(forward["algorithm"].decode(), forward, "in_")
        return found
