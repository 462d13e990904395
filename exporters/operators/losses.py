"""Losses with the gradients of their logits, where the backward pass begins."""

from __future__ import annotations

from .base import GRADIENTS_IN_FLIGHT, Operator, OrtNode, Port, fixed, same_as_input


class CrossEntropy(Operator):
    """Weighted cross-entropy of one branch."""

    inputs = (Port("logits"), Port("labels", "i64"), Port("sample_weight"))
    outputs = (
        Port("loss", dims=fixed()),
        Port("dlogits", dims=same_as_input(0)),
        Port("correct", dims=fixed(1)),
    )
    category = GRADIENTS_IN_FLIGHT
    ort_gradient = (OrtNode("onnx:Mul", ["GO(0)", "O(1)"], ["GI(0)"]),)


class _TwoBranchLoss(Operator):
    inputs = (Port("clean"), Port("adversarial"), Port("labels", "i64"), Port("sample_weight"))
    outputs = (
        Port("loss", dims=fixed()),
        Port("dclean", dims=same_as_input(0)),
        Port("dadversarial", dims=same_as_input(1)),
        Port("correct", dims=fixed(2)),
    )
    category = GRADIENTS_IN_FLIGHT
    ort_gradient = tuple(OrtNode("onnx:Mul", ["GO(0)", f"O({i + 1})"], [f"GI({i})"]) for i in (0, 1))


class Trades(_TwoBranchLoss):
    """CE(clean) + β·KL(clean ‖ adversarial); the second alone where the label is −1, which is none."""


class Mart(_TwoBranchLoss):
    """BCE(adversarial) + β·KL(clean ‖ adversarial)·(1 − p_y(clean))."""


LOSSES: dict[str, type[Operator]] = {"cross_entropy": CrossEntropy, "trades": Trades, "mart": Mart}
"""`Objective.loss` → its operator."""


class SoftmaxDifference(Operator):
    """softmax(logits) − target [n, K]: where the attack's backward pass begins."""

    half = True
    inputs = (Port("logits"), Port("target"))
    outputs = (Port("dlogits", dims=same_as_input(0)),)
    category = GRADIENTS_IN_FLIGHT
