"""Figures of what was trained and measured: curves, connectivity over time, compression, queries.

Each function returns a matplotlib figure made from files that `edge-bcs train`, `edge-bcs finetune` and
`edge-bcs evaluate --json` write; nothing is computed anew.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import read_small, write_atomically
from edge_bcs.core.metadata import parse_object
from edge_bcs.core.outputs import containing

# Okabe and Ito's colours: told apart with any kind of colour vision, and in print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_SOFTWARE = "edge-bcs"
DRAWN = containing(f"Software\0{_SOFTWARE}")
"""By which a PNG of ours is recognised: its own text field."""
_FEW = 12  # points that are marked, since a line through them hardly shows where they are
_SMOOTH = 50  # parts of a training, over each of which a curve of steps is averaged
_LONGEST_LINE = 1 << 20


_KINDS: dict[str, dict[str, Any]] = {
    "clean": {"linestyle": ":", "marker": "o", "markerfacecolor": "none", "markersize": 10},
    "robust": {"linestyle": "-", "marker": "o"},
}


@dataclass(frozen=True)
class Run:
    """A training: its name, its lines of epochs.jsonl, and the size of each layer, in order."""

    name: str
    epochs: list[dict[str, Any]]
    sizes: dict[str, int]


@dataclass(frozen=True)
class Tuning:
    """A fine-tuning: its name, its lines of metrics.jsonl (each step once), and what its report says.

    Attributes:
        steps: in their order; empty where only the report is known.
        report: "before" and "after" (accuracies of held-out images) and "training", as far as they are there.
    """

    name: str
    steps: list[dict[str, Any]]
    report: dict[str, Any]


@dataclass(frozen=True)
class Report:
    """An evaluation: what `edge-bcs evaluate --json` wrote."""

    name: str
    content: dict[str, Any]


def read(path: str | Path) -> Run | Tuning | Report:
    """Read a run folder of `edge-bcs train` or `finetune`, the report of a fine-tuning, or that of an
    evaluation.

    Raises:
        EdgeBcsError: it is none of these, or nothing was trained there yet.
    """
    path = Path(path)
    if path.is_dir():
        return read_tuning(path) if (path / "manifest.json").is_file() else read_run(path)
    try:
        content = parse_object(read_small(path))
    except (OSError, ValueError):
        content = {}
    return read_tuning(path) if {"before", "training", "run"} & set(content) else read_report(path)


def read_tuning(path: str | Path) -> Tuning:
    """Read a folder that `edge-bcs finetune` wrote, or its report alone.

    Raises:
        EdgeBcsError: not such a folder or report, or nothing in it to draw yet.
    """
    path = Path(path)
    file = path / "report.json" if path.is_dir() else path
    try:
        report = parse_object(read_small(file))
    except (OSError, ValueError):
        if path != file and not file.exists():
            report = {}  # it is written when the first step is
        else:
            raise EdgeBcsError(f"{file} is not a report of edge-bcs finetune") from None
    known = {
        name: report[name] for name in ("before", "after", "training") if isinstance(report.get(name), dict)
    }
    steps = _steps(path / "metrics.jsonl") if path.is_dir() else []
    if not steps and not {"before", "after"} & set(known):
        raise EdgeBcsError(f"nothing was trained or measured in {path} yet: there is nothing to draw")
    name = path.name if path.is_dir() else Path(str(report.get("run", path.stem))).name
    return Tuning(name, steps, known)


def _steps(file: Path) -> list[dict[str, Any]]:
    """The lines of a training's steps, in their order; of one that stands there twice, the last."""
    found: dict[int, dict[str, Any]] = {}
    try:
        with file.open("rb") as stream:
            while line := stream.readline(_LONGEST_LINE):
                try:
                    record = parse_object(line)
                    if "loss" in record:  # else it was skipped
                        found[int(record["step"])] = record
                except (ValueError, KeyError, TypeError, OverflowError):
                    continue  # cut off when the power was
    except OSError:
        return []
    return [found[step] for step in sorted(found)]


def read_run(folder: str | Path) -> Run:
    """Read a folder that `edge-bcs train` wrote.

    Raises:
        EdgeBcsError: not such a folder, or no epoch in it yet.
    """
    from edge_bcs.checkpoint import read_checkpoint

    folder = Path(folder)
    file = folder / "epochs.jsonl"
    try:
        lines = (
            read_small(file).splitlines() if file.exists() or not (folder / "metrics.jsonl").exists() else []
        )
        if lines and _cut_off(lines[-1]):
            del lines[-1]
        epochs = [parse_object(line) for line in lines if line]
    except (OSError, ValueError):
        raise EdgeBcsError(
            f"{folder} is not a folder of a training (no readable epochs.jsonl of edge-bcs train, nor an "
            "artifact that edge-bcs finetune trained)"
        ) from None
    if not epochs:
        raise EdgeBcsError(f"the training in {folder} has not finished an epoch yet")
    try:
        layers = read_checkpoint(folder / "checkpoint.safetensors").layers()
    except (ValueError, KeyError) as error:
        raise EdgeBcsError(f"the checkpoint in {folder} does not describe its kernels ({error})") from None
    return Run(folder.name, epochs, {name: math.prod(shape) for name, shape in layers})


def _cut_off(line: bytes | str) -> bool:
    """Whether the last line of a file is not whole: its writer was killed."""
    try:
        parse_object(line)
    except ValueError:
        return True
    return False


def read_report(file: str | Path) -> Report:
    """Read a report of `edge-bcs evaluate --json FILE`.

    Raises:
        EdgeBcsError: not such a file.
    """
    file = Path(file)
    try:
        content = parse_object(read_small(file))
        complete = {"accuracy", "samples"} <= set(content)
        for name in ("accuracy", "robust_accuracy", "adv_acc"):
            complete = complete and isinstance(content.get(name, 0), int | float | None)
    except (OSError, ValueError):
        complete = False
    if not complete:
        raise EdgeBcsError(f"{file} is not a report of edge-bcs evaluate --json, nor of edge-bcs finetune")
    return Report(str(content.get("method") or file.stem), content)


def training_curves(runs: Sequence[Run]) -> Any:
    """Return loss and held-out accuracy over epochs: clean dotted, robust solid, a colour for each run."""
    figure, (left, right) = _figure(2)
    for number, run in enumerate(runs):
        epochs = [line["epoch"] + 1 for line in run.epochs]
        style = _style(number, len(epochs))
        left.plot(epochs, [line["loss"] for line in run.epochs], label=run.name, **style)
        for key in ("validation_clean_acc", "validation_robust_acc"):
            shares = [(epoch, line.get(key)) for epoch, line in zip(epochs, run.epochs, strict=True)]
            known = [(epoch, 100 * share) for epoch, share in shares if share is not None]
            if known:
                right.plot(*zip(*known, strict=True), **_style(number, len(known), clean="clean" in key))
    left.set(title="Training loss", xlabel="epoch")
    right.set(title="Held-out accuracy (%)", xlabel="epoch", ylim=(0, 100))
    for axes in (left, right):
        _whole_numbers(axes)
    _from_zero(left)
    left.legend(frameon=False)
    _explain(right, _KINDS)
    return figure


def tuning_curves(runs: Sequence[Tuning]) -> Any:
    """Return loss and accuracy of fine-tunings over their steps: clean dotted, robust solid.

    Curves are those of the batches that were trained on, averaged over fiftieths of the training. The larger
    marks are held-out images, before the first step and after the last; of reports alone there is no more.
    """
    stepped = any(run.steps for run in runs)
    figure, panels = _figure(2 if stepped else 1)
    shares = panels[-1]
    for number, run in enumerate(runs):
        if run.steps:
            steps = [float(line["step"]) for line in run.steps]
            places, losses = _averaged(steps, [float(line["loss"]) for line in run.steps])
            panels[0].plot(places, losses, label=run.name, **_style(number, len(places)))
        for key in ("accuracy", "robust_accuracy"):
            clean = key == "accuracy"
            known = [(float(line["step"]), 100 * float(line[key])) for line in run.steps if key in line]
            if clean and all(line[key] == line.get("robust_accuracy") for line in run.steps):
                known = []  # the loss saw adversarial images alone: there is one accuracy
            if known:
                points = _averaged(*map(list, zip(*known, strict=True)))
                shares.plot(*points, alpha=0.7, **_style(number, len(points[0]), clean))
            held_out = [
                (place, 100 * float(run.report[when][key]))
                for when, place in zip(("before", "after"), _ends(run), strict=True)
                if key in run.report.get(when, {})
            ]
            if held_out:
                style = _style(number, 1, clean)
                style |= {"linewidth": 1, "markersize": 12 if clean else 8, "zorder": 3, "clip_on": False}
                shares.plot(*zip(*held_out, strict=True), **style)
    if stepped:
        panels[0].set(title="Training loss", xlabel="step")
        _from_zero(panels[0])
        panels[0].legend(frameon=False)
    shares.set(title="Accuracy (%)", xlabel="step", ylim=(0, 100))
    for axes in panels:
        _whole_numbers(axes)
    kinds = {**_KINDS, "held-out": {"linestyle": "", "marker": "o", "markersize": 8}}
    names = {} if stepped else {run.name: _style(number, 1) for number, run in enumerate(runs)}
    _explain(shares, kinds, names)
    return figure


def _ends(run: Tuning) -> tuple[float, float]:
    """The steps that were done when a fine-tuning began, and when it ended."""
    training = run.report.get("training", {})
    if run.steps:
        first, last = float(run.steps[0]["step"]) - 1, float(run.steps[-1]["step"])
    else:
        last = float(training.get("step", 1))
        first = last - float(training.get("done", last))
    return first, last


def _averaged(places: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    """Means of both over runs of neighbours, at most ``_SMOOTH`` of them."""
    size = -(-len(places) // _SMOOTH)
    parts = [slice(first, first + size) for first in range(0, len(places), size)]
    mean = [[sum(numbers[part]) / len(numbers[part]) for part in parts] for numbers in (places, values)]
    return mean[0], mean[1]


def connectivity(runs: Sequence[Run]) -> Any:
    """Return the density of each layer over epochs, a panel for each run: the network finds its own."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import LogLocator, MaxNLocator

    figure, panels = _figure(len(runs), shared=True)
    deepest = max(len(run.sizes) for run in runs)
    colours = colormaps["viridis"].resampled(256)
    depth = Normalize(1, max(2, deepest))
    for axes, run in zip(panels, runs, strict=True):
        epochs = [line["epoch"] + 1 for line in run.epochs]
        for number, (name, size) in enumerate(run.sizes.items(), start=1):
            shares = [100 * line["connections"][name] / size for line in run.epochs]
            axes.plot(
                epochs,
                [share or math.nan for share in shares],
                color=colours(0.92 * depth(number)),
                marker="o" if len(epochs) <= _FEW else "",
                markersize=4,
            )
        kappa = sum(run.epochs[-1]["connections"].values())
        overall = 100 * kappa / sum(run.sizes.values())
        axes.axhline(overall, color="0.35", linestyle="--", linewidth=1)
        axes.set(yscale="log", xlabel="epoch", title=f"{run.name} (dashed: {overall:.3g} % of all weights)")
        _whole_numbers(axes)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: "")
    panels[0].set_ylabel("connections in each layer (% of its weights)")
    ticks = MaxNLocator(integer=True)
    bar = figure.colorbar(ScalarMappable(depth, colours), ax=list(panels), pad=0.02, aspect=30, ticks=ticks)
    bar.set_label("layer, from the first to the last")
    bar.outline.set_visible(False)
    return figure


def compression(reports: Sequence[Report]) -> Any:
    """Return clean (dotted) and robust (solid) accuracy against compression, as in the paper's Figure 1.

    Reports of one method and one sparsity (seeds) are one point, their mean, with a bar from the least to the
    greatest.
    """
    figure, (axes,) = _figure(1)
    for number, group in enumerate(_groups(reports).values()):
        for key in ("accuracy", "robust_accuracy"):
            points: dict[float, list[float]] = {}
            for item in group:
                if item.get(key) is not None:
                    factor = 1 / (1 - float(item["sparsity"]))
                    points.setdefault(factor, []).append(100 * item[key])
            _means(axes, points, number, clean=key == "accuracy")
    axes.set(xlabel="model compression (×)", ylabel="accuracy (%)", ylim=(0, 100))
    _mark(axes, {1 / (1 - float(report.content["sparsity"])) for report in reports})
    axes.set_title("Accuracy against compression")
    names = {name: _style(number, 1) for number, name in enumerate(_groups(reports))}
    _explain(axes, _KINDS, names)
    return figure


def queries(reports: Sequence[Report]) -> Any:
    """Return robust accuracy against the query budget of Square, as in the paper's Figure 2.

    Reports of one method (seeds, or other budgets) are one curve: means, with bars as in `compression`.
    """
    figure, (axes,) = _figure(1)
    budgets: set[float] = set()
    for number, (name, group) in enumerate(_groups(reports).items()):
        points: dict[float, list[float]] = {}
        for item in group:
            for part in item.get("curve") or [item]:
                points.setdefault(part["queries"], []).append(100 * part["adv_acc"])
        _means(axes, points, number, label=name)
        budgets |= set(points)
    axes.set(xlabel="queries of the Square attack", ylabel="robust accuracy (%)")
    _mark(axes, budgets)
    axes.set_ylim(0, None)
    axes.set_title("Accuracy against Square with limited queries")
    axes.legend(frameon=False)
    return figure


def _means(
    axes: Any, points: Mapping[float, Sequence[float]], number: int, clean: bool = False, **style: Any
) -> None:
    """Draw the means of the numbers at each place, and bars from the least to the greatest where several."""
    if not points:
        return
    places = sorted(points)
    means = [sum(points[place]) / len(points[place]) for place in places]
    axes.plot(places, means, clip_on=False, **_style(number, 1, clean), **style)
    several = [place for place in places if len(points[place]) > 1]
    if several:
        lowest, highest = zip(*((min(points[place]), max(points[place])) for place in several), strict=True)
        colour = _COLOURS[number % len(_COLOURS)]
        axes.vlines(several, lowest, highest, color=colour, linewidth=3, alpha=0.4, capstyle="butt")


def _style(number: int, points: int, clean: bool = False) -> dict[str, Any]:
    """How the curve of run ``number`` is drawn; few points are marked: clean ones hollow, and larger, so that
    both are seen where they coincide."""
    marker = _MARKERS[number % len(_MARKERS)] if points <= _FEW else ""
    style = {"color": _COLOURS[number % len(_COLOURS)], "marker": marker, "linestyle": ":" if clean else "-"}
    return {**style, "markerfacecolor": "none", "markersize": 10} if clean else style


def _explain(
    axes: Any, kinds: Mapping[str, Mapping[str, Any]], names: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Add a legend: names in their colours, then what the kinds of lines and marks mean, in grey."""
    from matplotlib.lines import Line2D

    styles = {**(names or {}), **{kind: {"color": "0.4", **style} for kind, style in kinds.items()}}
    lines = [Line2D([], [], **style) for style in styles.values()]
    axes.legend(lines, list(styles), frameon=False)


def _from_zero(axes: Any) -> None:
    """Let a vertical axis begin at 0 and end a little above what is drawn."""
    top = float(axes.dataLim.ymax)
    axes.set_ylim(0, 1.08 * top if 0 < top < math.inf else 1)


def _whole_numbers(axes: Any) -> None:
    """Number a horizontal axis of steps or epochs by whole ones, around a single one, too."""
    low, high = axes.dataLim.intervalx
    if low == high:
        axes.set_xlim(low - 1, high + 1)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _mark(axes: Any, values: set[float]) -> None:
    """Label a logarithmic horizontal axis where there are points."""
    from matplotlib.ticker import NullLocator

    axes.set_xlim(min(values) / 1.25, max(values) * 1.25)
    axes.set_xscale("log")
    axes.set_xticks(sorted(values), labels=[f"{value:.4g}" for value in sorted(values)])
    axes.xaxis.set_minor_locator(NullLocator())


def save(draw: Callable[[], Any], file: Path) -> None:
    """Write the figure that ``draw`` makes as PNG (or what the name ends with), and forget it.

    Raises:
        EdgeBcsError: the runs or reports, which come from files, hold something that cannot be drawn; or
            the file cannot be written.
    """
    from matplotlib import pyplot

    try:
        figure = draw()
    except EdgeBcsError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise EdgeBcsError(
            f"{file.name} cannot be drawn: a run or report lacks a number ({type(error).__name__}: {error})"
        ) from None
    try:
        write_figure(figure, file, 150)
    finally:
        pyplot.close(figure)


def write_figure(figure: Any, file: Path, dpi: int) -> None:
    """Write a figure in the form that the file's name ends with, whole or not at all; EdgeBcsError if that
    is impossible."""
    stream = io.BytesIO()
    more: dict[str, Any] = {"metadata": {"Software": _SOFTWARE}} if file.suffix == ".png" else {}
    figure.savefig(stream, format=file.suffix.removeprefix(".") or "png", dpi=dpi, **more)
    write_atomically(file, stream.getvalue(), make_folder=True)


def _groups(reports: Sequence[Report]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for report in reports:
        groups.setdefault(report.name, []).append(report.content)
    return groups


def _figure(panels: int, shared: bool = False) -> tuple[Any, Any]:
    """Return a figure with so many panels beside each other, in one plain style."""
    try:
        import matplotlib
    except ImportError:
        raise EdgeBcsError("plots need matplotlib: run `pip install 'edge-bcs[host]'`") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1,
        panels,
        figsize=(max(6.0, 4.5 * panels), 3.8),
        layout="constrained",
        squeeze=False,
        sharey=shared,
    )
    for part in axes[0]:
        part.grid(True, color="0.9", linewidth=0.8)
        part.set_axisbelow(True)
        part.spines[["top", "right"]].set_visible(False)
        part.title.set_fontsize(10)
    return figure, axes[0]
