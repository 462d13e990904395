"""The update of `edge_bcs.method.step` for a GPU: the same bits, and never a wait of the host for the device.

How many connections die is known to the device alone. So every array here has a length that the host knows
beforehand: more candidates are drawn than can be needed, what is not wanted gets a position behind the
last one, and one sort brings κ connections to the front. Whether all went well is a tensor, too, to be read
later.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edge_bcs.core import random
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.settings import Coefficients
from edge_bcs.method import device_random, rewiring
from edge_bcs.method.sparse_model import SparseModel
from edge_bcs.method.step import moved, moved_dense

_SPARE = 1024


def has_enough_candidates(sparse: SparseModel) -> bool:
    """Whether so many candidates are certain to be enough: at most a quarter of all weights are connections.

    Then 2κ + 1024 candidates hold κ distinct dormant positions, except with a probability far below that of
    a broken processor; such a step would be reported as one that failed.
    """
    return 4 * sparse.kappa <= sparse.size < 2**31


@torch.no_grad()
def update_on_device(
    sparse: SparseModel,
    hyper: Coefficients,
    *,
    step: int | Tensor,
    failed: Tensor | None = None,
    rewire: str = "uniform",
) -> Tensor:
    """Update and rewire as `step.update` ("uniform" or "none"); return i64[2]: deaths, and 1 if it succeeded.

    A step with anything that is not finite changes nothing, nor does one that is told (`failed`, bool[]) that
    an earlier one failed.
    """
    gradient, dense_gradient = sparse.gradients()
    value, index = sparse.value(), sparse.index
    w, velocity = moved(value, sparse.momentum, gradient, hyper, seed=sparse.seed, step=step)
    parameters, dense_velocity = moved_dense(sparse, dense_gradient, hyper)
    success = torch.isfinite(w).all() & torch.isfinite(parameters).all()
    if failed is not None:
        success = success & ~failed
    positions, deaths = index, torch.zeros((), dtype=torch.int64, device=index.device)
    if rewire == "none":
        w = torch.where(w == 0, value.sign() * float(rewiring.NEWBORN), w)
    else:
        survives = (w != 0) & (torch.signbit(w) == torch.signbit(value))
        deaths = (~survives).sum()
        candidates, born = _births(sparse, survives, deaths, step)
        nowhere = sparse.size
        merged = torch.cat([torch.where(survives, index, nowhere), torch.where(born, candidates, nowhere)])
        positions, order = merged.sort()
        positions, order = positions[: sparse.kappa], order[: sparse.kappa]
        newborn = device_random.signs(candidates, seed=sparse.seed) * float(rewiring.NEWBORN)
        w = torch.cat([w, newborn])[order]
        velocity = torch.cat([velocity, torch.zeros_like(newborn)])[order]
        success = success & (born.sum() == deaths)
    weights = sparse.weights
    weights.index_fill_(0, index, 0.0)
    positions, w = torch.where(success, positions, index), torch.where(success, w, value)
    weights.index_copy_(0, positions, w)
    sparse.index.copy_(positions)
    sparse.momentum.copy_(torch.where(success, velocity, sparse.momentum))
    sparse.dense_value.copy_(torch.where(success, parameters, sparse.dense_value))
    sparse.dense_momentum.copy_(torch.where(success, dense_velocity, sparse.dense_momentum))
    return torch.stack([deaths, success.long()])


def _births(
    sparse: SparseModel, survives: Tensor, deaths: Tensor, step: int | Tensor
) -> tuple[Tensor, Tensor]:
    """Return candidates i64[2κ + 1024], and bool of that length: the first `deaths` of them that may be born.

    The candidates are the integers of `random.IntegerStream`, in order (a word that it skips stands for the
    position N); one may be born if no survivor and no earlier candidate has its position.
    """
    count, size, device = 2 * sparse.kappa + _SPARE, sparse.size, sparse.index.device
    word = device_random.words(count, seed=sparse.seed, step=step, purpose=random.BIRTH, device=device)
    product = word * size
    valid = (product & 0xFFFFFFFF) >= 2**32 % size
    candidates = torch.where(valid, product >> 32, size)
    taken = torch.zeros(size + 1, dtype=torch.bool, device=device)
    taken.index_copy_(0, sparse.index, survives)
    ascending, order = candidates.sort(stable=True)
    repeats = torch.zeros_like(valid)
    repeats[1:] = ascending[1:] == ascending[:-1]
    repeated = torch.zeros_like(valid).index_copy_(0, order, repeats)
    dormant = valid & ~repeated & ~taken[candidates]
    return candidates.clamp(max=size - 1), dormant & (dormant.cumsum(0) <= deaths)


def raise_if_failed(deaths_and_success: Tensor, step: int) -> int:
    """Return the deaths of a step whose tensor is i64[2]; `EdgeBcsError` if it failed."""
    deaths, success = deaths_and_success.tolist()
    if not success:
        raise EdgeBcsError(f"step {step} would make a weight that is not finite; lower the learning rate")
    return int(deaths)
