"""Reading files with one sentence for each failure; replacing them so that a reader finds the old content or
the new, never a mixture."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from edge_bcs.core.errors import EdgeBcsError

try:
    import fcntl
except ImportError:  # Windows, which does not remove a file that is open
    fcntl = None  # type: ignore[assignment]

PARTIAL_SUFFIX = ".partial"
"""Ends the name of a file that is being written, beside the one whose place it will take."""
_OWNED = re.compile(r"\.([0-9]{1,10})(?:-[0-9]+)?" + re.escape(PARTIAL_SUFFIX))
_CAUSES = {
    errno.ENOSPC: "the disk is full",
    errno.EFBIG: "the file may not grow further",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "permission is denied",
}
SMALL = 16 << 20
"""Bytes that no manifest, report, settings or other small file of text has."""


def read_small(file: str | Path, most: int = SMALL) -> bytes:
    """Return the content of a file that is small, or is none of ours.

    Raises:
        EdgeBcsError: it has more than ``most`` bytes, none of which are read, or is a pipe or a device.
        OSError: as `open`.
    """
    file = Path(file)
    found = file.stat()
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):  # which `open` refuses
        raise EdgeBcsError(f"{file} is not a regular file; it is not read.")
    content = b""
    if found.st_size <= most:
        with file.open("rb") as stream:
            content = stream.read(found.st_size + 1)
    if max(found.st_size, len(content)) > most:
        shown = f"{most >> 20} MiB" if most >> 20 else f"{most >> 10} KiB"
        raise EdgeBcsError(f"{file} is larger than {shown}, which no such file is; it is not read.")
    return content


def cause_of(error: OSError) -> str:
    """Why the system refused to write, in a few words."""
    return _CAUSES.get(error.errno or 0, error.strerror or str(error))


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Make one sentence, an EdgeBcsError, of an OSError inside the block, which reads ``path``."""
    try:
        yield
    except OSError as error:
        raise EdgeBcsError(f"{path} cannot be read: {error.strerror or error}.") from None


@contextlib.contextmanager
def replacing(file: Path, previous: Path | None = None, *, shared: bool = False) -> Iterator[IO[bytes]]:
    """Open a partial file that takes the place of ``file`` when the block ends well, else is removed.

    Its content is on the medium before it takes that place; `sync_folder` makes the renaming durable too.

    Args:
        file: what is replaced. previous: where the old ``file`` goes, if it is kept.
        shared: several processes may write ``file`` at once; the last one's stays. The partial file carries
            the number of its process and is locked while it is written, so that `remove_abandoned` can tell.
    """
    owner = f".{os.getpid()}-{threading.get_native_id()}" if shared else ""
    partial = file.with_name(file.name + owner + PARTIAL_SUFFIX)
    try:
        with partial.open("wb") as stream:
            if shared:
                try_lock(stream)
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        put(partial, file, previous)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def put(partial: Path, file: Path, previous: Path | None = None) -> None:
    """Rename ``partial`` to ``file``, and the old ``file`` to ``previous`` if it is kept."""
    if previous is not None and file.exists():
        os.replace(file, previous)
    os.replace(partial, file)


def try_lock(stream: IO[bytes]) -> bool:
    """Lock an open file for this process; False if another one has it, or the file system has no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def remove_abandoned(folder: Path) -> None:
    """Remove what processes that were killed left of ``replacing(…, shared=True)`` in ``folder``.

    A partial file goes only if no process has its number and nobody holds its lock, which also tells of
    processes in other containers and of numbers that are used again.
    """
    for partial in folder.glob("*" + PARTIAL_SUFFIX):
        owner = _OWNED.search(partial.name)
        if owner is None or is_running(int(owner[1])):
            continue
        with contextlib.suppress(OSError), partial.open("rb") as stream:
            if fcntl is None or try_lock(stream):
                partial.unlink()


def is_running(process: int) -> bool:
    """Whether a process of this number lives on this machine; False where that cannot be told (Windows)."""
    if os.name == "nt":  # where signal 0 is a key press; a file that is open cannot be removed there
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def write_json(path: Path, content: Mapping[str, Any] | Sequence[Any], *, make_folder: bool = False) -> None:
    """Replace a file by ``content`` as JSON, like `write_atomically`."""
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode(), make_folder=make_folder)


def sync_folder(folder: Path) -> None:
    """Make the renames in ``folder`` durable; a no-op where folders cannot be opened (Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_stream(path: Path) -> bool:
    """Whether ``path`` names a device, a pipe or an open file (/dev/stdout): written to, never replaced."""
    if path.absolute().parts[1:2] in (("dev",), ("proc",)):
        return path.exists() and not path.is_dir()
    try:
        kind = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(kind) or stat.S_ISDIR(kind))


def _opened(path: Path) -> IO[bytes]:
    """A device or a pipe to write to; of an open file of this process (/dev/stdout) that file itself, which
    goes on where it stands."""
    name = os.readlink(path) if path.is_symlink() else str(path)  # /dev/stdout is /proc/self/fd/1
    known = re.fullmatch(r"/(?:dev|proc/self)/fd/(\d+)", name)
    sys.stdout.flush()
    return open(os.dup(int(known[1])) if known else os.open(path, os.O_WRONLY | os.O_APPEND), "wb")


def write_atomically(path: Path, content: bytes | memoryview, *, make_folder: bool = False) -> None:
    """Replace a file by ``content``, on the medium before this returns.

    What a symbolic link points to is replaced, not the link. A device or a pipe is written to.

    Args:
        path: the file. content: all of it. make_folder: make the folder of the file if it is missing.

    Raises:
        EdgeBcsError: the file cannot be written; the old one is kept.
    """
    try:
        if is_stream(path):
            with _opened(path) as stream:
                stream.write(content)
            return
        file = Path(os.path.realpath(path))
        if make_folder:
            file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as partial:
            partial.write(content)
        sync_folder(file.parent)
    except OSError as error:
        raise EdgeBcsError(f"{path} cannot be written: {error.strerror or error}.") from None
