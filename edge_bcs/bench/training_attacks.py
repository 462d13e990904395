"""`make training-attacks`: the same robust training with PGD-10 and with each single-step attack.

    python -m edge_bcs.bench.training_attacks results/training-attacks --data cifar10 --out out/attacks

ResNet-18 of a quarter of the width on 16×16 pixels, 99 % sparse, AT, `--engine sparse`. Each training is a
command of `edge-bcs train`, resumed where it was cut; its best epoch is then measured on the test images by
the commands `export` and `evaluate`. A row is written when it is whole, and rows that are there are kept.
How long a step takes is measured by itself, the attacks in turn on one Trainer.

Writes rows.json and README.md, whose last part is written by hand and kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_bcs.bench.commands import AUTOATTACK, evaluate, export, train
from edge_bcs.bench.pages import by_hand
from edge_bcs.bench.settings import add_settings, settings_of
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import read_small, write_atomically, write_json
from edge_bcs.core.progress import say
from edge_bcs.core.settings import ATTACKS, Attack

_BY_HAND = "## What the rows say"
_TITLE = "# Cheaper robust training"


@dataclass(frozen=True)
class Settings:
    """What is trained and measured; each row names it.

    Attributes:
        epochs, width, size: of the training, and of the network. batch_size: of both.
        few: test images of PGD-50 with ten restarts. fewer: of AutoAttack; 0: it is left out.
    """

    epochs: int = 60
    width: float = 0.25
    size: int = 16
    batch_size: int = 128
    few: int = 1000
    fewer: int = 200


def row(kind: str, seed: int, data: str, out: Path, settings: Settings, threads: int) -> dict[str, Any]:
    """Train and measure; what is there already is not done again."""
    folder, s = out / f"{kind}-{seed}", settings
    trained = train(
        folder,
        *("--data", data, "--model", "resnet18", "--width", s.width, "--input-size", s.size),
        *("--batch-size", s.batch_size, "--training-attack", kind, "--epochs", s.epochs, "--seed", seed),
        *("--engine", "sparse", "--threads", threads),
    )
    artifact = export(folder)
    measures = {
        "pgd20": ("--attack", "pgd", "--attack-steps", 20),
        "pgd50": ("--attack", "pgd", "--attack-steps", 50, "--restarts", 10, "--limit", s.few),
        "autoattack": (*AUTOATTACK, "--limit", s.fewer, "--resume", folder / "counts.json"),
    }
    found = {}
    for name, options in measures.items():
        if name == "autoattack" and not s.fewer:
            continue
        found[name] = evaluate(name, artifact, "--data", data, "--threads", threads, *options)
    return {
        "kind": kind,
        "seed": seed,
        "settings": asdict(s),
        "fell_back": trained.get("fell_back"),
        "best_epoch": trained["best_epoch"],
        **found,
    }


def step_seconds(artifact: Path, batch: int, repetitions: int, threads: int) -> dict[str, float]:
    """The median seconds of a step with each attack, in turn on one Trainer."""
    from edge_bcs.runtime import Trainer

    times: dict[str, list[float]] = {kind: [] for kind in ATTACKS}
    with Trainer(artifact, threads=threads) as trainer:
        images = np.random.default_rng(0).random((batch, *trainer.artifact.input_shape), np.float32)
        labels = np.arange(batch) % trainer.artifact.num_classes
        for _ in range(repetitions + 1):  # the first is not counted
            for kind, found in times.items():
                trainer.attack = Attack(kind=kind)
                began = time.perf_counter()
                trainer.step(images, labels)
                found.append(time.perf_counter() - began)
    return {kind: statistics.median(found[1:]) for kind, found in times.items()}


def page(content: dict[str, Any], rest: str) -> str:
    """README.md of the rows that there are."""
    times: dict[str, float] = content.get("step_seconds", {})
    lines = [
        _TITLE,
        "",
        "ResNet-18 of a quarter of the width on 16×16 pixels, 99 % sparse, AT with ε = 8/255, the same",
        "seed and as many epochs for each attack (`make training-attacks`). Clean and PGD-20 on all",
        "test images, of the best epoch, which is chosen under PGD-10 on held-out training images.",
        "",
        "| attack | seed | epochs | clean | PGD-20 | PGD-50×10 | AutoAttack | a step | collapsed |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for found in content["rows"]:
        cells = [found["kind"], found["seed"], found["settings"]["epochs"]]
        cells += [_percent(found["pgd20"]["accuracy"]), _percent(found["pgd20"]["robust_accuracy"])]
        for name in ("pgd50", "autoattack"):
            part = found.get(name)
            cells.append("–" if part is None else f"{_percent(part['robust_accuracy'])} of {part['samples']}")
        share = times.get(found["kind"])
        cells.append("–" if share is None else f"{share / times['pgd']:.2f} × PGD-10's")
        cells.append("no" if found["fell_back"] is None else f"after step {found['fell_back']}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, "", rest or f"{_BY_HAND}\n"])


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--data", required=True, help="CIFAR-10, in any form that edge-bcs reads")
    parser.add_argument("--out", type=Path, required=True, help="where trainings are kept")
    parser.add_argument("--kinds", nargs="+", choices=ATTACKS, default=["n-fgsm", "fgsm-rs", "pgd"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--repetitions", type=int, default=15, help="steps of each attack that are timed")
    parser.add_argument("--threads", type=int, default=1)
    add_settings(parser, Settings)
    options = vars(parser.parse_args())
    settings = settings_of(Settings, options)
    results, threads = options["results"], options["threads"]
    file = results / "rows.json"
    content: dict[str, Any] = json.loads(read_small(file)) if file.exists() else {"rows": []}
    for seed in options["seeds"]:
        for kind in options["kinds"]:
            key = (kind, seed, asdict(settings))
            if any((found["kind"], found["seed"], found["settings"]) == key for found in content["rows"]):
                continue
            content["rows"].append(row(kind, seed, options["data"], options["out"], settings, threads))
            if "step_seconds" not in content:
                artifact = options["out"] / f"{kind}-{seed}" / "artifact"
                content["step_seconds"] = step_seconds(
                    artifact, settings.batch_size, options["repetitions"], threads
                )
            write_json(file, content, make_folder=True)
            readme = results / "README.md"
            write_atomically(readme, page(content, by_hand(readme, _BY_HAND)).encode())
            say(f"{kind}, seed {seed}: written to {results}")


if __name__ == "__main__":
    try:
        main()
    except EdgeBcsError as error:
        sys.exit(f"Error: {error}")
