"""What a training saves of itself, and how it goes on from there."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_bcs.checkpoint import read_checkpoint, save_checkpoint
from edge_bcs.core.collapse import Watch
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.metadata import parse_json, parse_object
from edge_bcs.data.classes import Names, shown
from edge_bcs.method.sparse_model import SparseModel
from edge_bcs.training.plan import TrainingPlan
from edge_bcs.training.updates import Update

BEST = "checkpoint.safetensors"
LAST = "last.safetensors"
_RESUME = "resume it as it was begun, or choose another folder"
_UNSAID = {
    "attack_precision": "f32",
    "balance": False,
    "decay": "stays",
    "train": "all",
    "training_attack": "pgd",
}
"""What a plan means that does not say these."""


@dataclass
class Standing:
    """How far a training is, beside the state of its network.

    Attributes:
        step: steps done. ended: those of the epochs that have been evaluated at their end.
        best: what the report says of the best epoch; empty before the first one ended.
        sums: f64[4] over the steps of the epoch: loss, right answers of up to two branches, deaths.
        watch: of a single-step attack, whether it has collapsed.
    """

    step: int = 0
    ended: int = 0
    best: dict[str, Any] = field(default_factory=dict)
    sums: NDArray[np.float64] = field(default_factory=lambda: np.zeros(4))
    watch: Watch = field(default_factory=Watch)


def save(
    path: Path, sparse: SparseModel, plan: TrainingPlan, standing: Standing, update: Update | None
) -> None:
    """Write a checkpoint; with ``update``, also of what that remembers, so that the training can go on."""
    save_checkpoint(
        path,
        sparse,
        metadata={
            "objective": plan.objective.name,
            "plan": json.dumps(plan.described()),
            "sums": json.dumps(standing.sums.tolist()),
            "ended": json.dumps(standing.ended),
            "best": json.dumps(standing.best),
            **({"watch": json.dumps(standing.watch.dump())} if plan.attack.single_step else {}),
        },
        more=None if update is None else update.state(),
    )


def resumed(
    last: Path, sparse: SparseModel, plan: TrainingPlan, update: Update, classes: Names | None
) -> tuple[Standing, dict[str, NDArray[Any]] | None]:
    """Put the saved state into the network and the update.

    Args:
        last: the newest checkpoint of the training, beside that of its best epoch.
        sparse, update: get what was saved.
        plan, classes: of the training that is to go on.

    Returns:
        Where it stands, and the network's state in the best epoch, if one has ended.

    Raises:
        EdgeBcsError: a checkpoint that no training wrote, or of another plan, network or classes.
    """
    checkpoint = read_checkpoint(last)
    standing = Standing(checkpoint.step)
    try:
        begun = parse_object(checkpoint.metadata["plan"])
        standing.best = parse_object(checkpoint.metadata["best"])
        # Without it the checkpoint was written within an epoch, or after the end of one had been seen to.
        standing.ended = parse_json(checkpoint.metadata.get("ended", str(checkpoint.step)))
        sums = np.array(parse_json(checkpoint.metadata["sums"]), np.float64)
        if plan.attack.single_step and "watch" in checkpoint.metadata:
            standing.watch = Watch.parse(parse_object(checkpoint.metadata["watch"]))
        network = checkpoint.network()
        best = standing.best
        counts = [standing.ended, *([best["best_step"]] if best else [])]
        if sums.shape != standing.sums.shape or any(type(count) is not int for count in counts):
            raise ValueError
    except (KeyError, ValueError, TypeError):
        raise EdgeBcsError(f"{last} was not written by a training") from None
    standing.sums = sums
    asked = plan.described()
    for name in {**asked, **begun}:
        before, now = (plan_of.get(name, _UNSAID.get(name)) for plan_of in (begun, asked))
        if before != now:
            raise EdgeBcsError(f"{last.parent} was begun with {_apart(name, before, now)}; {_RESUME}")
    record = sparse.record
    for name in ("normalize", "resize"):
        before, now = network.get(name), record.get(name)
        if before != now:
            raise EdgeBcsError(f"{last.parent} was begun with {_apart(name, before, now)}; {_RESUME}")
    same = all(network.get(name) == record.get(name) for name in ("name", "arguments"))
    same = same and network.get("head", record.get("head")) == record.get("head", network.get("head"))
    if not same or checkpoint.seed != sparse.seed:
        name = str(network.get("name"))[:60]
        if isinstance(made := network.get("factory"), str):
            name += f" (made by {made[:200]})"
        raise EdgeBcsError(
            f"{last.parent} was begun with the network {name} and the seed {checkpoint.seed}, not with "
            f"{sparse.record['name']} and the seed {sparse.seed}; {_RESUME}"
        )
    stored = checkpoint.classes
    if stored is not None and stored != classes:
        raise EdgeBcsError(
            f"{last.parent} was begun with the classes {shown(stored)}, not {shown(classes or ())}; {_RESUME}"
        )
    if plan.gradual is not None:  # which had as many connections then as it had
        sparse.become(*(checkpoint.tensors[f"coo.{name}"] for name in ("value", "index", "momentum")))
    sparse.load_state(checkpoint.tensors)
    update.load_state(checkpoint.tensors)
    update.took_over(sparse)
    sparse.step = standing.step
    return standing, read_checkpoint(last.parent / BEST).tensors if standing.best else None


def _apart(name: str, before: Any, now: Any) -> str:
    """How a training that began differs from the one that is asked for, in one of their entries."""
    if name == "teacher":
        return "no teacher" if before is None else f"{'a' if now is None else 'another'} teacher"
    return f"{name} {before!r}, not {now!r}"


def is_of_first_epoch(path: Path, plan: TrainingPlan) -> bool:
    """Whether a checkpoint is what a training of this plan saves after its first epoch."""
    try:
        metadata = read_checkpoint(path).metadata
        best = parse_object(metadata.get("best", ""))
        return parse_object(metadata.get("plan", "")) == plan.described() and best.get("best_epoch") == 0
    except (EdgeBcsError, ValueError):
        return False
