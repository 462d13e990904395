"""`make zoo`: the classification networks of torchvision and timm, each captured, checked and timed.

Writes one JSON a cell under the folder that is named (default results/networks), as soon as it is known, and
the table of all of them (default docs/networks.md). A cell is one of

- `SIZE-OBJECTIVE-STATISTICS-MofN.json`: a step of N images in micro-batches of M: the gradients beside
  torch's in float64 (`edge_bcs.bench.gradients`), one thread's bits beside two's, the predicted peak
  beside the measured;
- `SIZE-time.json`: seconds of a natural step beside dense PyTorch (channels_last where it can), in turn on
  the same cores; at the smallest size of an AT step (`ATTACK_STEPS` attack steps), too.

Cells that are there are kept, but for those of networks that were refused; `--again` makes all anew.
`--times` makes the times alone, which take minutes on two cores that do nothing else, and `--no-times` the
others, which may run beside other work.
Weights are random (nothing is downloaded), batch norms are given the statistics of random images. Each
network has a process of its own, so that one that crashes does not end the others. torchvision and timm
are needed here alone: `make zoo` installs them into an environment of their own. Hours on two cores; it
may be stopped at any time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_bcs.core.errors import EdgeBcsError, EdgeBcsWarning
from edge_bcs.core.files import read_small, write_atomically, write_json
from edge_bcs.core.outputs import check_output, containing

if TYPE_CHECKING:
    from torch import nn

    from edge_bcs.bench.gradients import Difference, Pool
    from edge_bcs.method.sparse_model import SparseModel
    from edge_bcs.runtime.artifact import Artifact

TORCHVISION = (
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "mnasnet1_0",
    "shufflenet_v2_x1_0",
    "squeezenet1_1",
    "densenet121",
    "googlenet",
    "regnet_y_400mf",
    "resnext50_32x4d",
    "resnet18",
    "resnet50",
    "convnext_tiny",
)
TIMM = ("mobilenetv4_conv_small", "efficientnet_lite0", "ghostnet_100", "repvgg_a0", "mobileone_s0")
NETWORKS = TORCHVISION + TIMM
CONTIGUOUS = ("repvgg_a0", "mobileone_s0")
"""Whose backward pass in channels_last is a segmentation fault of torch 2.13's own: their times are beside
torch in its ordinary layout."""
SIZES = (96, 160, 224)
CROSSED = 96
"""The size at which everything is crossed; above it, natural training with frozen statistics alone."""
OBJECTIVES = ("natural", "at", "trades")
STATISTICS = ("frozen", "batch")
DIVIDES, LEAVES = (4, 2), (5, 3)
"""Images of a step whose gradients are checked, and of a micro-batch: it divides them, or does not."""
DRAWS = 3
"""Of images, at most, the best of which counts: see `gradients.Pool`."""
STATISTICS_IMAGES = 8
"""Whose statistics the batch norms are given."""
LEAST_VARIANCE = 0.01
"""Of a channel, beside the largest of its layer."""
SPARSITY = 0.95
CLASSES = 10
IMAGES, ATTACK_STEPS, REPETITIONS = 16, 2, 3
"""Of a step that is timed."""


@dataclass(frozen=True)
class Cell:
    """What is measured of one network: its gradients in a step of some kind, or its time (no objective)."""

    size: int
    objective: str = ""
    statistics: str = ""
    batch: int = 0
    micro_batch: int = 0

    @property
    def name(self) -> str:
        """Of its file, without ending."""
        if not self.objective:
            return f"{self.size}-time"
        return f"{self.size}-{self.objective}-{self.statistics}-{self.micro_batch}of{self.batch}"


def cells(sizes: Sequence[int] = SIZES) -> Iterator[Cell]:
    """Every cell of one network, in the order in which they are made."""
    for size in sizes:
        if size == CROSSED:
            for objective in OBJECTIVES:
                for statistics in STATISTICS:
                    for images in (DIVIDES, LEAVES):
                        yield Cell(size, objective, statistics, *images)
        else:
            yield Cell(size, "natural", "frozen", *LEAVES)
        yield Cell(size)


# The networks


def created(name: str) -> nn.Module:
    """A network of torchvision or timm with random weights, for so many `CLASSES`."""
    import torch

    torch.manual_seed(0)
    models = torchvisions().models
    if name in TIMM:
        import timm  # which imports torchvision

        module: nn.Module = timm.create_model(name, pretrained=False, num_classes=CLASSES)
        return module
    options = {"init_weights": False} if name == "googlenet" else {}  # drawn by scipy, for minutes
    module = getattr(models, name)(num_classes=CLASSES, **options)
    return module


def torchvisions() -> Any:
    """The package torchvision; its compiled operators, which no classifier calls, may be of another build."""
    import torch

    try:
        import torchvision
    except RuntimeError:  # it expects the names of those that did not load
        fragment: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        _NAMES.append(fragment)
        for operator in ("nms", "qnms"):
            fragment.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    import torchvision.models

    return torchvision


_NAMES: list[Any] = []  # they are gone with what defined them


def made_sparse(model: nn.Module, size: int) -> SparseModel:
    """The network with `SPARSITY`, and batch norms with the statistics of what they normalise.

    Their scales are near 0.5 and their shifts near 0.8, so that one unit in twenty is shut by its ReLU. Where
    half of them are, a deep network of random weights makes of a rounding in its first layer a change of
    hundredths in its gradients, whatever computes them, and a wrong digit would not be seen.

    Where few connections lead to a channel it may be the same everywhere. Its variance is rounding then, and
    a division by it would make that as large as what other channels say: so there is a least variance.
    """
    import torch

    import edge_bcs
    from edge_bcs.method.attacks import evaluation_mode

    generator = torch.Generator().manual_seed(0)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.weight.data = 0.3 + 0.4 * torch.rand(norm.num_features, generator=generator)
        norm.bias.data = 0.8 + 0.2 * torch.randn(norm.num_features, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EdgeBcsWarning)  # of what the export then says
        sparse = edge_bcs.sparsify(model, SPARSITY, 0, "uniform", start="new")
    network = sparse.network.eval()
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad(), evaluation_mode(network, but=norms):
        network(torch.rand(STATISTICS_IMAGES, 3, size, size, generator=generator))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        assert norm.running_var is not None
        norm.running_var.clamp_(min=LEAST_VARIANCE * float(norm.running_var.max()))
    return sparse


# One cell


class Subject:
    """A network at one size: what all its cells have in common is made once."""

    def __init__(self, name: str, size: int, threads: int) -> None:
        self.name, self.size, self.threads = name, size, threads
        self._pools: dict[int, Pool] = {}

    @cached_property
    def sparse(self) -> SparseModel:
        """The network with its connections."""
        return made_sparse(created(self.name), self.size)

    def pool(self, artifact: Artifact, draw: int) -> Pool:
        """The images of a draw."""
        from edge_bcs.bench.gradients import Pool

        if draw not in self._pools:
            self._pools[draw] = Pool(artifact, self.sparse, max(DIVIDES[0], LEAVES[0]), draw)
        return self._pools[draw]

    def export(self, folder: Path, **options: Any) -> Artifact:
        """Export without a word on what does not reach the logits: heads that only training has."""
        from edge_bcs import export

        shape = 3, self.size, self.size
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EdgeBcsWarning)
            return export(self.sparse, folder, input_shape=shape, validate=False, **options)


def checked(subject: Subject, cell: Cell) -> dict[str, Any]:
    """Gradients, bits and bytes of one step.

    One thread computes what is compared, here and in torch: beside other work a second one costs more than it
    brings. Two give the same bits, which is a part of the check.
    """
    import torch

    from edge_bcs import Attack, Memory
    from edge_bcs.bench.gradients import TOLERANCE, Batch, by_artifact, by_engine, compare
    from edge_bcs.runtime import Trainer
    from edge_bcs.runtime.sessions import SessionEngine

    torch.set_num_threads(1)
    sparse, threads = subject.sparse, subject.threads
    with tempfile.TemporaryDirectory() as folder:
        artifact = subject.export(
            Path(folder) / "artifact",
            objective=cell.objective,
            memory=Memory(micro_batch=cell.micro_batch),
            attack=Attack(steps=1),
            batch_norm=cell.statistics,
            batch_size=cell.batch,
        )
        with Trainer(artifact, threads=threads) as trainer:
            batch = Batch.random(artifact, cell.batch)
            trainer.step(batch.images, batch.labels)
            peak = trainer.peak_bytes
        best: Difference | None = None
        with closing(SessionEngine(artifact, None, 1)) as engine:
            for draw in range(DRAWS):
                batch = subject.pool(artifact, draw).chosen(engine, cell.batch)
                ours = by_engine(engine, sparse, batch)
                found = compare(artifact, sparse, batch, ours)
                best = min(best or found, found, key=_distance)
                # Statistics of few numbers amplify rounding in whatever images.
                if not found.float32 or (cell.statistics == "batch" and not found.excess):
                    break
        same_bits = ours.same_bits(by_artifact(artifact, sparse, batch, threads))
        assert best is not None
    tensor, worst = best.worst
    return {
        "weights": sparse.size,
        "kappa": sparse.kappa,
        "others": sum(item.size for item in sparse.dense),
        "tensors": len(best.tensors),
        "worst": {
            "tensor": tensor,
            "difference": worst,
            "float32": best.float32.get(tensor),
            "moved": best.moved.get(tensor),
        },
        "loss": best.tensors["loss"],
        "image": best.tensors["image"],
        "above_tolerance": len([value for value in best.tensors.values() if not value <= TOLERANCE]),
        "excess": best.excess,
        "draws": draw + 1,
        "same_bits": same_bits,
        "predicted_peak_bytes": artifact.predicted_peak_bytes,
        "measured_peak_bytes": peak,
    }


def _distance(difference: Difference) -> tuple[int, float]:
    return len(difference.excess), difference.worst[1]


def timed(subject: Subject, cell: Cell) -> dict[str, Any]:
    """Seconds of steps, ours and dense PyTorch's, and the working set of ours."""
    import torch

    from edge_bcs import Attack, Memory
    from edge_bcs.bench.gradients import Batch
    from edge_bcs.bench.turns import beside_dense

    threads = subject.threads
    torch.set_num_threads(threads)
    model, last = created(subject.name), subject.name not in CONTIGUOUS
    found: dict[str, Any] = {"threads": threads, "images": IMAGES, "attack_steps": ATTACK_STEPS}
    found["channels_last"] = last
    for objective, steps in {"natural": 0, "at": ATTACK_STEPS}.items():
        if steps and cell.size != CROSSED:
            continue
        with tempfile.TemporaryDirectory() as folder:
            artifact = subject.export(
                Path(folder) / "artifact",
                objective=objective,
                memory=Memory(micro_batch=IMAGES),
                attack=Attack(steps=steps),
                batch_size=IMAGES,
            )
            batch = Batch.random(artifact, IMAGES)
            found[objective] = beside_dense(artifact, batch, model, steps, threads, REPETITIONS, last)
    return found


def measured(subject: Subject, cell: Cell) -> dict[str, Any]:
    """One cell; {"refused": the sentence} where the network, or what it needs, is not taken."""
    began = time.perf_counter()
    described = {"network": subject.name, "size": cell.size}
    if cell.objective:
        described |= {"objective": cell.objective, "statistics": cell.statistics}
        described |= {"micro_batch": cell.micro_batch, "batch": cell.batch}
    try:
        found = (checked if cell.objective else timed)(subject, cell)
    except EdgeBcsError as error:
        found = {"refused": str(error)}
    return {**described, **found, "took_seconds": round(time.perf_counter() - began, 1)}


def one_network(name: str, wanted: Sequence[Cell], folder: Path, threads: int, again: bool) -> None:
    """Make those cells of a network that are not there."""
    subject: Subject | None = None
    for cell in wanted:
        file = folder / name / f"{cell.name}.json"
        if file.is_file() and not again and "refused" not in json.loads(read_small(file)):
            continue
        if subject is None or subject.size != cell.size:
            subject = Subject(name, cell.size, threads)
        found = measured(subject, cell)
        write_json(file, found, make_folder=True)
        print(name, cell.name, _said(found), flush=True)


def _said(found: dict[str, Any]) -> str:
    if "refused" in found:
        return f"refused: {found['refused']}"
    timed = {
        kind: part["ratio"] for kind, part in found.items() if isinstance(part, dict) and "ratio" in part
    }
    if timed:
        return ", ".join(f"{kind} {ratio:.2f}×" for kind, ratio in timed.items())
    worst = found["worst"]
    peaks = found["predicted_peak_bytes"], found["measured_peak_bytes"]
    return (
        f"{worst['difference']:.1e} ({worst['tensor']}), {len(found['excess'])} too far, "
        f"{'same' if found['same_bits'] else 'OTHER'} bits, peaks {peaks[0]} {peaks[1]}"
    )


def main() -> None:
    """Make what is not there yet, then the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("results/networks"))
    parser.add_argument("page", nargs="?", type=Path, default=Path("docs/networks.md"))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS, metavar="NAME")
    parser.add_argument("--sizes", nargs="+", type=int, choices=SIZES, default=SIZES)
    parser.add_argument("--cells", default="", help="only cells whose names contain this, such as batch-2of4")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--times", action="store_true", help="only times")
    which.add_argument("--no-times", action="store_true", help="all but times")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--table", action="store_true", help="measure nothing, write the page")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # one process for all
    options = parser.parse_args()
    from edge_bcs.bench.zoo_page import HEADING, page

    check_output(options.page, containing(HEADING), "that of `make zoo`")
    wanted = [cell for cell in cells(options.sizes) if options.cells in cell.name]
    if options.times or options.no_times:
        wanted = [cell for cell in wanted if bool(cell.objective) == options.no_times]
    for name in () if options.table else options.networks:
        if options.here:
            one_network(name, wanted, options.folder, options.threads, options.again)
            continue
        arguments = [*sys.argv[1:], "--networks", name, "--here"]
        done = subprocess.run([sys.executable, "-m", "edge_bcs.bench.zoo", *arguments], env=os.environ)
        if done.returncode:
            print(f"{name}: the process ended with {done.returncode}", flush=True)
    if not options.here:
        write_atomically(options.page, page(options.folder).encode())


if __name__ == "__main__":
    try:
        main()
    except EdgeBcsError as error:
        sys.exit(f"Error: {error}")
