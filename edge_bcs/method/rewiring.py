"""The rewiring step in plain numpy: what the operator `edge_bcs::RewireStep` does, to the bit.

Algorithm 1 of Özdenizci and Legenstein (ICML 2021): momentum SGD with decoupled weight decay and Langevin
noise on the κ active connections; a connection whose weight would leave its sign's side of zero dies; as many
dormant positions as died, drawn uniformly over the whole network, are born with θ = 1e-12.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_bcs.core import random
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.state import NEWBORN as NEWBORN


def rewire_step(
    value: NDArray[np.float32],
    index: NDArray[np.int32],
    momentum: NDArray[np.float32],
    gradient: NDArray[np.float32],
    *,
    size: int,
    seed: int,
    step: int,
    learning_rate: float,
    weight_decay: float,
    momentum_factor: float,
    noise: float,
    spans: Sequence[tuple[int, int]] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.float32]]:
    """One step; every operation in float32, rounded separately, in this order.

    Args:
        value: f32[κ], the weights w = γ·θ, never 0.
        index: i32[κ], their positions, strictly ascending in [0, size).
        momentum: f32[κ], v; of those in ``spans`` alone, if there are any.
        gradient: f32[κ], g = ∂loss/∂w; likewise.
        size: N, the number of prunable weights of the network.
        seed: of the noise, the draws and γ.
        step: number of this step.
        learning_rate: λ.
        weight_decay: λ_w, not scaled by the learning rate.
        momentum_factor: μ.
        noise: σ; the noise has standard deviation λ·σ.
        spans: (begin, end) of each run of positions that are trained, ascending: connections move among these
            alone, and the others stay as they are. None: all.

    Returns:
        value, index and momentum after the step, new arrays of the same lengths.

    Raises:
        EdgeBcsError: arrays of different lengths, positions out of range or order, a weight of 0, a negative
            hyper-parameter, or anything not finite, before or after the step.
    """
    if spans is not None:
        inside = np.zeros(len(index), bool)
        for begin, end in spans:
            inside |= (index >= begin) & (index < end)
        still = value[~inside], index[~inside]
        value, index = value[inside], index[inside]
    check_buffers(value, index, momentum, gradient, size=size)
    rate, decay, factor, sigma = (
        np.float32(x) for x in (learning_rate, weight_decay, momentum_factor, noise)
    )
    for name, number in (
        ("learning rate", rate),
        ("weight decay", decay),
        ("momentum", factor),
        ("noise", sigma),
    ):
        if not (np.isfinite(number) and number >= 0):
            raise EdgeBcsError(f"the {name} is {number}, not a finite number of at least 0.")
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        v = (factor * momentum) + gradient
        w = (value * (np.float32(1) - decay)) - (rate * v)
        if sigma != 0:
            normal = random.normal(len(value), seed=seed, step=step, purpose=random.NOISE)
            w = w + (rate * sigma) * normal
    if not (np.isfinite(v).all() and np.isfinite(w).all()):
        raise EdgeBcsError("the step would make a weight that is not finite; nothing was changed.")

    survives = (w != 0) & (np.signbit(w) == np.signbit(value))
    deaths = int((~survives).sum())
    born = draw_births(index[survives], deaths, size=size, seed=seed, step=step, spans=spans)
    merged = np.concatenate([index[survives], born])
    order = np.argsort(merged)
    value = np.concatenate([w[survives], random.signs(born, seed=seed) * NEWBORN])
    momentum = np.concatenate([v[survives], np.zeros(len(born), np.float32)])
    value, index, momentum = value[order], merged[order].astype(np.int32), momentum[order]
    if spans is not None:
        index = np.concatenate([still[1], index])
        order = np.argsort(index)
        value, index = np.concatenate([still[0], value])[order], index[order]
    return value, index, momentum


def draw_births(
    survivors: NDArray[np.int32],
    count: int,
    *,
    size: int,
    seed: int,
    step: int,
    spans: Sequence[tuple[int, int]] | None = None,
    purpose: int = random.BIRTH,
) -> NDArray[np.int32]:
    """Draws positions uniformly among those of [0, size), or of ``spans``, that are not survivors, without
    repeating one.

    Returns:
        i32[count], in the order drawn.
    """
    taken = set(survivors.tolist())
    runs = [(0, size)] if spans is None else spans
    lengths = [end - begin for begin, end in runs]
    before = np.cumsum([0, *lengths])
    stream = random.IntegerStream(int(before[-1]), seed=seed, step=step, purpose=purpose)
    born: list[int] = []
    while len(born) < count:
        for place in stream.take(count - len(born)).tolist():
            run = int(np.searchsorted(before, place, side="right")) - 1
            candidate = runs[run][0] + place - int(before[run])
            if candidate not in taken:
                taken.add(candidate)
                born.append(candidate)
    return np.array(born, np.int32)


def check_buffers(
    value: NDArray[np.float32],
    index: NDArray[np.int32],
    momentum: NDArray[np.float32],
    gradient: NDArray[np.float32],
    *,
    size: int,
) -> None:
    """Checks what must hold of the COO buffers at any time.

    Raises:
        EdgeBcsError: it does not hold.
    """
    kappa = len(value)
    if not (value.shape == index.shape == momentum.shape == gradient.shape == (kappa,)):
        raise EdgeBcsError("value, index, momentum and gradient must be vectors of one length.")
    if kappa > size:
        raise EdgeBcsError(f"there are {kappa} connections for {size} positions.")
    if kappa and (index[0] < 0 or index[-1] >= size or (np.diff(index.astype(np.int64)) <= 0).any()):
        raise EdgeBcsError(f"the positions must be strictly ascending in [0, {size}).")
    for name, array in (("value", value), ("momentum", momentum), ("gradient", gradient)):
        if not np.isfinite(array).all():
            raise EdgeBcsError(f"{name} has an element that is not finite.")
    if (value == 0).any():
        raise EdgeBcsError("a connection has the weight 0, which none may have.")
