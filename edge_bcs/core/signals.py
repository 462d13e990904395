"""Letting signals wait while something is done that must not be left half-done; for host and board."""

from __future__ import annotations

import threading
from _signal import getsignal, signal  # what `signal` wraps: its own look at every signal takes 40 µs, not 2
from collections import deque
from collections.abc import Callable
from itertools import compress
from signal import valid_signals
from types import FrameType, TracebackType
from typing import Any

_NUMBERS = tuple(int(number) for number in valid_signals())
_Handler = Callable[[int, FrameType | None], Any]


class HeldSignals:
    """Lets Python's handlers of signals wait from `hold` to the end of the `with` block.

        with HeldSignals() as signals:
            ...                     # may be interrupted, as ever
            signals.hold()
            ...                     # not from here on

    A handler written in Python runs between two operations of the main thread, wherever that is, and may
    raise, as that of SIGINT raises KeyboardInterrupt. Those that were held are run when the block ends, as
    often as their signals came and in that order, whatever they raise. Signals that are ignored, that end the
    process, or that are handled by something else than Python are not touched. In other threads, where no
    handler runs, nothing is done. A few microseconds; blocks may lie in each other.

    Attributes:
        held: whether `hold` has been called.
    """

    def __init__(self) -> None:
        self.held = False
        self._handlers: dict[int, _Handler] = {}
        self._arrived: deque[tuple[_Handler, int, FrameType | None]] = deque()

    def hold(self) -> None:
        """Hold signals from now on; once is enough."""
        self.held = True
        if threading.get_ident() != threading.main_thread().ident:
            return
        for number in compress(_NUMBERS, map(callable, map(getsignal, _NUMBERS))):
            handler = getsignal(number)
            if not isinstance(getattr(handler, "__self__", None), HeldSignals):
                self._handlers[number] = handler  # before it is replaced: the next handler to run may raise
                signal(number, self._note)

    def __enter__(self) -> HeldSignals:
        """Return the object itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the handlers back, and run those whose signals came."""
        self._release()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._arrived.append((self._handlers[number], number, frame))

    def _release(self) -> None:
        try:
            while self._handlers:
                number, handler = next(iter(self._handlers.items()))
                if getsignal(number) == self._note:  # and nobody has set another one
                    signal(number, handler)
                del self._handlers[number]
        finally:  # a handler that is back may have run already, and raised
            if self._handlers:
                self._release()
            self._run()

    def _run(self) -> None:
        try:
            while self._arrived:
                handler, number, frame = self._arrived.popleft()
                handler(number, frame)
        finally:
            if self._arrived:
                self._run()
