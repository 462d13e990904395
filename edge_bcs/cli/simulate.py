"""edge-bcs simulate."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

from edge_bcs.cli.common import (
    THREADS,
    examples,
    given,
    json_file_option,
    memory_option,
    pairs,
    print_json,
    trust_option,
)
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.progress import Progress

if TYPE_CHECKING:
    from edge_bcs.runtime.artifact import Artifact


@click.command()
@click.argument("artifact", type=click.Path(), required=False)
@click.option(
    "--target",
    metavar="NAME|FILE",
    help="A name of `edge-bcs targets`, or a file of yours; default: this machine.",
)
@memory_option
@click.option("--threads", type=THREADS, help="Threads that compute; default: the board's cores.")
@click.option(
    "--run/--no-run", default=True, show_default=True, help="Also run it here, under the board's limits."
)
@click.option(
    "--seconds",
    type=click.FloatRange(0),
    default=10.0,
    show_default=True,
    help="About how long that run takes.",
)
@trust_option
@json_file_option
@click.option("--html", "html_file", type=click.Path(), help="Write a report for the browser.")
@click.option("--trace", "trace_file", type=click.Path(), help="Write a timeline for chrome://tracing.")
@examples("""
    edge-bcs simulate out/vgg16
    edge-bcs simulate out/vgg16 --target raspberry-pi-zero-2w --html report.html
    edge-bcs simulate out/vgg16 --memory 6MiB --no-run --json -
""")
def command(
    artifact: str | None,
    target: str | None,
    memory: str | None,
    threads: int | None,
    run: bool,
    seconds: float,
    trust_keys: tuple[str, ...],
    min_release: int | None,
    json_file: str | None,
    html_file: str | None,
    trace_file: str | None,
) -> None:
    """Say whether an artifact fits a board, and what to change if it does not.

    Peak memory and time of a step are predicted from the artifact's plan. Then the artifact runs on this
    machine under the board's limits, and both are measured.

    The verdict is "fits", "tight" (at least 90 % of the budget, or of the board's memory with the whole
    process) or "does not fit". The exit status is 1 if it does not fit, or if the run needs more than was
    predicted. For a microcontroller it says what the C project of `export --target` takes of RAM and flash.
    """
    from edge_bcs.core.outputs import check_output
    from edge_bcs.runtime.archive import is_artifact
    from edge_bcs.runtime.artifact import Artifact

    if artifact is None and json_file and is_artifact(json_file):
        artifact, json_file = json_file, "-"  # `simulate --json ARTIFACT`
    if artifact is None:
        raise click.UsageError("Missing argument 'ARTIFACT'.")

    from edge_bcs.targets import microcontrollers

    if target is not None and microcontrollers.is_one(target):
        for name in ("memory", "threads", "html_file", "trace_file"):
            if given(name):
                option = name.removesuffix("_file")
                raise EdgeBcsError(f"--{option} is for boards: a microcontroller has what its file says.")
        _show_small(Artifact.read(artifact, trust_keys, min_release), target, json_file)
        return

    from rich.console import Console

    from edge_bcs.simulation import simulate
    from edge_bcs.targets import report
    from edge_bcs.targets.terminal import show

    outputs = {"html": html_file, "trace": trace_file, "json": None if json_file == "-" else json_file}
    for kind, file in outputs.items():
        if file:
            check_output(file, report.WRITTEN[kind], f"what `edge-bcs simulate --{kind}` writes")
    with Progress("simulating"):
        simulation = simulate(
            Artifact.read(artifact, trust_keys, min_release),
            target=target,
            memory=memory,
            threads=threads,
            run=run,
            seconds=seconds,
            curve=bool(html_file or json_file),
        )
    if html_file:
        report.write(html_file, report.html(simulation))
    if trace_file:
        report.write(trace_file, json.dumps(report.trace(simulation)))
    content = json.dumps(simulation.to_json(), indent=1, ensure_ascii=False) + "\n"
    if json_file == "-":
        click.echo(content, nl=False)
    else:
        if json_file:
            report.write(json_file, content)
        show(simulation, Console(highlight=False, markup=False))
        for name, file in (("report", html_file), ("trace", trace_file), ("figures", json_file)):
            if file:
                click.echo(f"Wrote the {name} to {file}.")
    if not simulation.fits:
        click.echo(f"Error: it does not fit: {simulation.failure}.", err=True)
        sys.exit(1)
    if simulation.exceeded:
        click.echo("Error: the run needed more than was predicted; please report this.", err=True)
        sys.exit(1)


def _show_small(artifact: Artifact, target: str, json_file: str | None) -> None:
    """Answer for a microcontroller; exits with status 1 if the training does not fit."""
    from edge_bcs.core.outputs import check_output
    from edge_bcs.core.units import format_bytes, format_seconds
    from edge_bcs.targets import microcontrollers, report, small

    if json_file not in (None, "-"):
        check_output(json_file, report.WRITTEN["json"], "what `edge-bcs simulate --json` writes")
    board = microcontrollers.load(target)
    found = small.simulate(artifact, board)
    if json_file == "-":
        print_json(found.to_json())
    else:
        if json_file is not None:
            report.write(json_file, json.dumps(found.to_json(), indent=1, ensure_ascii=False) + "\n")
        click.echo(f"{artifact.network} on {board.title}: {'fits' if found.fits else 'does not fit'}")
        for kind, parts, there in (("RAM", found.ram, board.ram), ("flash", found.flash, board.flash)):
            click.echo(f"\n{kind}: {format_bytes(sum(parts.values()))} of {format_bytes(there)}")
            pairs([(name, format_bytes(size)) for name, size in parts.items()])
        click.echo()
        least = None if found.step_seconds is None else f"at least {format_seconds(found.step_seconds)}"
        pairs(
            [
                (
                    "saved state",
                    f"{format_bytes(found.state_bytes)} of {format_bytes(board.slot_bytes)} a slot",
                ),
                ("a step", least and f"{least}, if the core did arithmetic alone"),
            ]
        )
    if not found.fits:
        click.echo(f"Error: it does not fit: {'; '.join(found.faults)}.", err=True)
        sys.exit(1)
