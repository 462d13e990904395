"""Who may use a Trainer at a moment, and what a step that is not counted leaves behind: nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import numpy as np

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.signals import HeldSignals

Array = np.ndarray[Any, Any]


class Guard:
    """Lets one thread at a time use a Trainer, and knows whether a step is under way.

    As a context manager it is a lock that a thread may take again while it has it, and that refuses other
    threads: nobody waits.

    Args:
        arrays: the bound buffers. A step changes the running statistics among them before it is counted;
            `begin` keeps what they were, and `take_back` gives it back.
    """

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self._lock = threading.RLock()
        self._arrays = arrays
        pairs = {f"batchnorm.{kind}": f"rollback.{kind}" for kind in ("mean", "variance")}
        self._kept = {buffer: kept for buffer, kept in pairs.items() if kept in arrays}
        # Number of the step that has begun and is not counted: running statistics are not to be had.
        self._under_way: int | None = None
        self._reading = False  # of such a step: its next images are being read, and the buffers are free

    def __enter__(self) -> None:
        """Take the lock; EdgeBcsError if another thread has it."""
        if not self._lock.acquire(blocking=False):
            raise EdgeBcsError(
                "this Trainer is in use by another thread: call it from one thread at a time (wait for the "
                "other, or share a threading.Lock)."
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the lock back."""
        self._lock.release()

    def refuse_inside_a_step(self, *, but_while_reading: bool = False) -> None:
        """Raise EdgeBcsError where the handler of a signal, or the reading of images, is inside a step."""
        if self._under_way is not None and not (but_while_reading and self._reading):
            raise EdgeBcsError(
                f"step {self._under_way} is under way: call this between steps (the handler of a signal can "
                "leave a note that on_step looks at)."
            )

    def begin(self, number: int) -> None:
        """A step begins, the ``number``-th: keep what it may change before it is counted."""
        for buffer, kept in self._kept.items():
            self._arrays[kept][...] = self._arrays[buffer]
        self._under_way = number

    def reads(self, reading: bool) -> None:
        """Say whether the step under way is reading images, so that the buffers are free."""
        self._reading = reading

    def counted(self) -> None:
        """The step that was under way is done and counted."""
        self._under_way = None

    def take_back(self) -> None:
        """Take back what the micro-batches of a step did to the running statistics, unless it is counted."""
        if self._under_way is None:
            return
        with HeldSignals() as signals:
            signals.hold()
            for buffer, kept in self._kept.items():
                self._arrays[buffer][...] = self._arrays[kept]
            self._under_way, self._reading = None, False

    @property
    def has_statistics(self) -> bool:
        """Whether a step changes running statistics at all."""
        return bool(self._kept)

    def counted_state(self, names: Iterable[str]) -> dict[str, Array]:
        """The buffers that hold tensors of the state after the last step that is counted, while the next is
        under way, too."""
        kept = {} if self._under_way is None else self._kept
        return {name: self._arrays[kept.get(name, name)] for name in names}


class BetweenSteps:
    """A block that runs in one thread and inside no step: refused with EdgeBcsError otherwise.

    Args:
        guard: of the Trainer. but_while_reading: it may run while a step reads its next images.
    """

    def __init__(self, guard: Guard, *, but_while_reading: bool = False) -> None:
        self._guard, self._but_while_reading = guard, but_while_reading

    def __enter__(self) -> None:
        """Take the lock of the guard."""
        self._guard.__enter__()
        try:
            self._guard.refuse_inside_a_step(but_while_reading=self._but_while_reading)
        except BaseException:
            self._guard.__exit__(None, None, None)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give it back."""
        self._guard.__exit__(kind, error, trace)
