"""`make ablation`: what each option of `edge-bcs train` adds to Algorithm 1, alone and together.

    python -m edge_bcs.bench.ablation results/ablation --data cifar10 --out out/ablation

ResNet-18 of a quarter of the width, 99 % sparse or less, AT with a single-step attack, `--engine sparse`.
Each row is a command of `edge-bcs train` with one candidate's options, resumed where it was cut; its best
epoch is judged under PGD-50 on the tenth of the training images that the training held out (`--validation
0.1`). Test images are seen with `--test` alone, of the candidates that are named then: PGD-50 with ten
restarts on all of them, and AutoAttack. A row is written when it is whole, and rows that are there are kept.

Beside them the comparators: each prunes one dense network of the seed, which `--method dense` trains robustly
for as many epochs, and trains what is left for as many again. In between HYDRA searches for a third of them,
ADMM for as many. One process at a time may measure comparators of a seed: they share the dense network.

Writes rows.json, ablation.png, compression.png where a candidate has rows of several sparsities, and
README.md, whose last part is written by hand and kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edge_bcs.bench.commands import AUTOATTACK, accuracies, evaluate, export, kept, train
from edge_bcs.bench.pages import by_hand
from edge_bcs.bench.settings import add_settings, settings_of
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import read_small, write_atomically, write_json
from edge_bcs.core.progress import say
from edge_bcs.data.dataset import Subset, held_apart
from edge_bcs.plots import write_figure

_BY_HAND = "## What the rows say"
_TITLE = "# What each option adds to Algorithm 1"
FIRST = "paper"
"""With what the others are compared."""

CANDIDATES: dict[str, tuple[str, ...]] = {
    FIRST: (),
    "growth": ("--grow",),
    "erk": ("--distribution", "erk"),
    "one-cycle": ("--schedule", "one-cycle"),
    "cosine": ("--schedule", "cosine"),
    "low decay": ("--weight-decay", "1e-4"),
    "recycle": ("--recycle",),
    "growth, erk": ("--grow", "--distribution", "erk"),
    "growth, recycle": ("--grow", "--recycle"),
    "growth, low decay": ("--grow", "--weight-decay", "1e-4"),
    "growth, cosine": ("--grow", "--schedule", "cosine"),
    "growth, one-cycle": ("--grow", "--schedule", "one-cycle"),
    "growth, pgd end": ("--grow", "--pgd-from", "0.8"),
    "growth, images as they are": ("--grow", "--augment", "none"),
    "growth, mirrored": ("--grow", "--augment", "mirror"),
    "growth, images as they are, pgd end": ("--grow", "--augment", "none", "--pgd-from", "0.8"),
    "growth, mirrored, pgd end": ("--grow", "--augment", "mirror", "--pgd-from", "0.8"),
    "lwm": ("--method", "lwm"),
    "hydra": ("--method", "hydra"),
    "admm": ("--method", "admm"),
}
"""Options of `edge-bcs train` beside those of all."""


@dataclass(frozen=True)
class Settings:
    """How all candidates are trained and judged; each row names it.

    Attributes:
        epochs, width, size, sparsity, batch_size, attack: of the training, and of the network.
        validation: share of the training images that is held out, to choose the best epoch and to judge.
        judged_steps: of PGD on these.
    """

    epochs: int = 60
    width: float = 0.25
    size: int = 16
    sparsity: str = "0.99"
    batch_size: int = 128
    attack: str = "fgsm-rs"
    validation: float = 0.1
    judged_steps: int = 50


_SPARSITY = Settings().sparsity


@dataclass(frozen=True)
class Tests:
    """What is measured on the test images, 0: not at all.

    Attributes:
        restarts: of PGD-50. few: test images of AutoAttack.
    """

    restarts: int = 10
    few: int = 1000


def row(
    candidate: str, seed: int, data: str, out: Path, settings: Settings, threads: int, tests: Tests | None
) -> dict[str, Any]:
    """Train and judge; what is there already is not done again."""
    s, options = settings, CANDIDATES[candidate]
    sparsity = () if s.sparsity == _SPARSITY else ("--sparsity", s.sparsity)
    common = [
        *("--data", data, "--model", "resnet18", "--width", s.width, "--input-size", s.size),
        *("--batch-size", s.batch_size, "--training-attack", s.attack, "--epochs", s.epochs, "--seed", seed),
        *("--validation", s.validation, "--engine", "sparse", "--threads", threads),
    ]

    if "--method" in options:
        dense = out / f"{named(replace(s, sparsity=_SPARSITY))}-dense-{seed}"  # it has no sparsity
        train(dense, *common, "--method", "dense")
        # ADMM is nearer to κ connections the longer it searches; HYDRA's authors search for twenty epochs.
        search = s.epochs if candidate == "admm" else -(-s.epochs // 3)
        options = (*options, "--weights", str(dense))
        options += () if candidate == "lwm" else ("--search-epochs", str(search))
    folder = out / f"{named(s)}-{candidate.replace(', ', '+').replace(' ', '-')}-{seed}"
    trained = train(folder, *common, *sparsity, *options)
    artifact = export(folder)
    found = {
        "candidate": candidate,
        "seed": seed,
        "settings": asdict(s),
        "loss": trained["loss"],
        "best_epoch": trained["best_epoch"],
        "fell_back": trained.get("fell_back"),
        "held_out": _judged(artifact, data, seed, s, threads),
    }
    if tests is not None:
        found |= {"test": _tested(artifact, data, tests, threads), "tests": asdict(tests)}
    return found


def named(settings: Settings) -> str:
    """What the folders of these settings begin with."""
    sparsity = "" if settings.sparsity == _SPARSITY else f"-{settings.sparsity}"
    return f"{settings.size}x{settings.size}-{settings.attack}-{settings.epochs}{sparsity}"


def _judged(artifact: Path, data: str, seed: int, settings: Settings, threads: int) -> dict[str, Any]:
    """Clean and robust accuracy on the training images that were held out."""
    from edge_bcs.data.adapt import dataset_of
    from edge_bcs.runtime import Trainer

    def judged() -> dict[str, Any]:
        with Trainer(artifact, threads=threads) as trainer:
            images = dataset_of(data, shape=trainer.artifact.input_shape)
            held = held_apart(images, settings.validation, seed)[1]
            return accuracies(trainer.evaluate(Subset(images, held), settings.judged_steps))

    return kept(artifact.parent / "held_out.json", [data, settings.judged_steps], judged)


def _tested(artifact: Path, data: str, tests: Tests, threads: int) -> dict[str, Any]:
    """Clean and robust accuracy on test images, under PGD-50 and AutoAttack."""
    counts = artifact.parent / "counts.json"
    asked = {
        "pgd50": (tests.restarts, "--attack", "pgd", "--attack-steps", 50, "--restarts", tests.restarts),
        "autoattack": (tests.few, *AUTOATTACK, "--limit", tests.few, "--resume", counts),
    }
    return {
        name: evaluate(name, artifact, "--data", data, "--threads", threads, *options)
        for name, (wanted, *options) in asked.items()
        if wanted
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By candidate, the most robust first: its measures on held-out images, mean and deviation of a seed, and
    what it adds to Algorithm 1 with the same seed."""
    by_seed: dict[str, dict[int, dict[str, Any]]] = {}
    for found in rows:
        by_seed.setdefault(found["candidate"], {})[found["seed"]] = found
    first = by_seed.get(FIRST, {})
    told: dict[str, dict[str, Any]] = {}
    for candidate, of in by_seed.items():
        one: dict[str, Any] = {"seeds": len(of), "loss": statistics.mean(r["loss"] for r in of.values())}
        for measure in ("accuracy", "robust_accuracy"):
            values = {seed: r["held_out"][measure] for seed, r in of.items()}
            gains = [values[seed] - first[seed]["held_out"][measure] for seed in values if seed in first]
            one[measure] = {
                "mean": statistics.mean(values.values()),
                "deviation": statistics.stdev(values.values()) if len(values) > 1 else None,
                "gain": statistics.mean(gains) if gains else None,
                "gain_deviation": statistics.stdev(gains) if len(gains) > 1 else None,
            }
        told[candidate] = one
    return dict(sorted(told.items(), key=lambda item: -item[1]["robust_accuracy"]["mean"]))


def page(rows: list[dict[str, Any]], rest: str) -> str:
    """README.md of the rows that there are: a table for each of the settings."""
    lines = [
        _TITLE,
        "",
        "ResNet-18 of a quarter of the width, AT with ε = 8/255 (`make ablation`); options of",
        "`edge-bcs train` beside those of all. Judged on the tenth of the training images that is held out.",
        "Mean and standard deviation of a seed, in %; what an option adds, in points, with the same seed.",
    ]
    if any("--method" in CANDIDATES.get(row["candidate"], ()) for row in rows):
        lines += [
            "The comparators (`--method`) also had a dense network, trained for as many epochs, and HYDRA a",
            "third, ADMM as many again, in which they search what to prune.",
        ]
    for settings in _in_order(row["settings"] for row in rows):
        of = [row for row in rows if row["settings"] == settings]
        s = Settings(**settings)
        lines += [
            "",
            f"## {s.size}×{s.size} pixels, {100 * float(s.sparsity):g} % sparse, {s.epochs} epochs, "
            f"{s.attack}",
            "",
            "| candidate | options | seeds | loss "
            f"| clean | PGD-{s.judged_steps} | adds, clean | adds, robust |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for candidate, found in summary(of).items():
            measures = [found["accuracy"], found["robust_accuracy"]]
            options = " ".join(CANDIDATES.get(candidate, ()))  # trials have none
            cells = [candidate, f"`{options}`" if options else ""]
            cells += [str(found["seeds"]), f"{found['loss']:.3f}"]
            cells += [_with_deviation(one["mean"], one["deviation"]) for one in measures]
            cells += ["" if candidate == FIRST else _gain(one) for one in measures]
            lines.append("| " + " | ".join(cells) + " |")
        tested = [row for row in of if "test" in row]
        if tested:
            lines += ["", "Test images:", "", "| candidate | seed | clean | PGD-50 | AutoAttack |"]
            lines.append("| --- | ---: | ---: | ---: | ---: |")
        for found in tested:
            pgd, auto = found["test"].get("pgd50"), found["test"].get("autoattack")
            cells = [found["candidate"], str(found["seed"])]
            cells += (
                ["–", "–"] if pgd is None else [_percent(pgd["accuracy"]), _percent(pgd["robust_accuracy"])]
            )
            cells.append("–" if auto is None else f"{_percent(auto['robust_accuracy'])} of {auto['samples']}")
            lines.append("| " + " | ".join(cells) + " |")
    pictures = ["![what each option adds](ablation.png)"]
    if compressed(rows):
        pictures += ["", "![accuracy against compression](compression.png)"]
    return "\n".join([*lines, "", *pictures, "", rest or f"{_BY_HAND}\n"])


def compressed(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Of each candidate that was trained at several sparsities, with the settings of the first row but for
    that: what `summary` says of it, by sparsity, the lowest first."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    like = {**rows[0]["settings"], "sparsity": ""} if rows else {}
    of = [row for row in rows if {**row["settings"], "sparsity": ""} == like]
    for sparsity in sorted({row["settings"]["sparsity"] for row in of}, key=float):
        at = summary([row for row in of if row["settings"]["sparsity"] == sparsity])
        for candidate, one in at.items():
            found.setdefault(candidate, {})[sparsity] = one
    return {candidate: one for candidate, one in found.items() if len(one) > 1}


def _in_order(settings: Any) -> list[dict[str, Any]]:
    """Each once, in the order of their first rows."""
    found: list[dict[str, Any]] = []
    for one in settings:
        if one not in found:
            found.append(one)
    return found


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _with_deviation(mean: float, deviation: float | None) -> str:
    return _percent(mean) + ("" if deviation is None else f" ± {100 * deviation:.1f}")


def _gain(one: dict[str, Any]) -> str:
    if one["gain"] is None:
        return "–"
    spread = one["gain_deviation"]
    return f"{100 * one['gain']:+.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")


def draw(rows: list[dict[str, Any]], settings: Settings) -> Any:
    """A figure: each candidate's seeds under PGD-50, beside those of Algorithm 1."""
    from matplotlib.figure import Figure

    found = summary([row for row in rows if row["settings"] == asdict(settings)])
    figure = Figure(figsize=(7, 1 + 0.35 * len(found)), layout="constrained")
    axes = figure.add_subplot()
    for place, (candidate, one) in enumerate(reversed(found.items())):
        for row in rows:
            if row["candidate"] == candidate and row["settings"] == asdict(settings):
                axes.plot(100 * row["held_out"]["robust_accuracy"], place, "o", color="#0072B2", mfc="none")
        axes.plot(100 * one["robust_accuracy"]["mean"], place, "D", color="#D55E00")
    if FIRST in found:
        axes.axvline(100 * found[FIRST]["robust_accuracy"]["mean"], color="0.6", linestyle=":")
    axes.set_yticks(range(len(found)), list(reversed(found)))
    axes.set_xlabel(f"held-out images right under PGD-{settings.judged_steps}, %: seeds, and their mean")
    return figure


def draw_compression(found: dict[str, dict[str, dict[str, Any]]]) -> Any:
    """A figure of what `compressed` found: clean and robust accuracy against how many times fewer weights
    there are, as the paper's Figure 1."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.4), layout="constrained")
    times = {sparsity: 1 / (1 - float(sparsity)) for one in found.values() for sparsity in one}
    for axes, measure, title in zip(
        figure.subplots(1, 2), ("accuracy", "robust_accuracy"), ("clean", "under PGD"), strict=True
    ):
        for candidate, one in found.items():
            means = [100 * at[measure]["mean"] for at in one.values()]
            axes.plot([times[sparsity] for sparsity in one], means, "o-", label=candidate)
        axes.set_xscale("log")
        axes.set_xticks(list(times.values()), [f"{number:.0f}×" for number in times.values()])
        axes.minorticks_off()
        axes.set_title(title)
        axes.set_xlabel("compression")
        axes.set_ylabel("held-out images right, %")
    axes.legend(fontsize=8)
    return figure


def write_page(folder: Path, rows: list[dict[str, Any]], settings: Settings) -> None:
    """Write README.md and ablation.png; what was written by hand into the former is kept."""
    readme = folder / "README.md"
    write_atomically(readme, page(rows, by_hand(readme, _BY_HAND)).encode())
    write_figure(draw(rows, settings), folder / "ablation.png", dpi=150)
    if found := compressed(rows):
        write_figure(draw_compression(found), folder / "compression.png", dpi=150)


def main() -> None:
    """Train and judge what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--data", required=True, help="CIFAR-10, in any form that edge-bcs reads")
    parser.add_argument("--out", type=Path, required=True, help="where trainings are kept")
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--test", action="store_true", help="measure these candidates on the test images, too"
    )
    add_settings(parser, Settings)
    add_settings(parser, Tests)
    options = vars(parser.parse_args())
    settings, results = settings_of(Settings, options), options["results"]
    tests = settings_of(Tests, options) if options["test"] else None
    file = results / "rows.json"
    for seed in options["seeds"]:
        for candidate in options["candidates"]:
            if any(_is(found, candidate, seed, settings, tests) for found in rows_of(file)):
                continue
            made = row(candidate, seed, options["data"], options["out"], settings, options["threads"], tests)
            # Read again: another process may have written rows meanwhile.
            rows = [found for found in rows_of(file) if not _is(found, candidate, seed, settings, None)]
            rows.append(made)
            write_json(file, {"rows": rows}, make_folder=True)
            write_page(results, rows, settings)
            clean, robust = (made["held_out"][name] for name in ("accuracy", "robust_accuracy"))
            say(f"{candidate}, seed {seed}: {clean:.3f} clean, {robust:.3f} robust")


def rows_of(file: Path) -> list[dict[str, Any]]:
    """Rows of a file; settings that are younger than a row have their defaults there."""
    rows: list[dict[str, Any]] = json.loads(read_small(file))["rows"] if file.exists() else []
    return [{**row, "settings": asdict(Settings(**row["settings"]))} for row in rows]


def _is(found: dict[str, Any], candidate: str, seed: int, settings: Settings, tests: Tests | None) -> bool:
    same = (found["candidate"], found["seed"], found["settings"]) == (candidate, seed, asdict(settings))
    return same and (tests is None or found.get("tests") == asdict(tests))


if __name__ == "__main__":
    try:
        main()
    except EdgeBcsError as error:
        sys.exit(f"Error: {error}")
