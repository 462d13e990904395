"""The losses of the training objectives in torch, per sample (`edge_bcs.core.objectives` lists them).

Where two networks' outputs meet (TRADES, MART), gradients flow through both. A batch's loss is Σ
weight·loss; with weights 1/batch it is the mean.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.objectives import NO_LABEL, Objective


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return −log p_y per sample, f32[n], of logits f32 [n, K] and labels i64[n]."""
    return functional.cross_entropy(logits, labels, reduction="none")


def kl(clean: Tensor, adversarial: Tensor) -> Tensor:
    """Return KL(p(x) ‖ p(x̃)) per sample, f32[n], of the two logits f32 [n, K]."""
    log_clean, log_adversarial = clean.log_softmax(1), adversarial.log_softmax(1)
    return (log_clean.exp() * (log_clean - log_adversarial)).sum(1)


def trades(clean: Tensor, adversarial: Tensor, labels: Tensor, beta: float = 6.0) -> Tensor:
    """Return CE(x) + β·KL(p(x) ‖ p(x̃)) per sample, f32[n]; without CE(x) where the label is `NO_LABEL`."""
    first = functional.cross_entropy(clean, labels, ignore_index=NO_LABEL, reduction="none")
    return first + beta * kl(clean, adversarial)


def mart(clean: Tensor, adversarial: Tensor, labels: Tensor, beta: float = 4.0) -> Tensor:
    """Return MART's loss per sample, f32[n] (the formula in `edge_bcs.core.objectives`)."""
    column = labels.unsqueeze(1)
    probability = adversarial.softmax(1)
    wrong = probability.scatter(1, column, -1.0).amax(1)
    boosted = cross_entropy(adversarial, labels) - torch.log(1.0001 - wrong + 1e-12)
    certainty = clean.softmax(1).gather(1, column).squeeze(1)
    return boosted + beta * kl(clean, adversarial) * (1.0000001 - certainty)


def per_sample(
    objective: Objective,
    labels: Tensor,
    logits: Tensor,
    adversarial: Tensor | None = None,
    beta: float | None = None,
) -> Tensor:
    """Return an objective's loss per sample, f32[n].

    Args:
        objective: what it is.
        labels: i64[n].
        logits: f32 [n, K]; for two branches those of the clean images, else those of the images as
            assembled (clean, adversarial, or half and half).
        adversarial: f32 [n, K], the logits of the adversarial images; two branches only.
        beta: weight of the second term; the objective's default if None.
    """
    if not objective.two_branches:
        return cross_entropy(logits, labels)
    if adversarial is None:
        raise EdgeBcsError(f"{objective.name} needs the logits of clean and of adversarial images")
    return _OF_TWO_BRANCHES[objective.loss](
        logits, adversarial, labels, objective.beta if beta is None else beta
    )


_OF_TWO_BRANCHES = {"trades": trades, "mart": mart}


def weighted(losses: Tensor, sample_weight: Tensor | None = None) -> Tensor:
    """Return Σ weight·loss, f32[]; weights f32[n], all 1/n if None. A sample of weight 0 is left out."""
    if sample_weight is None:
        return losses.mean()
    return torch.where(sample_weight > 0, losses * sample_weight, 0.0).sum()
