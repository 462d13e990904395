"""--rounds and what belongs to it: boards that meet again through a folder, round after round."""

from __future__ import annotations

import math
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_bcs.cli.common import percent, table
from edge_bcs.cli.opening import REPORT
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import read_small, write_json
from edge_bcs.core.metadata import parse_object
from edge_bcs.core.progress import say, told_once
from edge_bcs.core.units import format_bytes

if TYPE_CHECKING:
    from edge_bcs.fleet.rounds import Met, Rounds
    from edge_bcs.runtime.artifact import Artifact

_OPTIONS = (
    click.option(
        "--rounds",
        type=click.Path(),
        metavar="DIR",
        help="Learn in rounds with other boards, through a folder that all of them see (a mounted share, "
        "rsync): each trains for --epochs or --steps, their runs become one there, and all go on with that.",
    ),
    click.option(
        "--board",
        metavar="NAME",
        help="With --rounds: what this board is called there; default: its host name.",
    ),
    click.option(
        "--boards",
        type=click.IntRange(1),
        metavar="N",
        help="With --rounds: how many boards take part; the last to send its run merges. Without it, "
        "somebody else does, with `edge-bcs merge`.",
    ),
    click.option(
        "--max-rounds",
        type=click.IntRange(1),
        metavar="N",
        help="With --rounds: rounds that this call takes part in; default: 1.",
    ),
    click.option(
        "--wait",
        type=click.FloatRange(0),
        metavar="SECONDS",
        help="With --rounds: how long to wait for other boards; then those that are there are merged, or, "
        "without --boards, the command ends with status 75. Default: 600.",
    ),
    click.option(
        "--robust", type=click.Choice(["median"]), help="With --rounds and --boards: see `edge-bcs merge`."
    ),
)
_NAMES = ("board", "boards", "max_rounds", "wait", "robust")
_ROUNDS, _WAIT = 1, 600.0
_SHORTEST = 1e-9
"""Hours: the first round is trained for a step at least."""
_MEASURED = ("accuracy", "robust_accuracy")
_OF_A_ROUND = ("before", "after", "training", "memory")  # of the command's report


def rounds_options(function: Any) -> Any:
    """Add --rounds, --board, --boards, --max-rounds, --wait and --robust."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def check_rounds(options: dict[str, Any]) -> None:
    """Refuse what belongs to --rounds without it, and a name that no board can have."""
    if options["rounds"] is None:
        for name in _NAMES:
            if options[name] is not None:
                raise EdgeBcsError(f"--{name.replace('_', '-')} belongs to --rounds, which is not given.")
        return
    if not options["rounds"]:
        raise EdgeBcsError("--rounds names no folder.")
    if options["robust"] is not None and options["boards"] is None:
        raise EdgeBcsError("--robust says how this board merges, which it does only with --boards.")
    exchange_of(options)


def exchange_of(options: dict[str, Any]) -> Rounds:
    """Return the folder that the options name."""
    from edge_bcs.fleet.rounds import Rounds

    board = options["board"]
    if board is None:
        board = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:64].lstrip("._-") or "board"
    return Rounds(options["rounds"], board, options["boards"], options["robust"])


def take_part(
    folder: Path,
    options: dict[str, Any],
    report: dict[str, Any],
    *,
    first: Callable[[], Artifact],
    resume: Callable[[], Any],
    train: Callable[[Any, float | None], int],
    check: Callable[[], None],
) -> int:
    """Train round after round and return the exit status; what became of each is in ``report["rounds"]``.

    Args:
        folder: the run of this board. options, report: of the command.
        first: returns the artifact that a new run begins with. resume: opens the run as a Trainer.
        train: trains that to the end of its round, at most so many hours, and saves it; its status is not 0
            if it was cut off.
        check: called once a second of waiting; raises Stopped if the command is to end.
    """
    from edge_bcs.cli.stopping import TIME_IS_UP, Stopped
    from edge_bcs.fleet.rounds import NotMet, begin, open_round

    exchange, wait = exchange_of(options), _WAIT if options["wait"] is None else options["wait"]
    tell, began = told_once(), time.monotonic()

    def hours_left() -> float:
        allowed = math.inf if options["max_hours"] is None else options["max_hours"]
        return max(allowed - (time.monotonic() - began) / 3600, 0.0)

    def between(sentence: str) -> None:
        tell(sentence)
        check()

    def until_time_is_up(sentence: str) -> None:
        between(sentence)
        if not hours_left():
            raise NotMet(f"round {number} has not been merged in the hours of --max-hours.")

    report["rounds"] = _earlier(folder)
    try:
        number = _join(
            exchange, folder, options, first, lambda ahead, own: exchange.meet(ahead, own, wait, between)
        )
        for count in range(options["max_rounds"] or _ROUNDS):
            if count and not hours_left():
                raise NotMet(f"round {number} is for another time: the hours of --max-hours are over.")
            say(f"Round {number}, as board {exchange.board}.")
            with open_round(resume()) as trainer:
                hours = None if options["max_hours"] is None else max(hours_left(), _SHORTEST)
                if status := train(trainer, hours):
                    return status
                artifact, metadata = trainer.artifact, trainer.metadata()
                sent = exchange.send(number, artifact, trainer.state(), metadata, trainer.classes)
            met = exchange.meet(number, artifact, wait, until_time_is_up)
            done = {name: report.pop(name) for name in _OF_A_ROUND if name in report}
            report["rounds"].append({"round": number, **done, "sent_bytes": sent, "merged": met.report})
            # Before the next round begins: cut off in between, it is begun again, and this one has its row.
            write_json(folder / REPORT, report)
            number += 1
            begin(folder, artifact, met, number)
            for one in met.report.get("left_out", []):
                say(f"Left out of round {number - 1}: {one['why']}")
    except NotMet as error:
        say(f"{str(error)[0].upper()}{str(error)[1:]}")
        by, status = "--wait" if hours_left() else "--max-hours", TIME_IS_UP
    except Stopped as stopped:
        by, status = stopped.name, stopped.exit_status
    else:
        return 0
    report["stopped"] = {"by": by, "step": _saved_step(folder)}
    return status


def _saved_step(folder: Path) -> int:
    """The step of the run in ``folder``; 0 if there is none."""
    from edge_bcs.runtime.artifact import Artifact
    from edge_bcs.runtime.state import read_state

    try:
        return int(read_state(Artifact.read(folder))[1]["step"])
    except EdgeBcsError:
        return 0


def _join(
    exchange: Rounds,
    folder: Path,
    options: dict[str, Any],
    first: Callable[[], Artifact],
    meet: Callable[[int, Artifact], Met],
) -> int:
    """Return the round that the run in ``folder`` is in; a new run, or one that the fleet has overtaken,
    begins the one after the last that was merged, with what ``meet`` finds there."""
    from edge_bcs.fleet.members import round_of
    from edge_bcs.fleet.rounds import begin
    from edge_bcs.runtime.artifact import Artifact
    from edge_bcs.runtime.manifest import MANIFEST
    from edge_bcs.runtime.state import read_state

    ahead, seed = exchange.last_merged(), None
    if options["resume"] and (folder / MANIFEST).is_file():
        artifact = Artifact.read(folder)
        metadata = read_state(artifact)[1]
        number = round_of(metadata)
        if not number:
            raise EdgeBcsError(f"{folder} holds a run that takes part in no rounds: choose another -o.")
        if ahead < number:
            return number
        say(f"Round {ahead} was merged; the run was in round {number}, and goes on from there.")
    else:
        artifact, seed = first(), options["seed"]
    begin(folder, artifact, meet(ahead, artifact) if ahead else None, ahead + 1, seed)
    write_json(folder / REPORT, {"run": str(folder), "rounds": _earlier(folder)})
    return ahead + 1


def _earlier(folder: Path) -> list[dict[str, Any]]:
    """The rounds in the report so far, which is a convenience: what is damaged in it counts as none."""
    from edge_bcs.fleet.rounds import tells

    try:
        rounds = parse_object(read_small(folder / REPORT))["rounds"]
        return [
            one
            for one in rounds
            if type(one["round"]) is type(one["sent_bytes"]) is int
            and (one["merged"] == {} or tells(one["merged"]))
            and all(
                isinstance(one.get(when, {}).get(name, 0.0), int | float)
                for when in ("before", "after")
                for name in _MEASURED
            )
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def print_rounds(report: dict[str, Any]) -> None:
    """Print what each round of a report was."""
    rows = []
    for one in report["rounds"]:
        merged = one["merged"]
        before, after = one.get("before", {}), one.get("after", {})
        rows.append(
            (
                str(one["round"]),
                str(len(merged["runs"])) if merged else "–",
                percent(merged["overlap"]["pairwise"] if merged else None),
                *(f"{percent(before.get(name))} → {percent(after.get(name))}" for name in _MEASURED),
                format_bytes(one["sent_bytes"]),
            )
        )
    columns = ("round", "boards", "masks in common", "clean, before → after", "robust", "sent")
    table("Rounds, on this board's held-out images", columns, rows)
