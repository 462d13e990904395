"""Folding batch norm and biases into a scale and a shift for each channel, and its gradient."""

from __future__ import annotations

from ..nodes import Node
from .base import SCALE_AND_SHIFT, Operator, OrtNode, Port, Types, same_as_input


def _slots(node: Node, types: Types) -> tuple[int, ...]:
    return (2 * sum(node.attributes["entries"][1::6]),)


class FoldAffine(Operator):
    """Dense parameters and statistics → scale and shift of every slot."""

    half = True
    inputs = (Port("dense"), Port("mean"), Port("variance"))
    outputs = (Port("affine", dims=_slots),)
    category = SCALE_AND_SHIFT
    early = True
    ort_gradient = (OrtNode("FoldAffineGrad", ["GO(0)", "I(0)", "I(1)", "I(2)", "I(0)"], ["GI(0)"]),)


class FoldAffineGrad(Operator):
    """Gradient of scale and shift → gradient of the dense parameters that are trained, accumulated."""

    inputs = (Port("affine_grad"), Port("dense"), Port("mean"), Port("variance"), Port("dense_grad"))
    outputs = (Port("dense_grad_out", shares="dense_grad"),)


class ZeroAffine(Operator):
    """Zeros of the shape of its input: where the scale and shift gradient is accumulated."""

    inputs = (Port("affine"),)
    outputs = (Port("affine_grad", dims=same_as_input(0)),)
    category = SCALE_AND_SHIFT
    early = True
