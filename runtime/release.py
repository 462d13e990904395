"""Releases of signed artifacts: a number that only grows, by which an older one is told from a newer one.

A signature says who made an artifact, not that the maker has replaced it since. The number stands in the
manifest, so the signature covers it. Beside a run folder `run` lies `run.release`, with the highest number
that was accepted for it; it outlives the run, and nothing older is accepted for a run of that name.
"""

from __future__ import annotations

from pathlib import Path

from edge_bcs.runtime.artifact import Artifact

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import read_small, reading, write_json
from edge_bcs.core.metadata import parse_object

_ACCEPTED = "accepted_release"


def memory_of(run: Path) -> Path:
    """Return the file that remembers the highest release accepted for a run folder."""
    run = run.resolve()
    return run.with_name(f"{run.name}.release")


def accepted(run: Path) -> int | None:
    """Return the highest release that was accepted for a run; None if none was.

    Raises:
        EdgeBcsError: the file that remembers it cannot be read.
    """
    file = memory_of(run)
    with reading(file):
        if not file.exists():
            return None
        content = read_small(file)
    try:
        release = parse_object(content)[_ACCEPTED]
        if type(release) is int and release > 0:
            return release
    except (ValueError, KeyError):
        pass
    raise EdgeBcsError(
        f"{file} should say which release was accepted last, but is damaged: find out how, then delete it."
    )


def check(artifact: Artifact, run: Path) -> None:
    """Refuse an artifact that is older than one that was accepted for ``run`` before.

    Raises:
        EdgeBcsError: its release is a lower number, or it has none.
    """
    newest = accepted(run)
    if newest is not None and (artifact.release or 0) < newest:
        raise EdgeBcsError(
            f"{artifact.path} is {artifact.release_text}, and release {newest} was accepted here before: "
            f"copy that or a newer one. Delete {memory_of(run)} to go back on purpose."
        )


def remember(artifact: Artifact, run: Path) -> None:
    """Remember that an artifact, whose signature is valid, was accepted for ``run``.

    Raises:
        EdgeBcsError: that cannot be written.
    """
    if artifact.release is not None and artifact.release > (accepted(run) or 0):
        write_json(memory_of(run), {_ACCEPTED: artifact.release}, make_folder=True)
