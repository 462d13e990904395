"""Photographs without labels: the files that a user names, and those in folders, read one at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path

import numpy as np

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.resizing import SQUASH, Resize
from edge_bcs.core.text import shown
from edge_bcs.data.dataset import Array, Shape
from edge_bcs.data.images import check_channels, decode_file
from edge_bcs.data.listing import SUFFIXES, Entry


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
