"""edge-bcs plot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from edge_bcs.cli.common import examples, json_option, print_json
from edge_bcs.errors import EdgeBcsError


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path())
@click.option(
    "-o", "--output", type=click.Path(), default="plots", show_default=True, help="Folder of the PNGs."
)
@json_option
@examples("""
    edge-bcs plot runs/bcs runs/fixed runs/random -o plots
    edge-bcs plot results/*.json -o plots
""")
def command(paths: tuple[str, ...], output: str, as_json: bool) -> None:
    """Draw trainings (folders of `edge-bcs train`) and reports (files of `edge-bcs evaluate --json FILE`).

    Trainings give training.png and connectivity.png; reports give compression.png (accuracy against
    compression) and, if the attack was Square, queries.png.
    """
    from edge_bcs import plots

    missing = [path for path in paths if not Path(path).exists()]
    if missing:
        raise EdgeBcsError(f"there is no file or folder {missing[0]}.")
    runs = [plots.read_run(path) for path in paths if Path(path).is_dir()]
    reports = [plots.read_report(path) for path in paths if Path(path).is_file()]
    square = [report for report in reports if report.content.get("attack") == "square"]
    others = [report for report in reports if report not in square and "sparsity" in report.content]
    if not (runs or square or others):
        raise EdgeBcsError(
            "there is nothing to draw: reports of the torch engine say how sparse a network is."
        )
    figures: dict[str, Callable[[], Any]] = {}
    if runs:
        figures |= {
            "training": lambda: plots.training_curves(runs),
            "connectivity": lambda: plots.connectivity(runs),
        }
    if others:
        figures["compression"] = lambda: plots.compression(others)
    if square:
        figures["queries"] = lambda: plots.queries(square)
    written = []
    for name, draw in figures.items():
        file = Path(output) / f"{name}.png"
        plots.save(draw, file)
        written.append(str(file))
    if as_json:
        print_json({"files": written})
        return
    for path in written:
        click.echo(f"Wrote {path}")
