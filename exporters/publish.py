"""Where an export goes: looked at before anything is written, and replaced as a whole or not at all.

An export takes the place of an artifact by exchanging two folders in one call of the system, so that whoever
looks finds the old artifact or the new one. It replaces only what is proven to be an artifact: format,
version, and for each file its entry in the manifest. A file of the user's among them refuses the export
instead of being kept in the new folder, because only whole folders can be exchanged.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edge_bcs.runtime import archive as archives
from edge_bcs.runtime.artifact import REPLACED, Artifact, sha256_of
from edge_bcs.runtime.manifest import FORMAT, GRAPHS, MANIFEST, PROGRAM, STATE, VERSIONS, graph_file
from edge_bcs.runtime.ort.checkpoint import CHECKPOINT
from edge_bcs.runtime.state import PREVIOUS

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import PARTIAL_SUFFIX, cause_of, read_small, replacing, sync_folder
from edge_bcs.core.locks import LOCK, FolderLock
from edge_bcs.core.metadata import parse_object

from .plain_eval import PLAIN_EVAL

_LONGEST_NAME = 150
_OF_ARTIFACTS = {MANIFEST, archives.SIGNATURE, LOCK}
"""Files of an exported artifact that its manifest does not list."""
_OF_RUNS = {STATE, PREVIOUS, CHECKPOINT, "metrics.jsonl", "report.json", "left-out.json"}
_FILES = {MANIFEST, archives.SIGNATURE, CHECKPOINT, PLAIN_EVAL, PROGRAM, *map(graph_file, GRAPHS)} | _OF_RUNS
_WRITTEN = {LOCK} | _FILES | {name + PARTIAL_SUFFIX for name in _FILES}
"""Every name that export and training give to a file."""
_AT_CWD, _EXCHANGE, _SWAP = -100, 2, 2  # of Linux' renameat2 and macOS' renamex_np


def check_target(target: str | Path, force: bool = False) -> None:
    """Raise EdgeBcsError, with one sentence, unless an export may take the place of what is at ``target``.

    Args:
        target: nothing, an empty folder, an artifact and nothing else, or an archive of one (NAME.tar).
        force: a saved run, too, and an artifact whose files were changed; never files of others.
    """
    target = Path(target)
    with _telling(target):
        if target.suffix == archives.SUFFIX:
            _check_archive(target)
        else:
            place = Path(os.path.realpath(target))
            _check_folder(target, place, force)
            if force and _is_run(place):
                FolderLock(target).release()  # refused while somebody trains into it


def _check_archive(target: Path) -> None:
    if target.is_dir():
        raise EdgeBcsError(f"{target} is a folder, not an archive; choose another name.")
    if len(os.fsencode(target.stem)) > _LONGEST_NAME:
        raise EdgeBcsError(f"{target} has too long a name for an archive; choose another name.")
    if os.path.exists(target):
        try:
            Artifact.read(target)
        except EdgeBcsError as error:
            raise EdgeBcsError(f"{target} exists and is not replaced: {error}") from None


def _check_folder(target: Path, place: Path, force: bool) -> None:
    """As `check_target`, of the folder that lies at ``place``, whether or not it still does at ``target``."""
    other = "choose another folder."
    here = Path.cwd()
    if place == here or place in here.parents:
        raise EdgeBcsError(
            f"{target} is the current folder or one around it, which cannot be replaced; name a folder in it."
        )
    if not os.path.lexists(place):
        return
    if not place.is_dir():
        raise EdgeBcsError(f"{target} exists and is not an artifact but a file; {other}")
    if os.path.ismount(place):
        raise EdgeBcsError(f"a disk is mounted at {target}, which cannot be replaced; name a folder in it.")
    entries = sorted(entry.name for entry in place.iterdir() if entry.name != LOCK)
    if not entries:
        return
    if MANIFEST not in entries:
        raise EdgeBcsError(f"{target} exists and is not an artifact (it holds {entries[0]}); {other}")
    listed = _listed_files(target, place)
    run = STATE not in listed
    own = _OF_ARTIFACTS | listed.keys()
    if run:
        own |= _OF_RUNS | {name + PARTIAL_SUFFIX for name in _FILES}
    for name in entries:
        file = place / name
        if name not in own or file.is_symlink() or not file.is_file():
            raise EdgeBcsError(
                f"{target} holds {name}, which is not of edge-bcs, and the whole folder would be replaced; "
                f"move it elsewhere or {other}"
            )
    if force:
        return
    if run:
        raise EdgeBcsError(f"{target} holds a trained run; --force replaces it by the artifact, or {other}")
    for name, entry in listed.items():
        file = place / name
        if file.exists() and (file.stat().st_size, sha256_of(file)) != (entry["bytes"], entry["sha256"]):
            raise EdgeBcsError(
                f"{target} is an artifact whose {name} was changed; --force replaces it all the same, or "
                f"{other}"
            )


def _listed_files(target: Path, place: Path) -> dict[str, Any]:
    """The ``files`` of the manifest of an artifact or a run; EdgeBcsError if it is of anything else."""
    wrong = f"{target} exists and is not an artifact: its {MANIFEST}"
    try:
        manifest = parse_object(read_small(place / MANIFEST, archives.LARGEST_MANIFEST))
    except ValueError:
        raise EdgeBcsError(f"{wrong} is not that of one; choose another folder.") from None
    if manifest.get("format") != FORMAT:
        raise EdgeBcsError(f"{wrong} has not the format {FORMAT}; choose another folder.")
    if manifest.get("version") not in VERSIONS:
        shown = repr(manifest.get("version"))[:20]
        raise EdgeBcsError(f"{wrong} has the unknown version {shown}; choose another folder.")
    files = manifest.get("files")
    if (
        not isinstance(files, dict)
        or not all(
            isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for entry in files.values()
        )
        or not {graph_file(graph) for graph in GRAPHS} <= files.keys() <= _WRITTEN
    ):
        raise EdgeBcsError(f"{wrong} does not list an artifact's files; choose another folder.")
    return files


@contextlib.contextmanager
def publishing(target: str | Path, force: bool = False) -> Iterator[Path]:
    """Yield an empty folder; when the block ends well it takes the place of ``target`` (or, packed, does if
    that is a NAME.tar), else nothing has changed.

    What an export that was killed left beside ``target`` is removed first.

    Raises:
        EdgeBcsError: as `check_target`, asked again at the end; or the disk is full, read-only, …
    """
    target = Path(target)
    place = Path(os.path.realpath(target))
    with _telling(target):
        with contextlib.suppress(OSError):
            _sweep(place)
        with _scratch(place) as scratch:
            folder = scratch / place.name
            folder.mkdir(parents=True)
            yield folder
            check_target(target, force)
            if target.suffix == archives.SUFFIX:
                packed = scratch / f"packed{archives.SUFFIX}"
                with replacing(packed) as stream:
                    archives.pack(folder, stream, target.stem)
                os.replace(packed, place)
                sync_folder(place.parent)
            else:
                _sync(folder)
                with FolderLock(target) if _is_run(place) else contextlib.nullcontext():
                    _put(folder, target, place, scratch / REPLACED, force)


@contextlib.contextmanager
def _telling(target: Path) -> Iterator[None]:
    """Make one sentence of what the system refuses."""
    try:
        yield
    except OSError as error:
        kept = "; what is there is kept" if os.path.lexists(target) else ""
        raise EdgeBcsError(f"{target} cannot be exported to: {cause_of(error)}{kept}.") from None


@contextlib.contextmanager
def _scratch(place: Path) -> Iterator[Path]:
    """A new folder beside ``place``, locked while it is used, and removed."""
    scratch = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
    with FolderLock(scratch, again=False):
        try:
            yield scratch
        finally:
            _empty(scratch, place)
    _remove_empty(scratch)


def _empty(scratch: Path, place: Path) -> None:
    """Remove everything from a scratch folder but its lock; first move back what was moved out of the way of
    an export that did not come."""
    with contextlib.suppress(OSError):
        if (scratch / REPLACED).exists() and not os.path.lexists(place):
            os.rename(scratch / REPLACED, place)
        for entry in scratch.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name != LOCK:
                entry.unlink()


def _remove_empty(scratch: Path) -> bool:
    """Remove a folder if it is empty; True if it was."""
    try:
        scratch.rmdir()
    except OSError:
        return False
    return True


def _sweep(place: Path) -> None:
    """Remove the scratch folders of exports to ``place`` that were killed.

    They are known by name, by the lock file, which nobody holds, and by holding nothing but what export
    writes or has replaced. Where the system could not exchange two folders, one may hold what was moved out
    of the way; it is moved back if nothing is in its place.
    """
    pattern = re.compile(re.escape(f".{place.name}.") + "[0-9a-f]{8}")
    for scratch in list(place.parent.iterdir()):
        if not pattern.fullmatch(scratch.name) or scratch.is_symlink() or not scratch.is_dir():
            continue
        if _remove_empty(scratch) or not _is_scratch(scratch, place.name):
            continue  # an empty one may be just being made, and is then made again
        try:
            lock = FolderLock(scratch, again=False)
        except EdgeBcsError:
            continue  # its export is under way
        with lock:
            _empty(scratch, place)
        _remove_empty(scratch)


def _is_scratch(folder: Path, name: str) -> bool:
    if not (folder / LOCK).is_file():
        return False
    for entry in folder.iterdir():
        packed = entry.name.removesuffix(PARTIAL_SUFFIX) == f"packed{archives.SUFFIX}"
        if entry.name == LOCK or (packed and entry.is_file()):
            continue
        if entry.name not in (name, REPLACED) or entry.is_symlink() or not entry.is_dir():
            return False
        if not all(file.name in _WRITTEN and file.is_file() for file in entry.iterdir()):
            return False
    return True


def _is_run(place: Path) -> bool:
    return (place / MANIFEST).is_file() and STATE not in _listed_files(place, place)


def _put(folder: Path, target: Path, place: Path, aside: Path, force: bool) -> None:
    """Put ``folder`` in the place of what is at ``place``, by renaming; all lies on one file system."""
    old: Path | None = None
    if not os.path.lexists(place):
        os.rename(folder, place)
    elif exchange(folder, place):
        old = folder
    else:
        old = aside
        os.rename(place, aside)
        try:
            os.rename(folder, place)
        except BaseException:
            os.rename(aside, place)
            raise
    try:
        if old is not None:
            _check_folder(target, old, force)  # a file may have come into it a moment ago
        sync_folder(place.parent)
    except BaseException:
        if old != folder:
            os.rename(place, folder)
        if old == aside:
            os.rename(aside, place)
        elif old == folder:
            exchange(folder, place)
        raise


def exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one call of the system; False where system or file system have none, or refuse
    it: what cannot be done in two calls either, those will say."""
    try:
        library = ctypes.CDLL(None)
        names = os.fsencode(one), os.fsencode(other)
        if sys.platform == "darwin":
            failed = library.renamex_np(*names, ctypes.c_uint(_SWAP))
        else:
            failed = library.renameat2(_AT_CWD, names[0], _AT_CWD, names[1], ctypes.c_uint(_EXCHANGE))
    except (OSError, AttributeError, TypeError):  # another system, or an old C library
        return False
    return not failed


def _sync(folder: Path) -> None:
    """Bring the content of a folder's files onto the medium."""
    for file in folder.iterdir():
        with file.open("r+b") as stream:
            os.fsync(stream.fileno())
    sync_folder(folder)
