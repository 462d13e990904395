"""edge-bcs finetune."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_bcs.cli.common import (
    AugmentingCommand,
    Seed,
    augment_option,
    augmentation,
    balance_option,
    class_names_option,
    data_option,
    engine_option,
    examples,
    json_option,
    memory_option,
    on_bad_option,
    precision_option,
    print_json,
    schedule_option,
    threads_option,
    trust_option,
    warmup_option,
    word,
)
from edge_bcs.cli.opening import METRICS, REPORT, first_artifact, open_run
from edge_bcs.cli.rounds import check_rounds, print_rounds, rounds_options, take_part
from edge_bcs.cli.run_report import earlier_report, print_report
from edge_bcs.cli.unlabelled import check_unlabelled, open_unlabelled, unlabelled_options
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import write_json
from edge_bcs.core.locks import FolderLock
from edge_bcs.core.progress import Progress, say, told_once
from edge_bcs.runtime.board.saving import DEFAULT_MAX_WRITES

if TYPE_CHECKING:
    from edge_bcs.core.settings import Unlabelled
    from edge_bcs.runtime.artifact import Artifact
    from edge_bcs.runtime.board.thermostat import Thermostat


@click.command(cls=AugmentingCommand)
@click.argument("artifact", type=click.Path())
@data_option
@class_names_option
@click.option("--epochs", type=click.IntRange(1), help="Passes over the data; default: 1.")
@click.option("--steps", type=click.IntRange(1), help="Optimizer steps, instead of epochs.")
@click.option(
    "--batch-size", type=click.IntRange(1), help="Images per optimizer step; default: the artifact's."
)
@click.option(
    "--learning-rate",
    type=float,
    help="At its highest; --schedule says how it changes. Default: the artifact's.",
)
@memory_option
@threads_option
@engine_option
@precision_option(None, "the artifact's; of a run that goes on, what it was begun with")
@trust_option
@click.option("--seed", type=Seed(), help="Of all randomness; default: the artifact's.")
@schedule_option
@warmup_option
@click.option(
    "--validation", type=click.FloatRange(0, 1, max_open=True), metavar="SHARE",
    help="Of the training images, such as 0.1, that is held out and measured after each epoch (under attack, "
    "where the training has one): the run ends with its best epoch. Every better epoch is saved, whatever "
    "--max-writes says.",
)  # fmt: skip
@click.option(
    "--patience", type=click.IntRange(1), metavar="EPOCHS",
    help="With --validation: end after so many epochs that were no better.",
)  # fmt: skip
@augment_option
@balance_option
@unlabelled_options
@rounds_options
@click.option("-o", "--output", type=click.Path(), help="The run folder; default: ARTIFACT-run.")
@click.option("--resume", is_flag=True, help="Go on with the run in the output folder, if there is one.")
@click.option("--save-steps", type=click.IntRange(1), help="Steps from one save to the next.")
@click.option(
    "--save-seconds", type=click.FloatRange(1),
    help="Seconds from one save to the next; default: 60, unless --save-steps is given.",
)  # fmt: skip
@click.option(
    "--max-writes", metavar="SIZE", default=DEFAULT_MAX_WRITES, show_default=True,
    help="Most bytes an hour that saves and metrics may write, so that an SD card lasts; none: no limit.",
)  # fmt: skip
@click.option(
    "--on-nan", type=click.Choice(["stop", "skip"]), default="stop", show_default=True,
    help="What a batch with a pixel, loss or gradient that is NaN or infinite does: stop ends the training; "
    "skip leaves the batch out.",
)  # fmt: skip
@on_bad_option
@click.option(
    "--max-temp", type=float, metavar="°C", help="Pause while any sensor of this machine shows more."
)
@click.option(
    "--max-hours", type=click.FloatRange(0, min_open=True),
    help="Save and exit with status 75 after so many hours (with --rounds, of all rounds and their waiting); "
    "--resume goes on.",
)  # fmt: skip
@click.option(
    "--eval-samples", type=click.IntRange(0), default=200, show_default=True,
    help="Held-out images that are measured before and after; 0: none.",
)  # fmt: skip
@click.option(
    "--eval-steps",
    type=click.IntRange(0),
    default=20,
    show_default=True,
    help="PGD steps of these measurements.",
)
@click.option(
    "--print-service",
    is_flag=True,
    help="Train nothing; print a systemd service that trains with these options at every boot.",
)
@json_option
@examples("""
    edge-bcs finetune out/vgg16 --data digits --steps 30
    edge-bcs finetune out/vgg16 --data photos/ --epochs 5 --memory 8MiB -o run
    edge-bcs finetune out/vgg16 --data photos/ --epochs 5 -o run --resume
    edge-bcs finetune out/vgg16 --data photos/ --epochs 20 --schedule cosine --augment photo --balance
    edge-bcs finetune out/vgg16 --data photos/ --epochs 100 --validation 0.1 --patience 10
    edge-bcs finetune out/vgg16 --data photos/ --unlabelled more/ --epochs 10
    edge-bcs finetune out/vgg16 --data photos/ --epochs 50 -o run --max-temp 75 --max-writes 50MiB
    edge-bcs finetune out/vgg16 --data photos/ --epochs 2 --rounds share/ --boards 3 --max-rounds 10 -o run
""")
def command(artifact: str, as_json: bool, print_service: bool, **options: Any) -> None:
    """Train an artifact robustly on this machine, inside a byte budget, and report what it gained.

    The run folder is an artifact with the newest state, metrics.jsonl (one line a step) and report.json. It
    is saved now and then, and when the command is stopped. --resume goes on there, with the schedule,
    augmentation, balance and validation that it was begun with, and ends with the same bits as a training
    that was never stopped. One process at a time trains into a run folder.

    With --rounds several boards learn together: each trains for a round, their runs are merged, and all go on
    with what they became. The run folder then holds that.

    Exit status: 0 finished; 1 failed, what was saved is kept; 75 the time of --max-hours or --wait is over;
    130 stopped by Ctrl-C (SIGINT), 143 by SIGTERM. After the last three, --resume goes on.
    """
    from edge_bcs.cli.reading import check_apart
    from edge_bcs.cli.stopping import stoppable

    _check(options)
    folder = Path(options["output"] or f"{artifact.rstrip('/').removesuffix('.tar')}-run")
    if not (folder / "manifest.json").is_file():
        check_apart(folder, options["data_spec"])
    if print_service:
        from edge_bcs.cli.service import unit

        click.echo(unit(click.get_current_context(), folder), nl=False)
        return
    report: dict[str, Any] = {"run": str(folder)}
    with stoppable() as check, FolderLock(folder):
        if options["rounds"] is None:
            with open_run(artifact, folder, options) as trainer:
                status = _session(trainer, folder, options, report, check)
                if not (as_json or status):
                    print_report(report, trainer, options)
        else:
            again = {**options, "resume": True, "seed": None}
            status = take_part(
                folder,
                options,
                report,
                first=lambda: _first(artifact, folder, options, check),
                resume=lambda: open_run(artifact, folder, again),
                train=lambda trainer, hours: _session(
                    trainer, folder, {**options, "max_hours": hours}, report, check
                ),
                check=check,
            )
            if (folder / "manifest.json").is_file():  # stopped before it began anything, it leaves nothing
                write_json(folder / REPORT, report)
            if not (as_json or status):
                print_rounds(report)
        if as_json:
            print_json(report)
        if status:
            by, step = report["stopped"]["by"], report["stopped"]["step"]
            say(f"Stopped by {by} after step {step}; go on with --resume -o {word(folder)}.")
    sys.exit(status)


def _first(artifact: str, folder: Path, options: dict[str, Any], check: Callable[[], None]) -> Artifact:
    """Return what a new run begins with, once its data was looked at: where that cannot be used, nothing is
    begun."""
    from edge_bcs.cli.reading import Reading

    found, spec = first_artifact(artifact, folder, options), options["data_spec"]
    settings: dict[str, Any] = {"resize": found.resize, "watch": check, "quiet": True}
    with Progress(f"looking at {spec}"):
        Reading(spec, found.input_shape, options["on_bad"], **settings).open("train")
    return found


def _session(
    trainer: Any, folder: Path, options: dict[str, Any], report: dict[str, Any], check: Callable[[], None]
) -> int:
    """Train what is open, write the report and return the exit status."""
    from edge_bcs.cli.stopping import TIME_IS_UP, Stopped

    status = 0
    try:
        _train(trainer, folder, options, report, check)
    except Stopped as stopped:
        try:
            trainer.save(folder)
        except EdgeBcsError as error:  # not saved, so this is no status that says so
            raise EdgeBcsError(f"stopped by {stopped.name} after step {trainer.steps}, but {error}") from None
        report["stopped"] = {"by": stopped.name, "step": trainer.steps}
        status = stopped.exit_status
    else:
        if not report["training"]["finished"]:
            report["stopped"] = {"by": "--max-hours", "step": trainer.steps}
            status = TIME_IS_UP
    write_json(folder / REPORT, report)
    return status


def _check(options: dict[str, Any]) -> None:
    """Refuse what cannot be meant, before anything is read, measured or saved."""
    if options["epochs"] is not None and options["steps"] is not None:
        raise EdgeBcsError("give the length in --epochs or in --steps, not both.")
    rate = options["learning_rate"]
    if rate is not None and not 0 < rate < math.inf:
        raise EdgeBcsError(f"--learning-rate must be a positive number, not {rate}.")
    augmentation(options)
    check_unlabelled(options)
    check_rounds(options)


def _train(
    trainer: Any, folder: Path, options: dict[str, Any], report: dict[str, Any], check: Callable[[], None]
) -> None:
    """Measure, train, save and measure again; fills ``report`` as it goes. ``check`` ends it by raising."""
    from edge_bcs.cli.reading import Reading
    from edge_bcs.runtime.board.saving import parse_max_writes
    from edge_bcs.runtime.board.thermostat import Thermostat

    thermostat = None if options["max_temp"] is None else Thermostat(options["max_temp"])
    parse_max_writes(options["max_writes"])  # refused before anything is measured
    _check_budget(trainer)
    tell = told_once()

    def between(*progress: int) -> None:
        """Between images that are looked at and micro-batches of a measurement: end it if asked to, cool down
        if need be."""
        check()
        if thermostat is not None:
            thermostat.wait(rest)

    def rest(sentence: str) -> None:
        tell(sentence)
        check()

    reading = Reading(
        options["data_spec"],
        trainer.artifact.input_shape,
        options["on_bad"],
        resize=trainer.artifact.resize,
        folder=folder if trainer.resumed else None,
        watch=between,
    )
    with Progress(f"reading {options['data_spec']}"):
        data = reading.open("train")
        held_out = reading.open("test") if options["eval_samples"] else None
        unlabelled = open_unlabelled(options, reading)
    if trainer.resumed:
        report |= {**earlier_report(folder), **report}
        report.pop("stopped", None)
    if trainer.artifact.attack_precision is not None:
        report["attack_precision"] = trainer.attack_precision
    report |= trainer.match_classes(data, training=True).report()
    report |= reading.report()
    if held_out is not None and "before" not in report:
        report["before"] = _evaluate(trainer, held_out, options, "before", between)
    if not trainer.resumed:
        trainer.save(folder)
    reading.record(folder)
    write_json(folder / REPORT, report)
    trainer.reset_peak()
    training = _fit(trainer, data, unlabelled, folder, options, thermostat, check)
    if training["steps"] or "training" not in report:
        report["training"] = training
        report.pop("after", None)
    else:  # a run that was cut off between its last step and its report has only where it stands to add
        report["training"] |= {name: training[name] for name in ("step", "done", "finished")}
    if held_out is not None and training["finished"] and "after" not in report:
        report["after"] = _evaluate(trainer, held_out, options, "after", between)
    report["memory"] = trainer.memory()


def _fit(
    trainer: Any,
    data: Any,
    unlabelled: Unlabelled | None,
    folder: Path,
    options: dict[str, Any],
    thermostat: Thermostat | None,
    check: Callable[[], None],
) -> dict[str, Any]:
    """Train with what the options say, showing how far it is; ``check`` is called after every step and once a
    second of a pause."""
    from edge_bcs.runtime.board.saving import SaveSchedule, parse_max_writes
    from edge_bcs.runtime.state import state_bytes

    saving = {"steps": options["save_steps"], "seconds": options["save_seconds"]}
    saving["max_writes"] = max_writes = parse_max_writes(options["max_writes"])
    schedule = SaveSchedule(state_bytes(trainer.artifact), step=trainer.steps, **saving)
    say(f"{schedule.describe()}.")
    with _saying_how_to_go_on(folder):
        training: dict[str, Any] = trainer.fit(
            data,
            options["epochs"],
            steps=options["steps"],
            batch_size=options["batch_size"],
            learning_rate=options["learning_rate"],
            schedule=options["schedule"],
            warmup=options["warmup"],
            augment=augmentation(options),
            balance=options["balance"] or None,
            validation=options["validation"],
            patience=options["patience"],
            unlabelled=unlabelled,
            progress=True,
            metrics=folder / METRICS,
            on_step=lambda _: check(),
            save=folder,
            save_steps=options["save_steps"],
            save_seconds=options["save_seconds"],
            max_writes=max_writes,
            on_nan=options["on_nan"],
            thermostat=thermostat,
            max_hours=options["max_hours"],
            on_wait=lambda _: check(),
        )
    return training


@contextmanager
def _saying_how_to_go_on(folder: Path) -> Iterator[None]:
    from edge_bcs.runtime.checks import NotFiniteError

    try:
        yield
    except NotFiniteError as error:
        raise EdgeBcsError(
            f"{error} The state before it is saved: go on with --resume -o {word(folder)}, adding --on-nan "
            "skip to leave such batches out."
        ) from None


def _check_budget(trainer: Any) -> None:
    """Refuse at once what the plan says cannot be trained, instead of after measuring for minutes.

    Raises:
        EdgeBcsError: the cap is below the peak of the artifact's plan.
    """
    cap, need = trainer.memory()["cap_bytes"], trainer.artifact.predicted_peak_bytes
    if cap is not None and cap < need:
        raise EdgeBcsError(
            f"memory budget exceeded: training this artifact takes {need} bytes, more than the {cap} that "
            f"are allowed. Allow {need} or more with --memory, or export it for less on the host: "
            f"`edge-bcs export --checkpoint … --memory {cap}`."
        )


def _evaluate(
    trainer: Any, data: Any, options: dict[str, Any], when: str, between: Callable[[int, int], None]
) -> dict[str, Any]:
    """Measure clean and robust accuracy; ``between`` is called after every micro-batch."""
    from edge_bcs.core.units import format_bytes

    limit, steps = min(options["eval_samples"], len(data)), options["eval_steps"]
    say(f"Measuring accuracy {when} on {limit} held-out images …")
    needed, cap = trainer.artifact.attack_bytes, trainer.memory()["cap_bytes"]
    if steps and cap is not None and needed > cap:
        if when == "before":
            say(
                "Robust accuracy is not measured: an attack, which this training has none of, needs "
                f"{needed} bytes ({format_bytes(needed)}), more than the cap; --memory {needed} measures it."
            )
        steps = 0
    with Progress("measuring", limit, unit="images") as bar:

        def on_batch(done: int, total: int) -> None:
            bar.update(done, total=total)
            between(done, total)

        measured: dict[str, Any] = trainer.evaluate(data, steps, limit=limit, on_batch=on_batch)
    for warning in measured.get("warnings", ()):
        say(f"Warning: {warning}")
    return measured
