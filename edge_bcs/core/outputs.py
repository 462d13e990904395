"""What a command may write over: what it, or an earlier call of it, wrote; anything else stays as it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import is_stream, read_small
from edge_bcs.core.metadata import parse_object

Recognised = Callable[[bytes], bool]
_LARGEST = 64 << 20


def json_with(*names: str) -> Recognised:
    """Recognise a JSON object that has all these names."""

    def recognised(content: bytes) -> bool:
        try:
            return parse_object(content).keys() >= set(names)
        except ValueError:
            return False

    return recognised


def containing(mark: str) -> Recognised:
    """Recognise a file that has these characters somewhere."""
    return lambda content: mark.encode() in content


def check_output(file: str | Path, ours: Recognised, what: str) -> None:
    """Raise EdgeBcsError if ``file`` is there and is not ``what``; a file that is empty may be written over.

    Args:
        file: what a command is about to write.
        ours: recognises the content of a file that the command wrote.
        what: such a file, for the message: "a report of `edge-bcs evaluate`".
    """
    file = Path(file)
    if is_stream(file):
        return
    if file.is_dir():
        raise EdgeBcsError(f"{file} is a folder; name a file.")
    check_folder(file.parent)
    if not _is_ours(file, ours):
        raise EdgeBcsError(f"{file} is there and is not {what}, so it stays: name another file, or move it.")


def check_folder(folder: str | Path) -> None:
    """Raise EdgeBcsError unless ``folder`` is one that can be written to, or can be made."""
    folder = Path(folder)
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise EdgeBcsError(f"{there} is a file; choose a folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise EdgeBcsError(f"{folder} cannot be written: {there} is read-only here, or not yours.")


def check_outputs(folder: str | Path, files: Iterable[str], proof: str, ours: Recognised, what: str) -> None:
    """Raise EdgeBcsError if one of ``files`` is in ``folder`` without the one that proves whose they are.

    Args:
        folder: where a command is about to write.
        files: the names of what it writes there.
        proof: the one of them by which the folder is recognised, with ``ours``.
        what: such a folder, for the message: "a report of `edge-bcs bench --all`".
    """
    folder = Path(folder)
    if (folder / proof).is_file() and _is_ours(folder / proof, ours):
        return
    for name in (proof, *files):
        if (folder / name).exists() and not _is_ours(folder / name, lambda content: False):
            raise EdgeBcsError(
                f"{folder} has a {name} that belongs to no {what}, so it stays: choose another folder, or "
                "move it."
            )


def _is_ours(file: Path, ours: Recognised) -> bool:
    """Whether nothing is lost by writing over ``file``."""
    try:
        return not file.exists() or not file.stat().st_size or ours(read_small(file, _LARGEST))
    except (OSError, EdgeBcsError):
        return False
