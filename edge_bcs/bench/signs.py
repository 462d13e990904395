"""`make signs`: from a pretrained network and photographs of hands to a robust one, as a board trains it.

    python -m edge_bcs.bench.signs results/signs --data signs.tar.gz

The photographs are split as in `edge_bcs.bench.hands`: 30 % are held out, 10 % are there to choose by.
EfficientNet-Lite0 is pruned on the host, by magnitude with its weights of ImageNet, at once or gradually, or,
from scratch, at random, and learns there for a few epochs with the statistics of its batches; distilled, with
the dense network as its teacher. The rest is what `finetune` does, under its cap: natural training of all or
of the head, and from where natural training of all ended, adversarial training of all or of the head, in
stages in which ε and the attack grow. Beside it the dense network, which PyTorch trains for as many epochs in
all: what the photographs allow without either limit.

Writes rows.json to the folder: for each draw and way the accuracy on the held-out photographs, clean and for
robust networks under PGD, the settings, and the working set; signs.png; and README.md, whose last part is
written by hand and kept. A row is written when it is done; rows that are there are kept, and a run that was
cut off goes on. `--choosing` measures the choosing split alone, into choosing.json, and keeps the held-out
photographs out of sight.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import edge_bcs
from edge_bcs.bench.hands import CLASSES, Stage, efficientnet, photographs, pretrained, split, untrained
from edge_bcs.bench.pages import by_hand
from edge_bcs.bench.settings import add_settings, settings_of
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import read_small, write_atomically, write_json
from edge_bcs.core.progress import say
from edge_bcs.core.units import parse_bytes
from edge_bcs.data.augmentation import Augment
from edge_bcs.data.dataset import ArrayDataset
from edge_bcs.plots import write_figure
from edge_bcs.runtime import Trainer

Array = np.ndarray[Any, Any]
PATIENCE = 40
"""Steps."""
_HEADING, _BY_HAND = "# Photographs of hands", "## What the rows say"


@dataclass(frozen=True)
class Way:
    """One way of training.

    Attributes:
        start: "pretrained", "distilled", "gradual", "scratch" or "dense". part: what is trained.
        robust: whether it is attacked.
        cap: of the working set on the board; None: it is trained on the host alone.
        clean, under_attack: what the held-out photographs shall show, if anything was aimed at.
    """

    start: str
    part: str
    robust: bool
    cap: str | None
    clean: float | None = None
    under_attack: float | None = None


WAYS = {
    "natural": Way("pretrained", "all", False, "48MiB", 0.97),
    "at": Way("pretrained", "all", True, "48MiB", 0.85, 0.60),
    "distilled natural": Way("distilled", "all", False, "48MiB", 0.97),
    "distilled at": Way("distilled", "all", True, "48MiB", 0.85, 0.60),
    "gradual natural": Way("gradual", "all", False, "48MiB", 0.97),
    "gradual at": Way("gradual", "all", True, "48MiB", 0.85, 0.60),
    "head natural": Way("pretrained", "head", False, "8MiB"),
    "head at": Way("pretrained", "head", True, "10MiB"),
    "scratch natural": Way("scratch", "all", False, "48MiB"),
    "scratch at": Way("scratch", "all", True, "48MiB"),
    "dense natural": Way("dense", "all", False, None),
}
"""Measured in pairs, each of all draws."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured; each row of the results names it.

    Attributes:
        sparsity: of the 1×1 layers. size: height and width of the images.
        host_epochs, host_rate, host_batch: natural training after pruning, on the host.
        epochs, rate, batch: natural training on the board.
        stages: of adversarial training, each SHARE:EPOCHS:STEPS:RATE (see `Stage`). at_batch: of all.
        epsilon: of 255.
        measured_steps: of PGD afterwards.
    """

    sparsity: float = 0.9
    size: int = 128
    host_epochs: int = 16
    host_rate: float = 0.02
    host_batch: int = 32
    epochs: int = 4
    rate: float = 0.0005
    batch: int = 32
    stages: str = "0.125:1:1:0.002 0.25:1:1:0.002 0.5:1:1:0.002 0.75:1:2:0.003 1:3:2:0.003"
    at_batch: int = 16
    epsilon: float = 4.0
    measured_steps: int = 20
    augment: Augment = "zoom"


class Draw:
    """One draw: its data, and the trainings of it, each in a folder named after what decides it."""

    def __init__(self, settings: Settings, images: Array, labels: Array, draw: int, draws: int, out: Path):
        self.settings, self.draw = settings, draw
        training, choosing, held_out = split(len(labels), draw, draws)
        self.training, self.choosing, self.held_out = (
            ArrayDataset(images[places], labels[places]) for places in (training, choosing, held_out)
        )
        self.out = out / f"draw-{draw}-of-{draws}"

    def row(self, name: str, choosing: bool, threads: int) -> dict[str, Any]:
        """Train one way to its end, measure it, and return the row; of one that collapsed, that it did."""
        row = {"draw": self.draw, "way": name, "settings": asdict(self.settings)}
        try:
            return {**row, **self._measured(name, choosing, threads)}
        except CollapsedError as error:
            return {**row, "collapsed": str(error)}

    def _measured(self, name: str, choosing: bool, threads: int) -> dict[str, Any]:
        way, settings = WAYS[name], self.settings
        data = self.choosing if choosing else self.held_out
        part = "choosing" if choosing else "held_out"
        host, chain = self._host(way.start, threads)
        if way.cap is None:
            return {part: self._in_pytorch(host, data)}
        if way.robust:
            natural, chain = self._natural(host, chain, Way(way.start, "all", False, "48MiB"), threads)
            run = self._robust(natural, chain, way, threads)
        else:
            run, _ = self._natural(host, chain, way, threads)
        steps = settings.measured_steps if way.robust else 0
        say(f"draw {self.draw}, {name}: measuring")
        with Trainer(run, threads=threads) as trainer:
            found = trainer.evaluate(data, steps)
            peak = trainer.peak_bytes
        report = json.loads(read_small(run / "done.json"))
        return {
            part: found,
            "trained": {"loss": report["loss"], "accuracy": report["accuracy"]},
            "peak_bytes": max(peak, report["peak_bytes"]),
            "cap_bytes": parse_bytes(way.cap),
        }

    def _host(self, start: str, threads: int) -> tuple[Path, str]:
        """Train the network on the host, pruned or dense; return the folder and what decided it."""
        import torch

        torch.set_num_threads(threads)
        s, dense = self.settings, start == "dense"
        gradual = edge_bcs.Gradual(str(s.sparsity)) if start == "gradual" else None
        teacher, before = self._teacher(threads) if start == "distilled" else (None, "")
        in_pytorch = dense or gradual is not None or teacher is not None
        sparsity = 0.0 if dense else s.sparsity
        epochs = s.host_epochs + (s.epochs if dense else 0)
        chain = _named(before, start, sparsity, s.size, epochs, s.host_rate, s.host_batch, s.augment)
        folder = self.out / f"host-{start}-{chain}"
        if not (folder / "done.json").exists():
            torch.manual_seed(self.draw)
            make = untrained if start == "scratch" else pretrained
            sparse = make(0.0 if gradual is not None else sparsity, self.draw)
            if in_pytorch:
                _lay_out(sparse.network)
            say(f"draw {self.draw}, host, {start}: {epochs} epochs")
            edge_bcs.train(
                sparse, self.training, objective="natural", batch_size=s.host_batch,
                method=edge_bcs.Method("dense" if dense else "bcs", gradual=gradual),
                schedule=edge_bcs.Schedule(epochs=epochs, kind="cosine", warmup=0.1),
                hyper=edge_bcs.Hyper(learning_rate=s.host_rate, weight_decay=0.005 * s.host_rate),
                feed=edge_bcs.Feed(augment=s.augment, validation=0), teacher=teacher,
                compute=edge_bcs.Compute("torch" if in_pytorch else "sparse", threads=threads),
                output=edge_bcs.Output(folder, resume=(folder / "last.safetensors").exists()),
            )  # fmt: skip
            write_json(folder / "done.json", {})
        return folder, chain

    def _teacher(self, threads: int) -> tuple[edge_bcs.Teacher, str]:
        """The dense network of the draw, and what decided it."""
        folder, chain = self._host("dense", threads)
        dense = edge_bcs.load(folder, with_head())
        _lay_out(dense.network)
        return edge_bcs.Teacher(dense), chain

    def _in_pytorch(self, host: Path, data: ArrayDataset) -> dict[str, Any]:
        from edge_bcs.evaluation import evaluate

        found = evaluate(edge_bcs.load(host, with_head()), data, attack="none", batch_size=32)
        return {"accuracy": found["clean_acc"], "samples": found["samples"]}

    def _natural(self, host: Path, before: str, way: Way, threads: int) -> tuple[Path, str]:
        s = self.settings
        chain = _named(before, way.part, way.cap, s.epochs, s.rate, s.batch)
        folder = self.out / f"natural-{way.start}-{way.part}-{chain}"
        how = {"objective": "natural", "batch_size": s.batch, "hyper": edge_bcs.Hyper(learning_rate=s.rate)}
        return self._board(folder, host, way, s.epochs, how, threads), chain

    def _robust(self, natural: Path, before: str, way: Way, threads: int) -> Path:
        s, run = self.settings, natural
        for number, text in enumerate(s.stages.split()):
            stage = Stage.parse(text)
            before = _named(before, way.part, way.cap, text, s.epsilon, s.at_batch)
            how = {"objective": "at", "batch_size": s.at_batch, "attack": stage.attack(s.epsilon)}
            how["hyper"] = edge_bcs.Hyper(learning_rate=stage.rate)
            folder = self.out / f"at-{number}-{way.start}-{way.part}-{before}"
            run = self._board(folder, run, way, stage.epochs, how, threads)
        return run

    def _board(
        self, folder: Path, learnt: Path, way: Way, epochs: int, how: dict[str, Any], threads: int
    ) -> Path:  # fmt: skip
        """Export what was learnt so far, and train it as `finetune` does; return the run."""
        artifact, run = folder / "artifact", folder / "run"
        if (run / "done.json").exists():
            return run
        if not (artifact / "manifest.json").exists():
            shutil.rmtree(artifact, ignore_errors=True)
            sparse = edge_bcs.load(learnt, with_head())
            edge_bcs.export(
                sparse, artifact, input_shape=(3, self.settings.size, self.settings.size), memory=way.cap,
                train=way.part, validate=False, **how,
            )  # fmt: skip
        begun = (run / "state.safetensors").exists()
        say(f"draw {self.draw}, {folder.name}: {epochs} epochs")
        with Trainer.resume(run, threads=threads) if begun else Trainer(artifact, threads=threads) as trainer:
            report = trainer.fit(
                self.training, epochs, save=run, metrics=run / "metrics.jsonl", augment=self.settings.augment,
                schedule="cosine", warmup=0.15 if way.robust else 0.1, max_writes=None, on_step=Watch(),
            )  # fmt: skip
        write_json(run / "done.json", report)
        return run


class CollapsedError(EdgeBcsError):
    """A training that answers by chance."""


class Watch:
    """Ends a training that has answered by chance for `PATIENCE` steps: it does not come back from there."""

    def __init__(self) -> None:
        self._accuracies: deque[float] = deque(maxlen=PATIENCE)

    def __call__(self, record: dict[str, Any]) -> None:
        """Look at a step; raise `CollapsedError`."""
        self._accuracies.append(record.get("robust_accuracy", record.get("accuracy", 1.0)))
        right = statistics.mean(self._accuracies)
        if len(self._accuracies) == PATIENCE and right < 1.5 / CLASSES:
            raise CollapsedError(
                f"{100 * right:.0f} % right in the {PATIENCE} steps up to {record['step']}: "
                f"by chance it would be {100 / CLASSES:.0f} %"
            )


def with_head() -> Any:
    """The network with ten outputs, as the checkpoints have it."""
    from edge_bcs.exportable import with_outputs

    network = efficientnet()
    with_outputs(network, CLASSES)
    return network


def _lay_out(network: Any) -> None:
    """Give a network with groups its images as `_channels_last`; torch 2.13 crashes with some others."""
    if any(getattr(module, "groups", 1) > 1 for module in network.modules()):
        network.register_forward_pre_hook(_channels_last)


def _channels_last(network: Any, given: tuple[Any]) -> tuple[Any]:
    """The images as PyTorch convolves them fastest channel by channel: 1.8 times as fast a step."""
    import torch

    return (given[0].contiguous(memory_format=torch.channels_last),)


def _named(before: str, *what: Any) -> str:
    """A name for all that decided a training: what went before, and its own settings."""
    return hashlib.sha256(json.dumps([before, *what]).encode()).hexdigest()[:10]


def order(names: list[str], draws: Iterable[int]) -> Iterator[tuple[int, str]]:
    """(draw, way) of all ``names`` and ``draws``: pair by pair of `WAYS`, draw by draw, natural first."""
    ways = [name for name in WAYS if name in names]
    for start, part in dict.fromkeys((WAYS[name].start, WAYS[name].part) for name in ways):
        for draw in draws:
            for name in ways:
                if (WAYS[name].start, WAYS[name].part) == (start, part):
                    yield draw, name


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and deviation of each way on the held-out photographs."""
    found: dict[str, Any] = {}
    for name in WAYS:
        of = [row["held_out"] for row in rows if row["way"] == name and "held_out" in row]
        for measure in ("accuracy", "robust_accuracy"):
            values = [one[measure] for one in of if measure in one]
            if values:
                found.setdefault(name, {})[measure] = {
                    "mean": statistics.mean(values),
                    "deviation": statistics.pstdev(values),
                    "draws": len(values),
                }
    return found


def write_page(folder: Path, rows: list[dict[str, Any]], settings: Settings) -> None:
    """Write README.md and signs.png; what was written by hand into the former is kept."""
    rows = [row for row in rows if row["settings"] == asdict(settings)]
    found, page = summary(rows), folder / "README.md"
    lines = [
        _HEADING,
        "",
        f"EfficientNet-Lite0 on {settings.size}×{settings.size} photographs of hands, ten classes, "
        f"{100 * settings.sparsity:.0f} % sparse in its 1×1 layers. Of each draw",
        "another range of the file numbers, 30 %, is held out and measured; these hands are nowhere else.",
        "Mean and deviation over the draws, in %.",
        "",
        "`make signs SIGNS=signs.tar.gz` measures what is missing.",
        "",
        "![accuracy of each way](signs.png)",
        "",
        "| trained | on the board | MiB | clean "
        f"| PGD-{settings.measured_steps}, ε = {settings.epsilon:g}/255 | draws |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name, one in found.items():
        way = WAYS[name]
        aims = {"accuracy": way.clean, "robust_accuracy": way.under_attack}
        cells = [_against(one[measure], aim) if measure in one else "" for measure, aim in aims.items()]
        board = "none | –" if way.cap is None else f"{way.part} | {parse_bytes(way.cap) >> 20}"
        lines.append(f"| {name} | {board} | {cells[0]} | {cells[1]} | {one['accuracy']['draws']} |")
    lines += [
        "",
        "| draw | trained | clean | under attack | working set, MiB |",
        "| ---: | --- | ---: | ---: | ---: |",
    ]
    for row in sorted(rows, key=lambda row: (list(WAYS).index(row["way"]), row["draw"])):
        if "collapsed" in row:
            lines.append(f"| {row['draw']} | {row['way']} | collapsed | | |")
            continue
        held = row["held_out"]
        robust = f"{100 * held['robust_accuracy']:.1f}" if "robust_accuracy" in held else ""
        peak = f"{row['peak_bytes'] / (1 << 20):.2f}" if "peak_bytes" in row else "–"
        lines.append(f"| {row['draw']} | {row['way']} | {100 * held['accuracy']:.1f} | {robust} | {peak} |")
    write_atomically(page, "\n".join([*lines, "", by_hand(page, _BY_HAND)]).encode())
    if found:
        plot(found, folder / "signs.png")


def _against(found: dict[str, float], aim: float | None) -> str:
    """Mean and deviation in %, and whether what was aimed at is met."""
    text = f"{100 * found['mean']:.1f} ± {100 * found['deviation']:.1f}"
    if aim is None:
        return text
    lacking = 100 * (aim - found["mean"])
    return text + (
        f" (≥ {100 * aim:.0f} met)" if lacking <= 0 else f" (≥ {100 * aim:.0f} missed by {lacking:.1f})"
    )


def plot(found: dict[str, Any], path: Path) -> None:
    """Mean and deviation of each way, clean and under attack; a line where something was aimed at."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8.4, 3.6), layout="constrained")
    bars = (("accuracy", -0.2, "#9aa5a8", "clean"), ("robust_accuracy", 0.2, "#2f8f83", "under attack"))
    for measure, shift, colour, label in bars:
        there = [(place, name) for place, name in enumerate(found) if measure in found[name]]
        means = [100 * found[name][measure]["mean"] for _, name in there]
        spread = [100 * found[name][measure]["deviation"] for _, name in there]
        drawn = axis.bar(
            [place + shift for place, _ in there], means, 0.38, yerr=spread, color=colour, label=label
        )
        axis.bar_label(drawn, [f"{mean:.0f}" for mean in means], padding=2, fontsize=8)
        for place, name in there:
            aim = WAYS[name].clean if measure == "accuracy" else WAYS[name].under_attack
            if aim is not None:
                axis.plot(
                    [place + shift - 0.19, place + shift + 0.19], [100 * aim] * 2, color="#24292f", lw=2
                )
    axis.set_xticks(range(len(found)), [name.replace(" ", "\n") for name in found])
    axis.set_ylim(0, 108)
    axis.set_ylabel("right, % of the held-out photographs")
    axis.legend(fontsize=8, loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)
    write_figure(figure, path, 130)


def main() -> None:
    """Measure what is not there yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--data", type=Path, required=True, metavar="signs.tar.gz")
    parser.add_argument("--out", type=Path, default=Path("out/signs"), help="where the runs are kept")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--only", type=int, help="this draw alone")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--choosing", action="store_true", help="measure the choosing split, not the other")
    parser.add_argument("--threads", type=int, default=2)
    add_settings(parser, Settings)
    options = vars(parser.parse_args())
    settings = settings_of(Settings, options)
    file = options["results"] / ("choosing.json" if options["choosing"] else "rows.json")
    rows: list[dict[str, Any]] = json.loads(read_small(file))["rows"] if file.exists() else []
    images, labels, _ = photographs(options["data"], settings.size)
    draws = range(options["draws"]) if options["only"] is None else [options["only"]]
    for number, name in order(options["ways"], draws):
        key = (number, name, asdict(settings))
        if any((row["draw"], row["way"], row["settings"]) == key for row in rows):
            continue
        draw = Draw(settings, images, labels, number, options["draws"], options["out"])
        rows.append(draw.row(name, options["choosing"], options["threads"]))
        content: dict[str, Any] = {"rows": rows}
        if not options["choosing"]:
            content = {"summary": summary([row for row in rows if row["settings"] == key[2]]), **content}
        write_json(file, content, make_folder=True)
        if not options["choosing"]:
            write_page(options["results"], rows, settings)
        say(f"draw {number}, {name}: {told(rows[-1])}")


def told(row: dict[str, Any]) -> str:
    """What came of a row, in a few words."""
    if "collapsed" in row:
        return f"collapsed, {row['collapsed']}"
    found = row.get("held_out") or row["choosing"]
    robust = f", {found['robust_accuracy']:.3f} robust" if "robust_accuracy" in found else ""
    return f"{found['accuracy']:.3f} clean{robust}"


if __name__ == "__main__":
    try:
        main()
    except EdgeBcsError as error:
        sys.exit(f"Error: {error}")
