"""How far something long is: on a terminal a line with a bar, elsewhere (a log, a pipe) one now and then.

    with Progress("training", total=400, unit="steps") as progress:
        for step in range(400):
            progress.update(step + 1, text=f"loss {loss:.3f}")

A thread of its own writes, so that a step of minutes is told of while it runs, and `update` costs nothing.
Everything goes to standard error: what a command answers is alone on standard output. A task inside another
is shown in its place. A stream that nobody reads any more is no fault of the work; nothing more is written.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ContextDecorator
from types import TracebackType
from typing import TextIO

from edge_bcs.core.text import shown
from edge_bcs.core.units import format_seconds

FIRST_SECONDS = 1.5
"""From the beginning of a task to its first line where there is no terminal."""
SECONDS = 10.0
"""Between two lines."""
APART = 2.0
"""Between the last line of one task and the first of the next."""
_REDRAWN = 0.2  # on a terminal
_BAR = 20
_SHORTEST_ETA = 3.0

_lock = threading.RLock()
_tasks: list[Progress] = []
_teller: _Teller | None = None


class Progress(ContextDecorator):
    """One task, shown from entering the block (or the function that it decorates) to leaving it.

    Args:
        what: a few words that name it. total: of what there is to do; None if that is not known.
        done: how much of it is done at the beginning.
        unit: what is counted, such as "images".
        shown: False: nothing is shown of this task (an outer one stays visible).

    Attributes:
        began: when it did, by `time.monotonic`.
        told: the last line that told of it where there is no terminal; "" before the first.
    """

    def __init__(
        self, what: str, total: int | None = None, *, done: int = 0, unit: str = "", shown: bool = True
    ) -> None:
        self.what, self.total, self.done, self.unit, self.text = what, total, done, unit, ""
        self._shown, self.began = shown, time.monotonic()
        self._first, self._first_at, self._moved_at = done, self.began, self.began
        self.told = ""

    def begin(self, done: int) -> None:
        """Count the time that is left from now on, where ``done`` is done."""
        self.done, self._first = done, done
        self._first_at = self._moved_at = time.monotonic()

    def update(self, done: int | None = None, *, total: int | None = None, text: str | None = None) -> None:
        """Set how much is done, how much there is to do, and what else is to be said; None leaves it."""
        if done is not None and done != self.done:
            self.done, self._moved_at = done, time.monotonic()
        self.total = self.total if total is None else total
        self.text = self.text if text is None else text

    def say(self, sentence: str) -> None:
        """Write a line that stays, at once; see `say`."""
        if self._shown:
            say(sentence)

    def __enter__(self) -> Progress:
        """Begin to show it."""
        global _teller
        self.began = self._first_at = self._moved_at = time.monotonic()
        self.told = ""
        if self._shown:
            with _lock:
                _tasks.append(self)
                if _teller is None:
                    _teller = _Teller()
                    _teller.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it; where lines of it were written, the last one says how it ended."""
        global _teller
        if not self._shown:
            return
        ended = None
        with _lock:
            if _teller is not None and kind is None and self.total is not None and self.done >= self.total:
                _teller.conclude(self)
            _tasks.remove(self)
            if not _tasks:
                ended, _teller = _teller, None
        if ended is not None:
            ended.end()

    @property
    def is_shown(self) -> bool:
        """Whether it is under way and shown."""
        with _lock:
            return self in _tasks

    def describe(self, width: int | None = None, bar: tuple[str, str] | None = None) -> str:
        """Return where it stands as one line: of at most ``width`` characters, with a bar of these two."""
        now = time.monotonic()
        parts = []
        if self.total:
            counted = f"{self.done:,} of {self.total:,} {self.unit}".rstrip()
            if bar is not None and (width is None or width >= 3 * _BAR):
                full = min(_BAR, _BAR * self.done // self.total)
                counted = f"{bar[0] * full}{bar[1] * (_BAR - full)} {counted}"
            parts.append(counted)
        elif self.done:
            parts.append(f"{self.done:,} {self.unit}".rstrip())
        times = [_rounded(now - self.began)]
        moved, took = self.done - self._first, self._moved_at - self._first_at
        if self.total and moved > 0 and now - self._first_at >= _SHORTEST_ETA:
            left = took * (self.total - self.done) / moved - (now - self._moved_at)
            if left >= 1:
                times.append(f"about {_rounded(left)} left")
        text = [self.text] if self.text else []
        parts += [*text, *times] if width is None else [*times, *text]  # the end of a line may be cut off
        line = f"{self.what}: {', '.join(parts)}"
        return line if width is None else line[:width]


def note(text: str) -> None:
    """Say of the task that is shown, if any, what it is doing now."""
    with _lock:
        task = _tasks[-1] if _tasks else None
    if task is not None:
        task.update(text=text)


def say(sentence: str) -> None:
    """Write a line to standard error, above the bar if there is one; a stream that is gone is left alone."""
    sentence = shown(sentence)
    with _lock:
        if _teller is not None:
            _teller.say(sentence)
        else:
            _Lines(sys.stderr).line(sentence)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether somebody looks at ``stream``."""
    try:
        return stream is not None and stream.isatty()
    except (OSError, ValueError):
        return False


def on_terminal(stream: TextIO | None) -> bool:
    """Whether a line of ``stream`` can be rewritten in place."""
    return is_terminal(stream) and os.environ.get("TERM") != "dumb"


class _Lines:
    """Lines of a stream, the last of which may be rewritten."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream, self._open = stream, ""

    def line(self, text: str) -> None:
        """Write a whole line, in the place of an open one."""
        self._write(f"{self._erase()}{text}\n")
        self._open = ""

    def rewrite(self, text: str) -> None:
        """Put ``text`` in the place of the open line; "" closes it."""
        if text != self._open:
            self._write(f"{self._erase()}{text}")
            self._open = text

    def _erase(self) -> str:
        return "\r\x1b[K" if self._open else ""

    def _write(self, text: str) -> None:
        try:
            if self._stream is not None:
                self._stream.write(text)
                self._stream.flush()
        except (OSError, ValueError):  # its reader is gone, or it is closed
            self._stream = None


class _Teller(threading.Thread):
    """Tells of the innermost task until `end` is called."""

    def __init__(self) -> None:
        super().__init__(name="edge-bcs progress", daemon=True)
        self._ended = threading.Event()
        self._lines, self._terminal = _Lines(sys.stderr), on_terminal(sys.stderr)
        self._bar = _bar_of(sys.stderr) if self._terminal else None
        self._last = 0.0  # when the last line was written

    def run(self) -> None:
        """Look now and then whether something is to be told."""
        while not self._ended.wait(_REDRAWN if self._terminal else min(0.25, FIRST_SECONDS / 2)):
            with _lock:
                if _tasks and not self._ended.is_set():
                    self._tell(_tasks[-1])

    def _tell(self, task: Progress) -> None:
        if self._terminal:
            columns = shutil.get_terminal_size().columns
            self._lines.rewrite(task.describe(max(8, columns - 1), self._bar))
            return
        now = time.monotonic()
        first = max(task.began + FIRST_SECONDS, self._last + APART)
        if now >= (self._last + SECONDS if task.told else first):
            self._write(task, now)

    def _write(self, task: Progress, now: float) -> None:
        task.told, self._last = task.describe(), now
        self._lines.line(task.told)

    def conclude(self, task: Progress) -> None:
        """Write the last line of a task that other lines told of."""
        if not self._terminal and task.told:
            self._write(task, time.monotonic())

    def say(self, sentence: str) -> None:
        """Write a line that stays."""
        self._lines.line(sentence)
        self._last = time.monotonic()

    def end(self) -> None:
        """Tell no more, and leave the terminal as it was."""
        self._ended.set()
        if self.is_alive():
            self.join()
        self._lines.rewrite("")


def _bar_of(stream: TextIO) -> tuple[str, str]:
    """Return what the done and the open part of a bar are drawn with."""
    try:
        "━─".encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return "#", "."
    return "━", "─"


def _rounded(seconds: float) -> str:
    return format_seconds(round(seconds) if seconds < 60 else seconds)


def told_once(tell: Callable[[str], None] = say) -> Callable[[str], None]:
    """Return a function that says a sentence (default: on standard error) unless it was the last one said."""
    said = ""

    def once(sentence: str) -> None:
        nonlocal said
        if sentence != said:
            tell(sentence)
        said = sentence

    return once
