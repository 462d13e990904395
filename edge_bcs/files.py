"""Reading files with one sentence for each failure; replacing them so that a reader finds the old content or
the new, never a mixture."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from edge_bcs.errors import EdgeBcsError

PARTIAL_SUFFIX = ".partial"
"""Ends the name of a file that is being written, beside the one whose place it will take."""


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Make one sentence, an EdgeBcsError, of an OSError inside the block, which reads ``path``."""
    try:
        yield
    except OSError as error:
        raise EdgeBcsError(f"{path} cannot be read: {error.strerror or error}.") from None


@contextlib.contextmanager
def replacing(file: Path, previous: Path | None = None) -> Iterator[IO[bytes]]:
    """Open a partial file that takes the place of ``file`` when the block ends well, else is removed.

    Its content is on the medium before it takes that place; `sync_folder` makes the renaming durable too.

    Args:
        file: what is replaced. previous: where the old ``file`` goes, if it is kept.
    """
    partial = file.with_name(file.name + PARTIAL_SUFFIX)
    try:
        with partial.open("wb") as stream:
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
