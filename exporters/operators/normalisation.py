# ruff: noqa: D102 (the methods of all operators are described once, in the base class)
"""Normalisation by the statistics of the micro-batch, or of each image by itself, and its gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..activations import unactivated
from ..layers import BatchNorm as BatchNormLayer
from ..layers import GroupNorm as GroupNormLayer
from ..layers import Layer
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
    blocks_of,
    named_halos,
    stack,
)
from .elementwise import masked_before

if TYPE_CHECKING:
    from ..autodiff import Tape
    from ..forward import Branch
    from ..fusion import FusedLayer


def _saved(node: Node, types: Types) -> tuple[int, ...]:
    return (2 * node.attributes["channels"],)


class BatchNorm(Operator):
    """act(normalised z·scale + shift + residual); ``saved`` [2C] holds the means and inverse deviations."""

    inputs = (
        Port("z"),
        Port("affine"),
        Port("sample_weight"),
        Port("mean"),
        Port("variance"),
        Port("residual", optional=True),
    )
    outputs = (
        Port("y", dims=stack("", "out_halo")),
        Port("saved", optional=True, dims=_saved, for_backward=True),
        Port("mean_out", optional=True, shares="mean"),
        Port("variance_out", optional=True, shares="variance"),
        Port("bits", "u8", optional=True, dims=bits("")),
        Port("pre", optional=True, dims=stack("", "pre_halo")),
    )
    parameters = True
    keeps = "z"
    repetition = "pass"
    takes = frozenset({"addition", "activation"})
    ort_gradient = (
        OrtNode(
            "BatchNormGrad",
            ["GO(0)", "I(0)", "I(1)", "O(1)", "I(2)", "", "", "I(1)"],
            ["GI(0)", "GI(1)"],
        ),
    )

    def bytes_moved(self, node: Node, types: Types, connections: Connections) -> int:
        """The input is read three times: for the mean, for the variance, and to be normalised."""
        return super().bytes_moved(node, types, connections) + 2 * types[node.inputs[0]].bytes

    def lower(self, fused: FusedLayer, sources: list[str], y: str, branch: Branch) -> None:
        layer = fused.layer
        assert isinstance(layer, BatchNormLayer)
        residual = branch.residual(fused)
        mean, variance = branch.statistics
        running = [branch.graph.unique(f"{name}.running") for name in ("mean", "variance")]
        attributes = {
            **branch.map(fused),
            "affine": fused.affine,
            "statistics": branch.network.statistics[layer.module].offset,
            **fused.activation,
            "momentum": float(layer.momentum),
            "epsilon": float(layer.epsilon),
            "update": int(branch.update),
            **named_halos(in_halo=sources[0], out_halo=y, residual_halo=residual),
        }
        inputs = {"z": sources[0], "affine": branch.affine, "sample_weight": "sample_weight"}
        inputs |= {"mean": mean, "variance": variance, "residual": residual}
        outputs = {"y": y, "mean_out": running[0], "variance_out": running[1]}
        self.emit(branch.graph, inputs, outputs, attributes)
        branch.statistics[:] = running

    def differentiate(self, node: Node, dy: str, tape: Tape) -> None:
        z, residual = self.read(node, "z"), self.read(node, "residual")
        if residual:
            tape.pass_on(residual, dy)
        # The scale's gradient is needed even where nobody reads the input's.
        dz = tape.absorb(z) if tape.needs(z) else tape.unread(z)
        halos = named_halos(dy_halo=dy, dx_halo=dz.tensor)
        attributes = {**unactivated(node.attributes), **halos, **dz.mask.attributes}
        assert tape.gradients is not None, "the statistics of a batch are those of training"
        affine_grad, out = tape.gradients.step_affine()
        inputs = {port: self.read(node, port) for port in ("z", "affine", "sample_weight")}
        inputs |= {"dy": dy, "affine_grad": affine_grad, **tape.saved(node), **dz.inputs}
        BatchNormGrad.emit(tape.graph, inputs, {"dz": dz.tensor, "affine_grad_out": out}, attributes)

    def repeated(
        self, node: Node, inputs: list[str], statistics: list[str]
    ) -> tuple[list[str], dict[str, Any]]:
        """The running averages stay as they are by now."""
        inputs = [*inputs[: self.input("mean")], *statistics, *inputs[self.input("residual") :]]
        return inputs, {**node.attributes, "update": 0}

    def running_statistics(self, node: Node) -> list[str]:
        return node.outputs[2:4] if node.outputs[2] else []

    def plain(self, layer: Layer) -> Plain:
        assert isinstance(layer, BatchNormLayer)
        return Plain("BatchNormalization", attributes={"epsilon": layer.epsilon})


class BatchNormGrad(Gradient):
    """The gradient through the batch's statistics, with addend and mask; that of scale and shift, summed."""

    inputs = (
        Port("dy"),
        Port("z"),
        Port("affine"),
        Port("saved"),
        Port("sample_weight"),
        *SUM_AND_MASK,
        Port("affine_grad"),
    )
    outputs = (Port("dz", dims=stack("", "dx_halo")), Port("affine_grad_out", shares="affine_grad"))

    def bytes_moved(self, node: Node, types: Types, connections: Connections) -> int:
        """dy and z are read twice: for the sums, and for the gradient."""
        again = types[node.inputs[0]].bytes + types[node.inputs[1]].bytes
        return super().bytes_moved(node, types, connections) + again

    def complete(self, forward: Attributes, instance: str) -> Completion:
        return masked_before(forward, "", forward["out_halo"])


# Norms of each image by itself


def _of_groups(node: Node, types: Types) -> tuple[int, ...]:
    a = node.attributes
    return blocks_of(node, types), a["groups"], 2, a["lanes"]


def _of_pixels(node: Node, types: Types) -> tuple[int, ...]:
    a = node.attributes
    return blocks_of(node, types), a["height"], 2, a["width"] * a["lanes"]


class _Norm(Operator):
    inputs = (Port("x"), Port("affine"))
    parameters = True
    keeps = "x"
    repetition = "pass"
    gradient: ClassVar[type[Operator]]

    def learns(self, node: Node, learned: Learned) -> bool:
        """A norm may have neither scale nor shift of its own."""
        return node.attributes["affine"] in learned.slots

    def lower(self, fused: FusedLayer, sources: list[str], y: str, branch: Branch) -> None:
        layer = fused.layer
        assert isinstance(layer, GroupNormLayer)
        attributes = {
            **branch.map(fused),
            "affine": fused.affine,
            "epsilon": float(layer.epsilon),
            **fused.activation,
            **named_halos(in_halo=sources[0], out_halo=y),
        }
        if not layer.per_pixel:
            attributes["groups"] = layer.groups
        self.emit(branch.graph, {"x": sources[0], "affine": branch.affine}, {"y": y}, attributes)

    def differentiate(self, node: Node, dy: str, tape: Tape) -> None:
        x, learned = self.read(node, "x"), tape.learns(node)
        if not (learned or tape.needs(x)):
            return
        dx = tape.absorb(x) if tape.needs(x) else tape.unread(x)
        halos = named_halos(dy_halo=dy, dx_halo=dx.tensor)
        attributes = {**unactivated(node.attributes), **halos, **dx.mask.attributes}
        inputs = {"dy": dy, "x": x, "affine": self.read(node, "affine"), **tape.saved(node), **dx.inputs}
        outputs = {"dx": dx.tensor}
        if tape.gradients and learned:
            inputs["affine_grad"], outputs["affine_grad_out"] = tape.gradients.step_affine()
        self.gradient.emit(tape.graph, inputs, outputs, attributes)

    def affine(self, layer: GroupNormLayer) -> list[Plain]:
        """Nodes that apply scale and shift."""
        shape = (layer.shape[0], *[1] * (len(layer.shape) - 1))
        parts = {"weight": "Mul", "bias": "Add"}
        return [
            Plain(operator, {part: Parameter(f"{layer.module}.{part}", shape)})
            for part, operator in parts.items()
            if layer.module
        ]


_NORM_GRADIENT = (
    *(Port("dy"), Port("x"), Port("affine"), Port("saved")),
    *SUM_AND_MASK,
    Port("affine_grad", optional=True),
)


class _NormGrad(Gradient):
    inputs = _NORM_GRADIENT
    outputs = (
        Port("dx", dims=stack("", "dx_halo")),
        Port("affine_grad_out", optional=True, shares="affine_grad"),
    )

    def bytes_moved(self, node: Node, types: Types, connections: Connections) -> int:
        """dy and x are read twice: for the sums, and for the gradient."""
        again = types[node.inputs[0]].bytes + types[node.inputs[1]].bytes
        return super().bytes_moved(node, types, connections) + again

    def complete(self, forward: Attributes, instance: str) -> Completion:
        return masked_before(forward, "", forward["out_halo"])


class GroupNormGrad(_NormGrad):
    """The gradient through the statistics of each group, with addend and mask; that of scale and shift."""

    def work_bytes(self, node: Node, types: Types) -> int:
        """Two sums in double for each image of each channel and of each group."""
        a = node.attributes
        return 16 * blocks_of(node, types) * int(a["lanes"] * (a["channels"] + a["groups"]))


class GroupNorm(_Norm):
    """act(normalised x·scale + shift), by the statistics of groups of channels; ``saved`` holds means and
    inverse deviations."""

    outputs = (
        Port("y", dims=stack("", "out_halo")),
        Port("saved", optional=True, dims=_of_groups, for_backward=True),
        Port("bits", "u8", optional=True, dims=bits("")),
        Port("pre", optional=True, dims=stack("", "pre_halo")),
    )
    takes = frozenset({"activation"})
    gradient = GroupNormGrad
    ort_gradient = (
        OrtNode("GroupNormGrad", ["GO(0)", "I(0)", "I(1)", "O(1)", "", "", "I(1)"], ["GI(0)", "GI(1)"]),
    )

    def work_bytes(self, node: Node, types: Types) -> int:
        """Two sums in double for each channel of each image."""
        a = node.attributes
        return 16 * blocks_of(node, types) * int(a["channels"] * a["lanes"])

    def bytes_moved(self, node: Node, types: Types, connections: Connections) -> int:
        """The input is read twice: for the statistics, and to be normalised."""
        return super().bytes_moved(node, types, connections) + types[node.inputs[0]].bytes

    def plain(self, layer: Layer) -> list[Plain]:
        """Opset 17 has no group norm; an instance norm of the groups, each as one channel, is the same."""
        assert isinstance(layer, GroupNormLayer)
        ones, zeros = np.ones(layer.groups), np.zeros(layer.groups)
        return [
            Plain("Reshape", {"groups": np.array([0, layer.groups, -1], np.int64)}),
            Plain("InstanceNormalization", {"ones": ones, "zeros": zeros}, {"epsilon": layer.epsilon}),
            Plain("Reshape", {"map": np.array([0, *layer.shape], np.int64)}),
            *self.affine(layer),
        ]


_PARTS = 16  # of LayerNormGrad::most_parts


class LayerNormGrad(_NormGrad):
    """The gradient through the statistics of each pixel, with addend and mask; that of scale and shift."""

    def work_bytes(self, node: Node, types: Types) -> int:
        """The gradients of scale and shift in double, in parts of some rows each."""
        a = node.attributes
        parts = min(_PARTS, blocks_of(node, types) * a["height"])
        return 16 * parts * int(a["channels"]) if self.read(node, "affine_grad") else 0


class LayerNorm(_Norm):
    """Normalised x·scale + shift, by the statistics of the channels of each pixel."""

    outputs = (
        Port("y", dims=stack("", "out_halo")),
        Port("saved", optional=True, dims=_of_pixels, for_backward=True),
    )
    gradient = LayerNormGrad
    ort_gradient = (
        OrtNode("LayerNormGrad", ["GO(0)", "I(0)", "I(1)", "O(1)", "", "", "I(1)"], ["GI(0)", "GI(1)"]),
    )

    def plain(self, layer: Layer) -> list[Plain]:
        """With the channels last."""
        assert isinstance(layer, GroupNormLayer)
        return [
            Plain("Transpose", attributes={"perm": [0, 2, 3, 1]}),
            Plain(
                "LayerNormalization",
                {"ones": np.ones(layer.shape[0])},
                {"axis": -1, "epsilon": layer.epsilon},
            ),
            Plain("Transpose", attributes={"perm": [0, 3, 1, 2]}),
            *self.affine(layer),
        ]
