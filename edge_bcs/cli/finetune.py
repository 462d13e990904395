"""edge-bcs finetune."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from edge_bcs.cli.common import (
    data_option,
    examples,
    json_option,
    memory_option,
    percent,
    print_json,
    table,
    threads_option,
    write_report,
)
from edge_bcs.errors import EdgeBcsError

_REPORT = "report.json"


class _Stopped(Exception):  # noqa: N818 (not an error)
    """SIGINT or SIGTERM arrived; the step under way has been finished."""


@click.command()
@click.argument("artifact", type=click.Path())
@data_option
@click.option("--epochs", type=click.IntRange(1), help="Passes over the data; default: 1.")
@click.option("--steps", type=click.IntRange(1), help="Optimizer steps, instead of epochs.")
@click.option(
    "--batch-size", type=click.IntRange(1), help="Images per optimizer step; default: the artifact's."
)
@click.option(
    "--learning-rate", type=float, help="The first one, ÷10 at 50 % and 75 %; default: the artifact's."
)
@memory_option
@threads_option
@click.option("--seed", type=click.IntRange(0), help="Of all randomness; default: the artifact's.")
@click.option("--augment/--no-augment", default=True, show_default=True, help="Shift by ±10 % and flip.")
@click.option("-o", "--output", type=click.Path(), help="The run folder; default: ARTIFACT-run.")
@click.option("--resume", is_flag=True, help="Go on with the run in the output folder, if there is one.")
@click.option(
    "--save-seconds", type=click.FloatRange(1), default=60.0, show_default=True, help="Time between saves."
)
@click.option(
    "--eval-samples", type=click.IntRange(0), default=200, show_default=True,
    help="Held-out images for the report before and after; 0: no report.",
)  # fmt: skip
@click.option(
    "--eval-steps", type=click.IntRange(0), default=20, show_default=True, help="PGD steps of the report."
)
@json_option
@examples("""
    edge-bcs finetune out/vgg16 --data digits --steps 30
    edge-bcs finetune out/vgg16 --data photos/ --epochs 5 --memory 8MiB -o run
    edge-bcs finetune out/vgg16 --data photos/ --epochs 5 -o run --resume
""")
def command(artifact: str, as_json: bool, **options: Any) -> None:
    """Train an artifact robustly on this machine, inside a byte budget, and report what it gained.

    The run folder is a complete artifact with the newest state, metrics.jsonl (one line a step) and
    report.json. It is saved now and then, and when the command is stopped; --resume goes on to the bit where
    it stood.
    """
    from edge_bcs.data import open_data

    folder = Path(options["output"] or f"{artifact.rstrip('/')}-run")
    trainer = _open(artifact, folder, options)
    with trainer:
        shape = trainer.artifact.input_shape
        data = open_data(options["data_spec"], "train", shape)
        held_out = open_data(options["data_spec"], "test", shape) if options["eval_samples"] else None
        report = _report(folder) if trainer.steps and options["resume"] else {}
        if held_out is not None and "before" not in report:
            report["before"] = _evaluate(trainer, held_out, options, "before")
        trainer.save(folder)
        write_report(folder / _REPORT, report)
        trainer.reset_peak()
        try:
            with _progress(trainer) as show, _stoppable() as check:
                report["training"] = trainer.fit(
                    data,
                    options["epochs"],
                    steps=options["steps"],
                    batch_size=options["batch_size"],
                    learning_rate=options["learning_rate"],
                    augment=options["augment"],
                    progress=False,
                    metrics=folder / "metrics.jsonl",
                    on_step=lambda record: (show(record), check()),
                    save=folder,
                    save_seconds=options["save_seconds"],
                )
        except _Stopped:
            trainer.save(folder)
            click.echo(f"Stopped after step {trainer.steps}; go on with --resume -o {folder}.", err=True)
            sys.exit(130)
        if held_out is not None:
            report["after"] = _evaluate(trainer, held_out, options, "after")
        report["memory"] = trainer.memory()
        report["run"] = str(folder)
        write_report(folder / _REPORT, report)
        _print_report(report, trainer, options, as_json)


def _open(artifact: str, folder: Path, options: dict[str, Any]) -> Any:
    """Return a Trainer on the artifact, or on the run that is to be resumed."""
    from edge_bcs.runtime.artifact import STATE
    from edge_bcs.runtime.state import PREVIOUS
    from edge_bcs.runtime.trainer import Trainer

    saved = (folder / "manifest.json").is_file() and any(
        (folder / slot).is_file() for slot in (STATE, PREVIOUS)
    )
    if saved and options["resume"]:
        if options["seed"] is not None:
            raise EdgeBcsError("a resumed run keeps its seed: leave --seed out.")
        return Trainer.resume(folder, memory=options["memory"], threads=options["threads"])
    if saved:
        raise EdgeBcsError(
            f"{folder} already holds a run: add --resume to go on with it, or choose another -o."
        )
    return Trainer(artifact, memory=options["memory"], threads=options["threads"], seed=options["seed"])


def _report(folder: Path) -> dict[str, Any]:
    """Return the report of the run so far; it is a convenience, so a damaged one counts as none."""
    try:
        content = json.loads((folder / _REPORT).read_text())
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError):
        return {}


def _evaluate(trainer: Any, data: Any, options: dict[str, Any], when: str) -> dict[str, float]:
    limit = min(options["eval_samples"], len(data))
    click.echo(f"Measuring accuracy {when} on {limit} held-out images …", err=True)
    measured: dict[str, float] = trainer.evaluate(data, options["eval_steps"], limit=limit)
    return measured


@contextmanager
def _progress(trainer: Any) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a function that shows a step: a bar on a terminal, a line now and then elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from edge_bcs.runtime.units import format_bytes

    console = Console(stderr=True)

    def describe(record: dict[str, Any]) -> str:
        robust = f"  robust {percent(record['robust_accuracy'])}" if "robust_accuracy" in record else ""
        clean = "" if trainer.artifact.objective.name == "at" else f"  accuracy {percent(record['accuracy'])}"
        return (
            f"loss {record['loss']:.3f}{clean}{robust}  {record['milliseconds']:.0f} ms/step  "
            f"peak {format_bytes(record['peak_bytes'])}"
        )

    if not console.is_terminal:

        def line(record: dict[str, Any]) -> None:
            done, total = record["done"], record["total"]
            if done in (1, total) or done % max(1, total // 10) == 0:
                click.echo(f"step {done}/{total}  {describe(record)}", err=True)

        yield line
        return
    columns = (TextColumn("{task.completed}/{task.total}"), BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("starting")

        def update(record: dict[str, Any]) -> None:
            bar.update(task, completed=record["done"], total=record["total"], description=describe(record))

        yield update


@contextmanager
def _stoppable() -> Iterator[Callable[[], None]]:
    """Let SIGINT and SIGTERM end the training after the step under way; yield the check for it."""
    arrived: list[int] = []

    def note(number: int, frame: object) -> None:
        if arrived:
            raise KeyboardInterrupt  # asked twice: at once
        arrived.append(number)

    def check() -> None:
        if arrived:
            raise _Stopped

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print_report(report: dict[str, Any], trainer: Any, options: dict[str, Any], as_json: bool) -> None:
    from edge_bcs.runtime.units import format_bytes

    if as_json:
        print_json(report)
        return
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
    click.echo(
        f"{trainer.steps} steps of {training['milliseconds_per_step']:.0f} ms ({trainer.threads} threads); "
        f"peak working set {format_bytes(training['peak_bytes'])} ({cap}), "
        f"process {format_bytes(memory['rss_bytes'])}"
    )
    click.echo(
        f"Saved {report['run']}; next: edge-bcs evaluate {report['run']} --data {options['data_spec']}"
    )
