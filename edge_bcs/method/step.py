"""One training step in torch (Algorithm 1, lines 5-26), the reference for everything compiled.

`training_step` is the algorithm in the order of the paper: attack, gradients, update and rewiring. The
update comes in two forms that agree to the bit on a CPU: `update_reference`, which calls the plain numpy
step, and `update`, vectorised in torch on whatever device the network is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge_bcs.core import random
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.objectives import Objective
from edge_bcs.core.part import Trained, merged
from edge_bcs.core.settings import BATCH_NORMS, REWIRE, Attack, Coefficients, check_choice
from edge_bcs.core.signals import HeldSignals
from edge_bcs.method import attacks, device_random, losses, rewiring
from edge_bcs.method.attacks import evaluation_mode
from edge_bcs.method.distillation import Teacher
from edge_bcs.method.sparse_model import SparseModel


@dataclass(frozen=True)
class Outcome:
    """What one batch gave: mean loss f32[], and correct answers, i64[1], or i64[2] (clean, adversarial)."""

    loss: Tensor
    correct: Tensor


def craft(
    sparse: SparseModel,
    x: Tensor,
    labels: Tensor,
    objective: Objective,
    attack: Attack,
    *,
    step: int | Tensor,
    seed: int,
    position: int = 0,
    batch: int | None = None,
) -> Tensor:
    """Return the images f32 [n, C, H, W] that the objective attacks, attacked; the others as they are.

    Args:
        sparse: the network, attacked in evaluation mode.
        x: clean images f32 [n, C, H, W] in [0, 1].
        labels: i64[n].
        objective: says how much of the batch is attacked, from which start, and against which loss.
        attack: its kind, radius, step and number of steps.
        step: number of the training step, from 0; on a GPU it may be a tensor i64[].
        seed: of the start.
        position: place of the first image in the whole batch, where x is a part of one.
        batch: size of the whole batch; n if None.
    """
    attacked = objective.attacked(batch or len(x)) - position
    attacked = max(0, min(len(x), attacked))
    if attacked == 0 or not objective.adversarial:
        return x
    adversarial = attacks.crafted(
        sparse,
        x[:attacked],
        labels[:attacked],
        objective.crafting(attack),
        loss=objective.attack_loss,
        seed=seed,
        step=step,
        first=position * x[0].numel(),
    )
    return torch.cat([adversarial, x[attacked:]]) if attacked < len(x) else adversarial


def accumulate(
    sparse: SparseModel,
    x: Tensor,
    adversarial: Tensor,
    labels: Tensor,
    objective: Objective,
    *,
    beta: float | None = None,
    sample_weight: Tensor | None = None,
    batch_norm: str = "batch",
    trained: Trained | None = None,
    teacher: Teacher | None = None,
) -> Outcome:
    """Add the gradient of Σ weight·loss to the network's gradients (see `SparseModel.zero_gradients`).

    Args:
        sparse: the network.
        x, adversarial: f32 [n, C, H, W], as `craft` takes and returns; x is used by two branches and by a
            teacher only.
        labels: i64[n].
        objective, beta: the loss; see `objectives.per_sample`.
        sample_weight: f32[n], all 1/n if None.
        batch_norm: "batch": statistics of this batch, running averages updated (once for each branch: clean
            and adversarial images go through separately); "frozen": running averages, as in evaluation.
            Nothing but batch norm knows of it: dropout and stochastic depth are the identity in both.
        trained: what has gradients; the batch norms outside it have running averages. None: everything.
        teacher: whose answers to x count, too (see `Teacher`).
    """
    check_choice("batch norm", batch_norm, BATCH_NORMS)
    names: Collection[str] = [item.name for item in sparse.statistics] if batch_norm == "batch" else ()
    if trained is not None and names:
        names = trained.batch_norms(names)
    norms = [sparse.network.get_submodule(name) for name in names]
    with evaluation_mode(sparse, but=norms), _learning(sparse, trained):
        return _backward(sparse, x, adversarial, labels, objective, beta, sample_weight, teacher)


@contextmanager
def _learning(sparse: SparseModel, trained: Trained | None) -> Iterator[None]:
    """Let autograd compute no other gradients than those of what is trained."""
    if trained is None:
        yield
        return
    names = {f"{kernel.name}.weight".removeprefix(".") for kernel in trained.kernels}
    names |= {parameter.name for parameter in trained.dense}
    before = [(parameter, parameter.requires_grad) for parameter in sparse.network.parameters()]
    try:
        for name, parameter in sparse.network.named_parameters():
            parameter.requires_grad_(name in names)
        yield
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)


def _backward(
    sparse: SparseModel,
    x: Tensor,
    adversarial: Tensor,
    labels: Tensor,
    objective: Objective,
    beta: float | None,
    sample_weight: Tensor | None,
    teacher: Teacher | None,
) -> Outcome:
    branches = [sparse(x), sparse(adversarial)] if objective.two_branches else [sparse(adversarial)]
    values = losses.per_sample(objective, labels, branches[0], branches[-1], beta)
    if teacher is not None:
        values = values + teacher.loss(x, branches[-1])
    loss = losses.weighted(values, sample_weight)
    loss.backward()  # type: ignore[no-untyped-call]
    counted = torch.ones_like(labels, dtype=torch.bool) if sample_weight is None else sample_weight > 0
    correct = torch.stack([((branch.argmax(1) == labels) & counted).sum() for branch in branches])
    return Outcome(loss.detach(), correct)


def training_step(
    sparse: SparseModel,
    x: Tensor,
    labels: Tensor,
    objective: Objective,
    *,
    step: int,
    hyper: Coefficients | None = None,
    attack: Attack | None = None,
    beta: float | None = None,
    batch_norm: str = "batch",
    seed: int | None = None,
    reference: bool = False,
) -> Outcome:
    """Do one step of Algorithm 1 (lines 5-26) on a batch; a signal interrupts it before it changes anything.

    Args:
        sparse: the network, which changes; its `step` is then that of the next one.
        x: images f32 [n, C, H, W] in [0, 1].
        labels: i64[n].
        objective: one of `edge_bcs.core.objectives`.
        step: number of this step, from 0; with the seed it fixes every random number.
        hyper, attack: the paper's if None.
        beta: weight of the objective's second term; its default if None.
        batch_norm: see `accumulate`.
        seed: of the attack's start; the network's if None. The update always draws with the network's.
        reference: update through the plain numpy step instead of the vectorised one.

    Raises:
        EdgeBcsError: a step that would make a weight that is not finite.
    """
    hyper, attack = hyper or Coefficients(), attack or Attack()
    seed = sparse.seed if seed is None else seed
    adversarial = craft(sparse, x, labels, objective, attack, step=step, seed=seed)
    with HeldSignals() as signals:
        signals.hold()  # from where running statistics change to where everything has
        sparse.zero_gradients()
        outcome = accumulate(sparse, x, adversarial, labels, objective, beta=beta, batch_norm=batch_norm)
        if reference:
            update_reference(sparse, hyper, step=step)
        else:
            update(sparse, hyper, step=step)
        sparse.step = step + 1
    return outcome


@torch.no_grad()
def update_reference(sparse: SparseModel, hyper: Coefficients, *, step: int) -> None:
    """Update and rewire (Algorithm 1, lines 15-26) with the accumulated gradients, through plain numpy.

    Raises:
        EdgeBcsError: a gradient or a weight that is not finite; nothing is changed then.
    """
    gradient, dense_gradient = sparse.gradients()
    if not torch.isfinite(dense_gradient).all():
        raise EdgeBcsError(f"step {step} would make a weight that is not finite; lower the learning rate")
    value, index = sparse.coo()
    value, index, momentum = rewiring.rewire_step(
        value,
        index.astype(np.int32),
        sparse.momentum.cpu().numpy(),
        gradient.cpu().numpy(),
        size=sparse.size,
        seed=sparse.seed,
        step=step,
        learning_rate=hyper.learning_rate,
        weight_decay=hyper.weight_decay,
        momentum_factor=hyper.momentum,
        noise=hyper.noise,
    )
    with HeldSignals() as signals:
        signals.hold()
        sparse.load_coo(value, index, momentum)
        _update_dense(sparse, dense_gradient, hyper)


def moved(
    value: Tensor,
    momentum: Tensor,
    gradient: Tensor,
    hyper: Coefficients,
    *,
    seed: int,
    step: int | Tensor,
) -> tuple[Tensor, Tensor]:
    """Return w and v of connections, f32[n] each, after momentum, decay and noise (Algorithm 1, line 15).

    v ← μ·v + g; w ← w·(1 − λ_w) − λ·v + λ·σ·z, each operation rounded separately.
    """
    rate = _f32(hyper.learning_rate)
    velocity = momentum * _f32(hyper.momentum) + gradient
    w = value * _one_minus(hyper.weight_decay) - velocity * rate
    if hyper.noise and len(w):
        scale = float(np.float32(rate) * np.float32(hyper.noise))
        normal = device_random.normal(len(w), seed=seed, step=step, purpose=random.NOISE, device=w.device)
        w += normal * scale
    return w, velocity


def moved_dense(sparse: SparseModel, gradient: Tensor, hyper: Coefficients) -> tuple[Tensor, Tensor]:
    """Return p and v of biases and batch norm, f32[D] each: v ← μ·v + g; p ← p·(1 − λ_w) − λ·v."""
    velocity = sparse.dense_momentum * _f32(hyper.momentum) + gradient
    parameters = sparse.dense_value * _one_minus(hyper.weight_decay) - velocity * _f32(hyper.learning_rate)
    return parameters, velocity


def _update_dense(
    sparse: SparseModel, gradient: Tensor, hyper: Coefficients, learn: Tensor | None = None
) -> None:
    parameters, velocity = moved_dense(sparse, gradient, hyper)
    if learn is not None:
        parameters = torch.where(learn, parameters, sparse.dense_value)
        velocity = torch.where(learn, velocity, sparse.dense_momentum)
    sparse.dense_value.copy_(parameters)
    sparse.dense_momentum.copy_(velocity)


@torch.no_grad()
def update(
    sparse: SparseModel,
    hyper: Coefficients,
    *,
    step: int,
    rewire: str = "uniform",
    trained: Trained | None = None,
) -> int:
    """Update and rewire as `update_reference`, vectorised on the network's device; return how many died.

    On a CPU the result is that of `update_reference` to the bit. `rewire` is "uniform" (Algorithm 1: over
    all dormant positions), "by-layer" (the released code: a layer in proportion to its size, then uniformly
    among its dormant positions) or "none" (a static mask: no sign constraint, nothing dies). With
    `trained` connections move among its kernels alone, and everything else stays as it is; by layer only all
    is trained.

    Raises:
        EdgeBcsError: a gradient or a weight that is not finite; nothing is changed then.
    """
    check_choice("rewiring", rewire, (*REWIRE, "none"))
    gradient, dense_gradient = sparse.gradients()
    value, index, momentum = sparse.value(), sparse.index, sparse.momentum
    still: tuple[Tensor, Tensor, Tensor] | None = None
    learn, spans = None, [(0, sparse.size)]
    if trained is not None:
        moving, learn = (_on(mask, index) for mask in trained_masks(sparse, trained))
        still = value[~moving], index[~moving], momentum[~moving]
        value, index, momentum, gradient = (each[moving] for each in (value, index, momentum, gradient))
        spans = merged(trained.kernels)
    w, velocity = moved(value, momentum, gradient, hyper, seed=sparse.seed, step=step)
    if rewire == "none":
        survives = torch.ones_like(index, dtype=torch.bool)
        w = torch.where(w == 0, value.sign() * float(rewiring.NEWBORN), w)
    else:
        survives = (w != 0) & (torch.signbit(w) == torch.signbit(value))
    finite = torch.isfinite(w).all() & torch.isfinite(dense_gradient).all()
    deaths, is_finite = torch.stack([(~survives).sum(), finite.long()]).tolist()
    if not is_finite:
        raise EdgeBcsError(f"step {step} would make a weight that is not finite; lower the learning rate")
    if deaths:
        remaining = index[survives]
        if rewire == "by-layer":
            born = _draw_by_layer(sparse, remaining, deaths, step)
        else:
            born = _draw_uniform(sparse, remaining, deaths, step, spans)
        newborn = torch.from_numpy(random.signs(born, seed=sparse.seed) * rewiring.NEWBORN)
        index = torch.cat([remaining, torch.from_numpy(born).to(index.device)])
        w = torch.cat([w[survives], newborn.to(w.device)])
        velocity = torch.cat([velocity[survives], velocity.new_zeros(deaths)])
    if still is not None:
        w, index, velocity = (torch.cat(both) for both in zip(still, (w, index, velocity), strict=True))
    if deaths or still is not None:
        index, order = index.sort()
        w, velocity = w[order], velocity[order]
    with HeldSignals() as signals:
        signals.hold()
        if deaths:
            sparse.write(w, index)
        else:
            sparse.weights[index] = w
        sparse.momentum.copy_(velocity)
        _update_dense(sparse, dense_gradient, hyper, learn)
    return int(deaths)


def trained_masks(sparse: SparseModel, trained: Trained) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Whether each connection, bool[κ], and each number of the other parameters, bool[D], is trained."""
    return trained.connections(sparse.index.cpu().numpy()), trained.numbers(len(sparse.dense_momentum))


def _on(mask: NDArray[np.bool_], like: Tensor) -> Tensor:
    return torch.from_numpy(mask).to(like.device)


def _f32(number: float) -> float:
    """Return the nearest float32, as Python's float: scalars take part in float32 arithmetic as float32."""
    return float(np.float32(number))


def _one_minus(number: float) -> float:
    return float(np.float32(1) - np.float32(number))


def _draw_uniform(
    sparse: SparseModel, survivors: Tensor, count: int, step: int, spans: Sequence[tuple[int, int]]
) -> NDArray[np.int64]:
    """Return the first `count` distinct dormant positions of the BIRTH stream, i64[count], in order.

    The stream counts the positions in ``spans``, (begin, end) each, ascending.
    """
    begins = np.array([begin for begin, _ in spans], np.int64)
    before = np.cumsum([0, *(end - begin for begin, end in spans)])
    stream = random.IntegerStream(int(before[-1]), seed=sparse.seed, step=step, purpose=random.BIRTH)
    born = np.empty(0, np.int64)
    while len(born) < count:
        places = stream.take(count - len(born))
        span = np.searchsorted(before, places, side="right") - 1
        candidates = begins[span] + places - before[span]
        _, first = np.unique(candidates, return_index=True)
        candidates = candidates[np.sort(first)]
        taken = np.isin(candidates, born) | _members(survivors, candidates)
        born = np.concatenate([born, candidates[~taken]])
    return born


def _members(ascending: Tensor, candidates: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return bool[n]: which of the candidates i64[n] occur in a vector in ascending order."""
    if not len(ascending):
        return np.zeros(len(candidates), dtype=bool)
    wanted = torch.from_numpy(candidates).to(ascending.device)
    place = torch.searchsorted(ascending, wanted).clamp_(max=len(ascending) - 1)
    found: NDArray[np.bool_] = (ascending[place] == wanted).cpu().numpy()
    return found


def _words(seed: int, step: int) -> Iterator[int]:
    """Yield words of the step's BIRTH stream far behind those that the draw of layers can consume."""
    start = 1 << 40
    while True:
        yield from random.words(1024, seed=seed, step=step, purpose=random.BIRTH, start=start).tolist()
        start += 1024


def _draw_by_layer(sparse: SparseModel, survivors: Tensor, count: int, step: int) -> NDArray[np.int64]:
    """Return `count` distinct dormant positions, i64[count]: layers ∝ size, then uniform inside.

    A layer without a dormant position is drawn again.
    """
    starts = np.array([layer.offset for layer in sparse.layers])
    positions = survivors.cpu().numpy()
    active = np.diff(np.searchsorted(positions, [*starts, sparse.size]))
    taken = set(positions.tolist())
    layer_stream = random.IntegerStream(sparse.size, seed=sparse.seed, step=step, purpose=random.BIRTH)
    words = _words(sparse.seed, step)
    born: list[int] = []
    while len(born) < count:
        number = int(np.searchsorted(starts, layer_stream.take(1)[0], side="right")) - 1
        layer = sparse.layers[number]
        if active[number] == layer.size:
            continue
        while True:
            product = next(words) * layer.size
            position = layer.offset + (product >> 32)
            if product % 2**32 >= 2**32 % layer.size and position not in taken:
                break
        taken.add(position)
        active[number] += 1
        born.append(position)
    return np.array(born, np.int64)
