"""edge-bcs merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edge_bcs.cli.common import (
    command_line,
    counted,
    examples,
    json_option,
    percent,
    print_json,
    table,
)
from edge_bcs.core.progress import say
from edge_bcs.core.units import format_bytes

_SHOWN = 20  # runs; the report has them all


@click.command()
@click.argument("runs", type=click.Path(), nargs=-1, required=True, metavar="RUN RUN…")
@click.option(
    "-o", "--output", type=click.Path(), required=True, help="The folder of the merged run, a new one."
)
@click.option(
    "--weight", "weights", type=float, multiple=True, metavar="NUMBER",
    help="How much a run counts, once for each RUN in their order, or once for all; default: the images that "
    "its training saw. None counts more than ten times the median.",
)  # fmt: skip
@click.option(
    "--robust", type=click.Choice(["median"]),
    help="Take the median of the values instead of their mean; the positions are the same.",
)  # fmt: skip
@click.option(
    "--on-bad", type=click.Choice(["stop", "skip"]), default="stop", show_default=True,
    help="What a run does that is damaged, of another network, not finite, or a hundred times as large as "
    "the others: stop ends the command; skip leaves it out and lists it.",
)  # fmt: skip
@json_option
@examples("""
    edge-bcs merge board-a board-b board-c -o merged
    edge-bcs merge boards/* -o merged --on-bad skip --robust median
    edge-bcs merge board-a board-b -o merged --weight 2 --weight 1
""")
def command(
    runs: tuple[str, ...],
    output: str,
    weights: tuple[float, ...],
    robust: str | None,
    on_bad: Any,
    as_json: bool,
) -> None:
    """Make one run of several that learned apart: of the connections that any of them has, the κ that matter
    most over all stay, with the mean of those who have them.

    The runs are of one network, with the same κ, classes and normalisation; where and how long each was
    trained, and with how much memory, may differ. The order in which they are given changes no bit. The
    merged run has the graphs and settings of the first one, no momentum, and merge.json, which tells what was
    kept from whom. It is fine-tuned, evaluated and exported like any other.
    """
    from edge_bcs.fleet.merging import REPORT, merge

    if len(weights) == 1:
        weights *= len(runs)
    report = merge(runs, output, weights=weights or None, robust=robust, on_bad=on_bad, progress=True)
    for one in report["left_out"]:
        say(f"Left out {one['run']}: {one['why']}")
    if as_json:
        print_json(report)
        return
    rows, kappa = report["runs"], report["kappa"]
    table(
        f"Merged {counted(len(rows), 'run')} of {kappa:,} connections each",
        ("run", "weight", "kept", "only there"),
        [
            (row["run"], f"{row['weight']:,g}{' (capped)' if row['capped'] else ''}",
             percent(row["kept"] / kappa), percent(row["alone"] / kappa))
            for row in rows[:_SHOWN]
        ],
    )  # fmt: skip
    if len(rows) > _SHOWN:
        click.echo(f"and {len(rows) - _SHOWN} more; {REPORT} has them all")
    overlap, sizes = report["overlap"], report["bytes"]
    click.echo()
    click.echo(
        f"{overlap['union']:,} positions in any run, {overlap['common']:,} in all; two runs have "
        f"{percent(overlap['pairwise'])} in common. Positions and values of a run are "
        f"{format_bytes(sizes['connections'])}, where dense weights are {format_bytes(sizes['dense'])}."
    )
    click.echo(
        f"Saved {report['run']}; next: {command_line('evaluate', Path(report['run']), '--data', 'PATH')}"
    )
