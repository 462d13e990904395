"""edge-bcs plot."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from edge_bcs.cli.common import examples, json_option, print_json
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.outputs import check_output
from edge_bcs.core.progress import Progress
from edge_bcs.core.text import shown

_DRAWN = {
    "training": "loss and accuracy by epoch",
    "connectivity": "the density of each layer",
    "finetuning": "loss and accuracy by step",
    "compression": "accuracy against compression",
    "queries": "accuracy against the queries of Square",
}


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path())
@click.option(
    "-o", "--output", type=click.Path(), default="plots", show_default=True, help="The folder for the PNGs."
)
@json_option
@examples("""
    edge-bcs plot runs/bcs runs/fixed runs/random -o plots
    edge-bcs plot run -o plots
    edge-bcs plot results/*.json -o plots
""")
def command(paths: tuple[str, ...], output: str, as_json: bool) -> None:
    """Draw trainings and evaluations as PNG.

    PATHS are folders of `edge-bcs train`, which give training.png and connectivity.png; runs of `edge-bcs
    finetune` (or their report.json), which give finetuning.png; and files of `edge-bcs evaluate --json FILE`,
    which give compression.png or, for the attack square, queries.png.
    """
    missing = [path for path in paths if not Path(path).exists()]
    if missing:
        raise EdgeBcsError(f"there is no file or folder {missing[0]}.")
    with Progress("drawing"):
        drawn = _draw(paths, Path(output))
    if as_json:
        print_json({"files": [str(file) for file in drawn], "of": {str(f): of for f, of in drawn.items()}})
        return
    for file, of in drawn.items():
        click.echo(f"Wrote {file}: {_DRAWN[file.stem]}, from {', '.join(map(shown, of))}")


def _draw(paths: tuple[str, ...], folder: Path) -> dict[Path, list[str]]:
    """Draw what there is; return each file with the paths whose content it shows."""
    from edge_bcs import plots

    found = {path: plots.read(path) for path in paths}
    runs = {path: item for path, item in found.items() if isinstance(item, plots.Run)}
    tunings = {path: item for path, item in found.items() if isinstance(item, plots.Tuning)}
    reports = {path: item for path, item in found.items() if isinstance(item, plots.Report)}
    square = {path: item for path, item in reports.items() if item.content.get("attack") == "square"}
    others = {path: item for path, item in reports.items() if path not in square}
    for path, item in others.items():
        if "sparsity" not in item.content:
            raise EdgeBcsError(f"{path} does not say how sparse its network is: evaluate it again.")
    figures: dict[str, tuple[Callable[[], Any], Iterable[str]]] = {
        "training": (lambda: plots.training_curves(list(runs.values())), runs),
        "connectivity": (lambda: plots.connectivity(list(runs.values())), runs),
        "finetuning": (lambda: plots.tuning_curves(list(tunings.values())), tunings),
        "compression": (lambda: plots.compression(list(others.values())), others),
        "queries": (lambda: plots.queries(list(square.values())), square),
    }
    for name, (_, of) in figures.items():
        if of:
            check_output(folder / f"{name}.png", plots.DRAWN, "a figure of edge-bcs")
    drawn = {}
    for name, (draw, of) in figures.items():
        if of:
            file = folder / f"{name}.png"
            plots.save(draw, file)
            drawn[file] = list(of)
    return drawn
