"""Temporary folders. Those that killed processes left go when the next one is made."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import tempfile
import weakref
from pathlib import Path
from typing import IO

from edge_bcs.core.files import is_running, try_lock

_LOCK = ".edge-bcs.lock"
_OWNED = re.compile(r"edge-bcs-[a-z]+-([0-9]{1,10})-\w+")


class ScratchFolder:
    """A new folder that only this user can read, until `remove` or the end of the object or of the process.

    Making one first removes those of processes that were killed.

    Args:
        purpose: a word in its name, of the letters a to z.

    Attributes:
        path: where it is.
    """

    def __init__(self, purpose: str) -> None:
        _remove_abandoned()
        self.path = Path(tempfile.mkdtemp(prefix=f"edge-bcs-{purpose}-{os.getpid()}-"))
        lock = (self.path / _LOCK).open("wb")  # locked until it is closed, however the process ends
        try_lock(lock)
        self._removal = weakref.finalize(self, _remove, self.path, lock, os.getpid())

    def remove(self) -> None:
        """Remove it with all it holds. Safe to call twice; without effect in a process forked off."""
        self._removal()


def _remove(folder: Path, lock: IO[bytes], process: int) -> None:
    if process == os.getpid():
        shutil.rmtree(folder, ignore_errors=True)
    lock.close()


def _remove_abandoned() -> None:
    """Remove the folders of this user whose process has gone and whose lock nobody holds, which also tells of
    processes in other containers and of numbers that are used again."""
    with contextlib.suppress(OSError):
        for folder in Path(tempfile.gettempdir()).glob("edge-bcs-*"):
            owner = _OWNED.fullmatch(folder.name)
            if owner is None or is_running(int(owner[1])) or not _is_mine(folder):
                continue
            with contextlib.suppress(OSError), (folder / _LOCK).open("rb") as lock:
                if try_lock(lock):
                    shutil.rmtree(folder, ignore_errors=True)


def _is_mine(folder: Path) -> bool:
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == getattr(os, "geteuid", lambda: found.st_uid)()
