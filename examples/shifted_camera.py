"""Does robust fine-tuning help on a board whose camera sees other images than the network was trained on?

    edge-bcs train --model resnet18 --width 0.25 --data CIFAR --epochs 10 --engine sparse -o runs/resnet18
    python examples/shifted_camera.py runs/resnet18 --data CIFAR -o out/shifted-camera

A robust, 99 % sparse network comes from `edge-bcs train`. The board's camera sees five of the ten classes,
out of focus, with a colour cast, low contrast and sensor noise. Three quarters of its images are for training
on the board, one quarter is held out. The same network is measured on the held-out images as it is, after
plain fine-tuning, with augmentation by colours and crops, by AugMix and without, and after robust fine-tuning
at a small and at the usual ε, each inside 8 MiB of working set: clean, under attack, and under fourteen
corruptions in five severities, which a camera that gets worse might add. A user sees which robustness helps.

The images come from the test split, which the network never saw; so nothing that is measured was trained on.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
from edge_bcs.runtime import Trainer
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

import edge_bcs
from edge_bcs.cli.common import percent, table
from edge_bcs.core.files import write_json
from edge_bcs.core.outputs import check_output, json_with
from edge_bcs.data import ArrayDataset, open_data
from edge_bcs.data.augmentation import Augment
from edge_bcs.evaluation.corruptions import under_corruptions

WAYS: dict[str, tuple[str | None, float, Augment]] = {
    "none": (None, 8, "shift"),
    "plain": ("natural", 8, "shift"),
    "plain, --augment photo": ("natural", 8, "photo"),
    "plain, --augment mix": ("natural", 8, "mix"),
    "robust (AT, PGD-10), ε = 2/255": ("at", 2, "shift"),
    "robust (AT, PGD-10), ε = 8/255": ("at", 8, "shift"),
}
"""Objective, ε in units of 1/255, and augmentation."""
EPSILON = 8 / 255  # of the attack with which all are measured
CLASSES = (0, 1, 3, 5, 8)  # in CIFAR-10's order: airplane, automobile, cat, dog, ship
BLUR = 0.7  # standard deviation of the blur, pixels
GAIN = (1.10, 0.97, 0.80)  # of red, green and blue: a warm lamp
CONTRAST = 0.75  # about the middle grey
NOISE = 0.03  # standard deviation of the sensor's noise, in units of the full range


def seen_by_the_camera(images: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """Return ``images`` (f32 [n, 3, H, W] in [0, 1]) blurred, tinted, flat and noisy, in the same form."""
    blurred = gaussian_filter(images, sigma=(0, 0, BLUR, BLUR))
    tinted = blurred * np.float32(GAIN)[None, :, None, None]
    flat = 0.5 + CONTRAST * (tinted - 0.5)
    noise = np.random.default_rng(seed).normal(0.0, NOISE, images.shape)
    return np.clip(flat + noise, 0.0, 1.0).astype(np.float32)


def camera_images(
    spec: str, shape: tuple[int, int, int], seed: int
) -> tuple[ArrayDataset, ArrayDataset, tuple[str, ...]]:
    """Return what the board may train on, what it is measured on, and the names of all classes.

    Both are the shifted test images of `CLASSES`, in the ``shape`` [C, H, W] that the network takes, and have
    the names of these alone: a camera knows of no others. The network finds its own labels by the names.
    """
    images = open_data(spec, "test", shape)
    x, y = images.read(images.order(seed, 0))
    chosen = np.isin(y, CLASSES)
    x, y = seen_by_the_camera(x[chosen], seed), np.searchsorted(CLASSES, y[chosen])
    names = tuple(images.classes[label] for label in CLASSES)
    quarter = len(y) // 4
    training = ArrayDataset(x[quarter:], y[quarter:], names)
    return training, ArrayDataset(x[:quarter], y[:quarter], names), images.classes


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True))
@click.option("--data", "spec", required=True, help="CIFAR-10, in any form that edge-bcs reads.")
@click.option("--epochs", type=click.IntRange(1), default=5, show_default=True)
@click.option("--learning-rate", type=float, default=0.01, show_default=True)
@click.option("--memory", default="8MiB", show_default=True, help="Cap of the working set.")
@click.option("--attack-steps", type=click.IntRange(1), default=20, show_default=True, help="Of PGD.")
@click.option(
    "--corrupted", type=click.IntRange(1), default=250, show_default=True, help="Images, of each kind."
)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), default="out/shifted-camera")
def main(checkpoint: str, spec: str, output: Path, **options: Any) -> None:
    """Compare no, plain and robust fine-tuning on what a shifted camera sees, attacked and corrupted."""
    ours = json_with("checkpoint", "data", "rows")
    check_output(output / "report.json", ours, "a report of this example")
    shape = edge_bcs.load(checkpoint).input_shape or (3, 32, 32)
    training, held_out, classes = camera_images(spec, shape, options["seed"])
    rows = []
    for name, way in WAYS.items():
        sparse = edge_bcs.load(checkpoint)
        # A checkpoint of an earlier version names no classes; its labels are those of the data it had.
        sparse.classes = sparse.classes or classes
        rows.append({"fine_tuning": name, **measure(sparse, way, training, held_out, options)})
    report = {"checkpoint": checkpoint, "data": spec, **options, "rows": rows}
    write_json(output / "report.json", report, make_folder=True)
    table(
        f"{len(held_out)} held-out images of the shifted camera",
        ["fine-tuning on the board", "clean", f"PGD-{options['attack_steps']}", "corrupted", "working set"],
        [
            (
                row["fine_tuning"],
                percent(row["accuracy"]),
                percent(row["robust_accuracy"]),
                percent(row["mean_corruption_acc"]),
                f"{row['peak_bytes'] / 2**20:.1f} MiB",
            )
            for row in rows
        ],
    )


def measure(
    sparse: edge_bcs.SparseModel,
    way: tuple[str | None, float, Augment],
    training: ArrayDataset,
    held_out: ArrayDataset,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Compile the network, fine-tune it as one of `WAYS` says, and return its accuracies."""
    objective, epsilon, augment = way
    with tempfile.TemporaryDirectory() as folder:
        edge_bcs.export(
            sparse,
            Path(folder) / "artifact",
            objective=objective or "at",
            memory=options["memory"],
            batch_norm="batch",
            attack=edge_bcs.Attack(epsilon=epsilon / 255, step_size=epsilon / 4 / 255),
            hyper=edge_bcs.Hyper(learning_rate=options["learning_rate"]),
        )
        artifact = Path(folder) / "artifact"
        with Trainer(artifact, memory=options["memory"], threads=options["threads"]) as trainer:
            if objective is not None:
                trainer.fit(training, options["epochs"], augment=augment)
            peak = trainer.memory()["peak_bytes"]
            accuracies = trainer.evaluate(held_out, options["attack_steps"], epsilon=EPSILON)
            known = trainer.match_classes(held_out).data
            broken = under_corruptions(trainer.predict, known, samples=options["corrupted"])
            return {**accuracies, **broken, "peak_bytes": peak}


if __name__ == "__main__":
    main()
