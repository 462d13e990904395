"""Reading files with one sentence for each failure; replacing them so that a reader finds the old content or
the new, never a mixture."""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from edge_bcs.errors import EdgeBcsError

try:
    import fcntl
except ImportError:  # Windows, which does not remove a file that is open
    fcntl = None  # type: ignore[assignment]

PARTIAL_SUFFIX = ".partial"
"""Ends the name of a file that is being written, beside the one whose place it will take."""
_OWNED = re.compile(r"\.([0-9]{1,10})(?:-[0-9]+)?" + re.escape(PARTIAL_SUFFIX))
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
                _try_lock(stream)
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        if previous is not None and file.exists():
            os.replace(file, previous)
        os.replace(partial, file)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def _try_lock(stream: IO[bytes]) -> bool:
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
        if owner is None or _is_running(int(owner[1])):
            continue
        with contextlib.suppress(OSError), partial.open("rb") as stream:
            if fcntl is None or _try_lock(stream):
                partial.unlink()


def _is_running(process: int) -> bool:
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


def write_atomically(path: Path, content: bytes, *, make_folder: bool = False) -> None:
    """Replace a file by ``content``, on the medium before this returns.

    Args:
        path: the file. content: all of it. make_folder: make the folder of the file if it is missing.

    Raises:
        EdgeBcsError: the file cannot be written; the old one is kept.
    """
    try:
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as stream:
            stream.write(content)
        sync_folder(path.parent)
    except OSError as error:
        raise EdgeBcsError(f"{path} cannot be written: {error.strerror or error}.") from None
