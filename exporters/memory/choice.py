"""What a training step is, and what may be chosen of how it is done."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from edge_bcs.targets.cost_model import TYPICAL_BOARD, Machine

from edge_bcs.core.objectives import Objective

from .storage import Storage


@dataclass(frozen=True)
class Job:
    """What is to be fast.

    Attributes:
        objective, beta: the loss. batch_size: images an optimizer step. attack_steps: of the training attack.
        bfloat16: whether activations may be kept as bfloat16, which rounds gradients.
        machine: for whom.
    """

    objective: Objective
    beta: float = 0.0
    batch_size: int = 128
    attack_steps: int = 10
    bfloat16: bool = False
    machine: Machine = TYPICAL_BOARD

    def runs(self, micro_batch: int) -> dict[str, int]:
        """How often each graph runs in one step (Algorithm 1: craft, accumulate, update)."""
        runs = self.objective.runs(self.batch_size, micro_batch, self.attack_steps)
        return {graph: runs[graph] for graph in ("training", "attack", "eval")}


@dataclass(frozen=True)
class Choice:
    """How to compile.

    Attributes:
        micro_batch: images a run of a graph.
        keep_both: both branches of a two-branch objective are kept (always False for one branch).
        storage: what is recomputed or narrowed. sparse: modules that do without the dense kernel.
    """

    micro_batch: int
    keep_both: bool = False
    storage: Storage = field(default_factory=Storage)
    sparse: frozenset[str] = frozenset()

    def less(self) -> Iterator[tuple[tuple[str, str], Choice]]:
        """(change, choice without it) of every change: what is done, and with which tensor or module."""
        storage = self.storage
        for tensor in sorted(storage.recomputed):
            kept = replace(storage, recomputed=storage.recomputed - {tensor})
            yield ("recomputed", tensor), replace(self, storage=kept)
        for tensor in sorted(storage.narrowed):
            kept = replace(storage, narrowed=storage.narrowed - {tensor})
            yield ("narrowed", tensor), replace(self, storage=kept)
        for module in sorted(self.sparse):
            yield ("sparse", module), replace(self, sparse=self.sparse - {module})


def together(choices: list[Choice]) -> Choice:
    """All changes of choices with one origin; what one recomputes and another narrows is recomputed."""
    recomputed = frozenset().union(*(choice.storage.recomputed for choice in choices))
    narrowed = frozenset().union(*(choice.storage.narrowed for choice in choices))
    sparse = frozenset().union(*(choice.sparse for choice in choices))
    return replace(choices[0], storage=Storage(recomputed, narrowed - recomputed), sparse=sparse)
