"""Does growth by gradient help a board that fine-tunes? What `README.md` says of it.

    python results/ablation/on_board.py runs/growth --data cifar10 --epochs 5 --learning-rate 0.01

The camera of `examples/shifted_camera.py` sees other images than the network was trained on. A board trains
on 3,000 of them, with and without growth between the steps, through its own Trainer; 1,000 others are
measured.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from edge_bcs.runtime import Trainer

import edge_bcs
from edge_bcs.method.growth import is_due, moved_at
from edge_bcs.training.backends.compiled import grow

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from shifted_camera import camera_images

_BATCH = 128
WAYS = ((0.0, 1), (0.1, 10), (0.3, 10), (0.3, 30))
"""Share of the connections that moves the first time, and every so many steps."""


def main() -> None:
    """Fine-tune each way with each seed, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", required=True, help="CIFAR-10, in any form that edge-bcs reads")
    parser.add_argument("--objective", choices=["natural", "at"], default="at")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    for seed in options.seeds:
        for share, every in WAYS:
            found = fine_tuned(options, seed, share, every)
            clean, robust = 100 * found["accuracy"], 100 * found["robust_accuracy"]
            told = f"{options.objective}, {options.epochs} epochs, rate {options.learning_rate}, "
            told += f"seed {seed}, share {share} every {every}: {clean:.1f} clean, {robust:.1f} robust"
            print(told, flush=True)


def fine_tuned(options: argparse.Namespace, seed: int, share: float, every: int) -> dict[str, Any]:
    """Accuracies on the images that the board does not train on, after a training."""
    sparse = edge_bcs.load(options.checkpoint)
    training, held_out, classes = camera_images(options.data, sparse.input_shape or (3, 32, 32), seed)
    sparse.classes = sparse.classes or classes
    attack = {} if options.objective == "natural" else {"attack": edge_bcs.Attack(kind="fgsm-rs")}
    hyper = edge_bcs.Hyper(learning_rate=options.learning_rate)
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "artifact"
        edge_bcs.export(
            sparse, artifact, objective=options.objective, batch_norm="batch", micro_batch=_BATCH,
            hyper=hyper, validate=False, **attack,
        )  # fmt: skip
        with Trainer(artifact, threads=1, seed=seed) as trainer:
            known = trainer.match_classes(training).data
            total = options.epochs * -(-len(training) // _BATCH)
            generator, growth = np.random.default_rng(seed), edge_bcs.Growth()

            def growing(record: dict[str, Any]) -> None:
                step = record["step"]
                count = moved_at(share, growth.until, trainer.artifact.kappa, step, total)
                if count and is_due(every, growth.until, step, total):
                    images, labels = known.read(generator.choice(len(known), _BATCH, replace=False))
                    grow(trainer, images, labels, count, growth, step)

            trainer.fit(training, options.epochs, on_step=growing)
            return trainer.evaluate(held_out, 20, epsilon=8 / 255)


if __name__ == "__main__":
    main()
