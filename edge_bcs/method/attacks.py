"""Attacks inside the l∞ ball of radius ε, on images in [0, 1]: FGSM and PGD (Madry et al., 2018).

The network is put in evaluation mode for the attack and left as it was found, so an attack never moves
batch-norm statistics (paper, section 4; Algorithm 1, lines 8-13).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from edge_bcs.core import random
from edge_bcs.core.answers import NO_ANSWER
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.settings import Crafting
from edge_bcs.method import device_random
from edge_bcs.method.losses import cross_entropy, kl

Model = Callable[[Tensor], Tensor]


@contextmanager
def evaluation_mode(model: Model, but: Collection[nn.Module] = ()) -> Iterator[None]:
    """Put every submodule of a torch module in evaluation mode, and each back as it was on leaving.

    Those of `but` are in training mode, without what is inside them. Batch norms among them take the
    statistics of their batch, and a dropout or a stochastic depth is the identity as ever: that is what an
    artifact computes.
    """
    modes = [(part, part.training) for part in model.modules()] if isinstance(model, nn.Module) else []
    training = set(but)
    for part, _ in modes:
        part.training = part in training
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def start(
    kind: str,
    shape: tuple[int, ...],
    epsilon: float,
    *,
    seed: int,
    step: int | Tensor,
    purpose: int = random.PGD_START,
    first: int = 0,
    device: torch.device | None = None,
) -> Tensor:
    """Return a random perturbation f32 `shape`; its t-th element, row-major, comes from draw first + t.

    "uniform": (2u − 1)·ε with u uniform in [0, 1); "gaussian": 0.001·N(0, 1).
    """
    count, device = math.prod(shape), device or torch.device("cpu")
    if kind == "uniform":
        drawn = device_random.uniform(
            count, seed=seed, step=step, purpose=purpose, start=first, device=device
        )
        return drawn.mul_(2).sub_(1).mul_(epsilon).view(shape)
    if kind == "gaussian":
        drawn = device_random.normal(count, seed=seed, step=step, purpose=purpose, start=first, device=device)
        return drawn.mul_(0.001).view(shape)
    raise EdgeBcsError(f"there is no attack start {kind!r}; choose uniform or gaussian")


def _check(epsilon: float, steps: int, loss: str, labels: Tensor | None) -> None:
    if not epsilon >= 0:
        raise EdgeBcsError(f"epsilon must not be negative, and is {epsilon}")
    if steps < 1:
        raise EdgeBcsError(f"an attack needs at least 1 step, not {steps}")
    if loss not in ("cross_entropy", "kl"):
        raise EdgeBcsError(f"there is no attack loss {loss!r}; choose cross_entropy or kl")
    if loss == "cross_entropy" and labels is None:
        raise EdgeBcsError("an attack on the cross-entropy needs labels")


def answers_of(logits: Tensor) -> Tensor:
    """Return the classes i64[n] that logits f32 [n, K] answer, as `edge_bcs.core.answers.answers_of` does."""
    largest, answers = logits.max(dim=1)
    return torch.where(largest.isfinite(), answers, NO_ANSWER)


def input_gradient(model: Model, x: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ∇ₓ Σ loss(model(x)), with the shape of x; the gradients of parameters are left alone."""
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        return torch.autograd.grad(loss(model(x)).sum(), x)[0]


def project(adversarial: Tensor, x: Tensor, epsilon: float) -> Tensor:
    """Return the images clipped to [x − ε, x + ε], then to [0, 1]."""
    return torch.minimum(torch.maximum(adversarial, x - epsilon), x + epsilon).clamp(0, 1)


def pgd(
    model: Model,
    x: Tensor,
    labels: Tensor | None = None,
    *,
    epsilon: float = 8 / 255,
    step_size: float = 2 / 255,
    steps: int = 10,
    loss: str = "cross_entropy",
    perturbation: Tensor | None = None,
) -> Tensor:
    """Return adversarial images f32 [n, C, H, W] after `steps` steps of projected sign-gradient ascent.

    x̃ ← Π(x̃ + step_size·sign(∇ L)), with sign(0) = 0. The result is a function of the arguments alone.

    Args:
        model: maps images to logits f32 [n, K]; a torch module is attacked in evaluation mode.
        x: clean images, f32 [n, C, H, W] in [0, 1].
        labels: i64[n], for the cross-entropy.
        epsilon: radius of the l∞ ball, in units of x.
        step_size: in units of x.
        steps: gradient steps, at least 1.
        loss: "cross_entropy" with the label, or "kl" for KL(p(x) ‖ p(x̃)) (TRADES, RST).
        perturbation: where to start, added to x and clipped to [0, 1]; see `start`. Zero if None.
    """
    _check(epsilon, steps, loss, labels)
    with evaluation_mode(model):
        ascend = _attack_loss(model, x, loss, labels)
        adversarial = x.detach() if perturbation is None else (x + perturbation).clamp(0, 1)
        for _ in range(steps):
            gradient = input_gradient(model, adversarial, ascend)
            adversarial = project(adversarial + step_size * gradient.sign(), x, epsilon)
    return adversarial.detach()


def crafted(
    model: Model,
    x: Tensor,
    labels: Tensor,
    how: Crafting,
    *,
    loss: str = "cross_entropy",
    seed: int,
    step: int | Tensor,
    purpose: int = random.PGD_START,
    first: int = 0,
) -> Tensor:
    """Return the images f32 [n, C, H, W] that a training or a measurement attacks, attacked.

    Args:
        model, x, labels, loss: as of `pgd`.
        how: start, radius and steps.
        seed, step, purpose, first: of the start, see `start`.
    """
    perturbation = None
    if how.start != "none":
        perturbation = start(
            how.start,
            tuple(x.shape),
            how.noise,
            seed=seed,
            step=step,
            purpose=purpose,
            first=first,
            device=x.device,
        )
    return pgd(
        model,
        x,
        labels,
        epsilon=how.radius,
        step_size=how.step_size,
        steps=how.steps,
        loss=loss,
        perturbation=perturbation,
    )


def fgsm(model: Model, x: Tensor, labels: Tensor, *, epsilon: float = 8 / 255) -> Tensor:
    """Return x + ε·sign(∇ₓ CE) clipped to [0, 1] (Goodfellow et al., 2015): PGD of one step of size ε."""
    return pgd(model, x, labels, epsilon=epsilon, step_size=epsilon, steps=1)


def _attack_loss(model: Model, x: Tensor, loss: str, labels: Tensor | None) -> Callable[[Tensor], Tensor]:
    if loss == "kl":
        with torch.no_grad():
            clean = model(x)
        return lambda logits: kl(clean, logits)
    assert labels is not None
    known = labels
    return lambda logits: cross_entropy(logits, known)


def pgd_restarts(
    model: Model,
    x: Tensor,
    labels: Tensor,
    *,
    restarts: int,
    epsilon: float = 8 / 255,
    step_size: float = 2.5 * (8 / 255) / 50,
    steps: int = 50,
    seed: int = 0,
    batch: int = 0,
) -> Tensor:
    """Return the adversarial images of the best of `restarts` PGD runs from different uniform starts.

    An image counts as robust only if no run fools the network; an image once fooled is not attacked again,
    and the others keep the image of highest loss. Restart r of batch b starts from draws of the purpose
    EVALUATION at step b·2³² + r.

    Raises:
        EdgeBcsError: fewer than 1 restart, and what `pgd` refuses.
    """
    if restarts < 1:
        raise EdgeBcsError(f"an attack needs at least 1 start, not {restarts}")
    best = x.clone()
    with evaluation_mode(model), torch.no_grad():
        logits = model(x)
        fooled = answers_of(logits) != labels
        highest = torch.full_like(logits[:, 0], -torch.inf)
        for restart in range(restarts):
            left = (~fooled).nonzero().squeeze(1)
            if not len(left):
                break
            perturbation = start(
                "uniform",
                tuple(x.shape),
                epsilon,
                seed=seed,
                step=(batch << 32) + restart,
                purpose=random.EVALUATION,
                device=x.device,
            )[left]
            adversarial = pgd(
                model,
                x[left],
                labels[left],
                epsilon=epsilon,
                step_size=step_size,
                steps=steps,
                perturbation=perturbation,
            )
            logits = model(adversarial)
            losses = cross_entropy(logits, labels[left])
            won = answers_of(logits) != labels[left]
            better = won | (losses > highest[left])
            best[left[better]] = adversarial[better]
            highest[left] = torch.maximum(highest[left], losses)
            fooled[left] = won
    return best
