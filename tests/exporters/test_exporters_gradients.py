"""The compiled training and attack graphs against torch float64 autograd.

Here the graphs are executed by the float64 interpreter of ``reference_ops``, so that what is tested is the
compiler
alone: fusion, reverse mode, halos, slots and chains. Any error is far above the tolerance of 1e-6 (the only
rounding is that of epsilon, a float32 attribute).
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from edge_bcs.exporters.graphs import attack_graph, evaluation_graph, training_graph
from edge_bcs.exporters.network import Network, network_of
from helpers.networks import (
    NETWORKS,
    EveryActivation,
    EveryLayer,
    Residual,
    batch,
    double,
    relative,
    sparse_of,
    state_feeds,
    tiny,
    torch_gradients,
    training_feeds,
)
from helpers.reference_ops import run_graph
from torch import nn

from edge_bcs.core.objectives import objective_named
from edge_bcs.method.sparse_model import SparseModel

BETA = 6.0


def interpreted_gradients(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a training graph and return loss, gradients and statistics under short names."""
    ready = [node for node in model.graph.node if node.op_type == "GradientReady"]
    for node in ready:
        model.graph.output.add().name = node.input[0]
    outputs = run_graph(model, feeds)
    result = {"loss": outputs["loss"], "coo": outputs[ready[0].input[0]], "dense": outputs[ready[1].input[0]]}
    for key in ("mean", "variance"):
        result[key] = outputs.get(f"batchnorm.{key}.out", feeds[f"batchnorm.{key}"])
    return result


def check_training(
    sparse: SparseModel, network: Network, objective: str, n: int, real: int, keep_both: bool | None = None
) -> None:
    images, labels = batch(network, n)
    adversarial = np.clip(images + 0.03, 0, 1).astype(np.float32)
    weight = np.where(np.arange(n) < real, 1 / real, 0).astype(np.float32)
    feeds = training_feeds(sparse, network, objective, images, adversarial, labels, weight)
    model = training_graph(network, n, objective_named(objective), BETA, keep_both).to_onnx()
    actual = interpreted_gradients(model, feeds)
    part = slice(real)
    expected = torch_gradients(
        sparse,
        objective,
        images[part],
        adversarial[part],
        labels[part],
        weight[part],
        BETA,
        network.batch_statistics,
    )
    for name, value in expected.items():
        assert relative(actual[name], value) < 1e-6, name


@pytest.mark.parametrize("statistics", ["frozen", "batch"])
@pytest.mark.parametrize(
    ("name", "objective"),
    [*((name, "at") for name in NETWORKS), ("vgg16", "trades"), ("resnet18", "mart"), ("wrn28_2", "trades")],
)
def test_training_graph_has_torchs_gradients(name: str, objective: str, statistics: str) -> None:
    sparse = tiny(name, width=0.0125 if name == "wrn28_10" else 0.0625)
    check_training(sparse, network_of(sparse, (3, 16, 16), statistics == "batch"), objective, n=3, real=3)


@pytest.mark.parametrize("objective", ["natural", "mixed", "rst"])
def test_the_other_objectives(objective: str) -> None:
    sparse = tiny("vgg16")
    check_training(sparse, network_of(sparse, (3, 16, 16)), objective, n=2, real=2)


@pytest.mark.parametrize("statistics", ["frozen", "batch"])
@pytest.mark.parametrize(("n", "real"), [(1, 1), (4, 3), (6, 4), (18, 17)])
def test_padding_samples_count_nothing(n: int, real: int, statistics: str) -> None:
    sparse = tiny("resnet18")
    check_training(sparse, network_of(sparse, (3, 16, 16), statistics == "batch"), "at", n, real)


@pytest.mark.parametrize("keep_both", [False, True])
@pytest.mark.parametrize("statistics", ["frozen", "batch"])
def test_both_orders_of_two_branches(statistics: str, keep_both: bool) -> None:
    sparse = tiny("resnet18")
    network = network_of(sparse, (3, 16, 16), statistics == "batch")
    check_training(sparse, network, "trades", n=2, real=2, keep_both=keep_both)


@pytest.mark.parametrize("statistics", ["frozen", "batch"])
@pytest.mark.parametrize("objective", ["at", "trades"])
@pytest.mark.parametrize("module", [EveryLayer, EveryActivation])
def test_a_module_with_every_layer(module: type[nn.Module], objective: str, statistics: str) -> None:
    sparse = sparse_of(module())
    check_training(sparse, network_of(sparse, (2, 13, 13), statistics == "batch"), objective, n=3, real=3)


@pytest.mark.parametrize("statistics", ["frozen", "batch"])
@pytest.mark.parametrize("variant", range(6))
def test_joins(variant: int, statistics: str) -> None:
    sparse = sparse_of(Residual(variant), density=0.5)
    network = network_of(sparse, (3, 3, 3), statistics == "batch")
    check_training(sparse, network, "at", n=2, real=2)
    check_attack(sparse, network, steps=2)


def torch_attack(
    sparse: SparseModel,
    start: np.ndarray,
    images: np.ndarray,
    target: np.ndarray,
    step: float,
    epsilon: float,
    steps: int,
) -> np.ndarray:
    """Adversarial images after some steps, in float64."""
    network = double(sparse, batch_statistics=False)
    x = torch.tensor(images, dtype=torch.float64)
    moved = torch.tensor(start, dtype=torch.float64)
    for _ in range(steps):
        moved = moved.detach().requires_grad_()
        loss = -(torch.tensor(target) * network(moved).log_softmax(1)).sum()
        (gradient,) = torch.autograd.grad(loss, moved)
        moved = (moved + step * gradient.sign()).clamp(x - epsilon, x + epsilon).clamp(0, 1)
    return moved.detach().numpy()


def check_attack(sparse: SparseModel, network: Network, steps: int, n: int = 2) -> None:
    images, labels = batch(network, n)
    random = np.random.default_rng(1)
    epsilon, step = np.float32(8 / 255), np.float32(2 / 255)
    start = np.clip(images + random.uniform(-epsilon, epsilon, images.shape), 0, 1).astype(np.float32)
    targets = {
        "cross-entropy": np.eye(network.num_classes, dtype=np.float32)[labels],
        "kl": random.dirichlet(np.ones(network.num_classes), n).astype(np.float32),
    }
    model = attack_graph(network, n).to_onnx()
    for target in targets.values():
        moved = start
        for _ in range(steps):
            feeds = {
                "adversarial": moved,
                "input": images,
                "target": target,
                "step_size": np.array([step]),
                "epsilon": np.array([epsilon]),
                **state_feeds(sparse, network),
            }
            moved = run_graph(model, feeds)["adversarial.out"]
        expected = torch_attack(
            sparse, start, images, target.astype(np.float64), float(step), float(epsilon), steps
        )
        assert np.abs(moved - expected).max() < 1e-9


@pytest.mark.parametrize(("name", "steps"), [("vgg16", 2), ("resnet18", 2), ("resnet50", 1), ("wrn28_2", 10)])
def test_attack_steps_are_torchs(name: str, steps: int) -> None:
    sparse = tiny(name)
    check_attack(sparse, network_of(sparse, (3, 16, 16)), steps)


@pytest.mark.parametrize("name", ["vgg16", "resnet50", "wrn28_4"])
def test_evaluation_graph_has_torchs_logits(name: str) -> None:
    sparse = tiny(name)
    network = network_of(sparse, (3, 16, 16))
    images, _ = batch(network, 5)
    feeds = {"input": images, **state_feeds(sparse, network)}
    logits = run_graph(evaluation_graph(network, 5).to_onnx(), feeds)["logits"]
    expected = (
        double(sparse, batch_statistics=False)(torch.tensor(images, dtype=torch.float64)).detach().numpy()
    )
    assert relative(logits, expected) < 1e-6


def test_the_buffers_are_added_to_unless_reset() -> None:
    sparse = tiny("vgg16")
    network = network_of(sparse, (3, 16, 16))
    images, labels = batch(network, 2)
    weight = np.full(2, 0.5, np.float32)
    model = training_graph(network, 2, objective_named("at")).to_onnx()
    feeds = training_feeds(sparse, network, "at", images, images, labels, weight)
    once = interpreted_gradients(model, feeds)
    feeds["lazy_reset_grad"] = np.array([False])
    model = training_graph(network, 2, objective_named("at")).to_onnx()
    again = interpreted_gradients(model, feeds)
    for name in ("coo", "dense"):
        start = feeds[f"{name}.value_grad.accumulation.buffer"]
        assert np.abs(start).min() > 0
        assert np.allclose(again[name], once[name] + start, rtol=0, atol=1e-12)
