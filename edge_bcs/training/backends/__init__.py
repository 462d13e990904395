"""The ways of doing the same training step: PyTorch, and the compiled sparse artifact on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.method.sparse_model import SparseModel
from edge_bcs.training.backends.base import Backend, Batch, Numbers
from edge_bcs.training.backends.compiled import CompiledBackend
from edge_bcs.training.backends.torch import TorchBackend
from edge_bcs.training.plan import TrainingPlan
from edge_bcs.training.replicas import Replicas
from edge_bcs.training.updates import Update

__all__ = ["Backend", "Batch", "CompiledBackend", "Numbers", "TorchBackend", "open_backend"]


def open_backend(
    sparse: SparseModel,
    plan: TrainingPlan,
    update: Update,
    *,
    shape: Sequence[int],
    replicas: Replicas,
    threads: int | None,
) -> Backend:
    """Return the backend that the plan names.

    Raises:
        EdgeBcsError: the sparse engine is asked for what only PyTorch does.
    """
    if plan.engine == "torch":
        return TorchBackend(sparse, plan, update, shape=shape, replicas=replicas)
    if update.needs_torch:
        what = "rewiring by layer" if plan.rewire == "by-layer" else "gradual pruning"
        raise EdgeBcsError(f"the sparse engine does not do {what}; choose the engine torch")
    if plan.teacher is not None:
        raise EdgeBcsError("the sparse engine does not learn from a teacher; choose the engine torch")
    if replicas.count > 1 or sparse.index.device.type != "cpu" or plan.precision != "f32":
        raise EdgeBcsError("the sparse engine runs in one process, on a CPU, in f32")
    if plan.seed != sparse.seed:
        raise EdgeBcsError("the sparse engine draws everything from the network's own seed")
    return CompiledBackend(sparse, plan, update, shape, threads)
