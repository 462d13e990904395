"""Three boards, each of which sees some of the digits: what they know alone, and what they know together.

    python examples/fleet.py

Handwritten digits are dealt out to the boards by class, unevenly: most of a digit goes to one or two of them
(Dirichlet, --alpha). All begin with the same sparse network. In each round every board trains robustly on
what it sees, and their runs are merged (`edge-bcs merge`); the next round begins with that. Beside it each
board trains alone for as many steps. All are measured on digits of every class that none of them has seen.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from edge_bcs.runtime import Trainer
from numpy.typing import NDArray

import edge_bcs
from edge_bcs.cli.common import percent, table
from edge_bcs.core.files import write_json
from edge_bcs.core.outputs import check_output, json_with
from edge_bcs.data import ArrayDataset, open_data
from edge_bcs.fleet.merging import merge

SHAPE = (1, 16, 16)


def dealt(labels: NDArray[np.int64], boards: int, alpha: float, seed: int) -> list[NDArray[np.int64]]:
    """Return the places of each board's images; the shares of a class are drawn from Dirichlet(alpha)."""
    rng = np.random.default_rng(seed)
    places: list[list[NDArray[np.int64]]] = [[] for _ in range(boards)]
    for label in np.unique(labels):
        of_class = rng.permutation(np.flatnonzero(labels == label))
        bounds = np.rint(np.cumsum(rng.dirichlet([alpha] * boards)) * len(of_class)).astype(int)[:-1]
        for board, some in zip(places, np.split(of_class, bounds), strict=True):
            board.append(some)
    return [np.sort(np.concatenate(board)) for board in places]


@click.command()
@click.option("--boards", type=click.IntRange(2, 26), default=3, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=8, show_default=True)
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True, help="Of a board in a round.")
@click.option("--sparsity", default="0.95", show_default=True)
@click.option(
    "--alpha", type=float, default=0.3, show_default=True, help="How unevenly the digits are dealt."
)
@click.option(
    "--attack-steps", type=click.IntRange(1), default=10, show_default=True, help="Of PGD, to measure."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), default="out/fleet")
def main(output: Path, **options: Any) -> None:
    """Compare boards that learn together with each of them alone."""
    report_file = output / "report.json"
    check_output(report_file, json_with("rounds", "alone"), "a report of this example")
    training, held_out = (open_data("digits", split, SHAPE) for split in ("train", "test"))
    images, labels = training.read(np.arange(len(training)))
    boards = [
        ArrayDataset(images[places], labels[places], training.classes)
        for places in dealt(labels, options["boards"], options["alpha"], options["seed"])
    ]
    names = [f"board {chr(97 + number)}" for number in range(len(boards))]
    rounds = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        begins = artifact = compiled(folder / "artifact", options)
        for number in range(options["rounds"]):
            runs = [folder / f"{number}-{name}" for name in names]
            for data, run in zip(boards, runs, strict=True):
                learn(begins, data, run, options["steps"], number)
            begins = folder / f"{number}-merged"
            report = merge(runs, begins)
            rounds.append({"overlap": report["overlap"]["pairwise"], **measured(begins, held_out, options)})
        alone = []
        for name, data in zip(names, boards, strict=True):
            run = folder / f"{name}-alone"
            learn(artifact, data, run, options["rounds"] * options["steps"], 0)
            alone.append({"images": len(data), **measured(run, held_out, options)})
    write_json(report_file, {**options, "rounds": rounds, "alone": alone}, make_folder=True)
    rows = [(f"together, round {number + 1}", one) for number, one in enumerate(rounds)]
    rows += [(f"{name}, alone ({one['images']} images)", one) for name, one in zip(names, alone, strict=True)]
    table(
        f"{len(held_out)} digits that no board has seen",
        ["", "clean", f"PGD-{options['attack_steps']}", "masks in common"],
        [
            (name, percent(one["accuracy"]), percent(one["robust_accuracy"]), percent(one.get("overlap")))
            for name, one in rows
        ],
    )


def compiled(folder: Path, options: dict[str, Any]) -> Path:
    """Export a new sparse network to ``folder``."""
    torch.manual_seed(options["seed"])  # biases are drawn by torch
    network = edge_bcs.models.resnet18(width=0.25, input_channels=1, input_size=SHAPE[1])
    sparse = edge_bcs.sparsify(network, options["sparsity"], seed=options["seed"], distribution="uniform")
    edge_bcs.export(
        sparse,
        folder,
        input_shape=SHAPE,
        attack=edge_bcs.Attack(steps=3),
        batch_norm="batch",
        batch_size=32,
        memory="16MiB",
        validate=False,
    )
    return folder


def learn(begins: Path, data: ArrayDataset, run: Path, steps: int, number: int) -> None:
    """Let a board train; all have the seed of the round, so that they grow in the same places."""
    with Trainer(begins, seed=number) as trainer:
        trainer.fit(data, steps=steps, schedule="cosine", augment="none", progress=False, save=run)


def measured(run: Path, held_out: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return a run's accuracies."""
    with Trainer(run) as trainer:
        return trainer.evaluate(held_out, options["attack_steps"])


if __name__ == "__main__":
    main()
