"""report.json of a fine-tuning run: what is read of it when the run goes on, and how it is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edge_bcs.cli.common import command_line, counted, percent, table
from edge_bcs.cli.opening import REPORT
from edge_bcs.cli.unlabelled import described
from edge_bcs.core.files import read_small
from edge_bcs.core.metadata import parse_object

_ACCURACY = ("accuracy", "samples", "robust_accuracy", "attack_steps")
_REPORTED = {
    "before": _ACCURACY,
    "after": _ACCURACY,
    "training": ("steps", "done", "finished", "milliseconds_per_step", "peak_bytes", "skipped",
                 "paused_seconds", "bytes_per_hour"),
}  # fmt: skip


def earlier_report(folder: Path) -> dict[str, Any]:
    """Return the report of the run so far; it is a convenience, so what is damaged in it counts as none."""
    try:
        content = parse_object(read_small(folder / REPORT))
    except (OSError, ValueError):
        return {}
    return {name: content[name] for name in _REPORTED if _holds(content.get(name), _REPORTED[name])}


def _holds(part: Any, numbers: tuple[str, ...]) -> bool:
    """Whether a part of a report has at least these numbers."""
    if not isinstance(part, dict):
        return False
    writes = part.get("writes")
    flat = {"robust_accuracy": 0.0, "attack_steps": 0, **part, **(writes if isinstance(writes, dict) else {})}
    return all(isinstance(flat.get(name), int | float) for name in numbers)


def print_report(report: dict[str, Any], trainer: Any, options: dict[str, Any]) -> None:
    """Show what a training that has finished gained and took."""
    from edge_bcs.core.units import format_bytes, format_seconds

    training, memory = report["training"], report["memory"]
    if "after" in report:
        steps = report["after"].get("attack_steps", 0)
        table(
            f"Held-out accuracy ({report['after']['samples']} images)",
            ("", "before", "after"),
            [
                (name, percent(report["before"].get(key)), percent(report["after"].get(key)))
                for name, key in (("clean", "accuracy"), (f"robust (PGD-{steps})", "robust_accuracy"))
                if key in report["after"]
            ],
        )
        click.echo()
    cap = "no cap" if memory["cap_bytes"] is None else f"cap {format_bytes(memory['cap_bytes'])}"
    placed = memory["placed_peak_bytes"]
    now = f" ({training['steps']} of them now)" if training["steps"] != training["done"] else ""
    click.echo(
        f"{counted(training['done'], 'step')}{now} of {training['milliseconds_per_step']:.0f} ms "
        f"({trainer.threads} threads); peak working set {format_bytes(training['peak_bytes'])} ({cap}), "
        f"process {format_bytes(memory['rss_bytes'])}"
    )
    if memory["cap_bytes"] is not None and placed > memory["cap_bytes"]:
        click.echo(
            f"ONNX Runtime's own allocator took {format_bytes(placed)} for it, which the cap does not count: "
            "export the artifact again to have every tensor placed."
        )
    if "best" in training:
        ended = f"; ended early, after {training['done']} steps" if training["early"] else ""
        click.echo(
            f"The best epoch ended with step {training['best']['step']}: "
            f"{percent(training['best']['accuracy'])} on the images held out for it{ended}."
        )
    if training.get("fell_back") is not None:
        attack = trainer.artifact.objective.attack.kind
        click.echo(f"{attack} collapsed: after step {training['fell_back']} the training attacked with PGD.")
    if "unlabelled" in training:
        click.echo(described(training["unlabelled"]))
    if training["skipped"]:
        click.echo(f"Skipped batches that were not finite: {training['skipped']}; metrics.jsonl says which.")
    if "left_out" in report:
        click.echo(
            f"Left out {report['left_out']['count']} images that cannot be used; report.json lists them."
        )
    if training["paused_seconds"]:
        click.echo(f"Paused for {format_seconds(training['paused_seconds'])} to cool.")
    click.echo(
        f"Saved {report['run']} ({format_bytes(training['writes']['bytes_per_hour'])} an hour at this pace); "
        f"next: {command_line('evaluate', Path(report['run']), '--data', options['data_spec'])}"
    )
