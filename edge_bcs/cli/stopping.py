"""Ending a command in good order when SIGINT or SIGTERM asks for it, and the exit status that says so."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

TIME_IS_UP = 75  # sysexits.h: a temporary failure; try again


class Stopped(Exception):  # noqa: N818 (not an error)
    """A signal arrived; what was under way has been finished.

    Attributes:
        name: "SIGINT" or "SIGTERM". exit_status: 128 and the signal's number, as shells have it: 130 or 143.
    """

    def __init__(self, number: int) -> None:
        self.name, self.exit_status = signal.Signals(number).name, 128 + number
        super().__init__(self.name)


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM interrupt the block as SIGINT does: raise Terminated where it is."""

    def terminate(number: int, frame: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """Note SIGINT and SIGTERM inside the block; yield the function that raises Stopped if one has arrived.

    A second signal ends the command at once.
    """
    arrived: list[int] = []

    def note(number: int, frame: object) -> None:
        if arrived:
            raise KeyboardInterrupt
        arrived.append(number)

    def check() -> None:
        if arrived:
            raise Stopped(arrived[0])

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
