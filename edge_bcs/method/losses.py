"""The training objectives, per sample; p(x) is the softmax of the logits at x, x̃ the adversarial image.

- natural: CE(x).
- at: CE(x̃) (Madry et al., 2018).
- mixed: CE(x̃) in the first half of the batch, CE(x) in the second (Kurakin et al., 2017).
- trades: CE(x) + β·KL(p(x) ‖ p(x̃)) (Zhang et al., 2019).
- rst: as trades, on labelled and pseudo-labelled data (Carmon et al., 2019).
- mart: CE(x̃) − log(1.0001 − max_{j≠y} p_j(x̃) + 1e-12) + β·KL(p(x) ‖ p(x̃))·(1.0000001 − p_y(x))
  (Wang et al., 2020).

Where two networks' outputs meet (TRADES, MART), gradients flow through both. A batch's loss is Σ
weight·loss; with weights 1/batch it is the mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from edge_bcs.core.errors import EdgeBcsError


@dataclass(frozen=True)
class Objective:
    """What an objective needs of attack and data.

    Attributes:
        name: as in the list above.
        attack_start: "uniform" in ±ε, "gaussian" (0.001·N(0, 1)), or None: not attacked.
        attack_loss: what PGD increases, "cross_entropy" with the label or "kl" from p(x).
        two_branches: whether x and x̃ both go through the network, in two passes.
        beta: default weight of the second term; 0 where there is none.
        adversarial_part: how much of the batch is attacked, counted from its beginning.
    """

    name: str
    attack_start: str | None
    attack_loss: str
    two_branches: bool
    beta: float
    adversarial_part: float


OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        Objective("natural", None, "cross_entropy", False, 0.0, 0.0),
        Objective("at", "uniform", "cross_entropy", False, 0.0, 1.0),
        Objective("mixed", "uniform", "cross_entropy", False, 0.0, 0.5),
        Objective("trades", "gaussian", "kl", True, 6.0, 1.0),
        Objective("rst", "gaussian", "kl", True, 6.0, 1.0),
        Objective("mart", "gaussian", "cross_entropy", True, 4.0, 1.0),
    )
}


def get(name: str) -> Objective:
    """Return the objective of that name, or raise `EdgeBcsError`."""
    if name not in OBJECTIVES:
        raise EdgeBcsError(f"there is no objective {name!r}; choose one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return −log p_y per sample, f32[n], of logits f32 [n, K] and labels i64[n]."""
    return functional.cross_entropy(logits, labels, reduction="none")


def kl(clean: Tensor, adversarial: Tensor) -> Tensor:
    """Return KL(p(x) ‖ p(x̃)) per sample, f32[n], of the two logits f32 [n, K]."""
    log_clean, log_adversarial = clean.log_softmax(1), adversarial.log_softmax(1)
    return (log_clean.exp() * (log_clean - log_adversarial)).sum(1)


def trades(clean: Tensor, adversarial: Tensor, labels: Tensor, beta: float = 6.0) -> Tensor:
    """Return CE(x) + β·KL(p(x) ‖ p(x̃)) per sample, f32[n]."""
    return cross_entropy(clean, labels) + beta * kl(clean, adversarial)


def mart(clean: Tensor, adversarial: Tensor, labels: Tensor, beta: float = 4.0) -> Tensor:
    """Return MART's loss per sample, f32[n] (the formula in the list above)."""
    column = labels.unsqueeze(1)
    probability = adversarial.softmax(1)
    wrong = probability.scatter(1, column, -1.0).amax(1)
    boosted = cross_entropy(adversarial, labels) - torch.log(1.0001 - wrong + 1e-12)
    certainty = clean.softmax(1).gather(1, column).squeeze(1)
    return boosted + beta * kl(clean, adversarial) * (1.0000001 - certainty)


def per_sample(
    objective: str | Objective,
    labels: Tensor,
    logits: Tensor,
    adversarial: Tensor | None = None,
    beta: float | None = None,
) -> Tensor:
    """Return an objective's loss per sample, f32[n].

    Args:
        objective: its name or description.
        labels: i64[n].
        logits: f32 [n, K]; for two branches those of the clean images, else those of the images as
            assembled (clean, adversarial, or half and half).
        adversarial: f32 [n, K], the logits of the adversarial images; two branches only.
        beta: weight of the second term; the objective's default if None.
    """
    objective = get(objective) if isinstance(objective, str) else objective
    if not objective.two_branches:
        return cross_entropy(logits, labels)
    if adversarial is None:
        raise EdgeBcsError(f"{objective.name} needs the logits of clean and of adversarial images")
    loss = mart if objective.name == "mart" else trades
    return loss(logits, adversarial, labels, objective.beta if beta is None else beta)


def weighted(losses: Tensor, sample_weight: Tensor | None = None) -> Tensor:
    """Return Σ weight·loss, f32[]; weights f32[n], all 1/n if None. A sample of weight 0 is left out."""
    if sample_weight is None:
        return losses.mean()
    return torch.where(sample_weight > 0, losses * sample_weight, 0.0).sum()
