"""The update without a wait of the host: the same bits, refusals that change nothing, no look at a number."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import edge_bcs
from edge_bcs.core import random
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.objectives import OBJECTIVES, objective_named
from edge_bcs.core.settings import Attack, Coefficients, Schedule
from edge_bcs.core.signals import HeldSignals
from edge_bcs.method import device_random, device_step
from edge_bcs.method import step as steps
from edge_bcs.training.backends import Batch, TorchBackend
from edge_bcs.training.plan import TrainingPlan
from edge_bcs.training.replicas import Replicas
from edge_bcs.training.updates import Rewiring


def network(sparsity: float = 0.9) -> edge_bcs.SparseModel:
    torch.manual_seed(0)
    return edge_bcs.sparsify(nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 5)), sparsity, 3, "uniform")


def give_gradients(sparse: edge_bcs.SparseModel, seed: int, size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    sparse.zero_gradients()
    for parameter in sparse.network.parameters():
        assert parameter.grad is not None
        parameter.grad.copy_(size * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("rewire", ["uniform", "none"])
def test_same_bits_as_the_plain_update(rewire: str) -> None:
    first = network()
    second = copy.deepcopy(first)
    total = 0
    for step in range(8):
        hyper = Coefficients(noise=1e-6 if rewire == "uniform" else 0.0)
        for sparse in (first, second):
            give_gradients(sparse, step)
        deaths = steps.update(first, hyper, step=step, rewire=rewire)
        number = torch.tensor(step)  # as a recorded graph has it
        outcome = device_step.update_on_device(second, hyper, step=number, rewire=rewire)
        assert device_step.raise_if_failed(outcome, step) == deaths
        state = second.state()
        assert all(np.array_equal(buffer, state[name]) for name, buffer in first.state().items())
        total += deaths
    assert (total > 100) == (rewire == "uniform")


def test_every_connection_may_die_at_once() -> None:
    first = network(0.8)
    second = copy.deepcopy(first)
    for sparse in (first, second):
        sparse.zero_gradients()
        sparse.all_gradients().copy_(sparse.weights * 1e6)
    deaths = steps.update(first, Coefficients(noise=0.0), step=0)
    outcome = device_step.update_on_device(second, Coefficients(noise=0.0), step=0)
    assert deaths == outcome[0] == first.kappa
    assert np.array_equal(first.coo()[1], second.coo()[1])


def test_a_failed_step_changes_nothing_and_nor_does_the_next() -> None:
    sparse = network()
    before = sparse.state()
    give_gradients(sparse, 0)
    sparse.all_gradients()[sparse.index[0]] = torch.inf
    outcome = device_step.update_on_device(sparse, Coefficients(), step=0)
    give_gradients(sparse, 1)
    after = device_step.update_on_device(sparse, Coefficients(), step=1, failed=outcome[1] == 0)
    assert outcome[1] == after[1] == 0
    assert all(np.array_equal(buffer, before[name]) for name, buffer in sparse.state().items())
    with pytest.raises(EdgeBcsError, match="step 0 would make a weight that is not finite"):
        device_step.raise_if_failed(outcome, 0)


def test_signs_as_on_the_host() -> None:
    positions = np.array([0, 1, 5, 1000, 2**31 - 1])
    drawn = device_random.signs(torch.from_numpy(positions), seed=2**40 + 7)
    assert np.array_equal(drawn.numpy(), random.signs(positions, seed=2**40 + 7))


@pytest.mark.parametrize("rewire", ["uniform", "none"])
def test_the_host_never_needs_a_number_of_the_device(rewire: str) -> None:
    """On tensors without content, whatever would make the host wait for a number of the device raises."""
    device = torch.device("meta")
    kappa, dense = torch.zeros(50, device=device), torch.zeros(7, device=device)
    for waits in (lambda: kappa.sum().item(), lambda: kappa[kappa > 0], kappa.nonzero, kappa.cpu):
        with pytest.raises((RuntimeError, NotImplementedError)):
            waits()
    stand_in: Any = SimpleNamespace(
        index=torch.zeros(50, dtype=torch.int64, device=device),
        momentum=kappa,
        weights=torch.zeros(500, device=device),
        dense_value=dense,
        dense_momentum=dense.clone(),
        value=lambda: kappa.clone(),
        gradients=lambda: (kappa.clone(), dense.clone()),
        kappa=50,
        size=500,
        seed=1,
    )
    outcome = device_step.update_on_device(stand_in, Coefficients(), step=3, rewire=rewire)
    assert outcome.device == device and outcome.shape == (2,)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("batch_norm", ["batch", "frozen"])
def test_a_whole_step_never_waits(objective: str, batch_norm: str) -> None:
    """Attack, loss, gradients, update and rewiring, queued twice before any number is asked for."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )
    sparse = edge_bcs.sparsify(model, 0.9).to("meta")
    plan = TrainingPlan(
        objective=objective_named(objective), beta=objective_named(objective).beta, method="bcs",
        rewire="uniform", engine="torch", processes=1, schedule=Schedule(epochs=1), batch_size=4,
        hyper=Coefficients(), attack=Attack(epsilon=0.1, step_size=0.1, steps=2),
        batch_norm=batch_norm, precision="f32", augment=False, validation=0.0, samples=4, seed=0,
    )  # fmt: skip
    engine = TorchBackend(sparse, plan, Rewiring("uniform"), shape=(1, 8, 8), replicas=Replicas())
    assert engine.lag == 1
    batch = Batch(np.zeros((4, 1, 8, 8), np.float32), np.zeros(4, np.int64), [(0, 4)], 4)
    with HeldSignals() as signals:
        engine.step(batch, Coefficients(), 0, signals)
        numbers = engine.step(batch, Coefficients(), 1, signals)
    with pytest.raises((RuntimeError, NotImplementedError)):
        numbers()
