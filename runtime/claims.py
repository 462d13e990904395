"""The run folders that one Trainer alone may write into."""

from __future__ import annotations

import os
from pathlib import Path

from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.state import is_run_of, read_state

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.locks import FolderLock


class Claims:
    """Locks on run folders, held until `release`.

    Args:
        artifact: what the Trainer reads; a run of it is what may be written.
        opened_at: the step of its state when it was opened.
    """

    def __init__(self, artifact: Artifact, opened_at: int) -> None:
        self._artifact, self._opened_at = artifact, opened_at
        self._locks: dict[str, FolderLock] = {}

    def claim(self, folder: str | Path) -> None:
        """Keep other processes from writing into a run folder; EdgeBcsError if one does, if one did since
        the run there was read, or if the folder belongs to something else."""
        name = os.path.realpath(folder)
        before = self._locks.get(name)
        run = before is None and is_run_of(folder, self._artifact)
        lock = FolderLock(folder)  # anew: the folder may have been moved away or deleted
        step = self._saved_step() if run and name == os.path.realpath(self._artifact.path) else 0
        if step > self._opened_at:
            lock.release()
            raise EdgeBcsError(
                f"{folder} is at step {step} and was at {self._opened_at} when it was opened here: another "
                "process trained on. Open it again, or save to another folder."
            )
        self._locks[name] = lock
        if before is not None:
            before.release()

    def release(self) -> None:
        """Let other processes in. Safe to call twice."""
        while self._locks:
            self._locks.popitem()[1].release()

    def _saved_step(self) -> int:
        """The step of what now lies in the run that was read; 0 if that is no intact state."""
        try:
            return int(read_state(self._artifact)[1]["step"])
        except EdgeBcsError:
            return 0
