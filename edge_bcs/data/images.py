"""Image files sorted into class folders, on disk or in a plain tar, decoded when they are read."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_bcs.data.dataset import Array, Dataset, Shape, held_out
from edge_bcs.errors import EdgeBcsError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".gif", ".tif", ".tiff")
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "val", "valid", "validation")
_LARGEST_FILE = 64 << 20
_LARGEST_PIXELS = 64 << 20
_LARGEST_HEADER = 1 << 20
# Pillow knows many more by their content, whatever their names, and gives some (PostScript) to programs.
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "GIF", "TIFF")


@dataclass(frozen=True)
class Entry:
    """One image file: where it belongs, and where its bytes are (``offset`` −1: a file of its own)."""

    split: str
    class_name: str
    name: str
    offset: int = -1
    size: int = 0


def entry_of(name: str, offset: int = -1, size: int = 0) -> Entry | None:
    """Return the entry of an image's path (…/[split/]class/file.jpg), None if it is no image in a class
    folder."""
    parts = name.replace("\\", "/").split("/")
    if len(parts) < 2 or parts[-1].startswith(".") or not parts[-1].lower().endswith(SUFFIXES):
        return None
    above = parts[-3].lower() if len(parts) > 2 else ""
    split = "train" if above in TRAIN_NAMES else "test" if above in TEST_NAMES else ""
    return Entry(split, parts[-2], name, offset, size)


def decode(data: bytes, shape: Shape, source: str) -> Array:
    """Return the pixels u8 [C, H, W] of an encoded image, resized to ``shape``.

    Raises EdgeBcsError if Pillow is missing, or the image is damaged, truncated or declares more than 64 Mi
    pixels.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise EdgeBcsError("reading image files needs Pillow: run `pip install pillow`.") from None
    try:
        with _quietly(), Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > _LARGEST_PIXELS:
                raise EdgeBcsError(
                    f"{source} declares {image.width}×{image.height} pixels, which is refused."
                )
            converted: Any = image.convert("L" if shape[0] == 1 else "RGB")
            if converted.size != (shape[2], shape[1]):
                converted = converted.resize((shape[2], shape[1]), Image.Resampling.BILINEAR)
            pixels = np.asarray(converted, np.uint8)
    except UnidentifiedImageError:
        raise EdgeBcsError(f"{source} is not an image that Pillow can read.") from None
    except Image.DecompressionBombError:
        raise EdgeBcsError(f"{source} declares far too many pixels, which is refused.") from None
    except EdgeBcsError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds for damaged files
        raise EdgeBcsError(f"{source} is damaged or truncated ({reason(error)}).") from None
    return pixels[None] if shape[0] == 1 else pixels.transpose(2, 0, 1)


def reason(error: Exception) -> str:
    """What another library says of a fault, in one line that is not long."""
    return " ".join(str(error).split())[:120] or type(error).__name__


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without Pillow's warnings about what is damaged, of which all that matters ends in an exception."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def check_channels(shape: Shape) -> None:
    """Raise EdgeBcsError unless images of ``shape`` have 1 or 3 channels."""
    if shape[0] not in (1, 3):
        raise EdgeBcsError(f"image files have 1 or 3 channels; the network takes {shape[0]}.")


def folder_entries(folder: Path) -> Iterator[Entry]:
    """Yield the images of ``folder``/[train|test/]class/, refusing class folders without any image."""
    split_folders = [
        path for path in _folders(folder, folder) if path.name.lower() in TRAIN_NAMES + TEST_NAMES
    ]
    for parent in split_folders or [folder]:
        for class_folder in _folders(parent, folder):
            found = False
            with os.scandir(class_folder) as listing:
                files = sorted(listing, key=lambda file: file.name)
            for file in files:
                entry = entry_of(f"{parent.name}/{class_folder.name}/{file.name}")
                if entry is not None:
                    found = True
                    _check_link(file, folder)
                    if not file.is_file():
                        raise EdgeBcsError(f"{file.path} is not a file, which is refused among images.")
                    yield Entry(entry.split if split_folders else "", class_folder.name, file.path)
            if not found:
                raise EdgeBcsError(
                    f"the class folder {class_folder} holds no image ({', '.join(SUFFIXES[:3])}, …)."
                )


def _folders(parent: Path, root: Path) -> list[Path]:
    found = sorted(path for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))
    for path in found:
        _check_link(path, root)
    return found


def _check_link(path: Path | os.DirEntry[str], root: Path) -> None:
    """Refuse a link that leads out of the data's folder: a copy of that folder from elsewhere may name any
    file of this machine."""
    if path.is_symlink() and not Path(path).resolve().is_relative_to(root.resolve()):
        raise EdgeBcsError(
            f"{os.fspath(path)} is a link out of {root}, which is refused: copy what it names into it."
        )


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
    try:
        with tarfile.open(file, "r:", tarinfo=TarHeader) as archive:
            for member in archive:
                entry = entry_of(member.name, member.offset_data, member.size) if member.isreg() else None
                if entry is not None:
                    yield Entry(split or entry.split, entry.class_name, entry.name, entry.offset, entry.size)
    except EdgeBcsError:
        raise
    except Exception as error:  # beside its own kinds, tarfile lets through those of what it calls
        raise EdgeBcsError(f"{file} is not a complete tar archive ({reason(error)}).") from None


class ImageFiles(Dataset):
    """Images of one split among ``entries``; ``archive`` is the tar that holds their bytes, if any.

    Classes are all class folders in alphabetical order. Where no entry names a split, a tenth is held out.
    """

    named = True

    def __init__(
        self, entries: Iterable[tuple[Path | None, Entry]], split: str, shape: Shape, source: str
    ) -> None:
        check_channels(shape)
        found = sorted(entries, key=lambda item: (item[1].class_name, item[1].name))
        if not found:
            raise EdgeBcsError(f"{source} holds no images in class folders (expected …/class/image.jpg).")
        self.classes = tuple(sorted({entry.class_name for _, entry in found}))
        number = {name: label for label, name in enumerate(self.classes)}
        labels = np.array([number[entry.class_name] for _, entry in found], np.int64)
        if any(entry.split for _, entry in found):
            chosen = np.array([(entry.split or "train") == split for _, entry in found])
        else:
            chosen = held_out(labels) == (split == "test")
        self.shape = shape
        self.labels = labels[chosen]
        self._files = [item for item, wanted in zip(found, chosen, strict=True) if wanted]
        if not self._files:
            raise EdgeBcsError(f"{source} holds no {split} images.")

    def images(self, positions: Array) -> Array:
        """Decode the images at ``positions``."""
        result = np.empty((len(positions), *self.shape), np.float32)
        for number, position in enumerate(positions):
            archive, entry = self._files[position]
            pixels = decode(_bytes_of(archive, entry), self.shape, _source(archive, entry))
            np.divide(pixels, np.float32(255), out=result[number])
        return result


def _source(archive: Path | None, entry: Entry) -> str:
    return f"the image {entry.name}" + (f" in {archive}" if archive else "")


def _bytes_of(archive: Path | None, entry: Entry) -> bytes:
    try:
        file = archive or Path(entry.name)
        size = entry.size if archive else file.stat().st_size
        if size > _LARGEST_FILE:
            raise EdgeBcsError(f"{_source(archive, entry)} is larger than 64 MiB, which is refused.")
        with file.open("rb") as stream:
            stream.seek(max(entry.offset, 0))
            return stream.read(size)
    except OSError as error:
        raise EdgeBcsError(f"{_source(archive, entry)} cannot be read: {error.strerror}.") from None
