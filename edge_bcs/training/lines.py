"""The lines that a training writes, a JSON object each: one for every step, and one for every epoch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.metadata import parse_object
from edge_bcs.core.metrics import keep_lines

STEPS = "metrics.jsonl"
EPOCHS = "epochs.jsonl"
_LONGEST_LINE = 1 << 20


class Lines:
    """Both files of a folder, which is made. Lines of steps after ``step`` are dropped from them, and those
    of epochs that end after the step ``ended``.

    Raises:
        EdgeBcsError: the folder cannot be written.
    """

    def __init__(self, folder: Path, step: int, ended: int) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            keep_lines(folder / STEPS, step)
            keep_lines(folder / EPOCHS, ended)
            self._steps = (folder / STEPS).open("a", encoding="utf-8")
        except OSError as error:
            raise EdgeBcsError(f"{folder} cannot be written: {error.strerror or error}") from None
        self._epochs = folder / EPOCHS

    def step(self, line: dict[str, Any]) -> None:
        """Write what is to be said of a step; on disk after `flush`."""
        self._steps.write(json.dumps(line) + "\n")

    def epoch(self, line: dict[str, Any]) -> None:
        """Write what is to be said of an epoch, and of its steps."""
        self.flush()
        with self._epochs.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def last_epoch(self) -> dict[str, Any]:
        """What was written last of an epoch; nothing before the first has ended."""
        last = b"{}"
        if self._epochs.exists():
            with self._epochs.open("rb") as stream:
                while line := stream.readline(_LONGEST_LINE):
                    last = line
        return parse_object(last)

    def flush(self) -> None:
        """Give the lines of all steps to the file."""
        self._steps.flush()

    def close(self) -> None:
        """Close the files."""
        self._steps.close()


def count_of_steps(folder: Path) -> int | None:
    """How many whole lines of steps a folder has; None if there is a file of that name, but not ours."""
    return _lines_with(folder / STEPS, "step", "deaths", "milliseconds")


def count_of_epochs(folder: Path) -> int | None:
    """How many whole lines of epochs a folder has; None if there is a file of that name, but not ours."""
    return _lines_with(folder / EPOCHS, "epoch", "step", "connections")


def _lines_with(path: Path, *names: str) -> int | None:
    """How many whole lines a file of metrics has; None if one of them lacks a name, and is thus another's."""
    count = 0
    with path.open("rb") as stream:
        while (line := stream.readline(_LONGEST_LINE)).endswith(b"\n"):
            try:
                if not parse_object(line).keys() >= set(names):
                    return None
            except ValueError:
                return None
            count += 1
    return None if len(line) == _LONGEST_LINE else count  # what has no end was cut off, or is none of ours
