"""When a training is saved, and how much that may wear the medium: bytes an hour, never more.

Flash memory (an SD card, eMMC) endures a limited number of bytes. A training writes its state, always whole,
and a line of metrics a step. Both together stay below a limit: saves come less often where the state is
large, and lines are left out where steps are fast.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.metrics import keep_lines
from edge_bcs.core.units import format_bytes, format_seconds, parse_bytes

DEFAULT_SECONDS = 60.0
DEFAULT_MAX_WRITES = "200MiB"
METRICS_SHARE = 0.1  # of the limit; the rest is for the state
_HOUR = 3600.0
Clock = Callable[[], float]


def parse_max_writes(text: int | str | None) -> int | None:
    """Return the bytes an hour that "200MiB" or "200MiB/h" names; None for "none"."""
    if text is None or (isinstance(text, str) and text.strip().lower() == "none"):
        return None
    return parse_bytes(text.strip().removesuffix("/h") if isinstance(text, str) else text)


class SaveSchedule:
    """Says when the next save is due: every ``steps`` steps or ``seconds`` seconds, whichever comes first,
    but never so often that saves of ``size`` bytes exceed their share of ``max_writes`` bytes an hour.

    Without ``steps`` and ``seconds`` it is every minute; ``max_writes`` None is no limit.
    """

    def __init__(
        self,
        size: int,
        *,
        step: int,
        steps: int | None = None,
        seconds: float | None = None,
        max_writes: int | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        if steps is not None and steps < 1:
            raise EdgeBcsError(f"a training is saved every 1 or more steps, not every {steps}.")
        if seconds is not None and not 0 <= seconds < float("inf"):
            raise EdgeBcsError(f"the seconds between saves must be a number of at least 0, not {seconds}.")
        self.size, self.steps, self.max_writes = size, steps, max_writes
        self.seconds = DEFAULT_SECONDS if steps is None and seconds is None else seconds
        self._clock, self._step, self._time = clock, step, clock()

    @property
    def shortest(self) -> float:
        """Seconds that must pass between two saves for the medium's sake."""
        if self.max_writes is None:
            return 0.0
        return self.size * _HOUR / ((1 - METRICS_SHARE) * self.max_writes)

    def due(self, step: int) -> bool:
        """True if the state after ``step`` should be saved now."""
        elapsed = self._clock() - self._time
        if elapsed < self.shortest:
            return False
        by_steps = self.steps is not None and step - self._step >= self.steps
        return by_steps or (self.seconds is not None and elapsed >= self.seconds)

    def saved(self, step: int, size: int) -> None:
        """Note that ``step`` was saved just now, with ``size`` bytes."""
        self.size, self._step, self._time = size, step, self._clock()

    def bytes_per_hour(self, seconds_per_step: float) -> float:
        """What the saves write at this pace."""
        waits = [self.seconds] if self.seconds is not None else []
        waits += [self.steps * seconds_per_step] if self.steps is not None else []
        return self.size * _HOUR / max(min(waits), self.shortest, seconds_per_step, 1e-3)

    def describe(self) -> str:
        """What is saved how often, for people: "Saves 1.8 MiB every 1 min, 108 MiB an hour (…)"."""
        often = [] if self.steps is None else [f"{self.steps} steps"]
        if self.seconds is not None:
            often.append(format_seconds(max(self.seconds, self.shortest)))
        text = f"Saves {format_bytes(self.size)} every {' or '.join(often)}"
        limit = ""
        if self.max_writes is not None:
            limit = f" (--max-writes allows {format_bytes(self.max_writes)} an hour)"
        if self.steps is None:
            text += f", {format_bytes(round(self.bytes_per_hour(0)))} an hour"
            limit = limit.replace(" an hour", "")
        return text + limit


class MetricsFile:
    """JSON objects, one a line, appended to a file; lines beyond their share of ``max_writes`` bytes an hour
    are left out (an hour's worth may come at once).

    Args:
        file: made if missing.
        resumed_at: the step at which an interrupted training goes on; what its last lines say of later steps,
            and a line that was cut off, are removed first.

    Raises EdgeBcsError if the file cannot be written, or if a resumed training is given another file.
    """

    def __init__(
        self,
        file: str | Path,
        *,
        resumed_at: int | None = None,
        max_writes: int | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.file, self.bytes = Path(file), 0
        self._clock, self._began = clock, clock()
        self._per_hour = None if max_writes is None else METRICS_SHARE * max_writes
        try:
            if resumed_at is not None:
                keep_lines(self.file, resumed_at)
            self._stream: BinaryIO = self.file.open("ab", buffering=0)
        except OSError as error:
            raise self._fault(error) from None

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one object, if its share allows."""
        line = json.dumps(record).encode() + b"\n"
        if self._per_hour is not None:
            hours = 1 + (self._clock() - self._began) / _HOUR
            if self.bytes + len(line) > self._per_hour * hours:
                return
        try:
            self._stream.write(line)
        except OSError as error:
            raise self._fault(error) from None
        self.bytes += len(line)

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def _fault(self, error: OSError) -> EdgeBcsError:
        return EdgeBcsError(f"the metrics file {self.file} cannot be written: {error.strerror}.")
