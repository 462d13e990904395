"""Whether a module has been trained: what `sparsify` looks at before it draws new weights.

A module counts as trained if one of these is found in it:

| evidence | what excuses it |
| --- | --- |
| a batch norm whose running statistics are not (0, 1) | it saw 1 to 9 batches: somebody looked at shapes |
| a batch norm whose scale or shift differs between channels | |
| a bias beyond ±1/√fan-in, where torch draws it | all of the layer are equal |
| weights that no initialisation gives | there are fewer than 64 |

Initialisations are those of torch.nn.init: constants (zeros aside), uniform, normal and truncated normal
values, which orthogonal matrices have, too, alike in every row and column of a kernel. Weights count as
others only if chance alone would make them so once in ten million networks. What was trained for a few steps
may therefore pass as new; what is new does not pass as trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

_FEW_BATCHES = 9
_FEWEST = 64
_LOOKED_AT, _ROWS, _COLUMNS = 1 << 13, 256, 1024
_LARGEST_DISTANCE = 3.2  # of √n·D (Kolmogorov-Smirnov): by chance once in 4e8 times
_LARGEST_DEVIATION = 7.0  # of a normal deviate
_CUT = 2.0  # standard deviations, where a truncated normal ends
_KEPT = 0.87962566  # standard deviation of such a normal, of its own


def evidence_of_training(module: nn.Module, *, kernels: bool = True) -> str | None:
    """Return what shows that `module` was trained, as a clause; None if nothing does.

    With `kernels` false the weights of convolutions and dense layers are not looked at, nor are biases.
    """
    if any(parameter.is_meta for parameter in module.parameters()):
        return None
    with torch.no_grad():
        return next(_evidence(module, kernels), None)


def _evidence(module: nn.Module, kernels: bool) -> Iterator[str]:
    parts = list(module.named_modules())
    for name, part in parts:
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            yield from _of_batch_norm(f"the batch norm {name}".rstrip(), part)
    for name, part in parts if kernels else ():
        if isinstance(part, nn.Conv2d | nn.Linear):
            layer, bound = name or "the layer", 1 / math.sqrt(part.weight[0].numel())
            if part.bias is not None and _varies(part.bias) and part.bias.abs().max().item() > 1.001 * bound:
                yield f"the bias of {layer} reaches beyond ±{bound:.3g}"
            if not _drawn(part.weight):
                yield f"the weights of {layer} are not as any initialisation draws them"


def _of_batch_norm(name: str, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> Iterator[str]:
    counter, mean, variance = norm.num_batches_tracked, norm.running_mean, norm.running_var
    seen = 0 if counter is None else int(counter)
    if seen > _FEW_BATCHES:
        yield f"{name} has seen {seen:,} batches"
    elif (
        seen == 0
        and mean is not None
        and variance is not None
        and bool(((mean != 0) | (variance != 1)).any())
    ):
        yield f"{name} has running statistics"
    for kind, values in (("scale", norm.weight), ("shift", norm.bias)):
        if values is not None and _varies(values):
            yield f"the {kind} of {name} differs between channels"


def _varies(values: Tensor) -> bool:
    return bool((values != values[0]).any())


def _drawn(weight: Tensor) -> bool:
    """Whether an initialisation may have given these weights [out, …]."""
    rows = weight.detach().flatten(1)
    if rows.numel() < _FEWEST:
        return True
    some = rows.flatten()[:: -(-rows.numel() // _LOOKED_AT)].cpu().numpy()
    rows = rows[:: -(-rows.shape[0] // _ROWS), :: -(-rows.shape[1] // _COLUMNS)].cpu().double()
    grid = (rows - rows.mean()).numpy()
    return _known_distribution(some) and _alike(grid) and _alike(grid.T)


def _known_distribution(values: NDArray[np.float32]) -> bool:
    """Whether the distribution of values may be constant, uniform, normal or a normal cut at 2 sigmas."""
    ordered = np.sort(values[values != 0].astype(np.float64))
    if len(ordered) == 0 or ordered[0] == ordered[-1]:
        return True
    low, high = ordered[0], ordered[-1]
    count = len(ordered)
    steps = np.arange(count + 1) / count

    def fits(distribution: NDArray[np.float64]) -> bool:
        distance = max((steps[1:] - distribution).max(), (distribution - steps[:-1]).max())
        return bool(math.sqrt(count) * distance < _LARGEST_DISTANCE)

    if fits((ordered - low) / (high - low)):
        return True
    scale = math.sqrt((ordered @ ordered) / count)
    if fits(_normal(ordered / scale)):
        return True
    tail = float(_normal(np.array([-_CUT]))[0])
    return fits(((_normal(ordered * (_KEPT / scale)) - tail) / (1 - 2 * tail)).clip(0, 1))


def _normal(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the distribution function of the standard normal."""
    found: NDArray[np.float64] = torch.special.ndtr(torch.from_numpy(values)).numpy()
    return found


def _alike(rows: NDArray[np.float64]) -> bool:
    """Whether means and mean squares of the rows differ no more than those of independent draws do."""
    count, length = rows.shape
    if count < 8 or length < 8:
        return True
    squares = np.square(rows)
    square = squares.mean()
    if square == 0:
        return True
    fourth = np.square(squares).mean() / square**2
    means, energies = rows.mean(axis=1), squares.mean(axis=1) / square
    deviations = [float(means @ means) / square * length / count]
    if fourth > 1:
        deviations.append(float(energies.var(ddof=1)) * length / (fourth - 1))
    # Each is χ² of as many degrees as rows, divided by them: its cube root is all but normal.
    spread = 2 / (9 * count)
    return all(
        (ratio ** (1 / 3) - (1 - spread)) / math.sqrt(spread) < _LARGEST_DEVIATION for ratio in deviations
    )
