"""Two differentiators, one gradient: ORT's gradient builder with our rules against our reverse mode.

Both graphs run the same kernels in float32; what differs is everything that a differentiator decides: masks,
sums over uses, accumulators, halos of gradients, order. So agreement is to rounding of sums.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime.training.api", reason="see make test-ort-training")

import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from edge_bcs.exporters.graphs import training_graph
from edge_bcs.exporters.network import Network, network_of
from edge_bcs.exporters.ort import gradients as ort_gradients
from edge_bcs.exporters.validation import run
from edge_bcs.runtime import library
from helpers.networks import (
    NETWORKS,
    Dense,
    EveryActivation,
    EveryLayer,
    Residual,
    batch,
    relative,
    sparse_of,
    tiny,
    torch_gradients,
    training_feeds,
)
from onnxruntime.training import artifacts
from onnxruntime.training.api import CheckpointState, Module, Optimizer
from torch import nn

from edge_bcs.core.objectives import OBJECTIVES, objective_named
from edge_bcs.method.sparse_model import SparseModel

BETA = 6.0
Arrays = dict[str, np.ndarray[Any, Any]]


def options() -> onnxruntime.SessionOptions:
    made = onnxruntime.SessionOptions()
    made.log_severity_level = 3
    library.register(made)
    return made


def feeds_of(sparse: SparseModel, network: Network, objective: str) -> Arrays:
    """Three images that count and a fourth that fills up the micro-batch."""
    images, labels = batch(network, 4)
    adversarial = np.clip(images + 0.03, 0, 1).astype(np.float32)
    weight = np.array([0.5, 0.25, 0.25, 0], np.float32)
    return training_feeds(sparse, network, objective, images, adversarial, labels, weight)


def check(sparse: SparseModel, network: Network, objective: str, folder: Path) -> None:
    feeds = feeds_of(sparse, network, objective)
    file = folder / "ours.onnx"
    file.write_bytes(
        training_graph(network, 4, objective_named(objective), BETA).to_onnx().SerializeToString()
    )
    ours = {name: array.copy() for name, array in feeds.items()}
    loss = run(str(file), ours)["loss"]

    forward = ort_gradients.loss_graph(network, 4, objective_named(objective), BETA).to_onnx()
    assert not [node for node in forward.graph.node if "Grad" in node.op_type]
    model = ort_gradients.gradient_model(forward)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options())
    wanted = ["loss", *(f"{name}_grad" for name in ("coo.value", "dense.value"))]
    given = {item.name: feeds[item.name] for item in session.get_inputs()}
    theirs = session.run([name for name in wanted if name in {o.name for o in session.get_outputs()}], given)
    assert theirs[0] == pytest.approx(loss, rel=1e-6)
    for name, gradient in zip(("coo.value", "dense.value"), theirs[1:], strict=False):
        expected = ours[f"{name}_grad.accumulation.buffer"]
        assert np.abs(expected).max() > 0
        assert relative(gradient, expected) < 2e-6, name


@pytest.mark.parametrize("statistics", ["frozen", "batch"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", [*NETWORKS, "wrn34_10"])
def test_both_differentiators_agree(name: str, objective: str, statistics: str, tmp_path: Path) -> None:
    sparse = tiny(name, width=0.0125 if name.endswith("_10") else 0.0625)
    check(sparse, network_of(sparse, (3, 16, 16), statistics == "batch"), objective, tmp_path)


@pytest.mark.parametrize("statistics", ["frozen", "batch"])
@pytest.mark.parametrize("objective", ["at", "trades"])
@pytest.mark.parametrize("module", [EveryLayer, EveryActivation])
def test_every_layer(module: type[nn.Module], objective: str, statistics: str, tmp_path: Path) -> None:
    sparse = sparse_of(module())
    check(sparse, network_of(sparse, (2, 13, 13), statistics == "batch"), objective, tmp_path)


@pytest.mark.parametrize("statistics", ["frozen", "batch"])
def test_kernels_that_stay_dense(statistics: str, tmp_path: Path) -> None:
    """With groups of all sizes and what is fused into them, beside connections of a layer with groups."""
    network = nn.Sequential(
        Dense(nn.Conv2d(3, 8, 3, stride=(2, 1), padding=(0, 1))), nn.ReLU(),
        Dense(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)), nn.BatchNorm2d(8), nn.ReLU(),
        Dense(nn.Conv2d(8, 12, 3, padding="same", dilation=2, groups=4, bias=False)), nn.BatchNorm2d(12),
        nn.Conv2d(12, 6, 3, groups=3), nn.ReLU(), nn.Flatten(), Dense(nn.Linear(6 * 1 * 5, 4)),
    )  # fmt: skip
    sparse = sparse_of(network)
    check(sparse, network_of(sparse, (3, 7, 7), statistics == "batch"), "trades", tmp_path)


@pytest.mark.parametrize("statistics", ["frozen", "batch"])
@pytest.mark.parametrize("variant", range(6))
def test_joins(variant: int, statistics: str, tmp_path: Path) -> None:
    sparse = sparse_of(Residual(variant), density=0.5)
    check(sparse, network_of(sparse, (3, 3, 3), statistics == "batch"), "at", tmp_path)


class Structures(nn.Module):
    """Operators that change shapes, multiply and normalise, on images [3, 9, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.same = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.gate = nn.Conv2d(4, 4, 1)
        self.groups, self.pixels = nn.GroupNorm(2, 4), nn.LayerNorm(4)
        self.scale = nn.Parameter(torch.tensor([0.5, 1.5, -1.0, 2.0]).reshape(4, 1, 1))
        self.head = nn.Linear(4 * 4 * 5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        x = x * self.gate(F.adaptive_avg_pool2d(x, 1))
        x = 1 - 2 * (x * self.same(x))
        x = F.relu(self.groups(F.pad(F.pad(x, (1, 0, 2, 0), value=0.3), (-1, 0, 0, -1))))
        x = F.interpolate(F.interpolate(x, scale_factor=2, mode="bilinear"), (13, 11))
        x = F.avg_pool2d(x, 3, 2, 1, ceil_mode=True)
        x = self.pixels(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) * self.scale
        x = F.max_pool2d(x, (2, 2), (2, 1), ceil_mode=True)
        logits: torch.Tensor = self.head(torch.flatten(x, 1))
        return logits


@pytest.mark.parametrize("objective", ["at", "trades"])
def test_structures(objective: str, tmp_path: Path) -> None:
    sparse = sparse_of(Structures(), density=0.7)
    check(sparse, network_of(sparse, (3, 9, 8)), objective, tmp_path)


def test_orts_graph_without_a_mask_has_another_gradient(tmp_path: Path) -> None:
    """The comparison sees a wrong rule: without the rectification's mask the gradients differ."""
    sparse = tiny("vgg16")
    network = network_of(sparse, (3, 16, 16))
    model = ort_gradients.gradient_model(
        ort_gradients.loss_graph(network, 4, objective_named("at")).to_onnx()
    )
    feeds = feeds_of(sparse, network, "at")

    def gradient(model: onnx.ModelProto) -> np.ndarray[Any, Any]:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options())
        given = {item.name: feeds[item.name] for item in session.get_inputs()}
        result: np.ndarray[Any, Any] = session.run(["coo.value_grad"], given)[0]
        return result

    right = gradient(model)
    masked = next(node for node in model.graph.node if node.op_type == "MaskedAdd" and len(node.input) == 3)
    del masked.input[1:]
    for attribute in masked.attribute:
        if attribute.name == "mask_kind":
            attribute.i = 0
    assert relative(gradient(model), right) > 1e-3


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_generate_artifacts_gives_a_training_loop(tmp_path: Path, optimizer: str) -> None:
    sparse = tiny("resnet18")
    folder = tmp_path / "artifacts"
    kind = getattr(artifacts.OptimType, optimizer)
    ort_gradients.generate_artifacts(sparse, folder, (3, 16, 16), 4, optimizer=kind)
    state = CheckpointState.load_checkpoint(folder / "checkpoint")
    module = Module(
        folder / "training_model.onnx", state, folder / "eval_model.onnx", session_options=options()
    )
    trainer = Optimizer(folder / "optimizer_model.onnx", module)
    trainer.set_learning_rate(0.01)
    images, labels = batch(network_of(sparse, (3, 16, 16)), 4)
    first = float(module(images, labels))
    weight = np.full(4, 0.25)
    expected = torch_gradients(sparse, "natural", images, images, labels, weight, 0.0, False)
    assert first == pytest.approx(float(expected["loss"]), rel=1e-5)
    for name, key in (("coo.value", "coo"), ("dense.value", "dense")):
        assert relative(state.parameters[name].grad, expected[key]) < 2e-5
    for _ in range(10):
        trainer.step()
        module.lazy_reset_grad()
        module(images, labels)
    module.eval()
    assert float(module(images, labels)) < 0.95 * first
