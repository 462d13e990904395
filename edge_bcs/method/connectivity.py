"""The global constraint ‖θ‖₀ = κ: counting, spreading over layers, drawing (Algorithm 1, lines 2-3).

The weights of all kernels (convolutions and linear layers) that do not stay dense are numbered once, layer by
layer in the order of `named_modules()`, each kernel row-major: N weights. `sparsify` draws κ of them, for the
whole network, and from then on there are exactly κ. The state itself lives in
`edge_bcs.method.sparse_model.SparseModel`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Sequence
from decimal import Decimal
from fnmatch import fnmatchcase
from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edge_bcs.core import random
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.metadata import exact_sparsity
from edge_bcs.core.segments import Segment
from edge_bcs.exportable import warn_if_not_exportable, with_outputs
from edge_bcs.method.heads import is_new
from edge_bcs.method.pruning import largest_of_all, largest_of_layers
from edge_bcs.method.sparse_model import KERNELS, SparseModel, prunable_layers, weight_name
from edge_bcs.method.trained import evidence_of_training
from edge_bcs.method.wrappers import unwrapped

__all__ = [
    "DISTRIBUTIONS",
    "SparseModel",
    "dense_by_default",
    "densities_of",
    "draw_positions",
    "erk_densities",
    "fixed",
    "kappa",
    "layer_counts",
    "matching",
    "paper_densities",
    "sparsify",
    "uniform_densities",
]

DISTRIBUTIONS = ("paper", "uniform", "erk")
STARTS = ("new", "magnitude")


class HasInitialDensity(Protocol):
    """A network that states its own initial densities (every network of `edge_bcs.models`)."""

    def initial_density(self, position: int, layers: int, name: str, connectivity: float) -> float:
        """Return the density of prunable layer `position` of `layers`, called `name`."""
        ...


def kappa(size: int, sparsity: float | str | Decimal) -> int:
    """Return floor((1 − sparsity)·size) in exact decimal arithmetic.

    Raises:
        EdgeBcsError: the sparsity is not in [0, 1) (see `exact_sparsity`), or leaves not a single connection.
    """
    count = int((1 - exact_sparsity(sparsity)) * size)
    if count < 1:
        raise EdgeBcsError(f"a sparsity of {sparsity} leaves none of {size} weights; choose a lower one")
    return count


def paper_densities(network: nn.Module, layers: Sequence[Segment], connectivity: float) -> list[float]:
    """Return the paper's initial density of each layer (appendix A.3), before scaling to κ.

    For a network that the paper does not have, the rule that its tables follow: the first and the last
    layer of the network 0.6, if they are among `layers`; layers that hold at most a hundredth of the weights
    0.2; every other layer half the global connectivity.
    """
    if hasattr(network, "initial_density"):
        known = cast(HasInitialDensity, network)
        return [
            known.initial_density(position, len(layers), layer.name, connectivity)
            for position, layer in enumerate(layers)
        ]
    size = sum(layer.size for layer in layers)
    densities = [0.2 if layer.size * 100 <= size else 0.5 * connectivity for layer in layers]
    ends = _ends(network)
    return [0.6 if layer.name in ends else density for layer, density in zip(layers, densities, strict=True)]


def _ends(network: nn.Module) -> tuple[str, str]:
    """Return the names of the first and the last module with a kernel."""
    names = [name for name, module in network.named_modules() if isinstance(module, KERNELS)]
    return names[0], names[-1]


def dense_by_default(network: nn.Module) -> frozenset[str]:
    """Return the modules whose kernels are not worth an index: names, none for networks of `edge_bcs.models`.

    These are depthwise convolutions (a channel of theirs has as few weights as positions), and the first and
    the last kernel of a network where it holds less than a hundredth of all kernels' weights.
    """
    if hasattr(network, "initial_density"):
        return frozenset()
    kernels = {name: module for name, module in network.named_modules() if isinstance(module, KERNELS)}
    dense = {name for name, module in kernels.items() if _is_depthwise(module)}
    size = sum(module.weight.numel() for module in kernels.values())
    for name in _ends(network) if kernels else ():
        if kernels[name].weight.numel() * 100 < size:
            dense.add(name)
    return frozenset() if len(dense) == len(kernels) else frozenset(dense)


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups > 1 and module.groups == module.in_channels


def matching(network: nn.Module, patterns: Sequence[str]) -> frozenset[str]:
    """Return the modules with a kernel whose names one of `patterns` matches, as in a shell (*, ?, []).

    Raises:
        EdgeBcsError: a pattern matches no module that has a kernel.
    """
    names = [name for name, module in network.named_modules() if isinstance(module, KERNELS)]
    found: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            some = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
            raise EdgeBcsError(f"no convolution or linear layer is called {pattern!r}; there are {some}")
        found |= matched
    return frozenset(found)


def uniform_densities(layers: Sequence[Segment]) -> list[float]:
    """Return the same density for every layer."""
    return [1.0 for _ in layers]


def erk_densities(layers: Sequence[Segment]) -> list[float]:
    """Return Erdős-Rényi-kernel densities: sum of a kernel's dimensions over product (Evci et al., 2020)."""
    return [sum(layer.shape) / math.prod(layer.shape) for layer in layers]


def densities_of(
    distribution: str, network: nn.Module, layers: Sequence[Segment], connectivity: float
) -> list[float]:
    """Return the densities, before scaling to κ, that one of `DISTRIBUTIONS` gives the layers."""
    if distribution == "paper":
        return paper_densities(network, layers, connectivity)
    return erk_densities(layers) if distribution == "erk" else uniform_densities(layers)


def layer_counts(sizes: Sequence[int], densities: Sequence[float], count: int) -> NDArray[np.int64]:
    """Return how many connections each layer starts with: i64[L], summing to `count` exactly.

    The densities are scaled by one factor. A layer that would be more than full is full, and the factor
    grows for the others; fractions are rounded by largest remainder. As long as `count` allows, no layer
    starts empty (an empty layer cuts the network, and no gradient would ever say so).

    Args:
        sizes: number of weights of each layer.
        densities: relative densities, all positive.
        count: connections to hand out, at most sum(sizes).
    """
    size = np.asarray(sizes, dtype=np.float64)
    share = size * np.asarray(densities, dtype=np.float64)
    full = np.zeros(len(size), dtype=bool)
    while True:
        factor = (count - size[full].sum()) / share[~full].sum() if not full.all() else 0.0
        overfull = ~full & (share * factor >= size)
        if not overfull.any():
            break
        full |= overfull
    target = np.where(full, size, share * factor)
    counts = np.floor(target).astype(np.int64)
    by_remainder = np.argsort(-(target - counts), kind="stable")
    for layer in by_remainder[: count - int(counts.sum())]:
        counts[layer] += 1
    for layer in np.flatnonzero(counts == 0):
        donor = int(np.argmax(counts))
        if counts[donor] > 1:
            counts[donor] -= 1
            counts[layer] += 1
    return counts


def draw_positions(seed: int, layer_number: int, size: int, count: int) -> NDArray[np.int64]:
    """Return `count` distinct positions below `size`, ascending, drawn uniformly (MASK, step = layer)."""
    # The smaller of the drawn set and its complement is drawn, so that few draws repeat.
    wanted = min(count, size - count)
    stream = random.IntegerStream(size, seed=seed, step=layer_number, purpose=random.MASK)
    drawn = stream.take(wanted + 16)
    distinct, first = np.unique(drawn, return_index=True)
    while len(distinct) < wanted:
        drawn = np.concatenate([drawn, stream.take(2 * (wanted - len(distinct)))])
        distinct, first = np.unique(drawn, return_index=True)
    chosen = np.sort(distinct[np.argsort(first)[:wanted]]).astype(np.int64)
    if wanted == count:
        return chosen
    keep = np.ones(size, dtype=bool)
    keep[chosen] = False
    return np.flatnonzero(keep).astype(np.int64)


def sparsify(
    model: nn.Module,
    sparsity: float | str | Decimal = 0.99,
    seed: int = 0,
    distribution: str | None = None,
    *,
    dense: Sequence[str] | None = None,
    start: str | None = None,
    classes: int | Sequence[str] | None = None,
    input_shape: Sequence[int] | None = None,
) -> SparseModel:
    """Return a copy of `model` with exactly κ = floor((1 − sparsity)·N) connections (Algorithm 1, lines 2-3).

    A new network's connections are drawn at random; θ is |He normal| with the dense fan-in, γ the hash of
    (seed, position). Kernels that stay dense are He normal with random signs. Everything that is not a kernel
    (biases, norms) is copied as it is. With `start="magnitude"` the largest weights of a trained network are
    kept, with their signs, and everything else is copied. A warning says if `export` would not take the
    network.

    Args:
        model: any float32 module whose parameters of several dimensions belong to Conv2d and Linear.
        sparsity: fraction of the N weights that is zero, in [0, 1). N counts the kernels that do not stay
            dense.
        seed: of mask, weights and signs; 64 bits.
        distribution: initial per-layer densities, all scaled to sum to κ: "paper" (see `paper_densities`; the
            default of a new network), "uniform", or "erk" (see `erk_densities`); or "global" (the default of
            "magnitude"): the largest of the whole network (see `pruning.largest_of_all`).
        dense: patterns of the names of modules whose kernels stay dense (see `matching`), none if it is
            empty; default: see `dense_by_default`.
        start: "magnitude" keeps trained weights; "new" says that they shall be replaced by random ones;
            without it a module with evidence of training (see `edge_bcs.method.trained`) is refused.
        classes: how many outputs the network shall have, or their names; where it has another number, its
            last layer is made anew (see `edge_bcs.method.heads`), and if that is sparse, the places of its
            connections are drawn: by "global" as many as its even part of κ. Default: those that it has.
        input_shape: (C, H, W) of the images, by which the last layer is found; usual sizes are tried.

    Raises:
        EdgeBcsError: an impossible sparsity, an unknown distribution, a trained module without `start`, a
            last layer that cannot be told, or a module that cannot be handled.
    """
    if start is not None and start not in STARTS:
        raise EdgeBcsError(f"there is no start {start!r}; choose {' or '.join(STARTS)}")
    keep = start == "magnitude"
    distribution = distribution or ("global" if keep else "paper")
    if distribution not in (*DISTRIBUTIONS, "global"):
        choices = ", ".join((*DISTRIBUTIONS, "global"))
        raise EdgeBcsError(f"there is no distribution {distribution!r}; choose {choices}")
    if distribution == "global" and not keep:
        raise EdgeBcsError(
            'the distribution "global" ranks trained weights: give start="magnitude" (on the command line '
            "--start magnitude), or another distribution"
        )
    given = model
    model = _network(model)
    names = None if classes is None or isinstance(classes, int) else tuple(classes)
    if classes is not None:
        model = copy.deepcopy(model)
        outputs = classes if isinstance(classes, int) else len(classes)
        with_outputs(model, outputs, input_shape=input_shape, seed=seed)
    prunable_layers(model)  # what is wrong with the network comes before what is wrong with a pattern
    kept = dense_by_default(model) if dense is None else matching(model, dense)
    layers = prunable_layers(model, kept)
    _check_start(given, start)
    sizes = [layer.size for layer in layers]
    count = kappa(sum(sizes), sparsity)
    if distribution == "global":
        begun = _pruned(model, layers, count, seed)
    else:
        densities = densities_of(distribution, model, layers, float(1 - Decimal(str(sparsity))))
        counts = layer_counts(sizes, densities, count)
        begun = _pruned(model, layers, counts, seed) if keep else _drawn(model, layers, counts, kept, seed)
    sparse = SparseModel(*begun, seed=seed, sparsity=str(sparsity), distribution=distribution, dense=kept)
    sparse.classes = names
    warn_if_not_exportable(sparse)
    return sparse


def _network(model: nn.Module) -> nn.Module:
    return model.network if isinstance(model, SparseModel) else unwrapped(model)


def _check_start(model: nn.Module, start: str | None) -> None:
    """Raise `EdgeBcsError` if new weights would replace trained ones and nobody said so."""
    if start is not None:
        return
    if isinstance(model, SparseModel):
        steps = f"it has {model.step:,} training steps behind it" if model.step else None
        evidence = steps or evidence_of_training(model.network, kernels=False)
    else:
        evidence = evidence_of_training(model)
    if evidence is not None:
        raise EdgeBcsError(
            f"the network looks trained ({evidence}), and new random weights would replace what it has "
            'learnt: give start="magnitude" to keep the largest, or start="new" if they shall (on the '
            "command line --start magnitude or --start new)"
        )


def fixed(model: nn.Module, trained: SparseModel, seed: int = 0, *, start: str | None = None) -> SparseModel:
    """Return a copy of `model` with a random mask that has the layer counts of a trained network.

    The baseline "Fixed" of the paper (section 4.1): the densities at which the method converged, without its
    connections. Train it with `method="fixed"`. `start` is that of `sparsify`.

    Raises:
        EdgeBcsError: the two networks have different kernels, `model` is trained or cannot be handled.
    """
    if start not in (None, "new"):
        raise EdgeBcsError('a fixed mask is random: it starts "new", with random weights')
    model = unwrapped(model)
    kept = trained.dense_kernels
    layers = prunable_layers(model, kept)
    _check_start(model, start)
    if layers != trained.layers:
        raise EdgeBcsError("the network whose layer counts are to be taken has other kernels than the model")
    counts = np.array(list(trained.layer_counts().values()))
    return SparseModel(
        *_drawn(model, layers, counts, kept, seed),
        seed=seed,
        sparsity=trained.sparsity,
        distribution=trained.distribution,
        dense=kept,
    )


_Start = tuple[nn.Module, NDArray[np.float32], NDArray[np.int64]]
"""A network, and the values and positions of its connections."""


def _drawn(
    model: nn.Module, layers: Sequence[Segment], counts: NDArray[np.int64], dense: Collection[str], seed: int
) -> _Start:
    """Return a copy of `model` with so many random connections in each layer, and random `dense` kernels."""
    if not 0 <= seed < 2**64:
        raise EdgeBcsError(f"the seed must be an unsigned 64-bit number, not {seed}")
    index = np.concatenate(
        [
            layer.offset + draw_positions(seed, number, layer.size, int(active))
            for number, (layer, active) in enumerate(zip(layers, counts, strict=True))
        ]
    )
    scale = np.repeat([_he(layer.shape) for layer in layers], counts)
    normal = random.normal(len(index), seed=seed, step=0, purpose=random.WEIGHT)
    theta = np.abs(normal) * scale.astype(np.float32)
    value = random.signs(index, seed=seed) * theta
    model = copy.deepcopy(model)
    _draw_dense(model, dense, seed)
    return model, value, index


def _pruned(
    model: nn.Module, layers: Sequence[Segment], counts: NDArray[np.int64] | int, seed: int
) -> _Start:
    """Return a copy of `model` with its largest weights: so many of each layer, or of all."""
    model = copy.deepcopy(model)
    kernels = [model.get_parameter(weight_name(layer)).detach().reshape(-1) for layer in layers]
    weights = torch.cat(kernels).cpu().numpy().astype(np.float32)
    if not np.isfinite(weights).all():
        raise EdgeBcsError("a weight of the network is not finite: nothing can be started from it")
    shares: Sequence[int] | NDArray[np.int64]
    if isinstance(counts, int):
        shares = [max(1, round(counts * layer.size / len(weights))) for layer in layers]
    else:
        shares = counts
    # In a layer that is new no weight is worth more than another: its connections are drawn.
    drawn = {
        number: layer.offset + draw_positions(seed, number, layer.size, int(shares[number]))
        for number, layer in enumerate(layers)
        if is_new(model.get_submodule(layer.name))
    }
    if isinstance(counts, int):
        index = largest_of_all(weights, layers, counts, drawn)
    else:
        chosen = largest_of_layers(weights, layers, counts.tolist())
        bounds = np.cumsum([0, *counts])
        parts = [drawn.get(n, chosen[bounds[n] : bounds[n + 1]]) for n in range(len(layers))]
        index = np.concatenate(parts)
    value = weights[index]
    # A connection has a sign, and so a weight of exactly zero is made the smallest number there is.
    tiny = np.finfo(np.float32).tiny * random.signs(index, seed=seed)
    return model, np.where(value == 0, tiny, value).astype(np.float32), index


def _he(shape: Sequence[int]) -> float:
    """Return √(2 / fan-in), with the fan-in of the dense layer (He et al., 2015)."""
    return math.sqrt(2.0 / math.prod(shape[1:]))


@torch.no_grad()
def _draw_dense(model: nn.Module, dense: Collection[str], seed: int) -> None:
    """Draw the kernels that stay dense (WEIGHT, step 1, one stream through all of them in module order)."""
    start = 0
    for name, module in model.named_modules():
        if name in dense and isinstance(module, KERNELS):
            shape = tuple(module.weight.shape)
            count = math.prod(shape)
            numbers = random.normal(count, seed=seed, step=1, purpose=random.WEIGHT, start=start)
            module.weight.copy_(torch.from_numpy(numbers * np.float32(_he(shape))).view(shape))
            start += count
