"""Recomputed and narrowed activations: the same gradients, to the bit or to bfloat16's rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from edge_bcs.exporters.graphs import training_graph
from edge_bcs.exporters.memory.choice import Job
from edge_bcs.exporters.memory.planner import Planner
from edge_bcs.exporters.memory.replay import replay_of
from edge_bcs.exporters.memory.storage import Storage, kept_stacks, makers, store
from edge_bcs.exporters.network import Network, network_of
from edge_bcs.exporters.nodes import Graph
from edge_bcs.exporters.operators.base import KEPT
from edge_bcs.exporters.validation import run
from edge_bcs.runtime.sessions import session_options
from helpers.networks import EveryActivation, EveryLayer, batch, relative, sparse_of, tiny, training_feeds
from helpers.reference_ops import run_graph
from helpers.schedule_replay import check_schedule
from torch import nn

from edge_bcs.core.objectives import objective_named
from edge_bcs.method.sparse_model import SparseModel

NETWORKS = ("vgg16", "resnet18", "resnet50", "wrn28_2", "every layer", "every activation")
MODULES = {"every layer": EveryLayer, "every activation": EveryActivation}


def made(name: str, statistics: str) -> tuple[SparseModel, Network]:
    if name in MODULES:
        sparse = sparse_of(MODULES[name]())
        return sparse, network_of(sparse, (2, 13, 13), statistics == "batch")
    sparse = tiny(name)
    return sparse, network_of(sparse, (3, 16, 16), statistics == "batch")


def feeds_of(sparse: SparseModel, network: Network, objective: str, n: int = 3) -> dict[str, Any]:
    images, labels = batch(network, n)
    adversarial = np.clip(images + 0.03, 0, 1).astype(np.float32)
    weight = np.full(n, 1 / n, np.float32)
    return training_feeds(sparse, network, objective, images, adversarial, labels, weight)


def gradients(graph: Graph, feeds: dict[str, Any], folder: Path) -> dict[str, np.ndarray]:
    """Gradients and running statistics as ONNX Runtime computes them."""
    onnx.save(graph.to_onnx(), folder / "training.onnx")
    buffers = {name: array.copy() for name, array in feeds.items()}
    run(str(folder / "training.onnx"), buffers, threads=1)
    return {name: array for name, array in buffers.items() if "_grad." in name or "batchnorm" in name}


def selections(tensors: list[str]) -> list[frozenset[str]]:
    """All tensors, every second one, and some at random."""
    random = np.random.default_rng(0).random(len(tensors)) < 0.4
    chosen = frozenset(t for t, taken in zip(tensors, random, strict=True) if taken)
    return [frozenset(tensors), frozenset(tensors[::2]), chosen]


@pytest.mark.parametrize("statistics", ["frozen", "batch"])
@pytest.mark.parametrize("objective", ["at", "trades"])
@pytest.mark.parametrize("name", NETWORKS)
def test_recomputing_changes_no_bit(tmp_path: Path, name: str, objective: str, statistics: str) -> None:
    sparse, network = made(name, statistics)
    graph = training_graph(network, 3, objective_named(objective), 6.0)
    feeds = feeds_of(sparse, network, objective)
    expected = gradients(graph, feeds, tmp_path)
    for recomputed in selections(kept_stacks(makers(graph))):
        actual = gradients(store(graph, Storage(recomputed)), feeds, tmp_path)
        for key, value in expected.items():
            assert actual[key].tobytes() == value.tobytes(), key


def test_recomputing_saves_memory_and_costs_arithmetic() -> None:
    _, network = made("vgg16", "frozen")
    graph = training_graph(network, 4, objective_named("at"))
    before = replay_of(graph, network.connections)
    # Every second tensor: what is recomputed is one operator away from what is kept.
    half = store(graph, Storage(frozenset(kept_stacks(makers(graph))[::2])))
    after = replay_of(half, network.connections)
    assert after.peak_bytes < 0.75 * before.peak_bytes
    assert sum(before.flops) < sum(after.flops) < 1.5 * sum(before.flops)


def smooth(depth: int = 4) -> Network:
    """Convolutions of 3×3 with SiLU, whose derivative needs what it is applied to."""
    layers = [nn.Conv2d(2, 8, 3, padding=1), nn.SiLU()]
    for _ in range(depth):
        layers += [nn.Conv2d(8, 8, 3, padding=1), nn.SiLU()]
    module = nn.Sequential(*layers, nn.AvgPool2d(8), nn.Flatten(), nn.Linear(8, 4))
    return network_of(sparse_of(module), (2, 8, 8))


def test_an_output_is_made_again_from_what_the_activation_was_applied_to() -> None:
    graph = training_graph(smooth(), 4, objective_named("at"))
    pre = frozenset(name for name in kept_stacks(makers(graph)) if name.endswith(".pre"))
    # The last output is read by the pooling alone, whose gradient reads nothing.
    outputs = frozenset(name.removesuffix(".pre") for name in pre) & {*kept_stacks(makers(graph))}
    assert len(pre) == 5 and len(outputs) == 4
    again = store(graph, Storage(outputs))
    operators = [node.operator for node in again.nodes]
    assert operators.count("Activate") == 4 and operators.count("Conv") == 6  # no product twice
    # One of the two stacks of each layer; the image is kept, too.
    network = smooth()
    kept, less = (replay_of(g, network.connections).categories[KEPT] for g in (graph, again))
    assert less < 0.65 * kept
    # Where it is made again itself, it is not written before, and nothing lies there that nobody reads.
    both = store(graph, Storage(outputs | pre))
    written = {name for node in both.nodes for name in node.outputs}
    assert not pre & written
    read = {name for node in both.nodes for name in node.inputs}
    assert not [name for name in written if ".pre" in name and name not in read]


def test_the_planner_keeps_one_stack_of_a_smooth_activation() -> None:
    network = smooth()
    job = Job(objective_named("at"), batch_size=4)
    planner = Planner(network)
    free = planner.fastest(job, 1 << 30, 4)
    assert free is not None and not free.choice.storage
    squeezed = planner.fastest(job, int(0.8 * free.peak_bytes), 4)
    assert squeezed is not None and squeezed.choice.storage.recomputed
    assert not [name for name in squeezed.choice.storage.recomputed if name.endswith(".pre")]
    assert squeezed.seconds < 1.2 * free.seconds


@pytest.mark.parametrize("statistics", ["frozen", "batch"])
@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_changes_gradients_by_its_rounding(tmp_path: Path, name: str, statistics: str) -> None:
    sparse, network = made(name, statistics)
    graph = training_graph(network, 3, objective_named("at"))
    feeds = feeds_of(sparse, network, "at")
    expected = gradients(graph, feeds, tmp_path)
    narrow = store(graph, Storage(narrowed=frozenset(kept_stacks(makers(graph)))))
    actual = gradients(narrow, feeds, tmp_path)
    # 2⁻⁹ a number; a batch norm amplifies what it normalises, the more the fewer numbers it has.
    tolerance = 2**-7 if statistics == "frozen" else 0.2
    differences = [relative(actual[key], value) for key, value in expected.items()]
    assert 0 < max(differences) < tolerance
    if statistics == "frozen":
        kept = replay_of(graph, network.connections).categories["activations kept for backward"]
        categories = replay_of(narrow, network.connections).categories
        assert categories["activations kept for backward"] < 0.75 * kept


@pytest.mark.parametrize("statistics", ["frozen", "batch"])
@pytest.mark.parametrize("name", NETWORKS)
def test_an_independent_replay_finds_the_same_peak(name: str, statistics: str) -> None:
    sparse, network = made(name, statistics)
    graph = training_graph(network, 3, objective_named("trades"), 6.0)
    tensors = kept_stacks(makers(graph))
    recomputed, narrowed = frozenset(tensors[::3]), frozenset(tensors[1::3])
    if statistics == "batch":  # the interpreter insists that a batch norm's input gives the saved statistics
        narrowed -= {node.inputs[1] for node in graph.nodes if node.operator == "BatchNormGrad"}
    rewritten = store(graph, Storage(recomputed, narrowed))
    model = rewritten.to_onnx()
    values: dict[str, Any] = {}
    run_graph(model, feeds_of(sparse, network, "trades"), values)
    assert check_schedule(model, values) == replay_of(rewritten, network.connections).peak_bytes


@pytest.mark.parametrize("order", ["the file's", "default"])
@pytest.mark.parametrize(
    ("name", "statistics"), [("vgg16", "frozen"), ("resnet50", "batch"), ("wrn28_2", "frozen")]
)
def test_no_engine_recomputes_before_the_backward_pass(
    tmp_path: Path, name: str, statistics: str, order: str
) -> None:
    sparse, network = made(name, statistics)
    graph = training_graph(network, 2, objective_named("at"))
    tensors = kept_stacks(makers(graph))
    model = store(graph, Storage(frozenset(tensors[::2]), frozenset(tensors[1::4]))).to_onnx()
    options = session_options(1)
    if order == "default":
        options.execution_order = onnxruntime.ExecutionOrder.DEFAULT
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    session.run(None, feeds_of(sparse, network, "at", 2))
    events = json.loads(Path(session.end_profiling()).read_text())
    executed = [
        event["name"].removesuffix("_kernel_time")
        for event in events
        if event.get("name", "").endswith("_kernel_time")
    ]
    written = [node.name for node in model.graph.node]
    if order == "the file's":
        assert executed == written
    position = {node: step for step, node in enumerate(executed)}
    loss = next(position[node] for node in written if node.endswith("CrossEntropy"))
    late = [node for node in written if ".again" in node or node.startswith("Widen")]
    assert late and all(position[node] > loss for node in late)
    narrow = [node for node in written if node.startswith("Narrow")]
    assert narrow and all(position[node] < loss for node in narrow)


def test_nothing_to_do_leaves_the_graph_alone() -> None:
    _, network = made("vgg16", "frozen")
    graph = training_graph(network, 2, objective_named("at"))
    assert store(graph, Storage()) is graph
