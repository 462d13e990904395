"""Which image files there are, sorted into class folders: on disk, or in a plain tar, where their bytes lie.

Nothing is decoded here, and nothing is unpacked.
"""

from __future__ import annotations

import itertools
import os
import posixpath
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.text import shown
from edge_bcs.data.decoding import reason
from edge_bcs.data.faults import require_utf8

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".gif", ".tif", ".tiff")
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "val", "valid", "validation")
_LARGEST_HEADER = 1 << 20


@dataclass(frozen=True)
class Entry:
    """One image file: where it belongs, its name in its folder or tar, and where its bytes are.

    Attributes:
        offset: in the tar; −1: a file of its own. size: in the tar.
        why: a sentence, if it can be seen already that it cannot be used.
    """

    split: str
    class_name: str
    name: str
    offset: int = -1
    size: int = 0
    why: str = ""


def entry_of(name: str, offset: int = -1, size: int = 0, why: str = "", *, in_tar: bool) -> Entry | None:
    """Return the entry of an image's path (…/[split/]class/file.jpg), None if it is no image in a class
    folder. What is hidden (.name) is none, nor is a class folder that is. In a tar, which may come from
    Windows, a backslash separates, too; on disk it is part of a name.
    """
    parts = (name.replace("\\", "/") if in_tar else name).split("/")
    if len(parts) < 2 or not parts[-1].lower().endswith(SUFFIXES):
        return None
    if any(part.startswith(".") for part in parts[-2:]):
        return None
    above = parts[-3].lower() if len(parts) > 2 else ""
    split = "train" if above in TRAIN_NAMES else "test" if above in TEST_NAMES else ""
    return Entry(split, require_utf8(parts[-2]), name, offset, size, why)


class ClassFolders:
    """The folders of a tar that hold images: each is a class, so all must lie side by side, as in a folder.

    Args:
        source: the tar, for the sentence.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._seen: set[str] = set()
        self._first: tuple[str, ...] | None = None

    def add(self, image: str) -> None:
        """Note the folder of an image; EdgeBcsError unless it lies beside those before it.

        A folder train or test between the class folders and the one that they lie in does not count.
        """
        folder = posixpath.normpath(image.replace("\\", "/").rpartition("/")[0])
        if folder in self._seen:
            return
        self._seen.add(folder)
        parts = tuple(folder.split("/"))
        if self._first is None:
            self._first = parts
        if _around(self._first) != _around(parts):
            inner, other = sorted([self._first, parts], key=lambda one: len(_around(one)), reverse=True)
            shared = zip(inner[:-1], other[:-1], strict=False)
            outer = 1 + sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], shared))
            while outer < len(inner) - 1 and _is_split(inner[outer - 1]):
                outer += 1
            raise _nested("/".join(inner), "/".join(inner[:outer]), self._source)


def _around(class_folder: tuple[str, ...]) -> tuple[str, ...]:
    """The folder in which class folders lie, without that of a split."""
    above = class_folder[:-1]
    return above[:-1] if above and _is_split(above[-1]) else above


def _is_split(folder: str) -> bool:
    return folder.lower() in TRAIN_NAMES + TEST_NAMES


def _nested(inner: str, outer: str, source: str) -> EdgeBcsError:
    return EdgeBcsError(
        f"{shown(source)} has images in {shown(inner)}, a folder inside the class folder {shown(outer)}: "
        "move the images of one class into one folder."
    )


def folder_entries(folder: Path) -> Iterator[Entry]:
    """Yield the images of ``folder``/[train|test/]class/, refusing class folders without any image, or with
    images in folders of their own, which would be left out without a word.

    A class folder that cannot be read, or that is a link out of ``folder``, to nothing or in a circle, is
    refused, for without it the labels of the others would change; a file like that is an image that cannot
    be used. What is neither a folder nor an image is passed over.
    """
    root = folder.resolve()
    parents = around_classes(folder)
    for parent in parents:
        for class_folder in _folders(parent, root):
            found, inner = False, ""
            for file in _listed(class_folder):
                name = f"{class_folder.name}/{file.name}"
                entry = entry_of(
                    name if parent == folder else f"{parent.name}/{name}",
                    why=why_unusable(file, root),
                    in_tar=False,
                )
                if entry is not None:
                    found = True
                    yield entry
                else:
                    inner = inner or _images_within(file)
            if inner:
                raise _nested(inner, str(class_folder), str(folder))
            if not found:
                raise EdgeBcsError(
                    f"the class folder {shown(str(class_folder))} holds no image "
                    f"({', '.join(SUFFIXES[:3])}, …)."
                )


def around_classes(folder: Path) -> list[Path]:
    """The folders in which the class folders of ``folder`` lie: train, test, …, or itself without these."""
    return [path for path in _folders(folder, folder.resolve()) if _is_split(path.name)] or [folder]


def _images_within(item: os.DirEntry[str]) -> str:
    """The first folder with images that `item`, an entry of a class folder, is or holds; "" if none."""
    left = [item]
    while left:
        entry = left.pop()
        if entry.name.startswith(".") or entry.is_symlink() or not entry.is_dir():
            continue
        inside = _listed(Path(entry.path))
        if any(entry_of(f"{entry.name}/{file.name}", in_tar=False) and file.is_file() for file in inside):
            return entry.path
        left += inside
    return ""


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as listing:
            return sorted(listing, key=lambda file: file.name)
    except OSError as error:
        raise EdgeBcsError(f"the folder {shown(str(folder))} cannot be read: {error.strerror}.") from None


def _folders(parent: Path, root: Path) -> list[Path]:
    found = []
    for item in _listed(parent):
        if item.name.startswith("."):
            continue
        if item.is_symlink():
            why = _why_no_link(item, root)
            # A link to nothing, or in a circle, may have been to a class folder.
            if why and (os.path.isdir(item.path) or not os.path.exists(item.path)):
                raise EdgeBcsError(why)
        if os.path.isdir(item.path):
            found.append(Path(item.path))
    return found


def why_unusable(file: os.DirEntry[str] | Path, root: Path) -> str:
    """Return why a file below ``root``, a resolved folder, cannot be an image, or ""."""
    if file.is_symlink() and (why := _why_no_link(file, root)):
        return why
    if not file.is_file():
        return f"{shown(os.fspath(file))} is not a file, which is refused among images."
    return ""


def _why_no_link(link: os.DirEntry[str] | Path, root: Path) -> str:
    """Why a link is not followed, or "": one that leads out of the data's folder may, in a copy of that
    folder from elsewhere, name any file of this machine."""
    try:
        target = Path(link).resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: a circle, before Python 3.13
        return f"{shown(os.fspath(link))} is a link to nothing, or in a circle: remove it."
    if not target.is_relative_to(root):
        return (
            f"{shown(os.fspath(link))} is a link out of {shown(str(root))}, which is refused: copy what it "
            "names into it."
        )
    return ""


def open_regular(file: Path) -> IO[bytes]:
    """Open a file to read, never waiting for a pipe or a device that took its place. Raises OSError."""
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "it is not a file")
    return os.fdopen(descriptor, "rb")


class TarHeader(tarfile.TarInfo):
    """A header of a tar, refused where it declares an extended header of more than 1 MiB: Python reads those
    into memory whole."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        extended = (
            tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
            tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
        )  # fmt: skip
        if self.type in extended and self.size > _LARGEST_HEADER:
            raise EdgeBcsError("a tar declares an extended header of more than 1 MiB, which is refused.")
        member: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]
        return member


def archive_entries(file: Path, split: str = "") -> Iterator[Entry]:
    """Yield the images of a tar that is not compressed, with the places of their bytes; nothing is
    unpacked."""
    folders = ClassFolders(str(file))
    try:
        with tarfile.open(file, "r:", tarinfo=TarHeader) as archive:
            for member in archive:
                if not member.isreg():
                    continue
                entry = entry_of(member.name, member.offset_data, member.size, in_tar=True)
                if entry is not None:
                    folders.add(entry.name)
                    yield Entry(split or entry.split, entry.class_name, entry.name, entry.offset, entry.size)
    except EdgeBcsError:
        raise
    except Exception as error:  # beside its own kinds, tarfile lets through those of what it calls
        raise EdgeBcsError(f"{file} is not a complete tar archive ({reason(error)}).") from None
