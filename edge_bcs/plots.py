"""Figures of what was trained and measured: curves, connectivity over time, compression, queries.

Each function returns a matplotlib figure made from files that `edge-bcs train` and `edge-bcs evaluate --json`
write; nothing is computed anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_bcs.errors import EdgeBcsError
from edge_bcs.files import read_small
from edge_bcs.metadata import parse_object

# Okabe and Ito's colours: told apart with any kind of colour vision, and in print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@dataclass(frozen=True)
class Run:
    """A training: its name, its lines of epochs.jsonl, and the size of each layer, in order."""

    name: str
    epochs: list[dict[str, Any]]
    sizes: dict[str, int]


@dataclass(frozen=True)
class Report:
    """An evaluation: what `edge-bcs evaluate --json` wrote."""

    name: str
    content: dict[str, Any]


def read_run(folder: str | Path) -> Run:
    """Read a folder that `edge-bcs train` wrote.

    Raises:
        EdgeBcsError: not such a folder, or no epoch in it yet.
    """
    from edge_bcs.checkpoint import read_checkpoint

    folder = Path(folder)
    try:
        lines = read_small(folder / "epochs.jsonl").splitlines()
        epochs = [parse_object(line) for line in lines if line]
    except (OSError, ValueError):
        raise EdgeBcsError(f"{folder} is not a folder of a training (no readable epochs.jsonl)") from None
    if not epochs:
        raise EdgeBcsError(f"the training in {folder} has not finished an epoch yet")
    try:
        layers = read_checkpoint(folder / "checkpoint.safetensors").layers()
    except (ValueError, KeyError) as error:
        raise EdgeBcsError(f"the checkpoint in {folder} does not describe its kernels ({error})") from None
    return Run(folder.name, epochs, {name: math.prod(shape) for name, shape in layers})


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
        raise EdgeBcsError(f"{file} is not a report of edge-bcs evaluate --json")
    return Report(str(content.get("method") or file.stem), content)


def training_curves(runs: Sequence[Run]) -> Any:
    """Return loss and held-out accuracy over epochs: clean dotted, robust solid, a colour for each run."""
    figure, (left, right) = _figure(2)
    for number, run in enumerate(runs):
        colour = _COLOURS[number % len(_COLOURS)]
        epochs = [line["epoch"] + 1 for line in run.epochs]
        marker = _MARKERS[number % len(_MARKERS)] if len(epochs) == 1 else ""
        style = {"color": colour, "marker": marker}
        left.plot(epochs, [line["loss"] for line in run.epochs], label=run.name, **style)
        for key, dashes in (("validation_clean_acc", ":"), ("validation_robust_acc", "-")):
            shares = [(epoch, line.get(key)) for epoch, line in zip(epochs, run.epochs, strict=True)]
            known = [(epoch, 100 * share) for epoch, share in shares if share is not None]
            if known:
                right.plot(*zip(*known, strict=True), linestyle=dashes, **style)
    left.set(title="Training loss", xlabel="epoch", ylim=(0, None))
    right.set(title="Held-out accuracy (%): dotted clean, solid robust", xlabel="epoch", ylim=(0, 100))
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    left.legend(frameon=False)
    return figure


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
                marker="o" if len(epochs) == 1 else "",
            )
        kappa = sum(run.epochs[-1]["connections"].values())
        overall = 100 * kappa / sum(run.sizes.values())
        axes.axhline(overall, color="0.35", linestyle="--", linewidth=1)
        axes.set(yscale="log", xlabel="epoch", title=f"{run.name} (dashed: {overall:.3g} % of all weights)")
        axes.xaxis.get_major_locator().set_params(integer=True)
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
    for number, (name, group) in enumerate(_groups(reports).items()):
        for key, line in (("accuracy", ":"), ("robust_accuracy", "-")):
            points: dict[float, list[float]] = {}
            for item in group:
                if item.get(key) is not None:
                    factor = 1 / (1 - float(item["sparsity"]))
                    points.setdefault(factor, []).append(100 * item[key])
            _means(axes, points, number, linestyle=line, label=name if line == "-" else None)
    axes.set(xlabel="model compression (×)", ylabel="accuracy (%)", ylim=(0, 100))
    _mark(axes, {1 / (1 - float(report.content["sparsity"])) for report in reports})
    axes.set_title("Accuracy against compression: dotted clean, solid robust")
    axes.legend(frameon=False)
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
        _means(axes, points, number, linestyle="-", label=name)
        budgets |= set(points)
    axes.set(xlabel="queries of the Square attack", ylabel="robust accuracy (%)")
    _mark(axes, budgets)
    axes.set_ylim(0, None)
    axes.set_title("Accuracy against Square with limited queries")
    axes.legend(frameon=False)
    return figure


def _means(axes: Any, points: Mapping[float, Sequence[float]], number: int, **style: Any) -> None:
    """Draw the means of the numbers at each place, and bars from the least to the greatest where several."""
    if not points:
        return
    places = sorted(points)
    means = [sum(points[place]) / len(points[place]) for place in places]
    colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
    axes.plot(places, means, color=colour, marker=marker, clip_on=False, **style)
    several = [place for place in places if len(points[place]) > 1]
    if several:
        lowest, highest = zip(*((min(points[place]), max(points[place])) for place in several), strict=True)
        axes.vlines(several, lowest, highest, color=colour, linewidth=3, alpha=0.4, capstyle="butt")


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
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=150)
    except OSError as error:
        raise EdgeBcsError(f"{file} cannot be written: {error.strerror or error}") from None
    finally:
        pyplot.close(figure)


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
