"""One writer at a time in a folder, by a lock that ends with its process, however that ends; host and board.

The lock is a file, `.edge-bcs.lock`, that its holder locks (flock) and removes when it is done. What a crash
leaves of it locks nobody out. Readers do not ask for it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.progress import say

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".edge-bcs.lock"
_LONGEST = 1 << 10
_ATTEMPTS = 100


@dataclass
class _Held:
    """What this process holds of one folder: the open lock file, how often it is wanted, folders made."""

    descriptor: int | None
    made: list[Path] = field(default_factory=list)
    count: int = 1
    process: int = field(default_factory=os.getpid)


_guard = threading.RLock()
_held: dict[str, _Held] = {}
_told: list[str] = []


class FolderLock:
    """Keeps other processes from writing into a folder until `release`, or the end of its `with` block.

    The folder is made if it is missing, and removed by `release` if it was and nothing came into it. Within a
    process a folder may be locked several times; the last release counts. Where nothing can be locked (a
    read-only disk, a file system without flock, of which one sentence on standard error tells once) the lock
    is none.

    Args:
        folder: the folder.
        again: whether this process may hold it already.

    Raises:
        EdgeBcsError: another process holds it; the sentence names the folder and, if it can, the process.
    """

    def __init__(self, folder: str | Path, *, again: bool = True) -> None:
        self._folder = Path(os.path.realpath(folder))
        with _guard:
            held = _held.get(str(self._folder))
            ours = held is not None and held.process == os.getpid()
            if held is not None and ours and _is_at(held.descriptor, self._folder / LOCK):
                if not again:
                    raise _taken(folder, "this process")
                held.count += 1
            else:
                held = _acquire(self._folder, folder)
                _held[str(self._folder)] = held
        self._mine: _Held | None = held

    def release(self) -> None:
        """Let others in. Safe to call twice, and of no effect in a process that was forked off."""
        with _guard:
            held, self._mine = self._mine, None
            if held is None or held.process != os.getpid():
                return
            held.count -= 1
            if held.count:
                return
            if _held.get(str(self._folder)) is held:
                del _held[str(self._folder)]
            if held.descriptor is not None:
                with contextlib.suppress(OSError):
                    if _is_at(held.descriptor, self._folder / LOCK):
                        (self._folder / LOCK).unlink()  # while it is locked: nobody else's can lie there
                os.close(held.descriptor)
            _remove_empty(held.made)

    def __enter__(self) -> FolderLock:
        """Return the lock itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release it."""
        self.release()


class _NoLocksError(Exception):
    """The file is there, and cannot be locked."""


def _acquire(folder: Path, shown: str | Path) -> _Held:
    made: list[Path] = []
    for _ in range(_ATTEMPTS):
        try:
            made += _make(folder)
            descriptor = _lock(folder / LOCK)
        except FileNotFoundError:
            continue  # the folder's last holder removed it just now
        except BlockingIOError:
            raise _taken(shown, _holder(folder / LOCK)) from None
        except _NoLocksError as error:
            _tell_once(folder, error)
            with contextlib.suppress(OSError):
                if not (folder / LOCK).stat().st_size:  # nobody's: made just now
                    (folder / LOCK).unlink()
            break
        except OSError:
            break  # nothing can be written here, as the writer will find and say
        if _is_at(descriptor, folder / LOCK):
            _sign(folder / LOCK)
            return _Held(descriptor, made)
        os.close(descriptor)  # locked, but its last holder had removed it from the folder
    return _Held(None, made)


def _taken(folder: str | Path, holder: str) -> EdgeBcsError:
    return EdgeBcsError(
        f"{folder} is being written by {holder}: wait until it has ended, stop it, or choose another folder."
    )


def _open(file: Path, mode: int) -> int:
    """Open the lock file, made if missing; it must not be a link to another."""
    flags = mode | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(file, flags, 0o644)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{file} is not a file")
    return descriptor


def _lock(file: Path) -> int:
    """Open the lock file, lock it and return its descriptor.

    It is open for reading only, so that a disk can still be made read-only; NFS wants it open for writing.
    """
    if fcntl is None:
        raise _NoLocksError("the system has no flock")
    for mode in (os.O_RDONLY, os.O_RDWR):
        descriptor = _open(file, mode)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise
        except OSError as error:
            os.close(descriptor)
            if error.errno != errno.EBADF or mode == os.O_RDWR:
                raise _NoLocksError(error.strerror or str(error)) from None
    raise AssertionError


def _is_at(descriptor: int | None, file: Path) -> bool:
    """Whether the open lock file is still the one in the folder."""
    if descriptor is None:
        return False
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(file))
    except OSError:
        return False


def _sign(file: Path) -> None:
    """Write who holds the lock, for the sentence that others get; a full disk may keep it from that."""
    with contextlib.suppress(OSError):
        file.write_text(f"{os.getpid()} {socket.gethostname()}\n")


def _holder(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            words = stream.read(_LONGEST).decode().split()
    except (OSError, ValueError):
        words = []
    if len(words) != 2 or not words[0].isdigit() or not words[1].isprintable():
        return "another process"
    where = "" if words[1] == socket.gethostname() else f" on {words[1]}"
    return f"process {words[0]}{where}"


def _make(folder: Path) -> list[Path]:
    """Make the folder and those above it; return what was missing, outermost first."""
    missing = [path for path in (*reversed(folder.parents), folder) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        _remove_empty(missing)
        raise
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in reversed(folders):
        try:
            folder.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            break


def _tell_once(folder: Path, error: _NoLocksError) -> None:
    if not _told:
        _told.append(str(folder))
        say(
            f"Note: nothing can be locked in {folder.parent} ({error}), so nothing keeps two processes from "
            "writing into one folder."
        )
