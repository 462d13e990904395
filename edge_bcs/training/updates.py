"""What a method does with the gradients of a step: rewire, keep a mask, or something of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge_bcs.core.part import Trained
from edge_bcs.core.settings import Coefficients
from edge_bcs.method import rewiring
from edge_bcs.method.device_step import has_enough_candidates, update_on_device
from edge_bcs.method.sparse_model import SparseModel
from edge_bcs.method.step import trained_masks, update


class Update:
    """One method's update; subclasses override `__call__`, and the others if they remember something.

    Attributes:
        needs_all_gradients: whether it reads gradients of dormant weights, too.
        needs_torch: whether no other engine can do it.
        trained: what of the network it updates, and needs gradients of; None: everything.
    """

    needs_all_gradients = False
    needs_torch = False
    trained: Trained | None = None

    def begin(self, sparse: SparseModel, total: int) -> None:
        """Learn of what is trained, and in how many steps, before the first step or a saved state."""

    def is_settled(self, step: int) -> bool:
        """Whether after so many steps the network has the connections with which it ends."""
        return True

    def queues(self, sparse: SparseModel) -> bool:
        """Whether on a GPU it queues the same kernels at every step, and `step` may be a tensor i64[]."""
        return False

    def __call__(
        self, sparse: SparseModel, hyper: Coefficients, *, step: int | Tensor, failed: Tensor | None
    ) -> Tensor:
        """Update the network with its gradients; return i64[2]: connections that died, and 1 if it succeeded.

        A step with anything that is not finite changes nothing, nor does any after `failed` (bool[]).
        """
        raise NotImplementedError

    def end_of_epoch(self, sparse: SparseModel, epoch: int) -> None:
        """Do what is done once an epoch (counted from 0), before the network is evaluated and saved."""

    def took_over(self, sparse: SparseModel) -> None:
        """Learn that the network has the state of a training that is resumed."""

    def state(self) -> dict[str, NDArray[Any]]:
        """Return what a resumed training needs, by names that no buffer of the network has."""
        return {}

    def load_state(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Take back what `state` returned."""


class Rewiring(Update):
    """Algorithm 1: "uniform", "by-layer", or "none" for a static mask with the same update.

    Args:
        rewire: which of these; "by-layer" only where everything is trained.
        trained: what of the network it updates; None: everything.
    """

    def __init__(self, rewire: str, trained: Trained | None = None) -> None:
        self.rewire, self.trained = rewire, trained
        self.needs_torch = rewire == "by-layer"

    def begin(self, sparse: SparseModel, total: int) -> None:
        """See `Update`; what is not trained has no momentum."""
        if self.trained is not None:
            connections, numbers = (torch.from_numpy(mask) for mask in trained_masks(sparse, self.trained))
            sparse.momentum[~connections.to(sparse.index.device)] = 0
            sparse.dense_momentum[~numbers.to(sparse.index.device)] = 0

    def __call__(
        self, sparse: SparseModel, hyper: Coefficients, *, step: int | Tensor, failed: Tensor | None
    ) -> Tensor:
        """See `Update`; on a GPU the host does not wait, unless rewiring is by layer or the network dense."""
        if sparse.index.device.type != "cpu" and self.queues(sparse):
            return update_on_device(sparse, hyper, step=step, failed=failed, rewire=self.rewire)
        died = update(sparse, hyper, step=int(step), rewire=self.rewire, trained=self.trained)
        return torch.tensor([died, 1])

    def queues(self, sparse: SparseModel) -> bool:
        """See `Update`."""
        if self.trained is not None:
            return False
        return self.rewire == "none" or (self.rewire == "uniform" and has_enough_candidates(sparse))


class Sgd(Update):
    """SGD with momentum as `torch.optim.SGD` has it, weight decay inside the gradient, on a static mask.

    v ← μ·v + (g + λ_w·w); w ← w − λ·v: what HYDRA and the other comparators train with.
    """

    def extra_gradient(self, sparse: SparseModel, value: Tensor) -> Tensor | float:
        """Return what is added to the gradient of the connections, f32[κ]."""
        return 0.0

    def __call__(
        self, sparse: SparseModel, hyper: Coefficients, *, step: int | Tensor, failed: Tensor | None
    ) -> Tensor:
        """See `Update`."""
        with torch.no_grad():
            gradient, dense_gradient = sparse.gradients()
            value = sparse.value()
            gradient = gradient + self.extra_gradient(sparse, value)
            w, velocity = descend(value, sparse.momentum, gradient, hyper)
            parameters, dense_velocity = descend(
                sparse.dense_value, sparse.dense_momentum, dense_gradient, hyper
            )
            # A connection that lands on 0 stays one: a checkpoint holds exactly κ weights that are not 0.
            w = torch.where(w == 0, torch.where(value < 0, -1.0, 1.0) * float(rewiring.NEWBORN), w)
            success = torch.isfinite(w).all() & torch.isfinite(parameters).all()
            if failed is not None:
                success = success & ~failed
            sparse.weights.index_copy_(0, sparse.index, torch.where(success, w, value))
            sparse.momentum.copy_(torch.where(success, velocity, sparse.momentum))
            sparse.dense_value.copy_(torch.where(success, parameters, sparse.dense_value))
            sparse.dense_momentum.copy_(torch.where(success, dense_velocity, sparse.dense_momentum))
            return torch.stack([torch.zeros_like(success).long(), success.long()])


def descend(value: Tensor, momentum: Tensor, gradient: Tensor, hyper: Coefficients) -> tuple[Tensor, Tensor]:
    """Return (value, momentum) after one step of SGD with weight decay inside the gradient."""
    velocity = hyper.momentum * momentum + (gradient + hyper.weight_decay * value)
    return value - hyper.learning_rate * velocity, velocity


def keep_mask(
    value: NDArray[np.float32],
    momentum: NDArray[np.float32],
    gradient: NDArray[np.float32],
    hyper: tuple[float, float, float],
    connections: bool,
) -> None:
    """Do `step.update` with a static mask in numpy, in place: v ← μ·v + g; w ← w·(1 − λ_w) − λ·v.

    Args:
        value, momentum, gradient: f32[n].
        hyper: (λ, λ_w, μ).
        connections: whether values must not become 0.
    """
    rate, decay, factor = (np.float32(number) for number in hyper)
    signs = np.sign(value)
    momentum *= factor
    momentum += gradient
    value *= np.float32(1) - decay
    value -= rate * momentum
    if connections:
        dead = value == 0
        value[dead] = signs[dead] * rewiring.NEWBORN
