"""What a network answers, clean and under attack, measured by an engine's graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from edge_bcs.runtime.attack import descend
from edge_bcs.runtime.checks import NotFiniteError, check_batch, in_data
from edge_bcs.runtime.engine import Engine

from edge_bcs.core import random
from edge_bcs.core.answers import NO_ANSWER, Batch, OnAnswers, answers_of, without_answer
from edge_bcs.core.collapse import WATCHED_STEPS
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.settings import Attack, Crafting, descent
from edge_bcs.data.dataset import Data

Array = np.ndarray[Any, Any]


def logits(engine: Engine, x: Array) -> Array:
    """Return the logits f32 [n, classes] of images f32 [n, C, H, W] that are checked."""
    size, arrays = engine.artifact.attack_micro_batch, engine.arrays
    result = np.empty((len(x), engine.artifact.num_classes), np.float32)
    for first in range(0, len(x), size):
        part = x[first : first + size]
        engine.load(part, np.zeros(len(part), np.int64), 0.0)
        engine.run("eval")
        result[first : first + size] = arrays["logits"][: len(part)]
    return result


def measure(
    engine: Engine,
    data: Data,
    *,
    attack: str,
    attack_steps: int,
    limit: int | None,
    restarts: int,
    epsilon: float | None,
    seed: int,
    on_batch: Callable[[int, int], None] | None,
    on_answers: OnAnswers | None = None,
) -> dict[str, Any]:
    """Clean and robust accuracy on ``data``, whose shape and classes are checked; see `Trainer.evaluate`."""
    if attack not in ("pgd", "fgsm"):
        raise EdgeBcsError(f"the board evaluates with pgd or fgsm, not {attack!r}.")
    if attack == "fgsm":
        attack_steps, restarts = min(attack_steps, 1), 1
    if attack_steps < 0 or restarts < 1 or (limit is not None and limit < 1):
        raise EdgeBcsError("attack steps must be at least 0, restarts and limit at least 1.")
    radius = engine.artifact.objective.attack.epsilon if epsilon is None else epsilon
    if not 0 <= radius <= 1:
        raise EdgeBcsError(f"epsilon must lie in [0, 1], not {radius}.")
    order = data.order(0, 0, shuffle=limit is not None)[:limit]

    how = Crafting("none", 0.0, radius, radius, 1) if attack == "fgsm" else descent(radius, attack_steps)

    def perturb(restart: int, first: int) -> None:
        noise = (restart, random.EVALUATION, first)
        descend(engine, how, loss="cross_entropy", seed=seed, noise=noise)

    perturbations = [partial(perturb, restart) for restart in range(restarts)] if attack_steps else []
    clean, robust, lost = _right_answers(engine, data, order, perturbations, on_batch, on_answers)
    metrics: dict[str, Any] = {"accuracy": clean / len(order), "samples": len(order)}
    if attack_steps:
        metrics |= {
            "robust_accuracy": robust / len(order),
            "attack_steps": attack_steps,
            "restarts": restarts,
        }
    if lost:
        metrics["warnings"] = without_answer(lost, len(order))
    return metrics


def watch(
    engine: Engine, data: Data, attack: Attack, *, seed: int, on_batch: Callable[[int, int], None] | None
) -> tuple[float, float]:
    """Return which shares of ``data``, whose shape and classes are checked, are right under ``attack``, as a
    training crafts its images, and under PGD (see `edge_bcs.core.collapse`)."""
    objective = engine.artifact.objective
    attacks = (
        (objective.kind.crafting(attack), objective.attack_loss),
        (descent(attack.epsilon, WATCHED_STEPS), "cross_entropy"),
    )

    def perturb(how: Crafting, loss: str, first: int) -> None:
        descend(engine, how, loss=loss, seed=seed, noise=(0, random.EVALUATION, first))

    order = np.arange(len(data))
    right = [
        _right_answers(engine, data, order, [partial(perturb, *each)], on_batch, None)[1] for each in attacks
    ]
    own, pgd = (count / len(data) for count in right)
    return own, pgd


def _right_answers(
    engine: Engine,
    data: Data,
    order: Array,
    perturbations: Sequence[Callable[[int], None]],
    on_batch: Callable[[int, int], None] | None,
    on_answers: OnAnswers | None,
) -> tuple[int, int, int]:
    """How many images at ``order`` are answered rightly, clean and under attack, and how many not at all.

    ``perturbations`` attack the micro-batch in the buffers, whose first image is at that place of ``order``.
    """
    arrays, size = engine.arrays, engine.artifact.attack_micro_batch
    clean = robust = lost = 0
    for first in range(0, len(order), size):
        places = order[first : first + size]
        x, y = check_batch(engine.artifact, *data.read(places), in_data(places))
        engine.load(x, y, 0.0)
        engine.run("eval")
        answered = arrays["logits"][: len(x)].copy()
        answers = answers_of(answered)
        right, unanswered = answers == y, answers == NO_ANSWER
        clean += int(right.sum())
        for perturb in perturbations:
            answers = _under_attack(engine, x, y, ~unanswered, partial(perturb, first))
            right &= answers == y
            unanswered |= answers == NO_ANSWER
        robust += int(right.sum())
        lost += int(unanswered.sum())
        if on_answers is not None:
            on_answers(Batch(places, x, y, answered, right if perturbations else None))
        if on_batch is not None:
            on_batch(first + len(x), len(order))
    return clean, robust, lost


def _under_attack(engine: Engine, x: Array, y: Array, answered: Array, attack: Callable[[], None]) -> Array:
    """What the images of a micro-batch are taken for under attack, i64[n]: `NO_ANSWER` for those that are not
    ``answered`` bool[n] as they are, and for those to which the network loses its answer on the way.

    The operators refuse a micro-batch with such an image; another image takes its place, and that of images
    that the micro-batch lacks.
    """
    left, refused = answered, not answered.all()
    while left.any():
        if refused:
            shown = np.full(engine.artifact.attack_micro_batch, left.argmax())
            shown[: len(x)][left] = np.flatnonzero(left)
            engine.load(x[shown], y[shown], 0.0)
        else:
            engine.load(x, y, 0.0)
        try:
            attack()
        except NotFiniteError:
            kept = left & (_answers(engine, len(x)) != NO_ANSWER)
            if refused and kept.sum() == left.sum():
                raise
            left, refused = kept, True
        else:
            return np.where(left, _answers(engine, len(x)), NO_ANSWER)
    return np.full(len(x), NO_ANSWER)


def _answers(engine: Engine, count: int) -> Array:
    """What the first ``count`` images in `adversarial` are taken for."""
    engine.arrays["input"][...] = engine.arrays["adversarial"]
    engine.run("eval")
    return answers_of(engine.arrays["logits"][:count])
