"""`make zoo-aims`: what is aimed at for networks of users' own, beside what this machine does.

Writes aims.json to the folder that is named (default results/networks): whole steps of MobileNetV2 and of
ResNet-18 with the stem of ImageNet beside dense PyTorch (channels_last), in turn; what share of the memory's
bandwidth, measured before and after them, depthwise kernels reach; and the working set of a small MobileNetV2
beside dense PyTorch's. Needs torchvision, so it runs in the environment of `make zoo`; minutes on two cores
that do nothing else.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_bcs.bench.targets import Target
from edge_bcs.core.files import write_json
from edge_bcs.core.units import parse_bytes

if TYPE_CHECKING:
    from torch import nn

    from edge_bcs.runtime.artifact import Artifact

IMAGES, CLASSES, ATTACK_STEPS = 16, 10, 10
MOBILE, SMALL_WIDTH, STEM = 128, 0.35, 224
"""Height and width of the images; of MobileNetV2, and of ResNet-18 with the stem of ImageNet."""
BUDGET = "5MiB"

_DENSE = """
import resource, sys, torch, torch.nn.functional as F
from edge_bcs.bench.aims import mobilenet
from edge_bcs.runtime.board.process import resident_peak
torch.set_num_threads(int(sys.argv[1]))
x, y = torch.rand(int(sys.argv[2]), 3, 128, 128), torch.arange(int(sys.argv[2])) % 10
before = resident_peak()
model = mobilenet(0.35).eval()
optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=5e-4)
for _ in range(2):
    moved = x.clone().requires_grad_()
    gradient, = torch.autograd.grad(F.cross_entropy(model(moved), y), moved)
    optimizer.zero_grad()
    F.cross_entropy(model((moved + 2 / 255 * gradient.sign()).detach()), y).backward()
    optimizer.step()
print(resident_peak() - before)
"""


def mobilenet(width: float = 1.0) -> nn.Module:
    """MobileNetV2 with random weights."""
    import torch

    from edge_bcs.bench.zoo import torchvisions

    torch.manual_seed(0)
    module: nn.Module = torchvisions().models.mobilenet_v2(num_classes=CLASSES, width_mult=width)
    return module


def resnet() -> nn.Module:
    """ResNet-18 with the stem of ImageNet, and random weights."""
    import torch

    from edge_bcs.bench.zoo import torchvisions

    torch.manual_seed(0)
    module: nn.Module = torchvisions().models.resnet18(num_classes=CLASSES)
    return module


def all_but_pointwise(network: nn.Module) -> list[str]:
    """The convolutions that are not 1×1."""
    from torch import nn

    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)
    ]


def whole_step(
    network: nn.Module,
    dense: list[str] | None,
    sparsity: float,
    size: int,
    objective: str,
    threads: int,
    repetitions: int,
    bandwidth: Callable[[], float] | None = None,
) -> dict[str, Any]:
    """Seconds of steps of `IMAGES` images, ours and dense PyTorch's, in turn; where ``bandwidth`` is given
    also the share of the memory's that the depthwise operators reach."""
    import copy

    import torch

    import edge_bcs
    from edge_bcs.bench.gradients import Batch
    from edge_bcs.bench.step import engine_with_batch, node_medians
    from edge_bcs.bench.turns import beside_dense
    from edge_bcs.core.objectives import objective_named

    torch.set_num_threads(threads)
    steps = ATTACK_STEPS if objective_named(objective).adversarial else 0
    sparse = edge_bcs.sparsify(network, sparsity, 0, "uniform", start="new", dense=dense)
    with tempfile.TemporaryDirectory() as folder:
        artifact = edge_bcs.export(
            sparse,
            Path(folder) / "artifact",
            objective=objective,
            input_shape=(3, size, size),
            memory=edge_bcs.Memory(micro_batch=IMAGES),
            attack=edge_bcs.Attack(steps=steps),
            batch_size=IMAGES,
            validate=False,
        )
        batch = Batch.random(artifact, IMAGES)
        found: dict[str, Any] = {
            "weights": sparse.size,
            "kappa": sparse.kappa,
            "others": sum(item.size for item in sparse.dense),
            **beside_dense(artifact, batch, copy.deepcopy(network), steps, threads, repetitions),
        }
        with engine_with_batch(artifact, threads, batch.images, batch.labels) as engine:
            graphs = ("training", "attack") if steps else ("training",)
            if bandwidth is not None:
                found["depthwise"] = {}
                for graph in graphs:
                    before, seconds_of_nodes, after = bandwidth(), node_medians(engine, graph), bandwidth()
                    found["depthwise"] |= depthwise(artifact, graph, seconds_of_nodes, (before + after) / 2)
    return found


def depthwise(artifact: Artifact, graph: str, seconds: dict[str, float], bandwidth: float) -> dict[str, Any]:
    """Graph and operator → its depthwise nodes' bytes (that the planner says they move), seconds, and share
    of the memory's ``bandwidth``; and the smallest share of a node that takes a tenth of their time."""
    import onnx

    planned = artifact.manifest["memory"]["phases"][graph]
    moved = dict(zip(planned["nodes"], planned["bytes"], strict=True))
    rows: dict[str, list[tuple[float, float]]] = {}
    for node in onnx.load_model_from_string(artifact.read_graph(graph)).graph.node:
        groups = next((item.i for item in node.attribute if item.name == "groups"), 1)
        if groups > 1:
            rows.setdefault(f"{graph}.{node.op_type}", []).append((moved[node.name], seconds[node.name]))
    found: dict[str, Any] = {}
    for kind, taken in rows.items():
        amount, time_ = (sum(column) for column in zip(*taken, strict=True))
        heavy = [bytes_ / second for bytes_, second in taken if second >= 0.1 * time_]
        found[kind] = {
            "nodes": len(taken),
            "bytes": amount,
            "seconds": time_,
            "bandwidth": bandwidth,
            "share": amount / time_ / bandwidth,
            "worst_heavy_share": min(heavy) / bandwidth if heavy else None,
        }
    return found


def working_set(threads: int) -> dict[str, Any]:
    """Bytes of an AT step (PGD-10, frozen statistics, all weights trained) of a small MobileNetV2 inside
    `BUDGET`, the smallest that would do, and dense PyTorch's."""
    import edge_bcs
    from edge_bcs.core.objectives import objective_named
    from edge_bcs.exporters.memory.choice import Job
    from edge_bcs.exporters.memory.planner import Planner
    from edge_bcs.exporters.network import network_of
    from edge_bcs.runtime import Trainer

    network = mobilenet(SMALL_WIDTH)
    sparse = edge_bcs.sparsify(network, 0.95, 0, "uniform", start="new", dense=all_but_pointwise(network))
    shape = (3, MOBILE, MOBILE)
    rule = objective_named("at")
    smallest = Planner(network_of(sparse, shape)).smallest(Job(rule, rule.beta, IMAGES, ATTACK_STEPS))
    with tempfile.TemporaryDirectory() as folder:
        artifact = edge_bcs.export(
            sparse,
            Path(folder) / "artifact",
            objective="at",
            input_shape=shape,
            memory=BUDGET,
            batch_size=IMAGES,
        )
        images = np.random.default_rng(0).random((IMAGES, *shape), dtype=np.float32)
        with Trainer(artifact, threads=threads) as trainer:
            trainer.step(images, np.arange(IMAGES) % CLASSES)
            peak = trainer.peak_bytes
    others: dict[str, int] = {}
    for count in (1, IMAGES):
        command = [sys.executable, "-c", _DENSE, str(threads), str(count)]
        others[str(count)] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {
        "kappa": sparse.kappa,
        "weights": sparse.size,
        "predicted_peak_bytes": artifact.predicted_peak_bytes,
        "measured_peak_bytes": peak,
        "micro_batch": artifact.micro_batch,
        "smallest_bytes": smallest.peak_bytes,
        "dense_pytorch_bytes": others,
    }


def rows(found: dict[str, Any]) -> list[Target]:
    """What is aimed at, beside what ``found``, of aims.json, has of it."""
    targets = []
    for what, least, name in (
        ("MobileNetV2 at 128², 1×1 layers 95 % sparse, natural step", 2.0, "mobilenet_v2, natural"),
        (f"the same, AT step (PGD-{ATTACK_STEPS})", 2.0, "mobilenet_v2, at"),
        ("ResNet-18 at 224², 99 % sparse, dense stem, natural step", 7.5, "resnet18, dense stem"),
        ("the same, sparse stem", 10.0, "resnet18, sparse stem"),
    ):
        ratio = found.get(name, {}).get("ratio")
        said = "not measured" if ratio is None else f"{ratio:.1f}×"
        met = None if ratio is None else ratio >= least
        targets.append(Target(what, f"≥ {least:g}× dense PyTorch", said, met))
    for kind, row in sorted({**found.get("mobilenet_v2, at", {}).get("depthwise", {})}.items()):
        share = row["share"]
        aim = "≥ 50 % of the memory's bandwidth"
        targets.append(Target(f"depthwise nodes, `{kind}`", aim, f"{100 * share:.0f} %", share >= 0.5))
    memory = found.get("working_set")
    what = (
        f"working set of MobileNetV2-w{SMALL_WIDTH} at 128², 1×1 layers 95 % sparse, AT (PGD-{ATTACK_STEPS})"
    )
    said, met = "not measured", None
    if memory:
        peak = memory["measured_peak_bytes"]
        theirs = memory["dense_pytorch_bytes"]
        said = f"{peak:,} bytes; dense PyTorch {theirs['1'] / 2**20:.0f} MiB on one image, "
        said += f"{theirs[str(IMAGES)] / 2**20:.0f} MiB on {IMAGES}"
        met = peak <= parse_bytes(BUDGET)
    return [*targets, Target(what, "≤ 5 MiB", said, met)]


def main() -> None:
    """Measure everything anew; each part is written as soon as it is known."""
    from edge_bcs.bench import machine

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("results/networks"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--part", default="", help="only parts whose names contain this")
    options = parser.parse_args()
    roof = machine.measure(options.threads)
    found: dict[str, Any] = {
        "command": " ".join(["python -m edge_bcs.bench.aims", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "processor": roof.processor,
        "isa": roof.isa,
        "threads": options.threads,
        "images": IMAGES,
        "attack_steps": ATTACK_STEPS,
        "memory_bandwidth": roof.memory_bandwidth,
    }
    timing = options.threads, options.repetitions
    bandwidth = partial(machine.memory_bandwidth, options.threads)
    network = mobilenet()
    pointwise = all_but_pointwise(network)
    parts: dict[str, Callable[[], Any]] = {
        "working_set": lambda: working_set(options.threads),
        "mobilenet_v2, natural": lambda: whole_step(
            network, pointwise, 0.95, MOBILE, "natural", *timing, bandwidth
        ),
        "mobilenet_v2, at": lambda: whole_step(network, pointwise, 0.95, MOBILE, "at", *timing, bandwidth),
        "resnet18, dense stem": lambda: whole_step(resnet(), None, 0.99, STEM, "natural", *timing),
        "resnet18, sparse stem": lambda: whole_step(resnet(), [], 0.99, STEM, "natural", *timing),
    }
    for name, measure in parts.items():
        if options.part not in name:
            continue
        found[name] = measure()
        write_json(options.folder / "aims.json", found, make_folder=True)
        print(name, found[name], flush=True)


if __name__ == "__main__":
    main()
