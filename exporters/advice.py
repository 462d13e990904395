# ruff: noqa: D102 (the methods of makers are described once, in the base class)
"""What would make an artifact fit, from plans that are really compiled for it (see ``targets.advice``)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

from edge_bcs.runtime.artifact import Artifact
from edge_bcs.targets.advice import COMPILED, SPARSITIES, Maker, Place, Point, Variant
from edge_bcs.targets.plans import MemoryPlan

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.objectives import PLAIN, objective_named
from edge_bcs.core.part import Part
from edge_bcs.method.sparse_model import SparseModel

from .compiler import PARTS, build, compiled_inside
from .memory.choice import Choice, Job
from .memory.planner import Planner
from .network import network_of

_FAMILIES = (
    ("wrn34_10", "wrn28_10", "wrn28_4", "wrn28_2"),
    ("resnet50", "resnet34", "resnet18"),
)
_BUDGETS = (1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 9.0)
"""Budgets of the trade-off curve over the smallest feasible one."""

Fresh = Callable[[str, dict[str, Any], str, str], SparseModel]
"""(name, arguments, sparsity, distribution) → a new network; EdgeBcsError if there is none like that."""


class Compiler(Maker):
    """Compiles each change."""

    source = COMPILED

    def __init__(
        self, artifact: Artifact, plan: MemoryPlan, place: Place, sparse: SparseModel, fresh: Fresh
    ) -> None:
        """Take the artifact with its network; ``fresh`` makes others."""
        self.artifact, self.plan, self.place = artifact, plan, place
        self._sparse, self._fresh = sparse, fresh
        self._batch = artifact.batch_norm == "batch"
        self._bfloat16 = artifact.manifest["memory"].get("choice", {}).get("store") == "bf16"
        self._arguments = dict(artifact.manifest["network"].get("arguments", {}))
        self._planner = self._planner_of(sparse, self._batch)

    def _planner_of(self, sparse: SparseModel, batch_statistics: bool, part: Part | None = None) -> Planner:
        part = self.artifact.trained.part if part is None else part
        attacked = self.artifact.objective.kind.adversarial
        return Planner(network_of(sparse, self.artifact.input_shape, batch_statistics, part, attacked))

    def curve(self, budget: int | None) -> Iterator[Point]:
        job = self._job(self.artifact.objective.name, self._bfloat16)
        least = self._planner.smallest(job).peak_bytes
        budgets = {int(factor * least) for factor in _BUDGETS}
        previous = None
        for limit in sorted(budgets | ({budget} if budget else set())):
            found = compiled_inside(self._planner, job, limit)
            if found is None or found.choice == previous:
                continue
            previous = choice = found.choice
            seconds = self.place.seconds(found.memory, choice.micro_batch, False)
            again = len(choice.storage.recomputed)
            yield Point(limit, choice.micro_batch, again, found.memory.peak_bytes, seconds)

    def _job(self, objective: str, bfloat16: bool) -> Job:
        described = self.artifact.objective
        return Job(
            objective_named(objective),
            described.beta,
            self.artifact.batch_size,
            described.attack.steps_taken,
            bfloat16,
            self.place.machine,
        )

    def _fitting(self, planner: Planner, job: Job, budget: int) -> tuple[Choice, MemoryPlan]:
        """What the planner makes of ``budget``, or the smallest it can if that is not enough."""
        found = compiled_inside(planner, job, budget) or build(planner, job, planner.smallest(job).choice)
        return found.choice, found.memory

    def variants(self, budget: int) -> Iterator[Variant]:
        objective = self.artifact.objective.name
        choice, plan = self._fitting(self._planner, self._job(objective, self._bfloat16), budget)
        size = choice.micro_batch
        memory = {"--memory": str(max(budget, plan.peak_bytes))}
        fits = plan.peak_bytes <= budget
        what = (
            f"compiled for this budget, micro-batch {size}"
            if fits
            else "the same network as small as it gets"
        )
        yield what, memory, False, size, plan
        if not self._bfloat16:
            choice, plan = self._fitting(self._planner, self._job(objective, True), budget)
            size = choice.micro_batch
            memory = {"--store": "bf16", "--memory": str(max(budget, plan.peak_bytes))}
            if choice.storage.narrowed:  # else it is the plan that is named already
                yield f"activations kept as bfloat16, micro-batch {size}", memory, False, size, plan
        for what, options, retrain, planner, name in self._single_changes(objective):
            job = self._job(name, bfloat16=False)
            changed = build(planner, job, planner.unlimited(job, self.artifact.micro_batch)).memory
            if changed.peak_bytes <= budget:
                keep = {"--micro-batch": str(self.artifact.micro_batch)}
                yield what, {**options, **keep}, retrain, self.artifact.micro_batch, changed
            else:
                choice, changed = self._fitting(planner, self._job(name, self._bfloat16), budget)
                size = choice.micro_batch
                memory = {"--memory": str(max(budget, changed.peak_bytes))}
                yield f"{what}, micro-batch {size}", {**options, **memory}, retrain, size, changed

    def _single_changes(self, objective: str) -> Iterator[tuple[str, dict[str, str], bool, Planner, str]]:
        if self._batch:
            frozen = self._planner_of(self._sparse, False)
            yield "frozen batch-norm statistics", {"--batch-norm": "frozen"}, False, frozen, objective
        if self.artifact.trained.part.everything:
            for part in PARTS:
                with contextlib.suppress(EdgeBcsError):  # of a network with fewer layers
                    fewer = self._planner_of(self._sparse, False, part)
                    options = {"--train": part.text, "--batch-norm": "frozen"}
                    yield f"only {part.text} trained", options, False, fewer, objective
        if self.artifact.objective.two_branches:
            plain = PLAIN.name
            what = f"objective {plain} instead of {objective}"
            yield what, {"--objective": plain}, False, self._planner, plain
        for sparsity in SPARSITIES:
            if Decimal(sparsity) > Decimal(self.artifact.sparsity):
                sparser = self._changed(self.artifact.network, sparsity)
                if sparser is not None:
                    yield f"sparsity {sparsity}", {"--sparsity": sparsity}, True, sparser, objective
        for family in _FAMILIES:
            if self.artifact.network in family:
                for name in family[family.index(self.artifact.network) + 1 :][:2]:
                    smaller = self._changed(name, self.artifact.sparsity)
                    if smaller is not None:
                        yield f"network {name}", {"--model": name}, True, smaller, objective

        width = float(self._arguments.get("width", 1.0)) / 2
        narrower = self._changed(self.artifact.network, self.artifact.sparsity, width)
        if narrower is not None:
            options = {"--model": self.artifact.network, "--width": str(width)}
            yield f"half the width of {self.artifact.network}", options, True, narrower, objective

    def _changed(self, name: str, sparsity: str, width: float | None = None) -> Planner | None:
        """A new network of this name, sparsity and width (default: as now), or None if there is none."""
        arguments = self._arguments if width is None else {**self._arguments, "width": width}
        distribution = self.artifact.manifest.get("distribution", "paper")
        try:
            return self._planner_of(self._fresh(name, arguments, sparsity, distribution), self._batch)
        except EdgeBcsError:
            return None
