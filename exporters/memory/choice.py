"""What a training step is, and what may be chosen of how it is done."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

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

    def runs(self, micro_batch: int, images: int | None = None) -> dict[str, int]:
        """How often each graph runs in one step (Algorithm 1: craft, accumulate, update).

        Args:
            micro_batch: images of the training graph. images: of the others; None: as many.
        """
        runs = self.objective.runs(self.batch_size, micro_batch, self.attack_steps, images)
        return {graph: runs[graph] for graph in ("training", "attack", "eval")}


class Change(NamedTuple):
    """One change of a choice: "recomputed" or "narrowed" a tensor, or "sparse" a module."""

    kind: Literal["recomputed", "narrowed", "sparse"]
    name: str


@dataclass(frozen=True)
class Choice:
    """How to compile.

    Attributes:
        micro_batch: images a run of the training graph.
        attack_micro_batch: images that the buffers hold, which an attack and an evaluation take at once: a
            multiple of those; None: as many.
        keep_both: both branches of a two-branch objective are kept (always False for one branch).
        storage: what is recomputed or narrowed. sparse: modules that do without the dense kernel.
    """

    micro_batch: int
    keep_both: bool = False
    storage: Storage = field(default_factory=Storage)
    sparse: frozenset[str] = frozenset()
    attack_micro_batch: int | None = None

    @property
    def images(self) -> int:
        """Images that the buffers hold."""
        return self.attack_micro_batch or self.micro_batch

    @property
    def changes(self) -> list[Change]:
        """What is not simply kept, and which modules are sparse."""
        return [
            *(Change("recomputed", tensor) for tensor in sorted(self.storage.recomputed)),
            *(Change("narrowed", tensor) for tensor in sorted(self.storage.narrowed)),
            *(Change("sparse", module) for module in sorted(self.sparse)),
        ]

    def without(self, change: Change) -> Choice:
        """The same without one of its changes."""
        if change.kind == "sparse":
            return replace(self, sparse=self.sparse - {change.name})
        return replace(self, storage=self.storage.without(change.name))


def together(choices: list[Choice]) -> Choice:
    """All changes of choices with one origin; what one recomputes and another narrows is recomputed."""
    recomputed = frozenset().union(*(choice.storage.recomputed for choice in choices))
    narrowed = frozenset().union(*(choice.storage.narrowed for choice in choices))
    sparse = frozenset().union(*(choice.sparse for choice in choices))
    return replace(choices[0], storage=Storage(recomputed, narrowed - recomputed), sparse=sparse)
