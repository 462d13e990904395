"""The memory plan against an independent checker, against the allocator, and what it promises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from edge_bcs.exporters.artifact import export
from edge_bcs.exporters.compiler import Compiled, compile_network
from edge_bcs.exporters.memory.choice import Job
from edge_bcs.exporters.memory.planner import Planner
from edge_bcs.exporters.memory.replay import KEPT
from edge_bcs.exporters.network import network_of
from edge_bcs.runtime.sessions import SessionEngine, session_options
from edge_bcs.targets.plans import HOLES
from helpers.networks import EveryLayer, batch, sparse_of, state_feeds, tiny, training_feeds
from helpers.reference_ops import run_graph
from helpers.schedule_replay import check_schedule
from torch import nn

import edge_bcs
from edge_bcs import EdgeBcsError, models
from edge_bcs.core.objectives import objective_named


def compiled(
    sparse: edge_bcs.SparseModel, objective: str, batch_statistics: bool, n: int, shape: Any
) -> Compiled:
    return compile_network(
        network_of(sparse, shape, batch_statistics), Job(objective_named(objective), 6.0), n
    )


@pytest.mark.parametrize("statistics", ["frozen", "batch"])
@pytest.mark.parametrize("objective", ["at", "trades"])
@pytest.mark.parametrize("name", ["vgg16", "resnet50", "wrn28_2", "every layer"])
def test_an_independent_replay_finds_the_same_peaks(name: str, objective: str, statistics: str) -> None:
    sparse = sparse_of(EveryLayer()) if name == "every layer" else tiny(name)
    shape = (2, 13, 13) if name == "every layer" else (3, 16, 16)
    result = compiled(sparse, objective, statistics == "batch", 2, shape)
    network = result.network
    images, labels = batch(network, 2)
    weight = np.full(2, 0.5, np.float32)
    common = state_feeds(sparse, network)
    scalars = {name: np.array([0.01], np.float32) for name in ("step_size", "epsilon")}
    target = np.eye(network.num_classes, dtype=np.float32)[labels]
    feeds = {
        "training": training_feeds(sparse, network, objective, images, images, labels, weight),
        "attack": {"adversarial": images, "input": images, "target": target, **scalars, **common},
        "eval": {"input": images, **common},
    }
    for phase, inputs in feeds.items():
        model = result.graphs[phase].to_onnx()
        tensors: dict[str, Any] = {}
        run_graph(model, inputs, tensors)
        alive = [step.total() - step[HOLES] for step in result.memory.phases[phase].live()]
        assert check_schedule(model, tensors) == max(alive), phase


def test_the_checker_notices_a_tensor_read_too_early() -> None:
    model = compiled(tiny("vgg16"), "at", False, 2, (3, 16, 16)).graphs["eval"].to_onnx()
    nodes = list(model.graph.node)
    nodes[2], nodes[3] = nodes[3], nodes[2]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    with pytest.raises((AssertionError, KeyError)):
        check_schedule(model, {})


def measured(
    folder: Path, sparse: edge_bcs.SparseModel, shape: Any, **options: Any
) -> dict[str, tuple[int, int]]:
    """Phase → (predicted, measured) peak of the working set."""
    artifact = export(sparse, folder, input_shape=shape, validate=False, **options)
    engine = SessionEngine(artifact, None, 1)
    try:
        engine.arrays["sample_weight"][...] = 1 / artifact.micro_batch
        engine.arrays["lazy_reset_grad"][...] = True
        engine.arrays["hyper"][...] = (0.1, 5e-4, 0.9, 0)
        for name in ("input", "adversarial"):
            engine.arrays[name][...] = np.random.default_rng(0).random(engine.arrays[name].shape)
        peaks = {}
        for phase in ("training", "attack", "eval", "optimizer"):
            engine.budget.reset_peak()
            engine.run(phase)
            peaks[phase] = (artifact.manifest["memory"]["phases"][phase]["peak_bytes"], engine.budget.peak)
        assert artifact.predicted_peak_bytes == max(peak for peak, _ in peaks.values())
        return peaks
    finally:
        engine.close()


class Unread(nn.Module):
    """A batch norm on the image itself: nobody reads its gradient with respect to the image [3, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6 * 64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(torch.relu(self.first(x)))))
        return self.head(x.flatten(1))


@pytest.mark.parametrize("store", ["f32", "bf16"])
@pytest.mark.parametrize("statistics", ["frozen", "batch"])
@pytest.mark.parametrize("objective", ["at", "trades"])
def test_what_nobody_reads_counts_to_the_end(
    tmp_path: Path, objective: str, statistics: str, store: str
) -> None:
    sparse, job = sparse_of(Unread()), Job(objective_named(objective), 6.0, 16, bfloat16=store == "bf16")
    least = Planner(network_of(sparse, (3, 8, 8), statistics == "batch")).smallest(job).peak_bytes
    for memory in (None, least, int(1.2 * least), int(1.5 * least), 2 * least):
        options = {
            "objective": objective,
            "batch_norm": statistics,
            "memory": edge_bcs.Memory(memory, store=store),
        }
        for phase, (predicted, peak) in measured(tmp_path / "a", sparse, (3, 8, 8), **options).items():
            assert peak == predicted, (phase, memory)


NETWORKS = ("vgg16", "resnet18", "resnet34", "resnet50", "wrn28_2", "wrn28_4")


def check_measured(folder: Path, name: str, objective: str, statistics: str, micro_batch: int) -> None:
    options = {
        "objective": objective,
        "batch_norm": statistics,
        "memory": edge_bcs.Memory(micro_batch=micro_batch),
    }
    for phase, (predicted, peak) in measured(folder, tiny(name), (3, 16, 16), **options).items():
        assert peak <= predicted <= 1.01 * peak, (phase, predicted, peak)


@pytest.mark.parametrize(("micro_batch", "width", "numbers"), [(8, 8, 3), (16, 4, 3), (16, 8, 4)], ids=str)
def test_the_room_for_packed_weights_is_measured(
    tmp_path: Path, micro_batch: int, width: int, numbers: int
) -> None:
    """Dense layers of many weights and few pixels, with and without Winograd's form: they make the peak."""
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 64, 3, padding=1), torch.nn.ReLU(),
        torch.nn.Conv2d(64, 128, 3, padding=1), torch.nn.ReLU(),
        torch.nn.AvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(32 * width, 10),
    )  # fmt: skip
    sparse = edge_bcs.sparsify(network, sparsity=0.2, seed=0, distribution="uniform")
    peaks = measured(
        tmp_path / "a", sparse, (3, 4, width), objective="at", memory=edge_bcs.Memory(micro_batch=micro_batch)
    )
    room = 4 * 128 * 64 * 9 * numbers // 3
    predicted, peak = peaks["training"]
    assert peak <= predicted <= 1.01 * peak and peak > room


@pytest.mark.parametrize(
    ("name", "objective", "statistics", "micro_batch"),
    [
        ("vgg16", "at", "frozen", 4),
        ("vgg16", "trades", "batch", 3),
        ("resnet18", "mart", "frozen", 16),
        ("resnet18", "natural", "batch", 2),
        ("resnet50", "trades", "frozen", 1),
        ("wrn28_2", "at", "batch", 18),
        ("wrn28_4", "mixed", "frozen", 5),
    ],
)
def test_predicted_is_measured(
    tmp_path: Path, name: str, objective: str, statistics: str, micro_batch: int
) -> None:
    check_measured(tmp_path / "a", name, objective, statistics, micro_batch)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [2, 3, 16, 32])
@pytest.mark.parametrize("statistics", ["frozen", "batch"])
@pytest.mark.parametrize("objective", ["natural", "at", "mixed", "trades", "rst", "mart"])
@pytest.mark.parametrize("name", NETWORKS)
def test_predicted_is_measured_everywhere(
    tmp_path: Path, name: str, objective: str, statistics: str, micro_batch: int
) -> None:
    check_measured(tmp_path / "a", name, objective, statistics, micro_batch)


def check_planned(
    folder: Path, name: str, objective: str, statistics: str, shares: tuple[float, ...], store: str = "f32"
) -> None:
    """Artifacts that the planner squeezed into shares of what everything kept at 8 images would need."""
    sparse = tiny(name)
    network = network_of(sparse, (3, 16, 16), statistics == "batch")
    job = Job(objective_named(objective), 6.0, 32, bfloat16=store == "bf16")
    least = Planner(network).smallest(job).peak_bytes
    most = compiled(sparse, objective, statistics == "batch", 8, (3, 16, 16)).memory.peak_bytes
    for share in shares:
        memory = int(least + share * (most - least))
        options = {"objective": objective, "batch_norm": statistics, "batch_size": 32}
        for phase, (predicted, peak) in measured(
            folder / "a", sparse, (3, 16, 16), memory=edge_bcs.Memory(memory, store=store), **options
        ).items():
            assert peak <= predicted <= 1.01 * peak, (phase, memory, predicted, peak)


@pytest.mark.parametrize(
    ("name", "objective", "statistics", "share"),
    [("vgg16", "trades", "batch", 0.5), ("vgg16", "mart", "frozen", 0.1), ("resnet18", "at", "batch", 0.3)],
)
def test_predicted_is_measured_of_what_the_planner_squeezed(
    tmp_path: Path, name: str, objective: str, statistics: str, share: float
) -> None:
    check_planned(tmp_path, name, objective, statistics, (share,))


@pytest.mark.slow
@pytest.mark.parametrize("store", ["f32", "bf16"])
@pytest.mark.parametrize("statistics", ["frozen", "batch"])
@pytest.mark.parametrize("objective", ["natural", "at", "mixed", "trades", "rst", "mart"])
@pytest.mark.parametrize("name", NETWORKS)
def test_predicted_is_measured_of_everything_squeezed(
    tmp_path: Path, name: str, objective: str, statistics: str, store: str
) -> None:
    check_planned(tmp_path, name, objective, statistics, (0.0, 0.2, 0.5, 0.9), store)


@pytest.mark.parametrize("name", ["resnet50", "wrn28_2"])
def test_onnxruntime_executes_in_file_order(tmp_path: Path, name: str) -> None:
    result = compiled(tiny(name), "trades", True, 2, (3, 16, 16))
    network = result.network
    images, labels = batch(network, 2)
    weight = np.full(2, 0.5, np.float32)
    model = result.graphs["training"].to_onnx()
    options = session_options(1)
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    session.run(None, training_feeds(tiny(name), network, "trades", images, images, labels, weight))
    events = json.loads(Path(session.end_profiling()).read_text())
    executed = [event["name"] for event in events if event.get("name", "").endswith("_kernel_time")]
    assert executed == [f"{node.name}_kernel_time" for node in model.graph.node]


def test_the_attack_keeps_bits_and_choices_only() -> None:
    for name in ("vgg16", "resnet18", "wrn28_2"):
        phase = compiled(tiny(name), "at", False, 4, (3, 16, 16)).memory.phases["attack"]
        kept = [life for life in phase.allocations if life.category == KEPT]
        assert kept and all(life.type.startswith("u8") for life in kept), name


def test_two_branches_need_hardly_more_than_one() -> None:
    sparse = edge_bcs.sparsify(models.vgg16(), 0.99)
    peaks = {
        name: compiled(sparse, name, False, 2, (3, 32, 32)).memory.peak_bytes
        for name in ("at", "trades", "mart")
    }
    assert peaks["trades"] - peaks["at"] < 1024
    assert peaks["mart"] - peaks["at"] < 1024


def test_vgg16_at_99_percent_with_four_images_fits_12_mib() -> None:
    sparse = edge_bcs.sparsify(models.vgg16(), 0.99)
    assert compiled(sparse, "at", False, 4, (3, 32, 32)).memory.peak_bytes <= 12 * 2**20


@pytest.mark.parametrize("size", ["12XB", "-1", "", "0", "1e6", "MiB"])
def test_nonsense_sizes_are_refused(tmp_path: Path, size: str) -> None:
    with pytest.raises(EdgeBcsError):
        export(tiny("vgg16"), tmp_path / "a", input_shape=(3, 16, 16), memory=size)
