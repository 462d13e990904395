"""`simulate` with the compiler, where that is installed: what it advises comes from plans really compiled."""

from __future__ import annotations

from functools import partial
from typing import Any

from edge_bcs.runtime.artifact import Artifact
from edge_bcs.targets.advice import Maker, Place
from edge_bcs.targets.plans import MemoryPlan
from edge_bcs.targets.simulator import simulate as simulate_without

__all__ = ["simulate"]


def recompiled(artifact: Artifact, plan: MemoryPlan, place: Place) -> Maker:
    """Return what compiles changes of an artifact.

    Raises:
        ImportError: the compiler is not installed (on a board). EdgeBcsError: no name rebuilds the network.
    """
    from edge_bcs import models
    from edge_bcs.exporters.advice import Compiler
    from edge_bcs.loading import load
    from edge_bcs.method.connectivity import SparseModel, sparsify

    def fresh(name: str, arguments: dict[str, Any], sparsity: str, distribution: str) -> SparseModel:
        network = models.create(name, **arguments)
        return sparsify(network, sparsity=sparsity, seed=0, distribution=distribution)

    return Compiler(artifact, plan, place, load(artifact.path), fresh)


simulate = partial(simulate_without, recompiled=recompiled)
"""`edge_bcs.targets.simulator.simulate`, which does without the compiler."""
