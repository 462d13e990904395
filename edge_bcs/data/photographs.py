"""Photographs without labels: the files that a user names, and those in folders, read one at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path

import numpy as np

from edge_bcs.core.digest import sha256
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.resizing import SQUASH, Resize
from edge_bcs.core.text import shown
from edge_bcs.data.dataset import Array, Shape
from edge_bcs.data.faults import Handling
from edge_bcs.data.images import ImageFiles, check_channels, decode_file
from edge_bcs.data.listing import SUFFIXES, Entry, open_regular, why_unusable

_AT_A_TIME = 1 << 20  # bytes of a file that is compared


def image_files(paths: Iterable[str | PathLike[str]]) -> Iterator[Path]:
    """Yield the files among ``paths`` as they are named, and in place of a folder the image files in it and
    in its folders, by name. Hidden files and folders, and links to folders, are passed over in a folder.

    Raises:
        EdgeBcsError: a folder that cannot be read, or without any image; the paths before it are yielded.
    """
    for path in map(Path, paths):
        if path.is_dir():
            yield from _inside(path)
        else:
            yield path


def _inside(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        where = shown(str(error.filename or folder))
        raise EdgeBcsError(f"the folder {where} cannot be read: {error.strerror or error}.") from None

    found = False
    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                found = True
                yield Path(parent, name)
    if not found:
        raise EdgeBcsError(f"the folder {shown(str(folder))} holds no image ({', '.join(SUFFIXES[:3])}, …).")


def read_image(file: Path, shape: Shape, resize: Resize = SQUASH) -> Array:
    """Return an image f32 [C, H, W] in [0, 1], read as a data set of image files reads its own.

    Args:
        file: of any kind that is read, whatever its name. shape: (C, H, W); C is 1 (grey) or 3.
        resize: how it is brought to ``shape``.

    Raises:
        BadImageError: it cannot be used (see `edge_bcs.data.decoding`).
        EdgeBcsError: another number of channels, or Pillow is missing.
    """
    check_channels(shape)
    pixels = decode_file(file.parent, Entry("", "", file.name), shape, resize)
    return pixels.astype(np.float32) / np.float32(255)


class Photographs(ImageFiles):
    """The photographs in a folder and in its folders, of any depth, as a data set without labels: all have
    the label 0, of a class without a name.

    Args:
        folder: hidden files and folders in it, and links to folders, are passed over.
        shape, resize: of the images. handling: of files that cannot be used.
    """

    def __init__(
        self, folder: Path, shape: Shape, handling: Handling | None = None, resize: Resize = SQUASH
    ) -> None:
        root = folder.resolve()
        entries = (
            (folder, self.entry_of(file.relative_to(folder).as_posix(), why_unusable(file, root), False))
            for file in _inside(folder)
        )
        super().__init__(entries, "train", shape, shown(str(folder)), handling, resize)

    def entry_of(self, name: str, why: str, in_tar: bool) -> Entry:
        """Return the entry of a photograph, by its path in the folder."""
        return Entry("train", "", name, why=why)


def open_photographs(
    folder: str | PathLike[str], shape: Shape, handling: Handling | None = None, resize: Resize = SQUASH
) -> Photographs:
    """Open a folder of photographs without labels; see `Photographs`.

    Raises:
        EdgeBcsError: no folder, one that cannot be read or holds no image, or images that cannot be used.
    """
    path = Path(folder)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise EdgeBcsError(
            f"{shown(str(path))} {what}; unlabelled images are a folder of photographs, in folders of any "
            "depth."
        )
    return Photographs(path, shape, handling, resize)


def repeated(data: object, others: object) -> dict[int, str]:
    """Return which images of ``data`` are the same file, byte for byte, as one of ``others``, of whatever
    split: its place → the name of the other one. Only image files, in folders or a tar, are compared."""
    if not (isinstance(data, ImageFiles) and isinstance(others, ImageFiles)):
        return {}
    sizes = [_size(*item) for item in data.files]
    wanted = set(sizes)
    alike = [item for item in others.files_of_all_splits if _size(*item) in wanted]
    found = {_size(*item) for item in alike}
    names = {digest: entry.name for holder, entry in alike if (digest := _digest(holder, entry))}
    result = {}
    for place, (item, size) in enumerate(zip(data.files, sizes, strict=True)):
        twin = names.get(_digest(*item)) if size in found else None
        if twin is not None:
            result[place] = twin
    return result


def _size(holder: Path, entry: Entry) -> int:
    """Bytes of an image file; −1 if there is none."""
    if entry.offset >= 0:
        return entry.size
    try:
        return (holder / entry.name).stat().st_size
    except OSError:
        return -1


def _digest(holder: Path, entry: Entry) -> bytes:
    """The sha256 of an image file; empty if it cannot be read."""
    digest = sha256()
    try:
        with open_regular(holder if entry.offset >= 0 else holder / entry.name) as stream:
            stream.seek(max(entry.offset, 0))
            left = entry.size if entry.offset >= 0 else os.fstat(stream.fileno()).st_size
            while left > 0 and (part := stream.read(min(left, _AT_A_TIME))):
                digest.update(part)
                left -= len(part)
    except OSError:
        return b""
    return digest.digest()
