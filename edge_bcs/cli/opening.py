"""Opening what `edge-bcs finetune` trains: an artifact, or the run that it goes on with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_bcs.cli.common import machine_of, trusted
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.progress import Progress, say

if TYPE_CHECKING:
    from edge_bcs.runtime.artifact import Artifact

REPORT, METRICS = "report.json", "metrics.jsonl"
"""Files of a run beside its state."""


@Progress("opening the artifact")
def open_run(artifact: str, folder: Path, options: dict[str, Any]) -> Any:
    """Return a Trainer on the artifact, or on the run that is to be resumed."""
    from edge_bcs.runtime import release
    from edge_bcs.runtime.artifact import check_is_run_of
    from edge_bcs.runtime.trainer import Trainer

    machine = machine_of(options)
    if options["resume"] and _holds_state(folder):
        if options["trust_keys"] or options["min_release"]:
            # What training wrote here has no signature; that it goes on from what was signed can be seen.
            read = _trusted(artifact, folder, options)
            check_is_run_of(folder, read)
            release.remember(read, folder)
        elif (known := _readable(artifact)) is not None:
            check_is_run_of(folder, known)
        trainer = Trainer.resume(folder, **machine)
        if options["seed"] not in (None, trainer.seed):
            trainer.close()
            raise EdgeBcsError(f"a resumed run keeps its seed, here {trainer.seed}: leave --seed out.")
        before, now = trainer.artifact.attack_precision, trainer.attack_precision
        if before in ("f32", "half") and before != now:
            say(f"Attacks of this run were in {before}; from here on they are in {now}.")
        return trainer
    read = first_artifact(artifact, folder, options)
    trainer = Trainer(read, seed=options["seed"], **machine)
    try:
        if options["trust_keys"]:
            release.remember(read, folder)
    except BaseException:
        trainer.close()
        raise
    return trainer


def first_artifact(artifact: str, folder: Path, options: dict[str, Any]) -> Artifact:
    """Return the artifact that a new run in ``folder`` begins with; EdgeBcsError if there is one already, or
    if files of others are in its way."""
    from edge_bcs.cli.reading import RECORD
    from edge_bcs.runtime.state import is_run_of

    read = _trusted(artifact, folder, options)
    if is_run_of(folder, read) and _holds_state(folder):
        raise EdgeBcsError(
            f"{folder} already holds a run: add --resume to go on with it, or choose another -o."
        )
    for name in (REPORT, METRICS, RECORD):
        if (folder / name).exists() and not (folder / "manifest.json").is_file():
            raise EdgeBcsError(
                f"{folder} holds no run, but a {name} that the run would write over; choose another -o."
            )
    return read


def _holds_state(folder: Path) -> bool:
    """Whether a run that was saved at least once lies there."""
    from edge_bcs.runtime.manifest import STATE
    from edge_bcs.runtime.state import PREVIOUS

    slots = (STATE, PREVIOUS)
    return (folder / "manifest.json").is_file() and any((folder / slot).is_file() for slot in slots)


def _readable(artifact: str) -> Artifact | None:
    """Return the artifact of a run that goes on; None if it is gone or damaged, for the run is complete."""
    from edge_bcs.runtime.artifact import Artifact

    try:
        return Artifact.read(artifact)
    except EdgeBcsError:
        return None


def _trusted(artifact: str, folder: Path, options: dict[str, Any]) -> Artifact:
    """Return the artifact; if keys are trusted, it is signed, and not older than what was accepted before."""
    from edge_bcs.runtime import release
    from edge_bcs.runtime.artifact import Artifact

    read = Artifact.read(artifact, **trusted(options))
    if options["trust_keys"]:
        release.check(read, folder)
    return read
