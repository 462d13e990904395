"""One step of Algorithm 1 by an engine's graphs: it is done and counted, or leaves no trace."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from edge_bcs.runtime.attack import craft
from edge_bcs.runtime.checks import Name, NotFiniteError, check_statistics, check_update, in_batch
from edge_bcs.runtime.engine import Engine
from edge_bcs.runtime.guard import Guard

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.objectives import NO_LABEL
from edge_bcs.core.settings import Attack
from edge_bcs.core.signals import HeldSignals

Array = np.ndarray[Any, Any]
Reader = Callable[[int, int], tuple[Array, Array]]
"""Returns the images and labels at the places [first, end) of a logical batch."""


class Counting(Protocol):
    """What a step asks of the Trainer that takes it.

    Attributes:
        seed: of the attack's random start. steps: optimizer steps done. images: that they saw.
        attack: with which its images are crafted.
    """

    seed: int
    attack: Attack
    steps: int
    images: int

    def coefficients(self) -> tuple[float, float, float, float]:
        """λ, λ_w, μ, σ of the next step."""
        ...

    def run_optimizer_only(self) -> None:
        """Update with the gradients in the buffers, and count a step."""
        ...


def take_step(
    trainer: Counting,
    engine: Engine,
    guard: Guard,
    signals: HeldSignals,
    read: Reader,
    count: int,
    name: Name,
    weights: Array | None = None,
) -> dict[str, Any]:
    """Do one step; return its "loss", "accuracy" and "robust_accuracy", see `Trainer.step`.

    Args:
        trainer: says how, and counts. engine: its buffers and graphs. guard: it, too, the trainer's.
        signals: held from the update on.
        read: returns images f32 and labels i64 that are checked, a micro-batch at a time.
        count: images of the logical batch. name: says which image stands at a place of it.
        weights: of the images in the loss, f32[count], beside 1 for an image like any other.
    """
    guard.refuse_inside_a_step()
    steps = trainer.steps
    try:
        guard.begin(steps + 1)
        weight = np.broadcast_to((1.0 if weights is None else np.float64(weights)) / count, (count,))
        loss, correct, labelled = _accumulate(
            engine, guard, read, weight, seed=trainer.seed, step=steps, name=name, attack=trainer.attack
        )
        check_update(engine.artifact, engine.arrays, trainer.coefficients())
        # From here to where the step is counted no signal's handler runs, nor between that and what the
        # caller must do with it.
        signals.hold()
        trainer.run_optimizer_only()
        trainer.images += count
        guard.counted()
    except NotFiniteError as error:
        raise NotFiniteError(f"in step {steps + 1}, {error}") from None
    finally:
        try:
            guard.take_back()
        finally:  # a second signal may have come while the first one was answered
            guard.take_back()
    objective = engine.artifact.objective
    metrics: dict[str, Any] = {"loss": loss}
    if not labelled:
        return metrics
    metrics["accuracy"] = float(correct[0]) / labelled
    if objective.two_branches:
        metrics["robust_accuracy"] = float(correct[1]) / labelled
    elif objective.kind.accuracy_is_robust:
        metrics["robust_accuracy"] = metrics["accuracy"]
    return metrics


def accumulate(trainer: Counting, engine: Engine, guard: Guard, read: Reader, count: int) -> None:
    """Leave the gradients of a batch in the bound buffers, as `take_step` would, and take no step; arguments
    as there."""
    guard.refuse_inside_a_step()
    try:
        guard.begin(trainer.steps + 1)
        weight = np.full(count, 1 / count)
        options: dict[str, Any] = {"seed": trainer.seed, "step": trainer.steps, "attack": trainer.attack}
        _accumulate(engine, guard, read, weight, name=in_batch, **options)
    finally:
        guard.take_back()


def _accumulate(
    engine: Engine,
    guard: Guard,
    read: Reader,
    weight: Array,
    *,
    seed: int,
    step: int,
    name: Name,
    attack: Attack,
) -> tuple[float, Array, int]:
    """Leave the gradients of a logical batch in the bound buffers, micro-batch after micro-batch (Algorithm
    1, lines 4 to 8), several of which may be attacked at once.

    Returns the loss, correct answers f64[branches], and how many images have a label.

    ``weight``, f64[n], is that of each image of the batch in the loss.

    Raises NotFiniteError for a loss, or running statistics, that are not finite, with the images at fault.
    """
    arrays, held, size = engine.arrays, engine.artifact.attack_micro_batch, engine.artifact.micro_batch
    loss, correct, labelled, count = 0.0, np.zeros(len(arrays["correct"])), 0, len(weight)
    for first in range(0, count, held):
        end = min(first + held, count)
        guard.reads(True)
        x, y = read(first, end)
        guard.reads(False)
        engine.load(x, y, weight[first:end])
        part = first
        try:
            craft(engine, first, count, seed=seed, step=step, attack=attack)
            for part in range(first, end, size):
                engine.bring_forward(part - first, min(size, end - part))
                arrays["lazy_reset_grad"][0] = part == 0
                engine.run("training")
                loss += float(arrays["loss"])
                if not math.isfinite(loss):
                    raise NotFiniteError(f"the loss is {loss}")
                if guard.has_statistics:
                    check_statistics(engine.artifact, arrays)
                correct += arrays["correct"]
        except NotFiniteError as error:
            blamed = _blamed(engine, part, engine.images, name)
            raise NotFiniteError(f"{error} ({blamed}); lower the learning rate.") from None
        labelled += int((y != NO_LABEL).sum())
    return loss, correct, labelled


def _blamed(engine: Engine, first: int, count: int, name: Name) -> str:
    """Name those of the first ``count`` images in the buffers whose logits are not finite; all if it is none
    of them. ``first`` is the place of the first in the batch."""
    arrays, faulty = engine.arrays, np.zeros(count, bool)
    for images in ("input", "adversarial"):
        arrays["input"][...] = arrays[images]
        try:
            engine.run("eval")
        except EdgeBcsError:
            continue
        faulty |= ~np.isfinite(arrays["logits"][:count]).all(axis=1)
    places = np.flatnonzero(faulty)
    if len(places) in (0, count):
        several = f"{name(first)} and the {count - 1} after it" if count > 1 else name(first)
        return several
    more = f" and {len(places) - 1} more" if len(places) > 1 else ""
    return f"{name(first + int(places[0]))}{more}"
