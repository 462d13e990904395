"""edge-bcs simulate."""

from __future__ import annotations

import sys
from typing import Any

import click

from edge_bcs.cli.common import examples, json_option, memory_option, pairs, print_json, table, threads_option


@click.command()
@click.argument("artifact", type=click.Path())
@click.option(
    "--target", metavar="NAME", help="A board of `edge-bcs targets`; its default budget is the cap."
)
@memory_option
@threads_option
@json_option
@examples("""
    edge-bcs simulate out/vgg16
    edge-bcs simulate out/vgg16 --memory 12MiB --json
    edge-bcs simulate out/vgg16 --target raspberry-pi-zero-2w
""")
def command(
    artifact: str, target: str | None, memory: str | None, threads: int | None, as_json: bool
) -> None:
    """Predict an artifact's peak memory from its graphs, then run one step of each under the cap and measure
    it.

    Exits with status 1 if the prediction or the measurement goes over the cap.
    """
    from edge_bcs.runtime.artifact import Artifact
    from edge_bcs.runtime.units import format_bytes, parse_bytes

    described = Artifact.read(artifact)
    cap = described.budget if memory is None else parse_bytes(memory)
    if target is not None and memory is None:
        from edge_bcs.targets import boards

        cap = boards.load(target).default_budget
    phases = described.manifest["memory"].get("phases", {})
    predicted = described.predicted_peak_bytes
    measured, failure, report = _measure(artifact, cap, threads)
    measured_peak = max(measured.values(), default=None) if failure is None else None
    fits = failure is None and (cap is None or predicted <= cap)
    peak_phase = max(phases, key=lambda name: phases[name]["peak_bytes"]) if phases else None
    if as_json:
        print_json(
            {
                "artifact": artifact,
                "predicted_peak_bytes": predicted,
                "measured_peak_bytes": measured_peak,
                "cap_bytes": cap,
                "fits": fits,
                "exact": report.get("exact"),
                "error": failure,
                "phases": {
                    name: {
                        "predicted_peak_bytes": phase["peak_bytes"],
                        "measured_peak_bytes": measured.get(name),
                        "categories": phase["categories"],
                    }
                    for name, phase in phases.items()
                },
                "rss_bytes": report.get("rss_bytes"),
            }
        )
    else:
        rows = [
            (
                name,
                format_bytes(phase["peak_bytes"]),
                format_bytes(measured[name]) if name in measured else "–",
            )
            for name, phase in phases.items()
            if name != "lists"
        ]
        table(f"Peak of each graph, {described.network}", ("graph", "predicted", "measured"), rows)
        if peak_phase is not None:
            categories = phases[peak_phase]["categories"]
            click.echo()
            table(
                f"What is in memory at the peak ({peak_phase})",
                ("category", "bytes", "share"),
                [
                    (name, f"{size:,}", f"{100 * size / phases[peak_phase]['peak_bytes']:.0f} %")
                    for name, size in categories.items()
                ],
            )
        click.echo()
        pairs(
            [
                ("predicted peak", f"{predicted:,} bytes ({format_bytes(predicted)})"),
                (
                    "measured peak",
                    None
                    if measured_peak is None
                    else f"{measured_peak:,} bytes ({format_bytes(measured_peak)})",
                ),
                ("cap", "none" if cap is None else f"{cap:,} bytes ({format_bytes(cap)})"),
                (
                    "process",
                    f"{format_bytes(report['rss_bytes'])} with interpreter and libraries" if report else None,
                ),
            ]
        )
    if not fits:
        reason = failure or f"the predicted peak of {predicted} bytes is over the cap of {cap} bytes"
        click.echo(f"Error: {reason}", err=True)
        sys.exit(1)


def _measure(
    artifact: str, cap: int | None, threads: int | None
) -> tuple[dict[str, int], str | None, dict[str, Any]]:
    """Return (measured peak by graph, error if it did not fit, memory report)."""
    from edge_bcs.runtime.budget import BudgetExceeded
    from edge_bcs.runtime.trainer import Trainer

    try:
        with Trainer(artifact, memory=cap, threads=threads) as trainer:
            return trainer.measure_phases(), None, trainer.memory()
    except BudgetExceeded as error:
        return {}, str(error), {}
