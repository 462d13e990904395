# ruff: noqa: D102 (the methods of makers are described once, in the base class)
"""What would make an artifact fit: changes, each with the bytes it saves, the time it costs and a
command to paste.

Where the compiler is at hand (`exporters.advice`, on the host), every figure comes from a plan that was
really compiled for the changed artifact; elsewhere it is scaled from the artifact's own plan, and says so.
"""

from __future__ import annotations

import contextlib
import math
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from edge_bcs.runtime.archive import SUFFIX
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.targets.cost_model import Machine, Walk, lanes_of

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.objectives import PLAIN
from edge_bcs.core.settings import Attack

from .layout import assign
from .plans import Allocation, MemoryPlan, Phase

COMPILED = "compiled"
SCALED = "scaled from the artifact's own plan"
SPARSITIES = ("0.95", "0.98", "0.99", "0.995", "0.999")
_SCALING = {"data", "attack buffers", "activations in passing", "activations kept for backward"}
_SCALING |= {"gradients in flight"}
_CONNECTIONS = {"values", "indices", "lists", "momentum", "gradients"}

Seconds = Callable[[MemoryPlan, int, bool], float | None]
"""(plan, micro-batch, with the objective "at" instead of the artifact's) → expected seconds of a step."""


@dataclass(frozen=True)
class Place:
    """For whom a change is planned.

    Attributes:
        target: the board as the command line names it, None for no board.
        machine: what the planner counts the time of; seconds: what a plan would take there.
    """

    target: str | None
    machine: Machine
    seconds: Seconds


@dataclass(frozen=True)
class Change:
    """One way to a smaller working set.

    Attributes:
        what: a few words. command: to paste.
        peak_bytes: predicted working set then; saved_bytes: against the artifact as it is.
        seconds: expected duration of a step then, None if unknown; slowdown: against the artifact as it is.
        fits: whether it is enough by itself. retrain: the present weights cannot be kept.
        source: COMPILED or SCALED.
    """

    what: str
    command: str
    peak_bytes: int
    saved_bytes: int
    seconds: float | None
    slowdown: float | None
    fits: bool
    retrain: bool
    source: str


@dataclass(frozen=True)
class Point:
    """What the planner makes of one budget.

    Attributes:
        budget_bytes: the budget. peak_bytes: of the working set that it plans with; recomputed: activations
            that are computed twice (None where it is scaled from the artifact's own plan).
        seconds: expected duration of a step, None if unknown.
    """

    budget_bytes: int
    micro_batch: int
    recomputed: int | None
    peak_bytes: int
    seconds: float | None


@dataclass(frozen=True)
class Advice:
    """Changes, the best first, and the trade-off, the smallest budget first."""

    changes: tuple[Change, ...]
    curve: tuple[Point, ...]
    source: str


def advise(
    artifact: Artifact,
    plan: MemoryPlan,
    budget: int | None,
    place: Place,
    curve: bool = True,
    recompiled: Recompiled | None = None,
) -> Advice:
    """Changes that bring ``artifact`` under ``budget`` (none asked for if it is None) and, with ``curve``,
    the trade-off between memory and time.

    Args:
        recompiled: the compiler, where it may be there; without it figures are scaled.
    """
    maker: Maker = Scaler(artifact, plan, place)
    if recompiled is not None:
        with contextlib.suppress(ImportError, EdgeBcsError):
            maker = recompiled(artifact, plan, place)
    now = place.seconds(plan, artifact.micro_batch, False)
    points = tuple(maker.curve(budget)) if curve else ()
    if budget is None or plan.peak_bytes <= budget:
        return Advice((), points, maker.source)
    changes = []
    for what, options, retrain, size, changed in maker.variants(budget):
        time = place.seconds(changed, size, options.get("--objective") == PLAIN.name)
        changes.append(
            Change(
                what=what,
                command=_command(artifact, options, place.target),
                peak_bytes=changed.peak_bytes,
                saved_bytes=plan.peak_bytes - changed.peak_bytes,
                seconds=time,
                slowdown=time / now if time is not None and now else None,
                fits=changed.peak_bytes <= budget,
                retrain=retrain,
                source=maker.source,
            )
        )
    useful = [change for change in changes if change.saved_bytes > 0]
    useful.sort(key=lambda change: (not change.fits, change.retrain if change.fits else 0, _cost(change)))
    return Advice(tuple(useful), points, maker.source)


def _cost(change: Change) -> float:
    """Among the changes that fit the quickest is first, among the others the smallest."""
    return change.seconds if change.fits and change.seconds is not None else float(change.peak_bytes)


def images_of(plan: MemoryPlan, artifact: Artifact) -> int:
    """How many images the buffers of a plan hold, of the network of ``artifact``."""
    scaled = plan.bound.get(_SCALED_DATA, 0) // _data(artifact)
    return plan.bound["input"] // (4 * math.prod(artifact.input_shape)) + scaled


def _data(artifact: Artifact) -> int:
    """Bytes of the buffers that hold an image."""
    return 12 + 8 * artifact.num_classes + 8 * math.prod(artifact.input_shape)


def _smallest(artifact: Artifact) -> int:
    return 2 if artifact.batch_norm == "batch" else 1


def _powers(artifact: Artifact) -> list[int]:
    """Micro-batches worth looking at."""
    largest = max(artifact.micro_batch, min(128, artifact.batch_size))
    return [size for size in (1 << n for n in range(8)) if _smallest(artifact) <= size <= largest]


_SCALED_DATA = "scaled data"
Variant = tuple[str, dict[str, str], bool, int, MemoryPlan]
"""(what, options of `edge-bcs export` that change, whether weights are lost, micro-batch, plan)."""


class Maker:
    """Makes the plan of a changed artifact."""

    source = ""

    def curve(self, budget: int | None) -> Iterator[Point]:
        """The trade-off, ``budget`` among its points."""
        raise NotImplementedError

    def variants(self, budget: int) -> Iterator[Variant]:
        """Every change worth naming."""
        raise NotImplementedError


Recompiled = Callable[[Artifact, MemoryPlan, Place], Maker]
"""What makes the maker that compiles; ImportError or EdgeBcsError if it cannot."""


class Scaler(Maker):
    """For boards: what is proportional to the micro-batch or to κ is scaled."""

    source = SCALED

    def __init__(self, artifact: Artifact, plan: MemoryPlan, place: Place) -> None:
        self.artifact, self.plan, self.place = artifact, plan, place

    def curve(self, budget: int | None) -> Iterator[Point]:
        for size in sorted({*_powers(self.artifact), self.artifact.micro_batch}):
            plan = self.at(size)
            yield Point(plan.peak_bytes, size, None, plan.peak_bytes, self.place.seconds(plan, size, False))

    def at(self, micro_batch: int) -> MemoryPlan:
        """The plan with another micro-batch."""
        ratio = micro_batch / self.artifact.micro_batch
        held = self.artifact.attack_micro_batch
        bound = dict(self.plan.bound)
        bound[_SCALED_DATA] = _data(self.artifact) * (round(held * ratio) - held)
        lanes = self.artifact.lanes, lanes_of(micro_batch)
        below = replace(self.plan, bound=bound).bound_bytes
        phases = {
            name: _scaled(phase, ratio, below, lanes, self.plan.placed)
            for name, phase in self.plan.phases.items()
        }
        counted = [phase.peak_bytes for phase in phases.values() if not phase.apart]
        return MemoryPlan(max(counted), bound, phases, self.plan.placed)

    def variants(self, budget: int) -> Iterator[Variant]:
        sizes = [size for size in _powers(self.artifact) if size < self.artifact.micro_batch]
        for size in sorted(sizes, reverse=True):
            changed = self.at(size)
            if changed.peak_bytes <= budget or size == min(sizes):
                yield f"micro-batch {size}", {"--micro-batch": str(size)}, False, size, changed
                break
        now = 1 - Decimal(self.artifact.sparsity)
        per_connection = sum(self.plan.peak_phase.categories.get(name, 0) for name in _CONNECTIONS)
        for sparsity in SPARSITIES:
            if Decimal(sparsity) > 1 - now:
                less = int(per_connection * (1 - (1 - Decimal(sparsity)) / now))
                changed = replace(self.plan, peak_bytes=self.plan.peak_bytes - less)
                yield (
                    f"sparsity {sparsity}",
                    {"--sparsity": sparsity},
                    True,
                    self.artifact.micro_batch,
                    changed,
                )


def _scaled(phase: Phase, ratio: float, bound: int, lanes: tuple[int, int], placed: bool) -> Phase:
    """``phase`` with ``ratio`` times as many images, of which ``lanes`` lie side by side (before, then).

    It lies above ``bound`` bytes; its tensors are placed anew if they have places.
    """
    before, after = lanes

    def scaled(tensor: Allocation) -> Allocation:
        return replace(tensor, bytes=int(tensor.bytes * ratio)) if tensor.category in _SCALING else tensor

    def walked(walk: Walk) -> Walk:
        floats = walk.floats // before * after
        return replace(
            walk,
            rows=round(walk.rows * ratio * before / after),
            floats=floats,
            run=floats if walk.run == walk.floats else after,
            lanes=after,
        )

    tensors = tuple(map(scaled, phase.allocations))
    if placed:
        found = assign(tensors).addresses
        tensors = tuple(replace(each, address=place) for each, place in zip(tensors, found, strict=True))
    changed = replace(
        phase,
        walks=tuple(tuple(map(walked, walks)) for walks in phase.walks),
        allocations=tensors,
        flops=tuple(int(flops * ratio) for flops in phase.flops),
        moved=tuple(int(moved * ratio) for moved in phase.moved),
    )
    return replace(changed, peak_bytes=bound + max((step.total() for step in changed.live()), default=0))


def _command(artifact: Artifact, changed: dict[str, str], board: str | None) -> str:
    """What exports the artifact again as it is but for the options ``changed`` of `edge-bcs export`."""
    if "--memory" in changed and board is not None:  # whose time the planner counts
        changed = {**changed, "--target": board}
    target = f"{str(artifact.path).rstrip('/').removesuffix(SUFFIX)}-smaller"
    arguments: dict[str, Any] = artifact.manifest["network"].get("arguments", {})
    channels, height, _ = artifact.input_shape
    objective, attack, usual = artifact.objective, artifact.objective.attack, Attack()
    options = {"--objective": objective.name, "--batch-norm": artifact.batch_norm}
    if not artifact.trained.part.everything:
        options["--train"] = artifact.trained.part.text
    if artifact.manifest["memory"].get("choice", {}).get("store") == "bf16":
        options["--store"] = "bf16"
    defaults: dict[str, tuple[Any, Any]] = {
        "--batch-size": (artifact.batch_size, 128),
        "--attack-steps": (attack.steps, usual.steps),
        "--epsilon": (attack.epsilon, usual.epsilon),
        "--step-size": (attack.step_size, usual.step_size),
        "--training-attack": (attack.kind, usual.kind),
    }
    if not arguments:  # a module of the user's own, which only Python can name
        return _call(artifact, target, {**options, **_unusual(defaults), **changed})
    defaults |= {"--input-size": (height, 32), "--channels": (channels, 3)}
    if "--model" in changed or "--sparsity" in changed:
        options |= {"--model": artifact.network, "--sparsity": artifact.sparsity}
        defaults["--classes"] = (artifact.num_classes, 10)
        defaults["--width"] = (arguments.get("width", 1.0), 1.0)
        defaults["--distribution"] = (artifact.manifest.get("distribution", "paper"), "paper")
    else:
        options["--checkpoint"] = str(artifact.path)
    words = ["edge-bcs", "export"]
    for name, value in {**options, **_unusual(defaults), **changed, "-o": target}.items():
        words += [name, value]
    return shlex.join(words)


def _unusual(defaults: dict[str, tuple[Any, Any]]) -> dict[str, str]:
    """Options whose (value, default) differ."""
    return {name: str(value) for name, (value, usual) in defaults.items() if value != usual}


_FIELDS = {
    "--memory": ("memory=edge_bcs.Memory", "budget"),
    "--micro-batch": ("memory=edge_bcs.Memory", "micro_batch"),
    "--store": ("memory=edge_bcs.Memory", "store"),
    "--attack-steps": ("attack=edge_bcs.Attack", "steps"),
    "--epsilon": ("attack=edge_bcs.Attack", "epsilon"),
    "--step-size": ("attack=edge_bcs.Attack", "step_size"),
    "--training-attack": ("attack=edge_bcs.Attack", "kind"),
}
"""Options of the command line that are a field of an object in Python."""


def _call(artifact: Artifact, target: str, options: dict[str, str]) -> str:
    """The same in Python."""
    sparsity = options.pop("--sparsity", None)
    source = f"edge_bcs.load({str(artifact.path)!r}, model=module)"
    if sparsity is not None:
        source = f"edge_bcs.sparsify(module, sparsity={sparsity!r})"
    words = [source, repr(target), f"input_shape={artifact.input_shape}"]
    options.pop("--target", None)
    groups: dict[str, list[str]] = {}
    for name, value in options.items():
        text = value if value.replace(".", "").isdigit() else repr(value)
        call, field = _FIELDS.get(name, ("", name.removeprefix("--").replace("-", "_")))
        (groups.setdefault(call, []) if call else words).append(f"{field}={text}")
    words += [f"{call}({', '.join(fields)})" for call, fields in groups.items()]
    return f"edge_bcs.export({', '.join(words)})"
