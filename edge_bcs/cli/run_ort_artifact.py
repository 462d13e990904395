"""edge-bcs run-ort-artifact."""

from __future__ import annotations

import os
import time
from typing import Any

import click

from edge_bcs.cli.common import (
    Seed,
    class_names,
    class_names_option,
    counted,
    data_option,
    examples,
    json_option,
    on_bad_option,
    percent,
    print_json,
    threads_option,
)
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.outputs import check_output
from edge_bcs.core.progress import Progress


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path())
@data_option
@click.option("--epochs", type=click.IntRange(1), help="Passes over the data; default: 1.")
@click.option("--steps", type=click.IntRange(1), help="Optimizer steps, instead of epochs.")
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    help="Images per optimizer step; default: what the graphs are fixed to, or 32.",
)
@click.option("--learning-rate", type=float, default=1e-3, show_default=True, help="The same in all steps.")
@click.option("--prefix", default="", help="How the file names begin, as given to generate_artifacts.")
@click.option(
    "--checkpoint", type=click.Path(),
    help="Begin with this checkpoint, and the optimizer's state in it, instead of the folder's.",
)  # fmt: skip
@class_names_option
@on_bad_option
@threads_option
@click.option("--seed", type=Seed(), default=0, show_default=True, help="Of the order of the images.")
@click.option(
    "--augment/--no-augment", default=False, show_default=True, help="Shift images by ±10 % and flip them."
)
@click.option(
    "--eval-samples", type=click.IntRange(0), default=200, show_default=True,
    help="Held-out images that are measured before and after; 0: none.",
)  # fmt: skip
@click.option("-o", "--output", type=click.Path(), help="Where the trained checkpoint goes.")
@click.option(
    "--force", is_flag=True, help="Replace a file that is there and is not what --checkpoint reads."
)
@json_option
@examples("""
    edge-bcs run-ort-artifact artifacts/ --data photos/ --epochs 3 -o trained.checkpoint
    edge-bcs run-ort-artifact artifacts/ --data digits --steps 100 --learning-rate 0.01
    edge-bcs run-ort-artifact artifacts/ --data photos/ --checkpoint trained.checkpoint -o trained.checkpoint
""")
def command(folder: str, as_json: bool, **options: Any) -> None:
    """Train a dense artifact of ONNX Runtime's own tools with the onnxruntime of PyPI, aarch64 included.

    DIR is what onnxruntime.training.artifacts.generate_artifacts wrote: training_model.onnx, eval_model.onnx,
    optimizer_model.onnx and checkpoint. The network gets images in [0, 1]. The trained checkpoint also holds
    the optimizer's state and the names of the classes; ONNX Runtime's training build reads it.
    """
    from edge_bcs.runtime.ort.artifact import OrtArtifact

    check_checkpoint(options["output"], options["checkpoint"], options["force"])
    with Progress(f"opening {folder}"):
        training = OrtArtifact(
            folder,
            prefix=options["prefix"],
            checkpoint=options["checkpoint"],
            learning_rate=options["learning_rate"],
            threads=options["threads"],
        )
        batch = _batch_size(training, options["batch_size"])
        data, held_out, described = _matched(training, options)
    per_epoch = len(data) // batch
    if not per_epoch:
        raise EdgeBcsError(f"the data has {len(data)} images, less than one batch of {batch}.")
    steps = options["steps"] or per_epoch * (options["epochs"] or 1)
    first, total = training.steps, training.steps + steps
    report: dict[str, Any] = {
        **described,
        "before": _evaluate(training, held_out, batch, options["eval_samples"]),
    }
    losses: list[float] = []
    began = time.perf_counter()
    with Progress("training", steps, unit="steps") as bar:
        while training.steps < total:
            epoch, position = divmod(training.steps, per_epoch)
            if position == 0 or not losses:
                order = data.order(options["seed"], epoch)
            chosen = order[position * batch :][:batch]
            images, labels = data.read(chosen, seed=options["seed"], epoch=epoch, augment=options["augment"])
            losses.append(training.step(images, labels)["loss"])
            bar.update(training.steps - first, text=f"loss {losses[-1]:.4f}")
    report["steps"], report["steps_before"] = steps, first
    report["losses"] = losses
    report["milliseconds_per_step"] = 1e3 * (time.perf_counter() - began) / steps
    report["after"] = _evaluate(training, held_out, batch, options["eval_samples"])
    if options["output"]:
        training.save_checkpoint(options["output"])
        report["checkpoint"] = options["output"]
    if as_json:
        print_json(report)
        return
    for when in ("before", "after"):
        measured = report[when]
        if measured:
            accuracy = f", accuracy {percent(measured['accuracy'])}" if "accuracy" in measured else ""
            click.echo(
                f"{when:>6}: loss {measured['loss']:.4f}{accuracy} ({measured['samples']} held-out images)"
            )
    click.echo(f"{counted(steps, 'step')} of {report['milliseconds_per_step']:.0f} ms")
    if options["output"]:
        click.echo(f"Saved {options['output']}")


def _matched(training: Any, options: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Return the training and the held-out images with the network's labels, and what the report says of
    them."""
    from edge_bcs.cli.reading import Reading
    from edge_bcs.data.classes import match, named, say

    names = class_names(options)
    if names is not None:
        training.classes = named(training.classes, names, training.outputs)
    reading = Reading(options["data_spec"], training.input_shape, options["on_bad"])
    data = reading.open("train")
    matched = match(data, training.classes, training.outputs, naming=True, trained=training.steps > 0)
    training.classes = matched.classes
    held_out = match(reading.open("test"), training.classes, training.outputs)
    say([*matched.notes, *held_out.notes])
    return matched.data, held_out.data, {**matched.report(), **reading.report()}


def check_checkpoint(output: str | None, checkpoint: str | None, force: bool) -> None:
    """Refuse to write over a checkpoint, or any other file, unless the training goes on from it."""
    goes_on = output and checkpoint and os.path.realpath(output) == os.path.realpath(checkpoint)
    if output and not goes_on:
        what = "what --checkpoint reads (--force replaces it all the same)"
        check_output(output, lambda content: force, what)


def _batch_size(training: Any, asked: int | None) -> int:
    fixed: int | None = training.batch_size
    if fixed is not None and asked not in (None, fixed):
        raise EdgeBcsError(f"the artifact's graphs are fixed to batches of {fixed}: leave --batch-size out.")
    return fixed or asked or 32


def _evaluate(training: Any, data: Any, batch: int, limit: int) -> dict[str, float]:
    """Means over the whole batches of the first ``limit`` images of a fixed shuffle; {} if there are none."""
    order = data.order(0, 0)[:limit]
    results = []
    with Progress("measuring", len(order), unit="images") as bar:
        for first in range(0, len(order) - batch + 1, batch):
            results.append(training.evaluate(*data.read(order[first : first + batch])))
            bar.update(first + batch)
    if not results:
        return {}
    means = {name: sum(result[name] for result in results) / len(results) for name in results[0]}
    return {**means, "samples": len(results) * batch}
