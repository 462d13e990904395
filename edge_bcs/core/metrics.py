"""Files of metrics, one JSON object a step, that an interrupted training goes on with; host and board."""

from __future__ import annotations

import os
from pathlib import Path

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.metadata import parse_object

_LONGEST_LINE = 1 << 20


def keep_lines(file: Path, last_step: int) -> None:
    """Remove from a file of metrics, if it is there, what comes after the last whole line of a step up to
    ``last_step``: lines that a training writes again, and one that was cut off."""
    if file.exists():
        os.truncate(file, _end_of_lines(file, last_step))


def _end_of_lines(file: Path, last_step: int) -> int:
    """Where the last whole line of a step up to ``last_step`` ends, in bytes; EdgeBcsError if the first line
    is whole and of no step, and the file thus of something else."""
    end = position = 0
    with file.open("rb") as stream:
        first = stream.readline(_LONGEST_LINE)
        if first.endswith(b"\n") and not first.startswith(b"\0") and not _is_of_a_step(first):
            raise EdgeBcsError(f"{file} holds no metrics, so it stays; choose another file for them.")
        stream.seek(0)
        # What has no end is the last line, cut off, or none of ours.
        while (line := stream.readline(_LONGEST_LINE)).endswith(b"\n"):
            position += len(line)
            try:
                if int(parse_object(line)["step"]) <= last_step:
                    end = position
            except (ValueError, KeyError, TypeError, OverflowError):
                continue
    return end


def _is_of_a_step(line: bytes) -> bool:
    try:
        return "step" in parse_object(line)
    except ValueError:
        return False
