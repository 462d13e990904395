"""`make attack-precision`: whether attacks in half precision change what is learned.

    python -m edge_bcs.bench.attack_precision results/attack-precision --data cifar10

ResNet-18 of a quarter of the width on 16×16 pixels, 99 % sparse, AT, on a board's `Trainer` with our own
engine. Each seed draws a network and the order of its images, and trains twice: with attacks in float32, and
in half precision. Both are measured under attacks in float32, on the test images, which choose nothing. Of
each network that was trained in float32, attacks in both precisions begin at the same points of the same
images, and the losses that they reach are compared, both found in float32.

Needs a processor with arithmetic in half precision (AVX-512 BF16, ARM's FP16). A row is written when it is
whole; what is there is not done again. Writes rows.json and README.md, whose last part is written by hand.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import edge_bcs
from edge_bcs.bench.fleet_learning import pixels_of
from edge_bcs.bench.pages import by_hand
from edge_bcs.bench.settings import add_settings, settings_of
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import read_small, write_atomically, write_json
from edge_bcs.core.progress import say
from edge_bcs.data.dataset import ArrayDataset
from edge_bcs.runtime import Trainer
from edge_bcs.runtime.precision import FULL, HALF

Array = np.ndarray[Any, Any]
PRECISIONS = (FULL, HALF)
_BY_HAND = "## What the rows say"
_LOSS_IMAGES = 512


@dataclass(frozen=True)
class Settings:
    """What is trained and measured; each row names it.

    Attributes:
        network, width, sparsity, size: what is trained, and on how many pixels.
        images: training images, the same for all seeds. epochs, batch_size, rate: of the training.
        attack_steps: of PGD while it trains, each of 2.5·ε/attack_steps. measured_steps: of PGD afterwards.
    """

    network: str = "resnet18"
    width: float = 0.25
    sparsity: float = 0.99
    size: int = 16
    images: int = 16_000
    epochs: int = 12
    batch_size: int = 64
    rate: float = 0.1
    attack_steps: int = 7
    measured_steps: int = 20


def attack_of(steps: int) -> edge_bcs.Attack:
    """PGD of so many steps of 2.5·ε/steps, with ε = 8/255."""
    return edge_bcs.Attack(steps=steps, step_size=20 / 255 / steps)


def exported(settings: Settings, seed: int, folder: Path) -> None:
    """Compile a new network."""
    import torch

    torch.manual_seed(seed)
    network = getattr(edge_bcs.models, settings.network)(width=settings.width, input_size=settings.size)
    sparse = edge_bcs.sparsify(network, settings.sparsity, seed=seed)
    edge_bcs.export(
        sparse, folder, "at", (3, settings.size, settings.size),
        memory=edge_bcs.Memory(micro_batch=settings.batch_size), batch_norm="batch",
        batch_size=settings.batch_size, validate=False,
        attack=attack_of(settings.attack_steps),
        hyper=edge_bcs.Hyper(learning_rate=settings.rate, weight_decay=5e-4),
    )  # fmt: skip


def row(
    settings: Settings, seed: int, precision: str, train: ArrayDataset, test: ArrayDataset, out: Path
) -> dict[str, Any]:
    """Train and measure."""
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode()).hexdigest()[:12]
    artifact, run = (
        out / f"{settings.network}-{digest}" / f"{name}-{seed}" for name in ("artifact", precision)
    )
    if not (artifact / "manifest.json").exists():
        exported(settings, seed, artifact)
    begun = (run / "state.safetensors").exists()
    how: dict[str, Any] = {"threads": 1, "engine": "native", "attack_precision": precision}
    began = time.process_time()
    with Trainer.resume(run, **how) if begun else Trainer(artifact, **how) as trainer:
        trainer.fit(
            train, epochs=settings.epochs, augment="shift", schedule="cosine", save=run, max_writes=None
        )
    seconds = time.process_time() - began
    found: dict[str, Any] = {"seed": seed, "precision": precision, "settings": asdict(settings)}
    with Trainer(run, threads=1, engine="native", attack_precision=FULL) as trainer:
        measured = trainer.evaluate(test, settings.measured_steps)
    found |= {name: measured[name] for name in ("accuracy", "robust_accuracy", "samples")}
    found["processor_seconds"] = None if begun else round(seconds, 1)
    if precision == FULL:
        found["loss"] = losses(run, test, 10)
    return found


def losses(run: Path, test: ArrayDataset, steps: int) -> dict[str, float]:
    """Precision -> the mean loss, in float32, that attacks of so many steps reach on test images."""
    found = {}
    for precision in PRECISIONS:
        with Trainer(run, threads=1, engine="native", attack_precision=precision) as trainer:
            found[precision] = reached(trainer, test, attack_of(steps))
    return found


def reached(trainer: Trainer, test: ArrayDataset, attack: edge_bcs.Attack) -> float:
    """The mean loss, in float32, of training steps under an attack that leave the weights as they are."""
    trainer.attack = attack
    trainer.learning_rate = trainer.weight_decay = 0.0
    size = trainer.artifact.batch_size
    batches = range(min(len(test), _LOSS_IMAGES) // size)
    return statistics.fmean(
        trainer.step(*test.read(np.arange(n * size, (n + 1) * size)))["loss"] for n in batches
    )


def page(rows: Sequence[dict[str, Any]], rest: str) -> str:
    """README.md of the rows that there are."""
    lines = [
        "# Attacks in half precision, and what is learned",
        "",
        "AT with ε = 8/255, CIFAR-10 (JPEG), our own engine, one thread: `make attack-precision",
        "DATA=cifar10`. A seed draws the network, the connections that grow and the order of the images.",
        "Clean and under attack on all test images, in float32, after the last epoch.",
        "",
    ]
    for text in dict.fromkeys(json.dumps(one["settings"], sort_keys=True) for one in rows):
        own = [one for one in rows if one["settings"] == json.loads(text)]
        settings = Settings(**json.loads(text))
        lines += [
            f"{settings.network}, {settings.width:g} of the width, {100 * settings.sparsity:g} % sparse, on "
            f"{settings.size}×{settings.size} pixels: {settings.images:,} images, {settings.epochs} epochs, "
            f"PGD-{settings.attack_steps}, measured under PGD-{settings.measured_steps}.",
            "",
            "| seed | attacks | clean | under attack | processor seconds | loss of 10 steps, half / f32 |",
            "| ---: | --- | ---: | ---: | ---: | ---: |",
        ]
        for one in sorted(own, key=lambda one: (one["seed"], one["precision"])):
            reached = f"{one['loss'][HALF] / one['loss'][FULL]:.4f}" if "loss" in one else ""
            cells = [
                one["seed"],
                one["precision"],
                _percent(one["accuracy"]),
                _percent(one["robust_accuracy"]),
            ]
            lines.append(
                "| " + " | ".join(map(str, [*cells, one["processor_seconds"] or "–", reached])) + " |"
            )
        lines += ["", *_compared(own), ""]
    return "\n".join([*lines, rest or f"{_BY_HAND}\n"])


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _compared(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How far the precisions are apart, beside how far seeds are: of seeds that have both."""
    lines = []
    for name, measure in (("clean", "accuracy"), ("under attack", "robust_accuracy")):
        found = {
            precision: {one["seed"]: 100 * one[measure] for one in rows if one["precision"] == precision}
            for precision in PRECISIONS
        }
        seeds = sorted(found[FULL].keys() & found[HALF].keys())
        if len(seeds) < 2:
            continue
        full, half = ([found[precision][seed] for seed in seeds] for precision in PRECISIONS)
        shown = [f"{statistics.fmean(each):.2f} ± {statistics.stdev(each):.2f}" for each in (full, half)]
        apart = abs(statistics.fmean(half) - statistics.fmean(full))
        lines.append(
            f"- {name}: f32 {shown[0]}, half {shown[1]} over {len(seeds)} seeds; the means differ by "
            f"{apart:.2f}."
        )
    return lines


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--data", required=True, help="CIFAR-10, in any form that edge-bcs reads")
    parser.add_argument("--out", type=Path, default=Path("out/attack-precision"), help="where runs are kept")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    add_settings(parser, Settings)
    options = vars(parser.parse_args())
    settings = settings_of(Settings, options)
    file, readme = options["results"] / "rows.json", options["results"] / "README.md"
    rows: list[dict[str, Any]] = json.loads(read_small(file))["rows"] if file.exists() else []
    pixels, labels, classes = pixels_of(options["data"], "train", settings.size)
    chosen = np.random.default_rng(0).permutation(len(labels))[: settings.images]
    train = ArrayDataset(pixels[chosen], labels[chosen], classes)
    test = ArrayDataset(*pixels_of(options["data"], "test", settings.size))
    for seed in options["seeds"]:
        for precision in PRECISIONS:
            key = (seed, precision, asdict(settings))
            if any((one["seed"], one["precision"], one["settings"]) == key for one in rows):
                continue
            say(f"seed {seed}, attacks in {precision}")
            rows.append(row(settings, seed, precision, train, test, options["out"]))
            write_json(file, {"rows": rows}, make_folder=True)
            write_atomically(readme, page(rows, by_hand(readme, _BY_HAND)).encode())


if __name__ == "__main__":
    try:
        main()
    except EdgeBcsError as error:
        sys.exit(f"Error: {error}")
