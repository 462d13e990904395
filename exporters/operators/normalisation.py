# ruff: noqa: D102 (the methods of all operators are described once, in the base class)
"""Normalisation by the statistics of the micro-batch, and its gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..layers import BatchNorm as BatchNormLayer
from ..layers import Layer
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
    takes = frozenset({"addition", "relu"})
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
            "relu": int(fused.relu),
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
        attributes = {**node.attributes, "relu": 0, **halos, **dz.mask.attributes}
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
