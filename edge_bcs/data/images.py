"""Image files sorted into class folders, on disk or in a plain tar, decoded when they are read."""

from __future__ import annotations

import io
import os
import tarfile
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
        with Image.open(io.BytesIO(data)) as image:
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
    except EdgeBcsError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds for damaged files
        raise EdgeBcsError(f"{source} is damaged or truncated ({error}).") from None
    return pixels[None] if shape[0] == 1 else pixels.transpose(2, 0, 1)


def check_channels(shape: Shape) -> None:
    """Raise EdgeBcsError unless images of ``shape`` have 1 or 3 channels."""
    if shape[0] not in (1, 3):
        raise EdgeBcsError(f"image files have 1 or 3 channels; the network takes {shape[0]}.")


def folder_entries(folder: Path) -> Iterator[Entry]:
    """Yield the images of ``folder``/[train|test/]class/, refusing class folders without any image."""
    split_folders = [path for path in _folders(folder) if path.name.lower() in TRAIN_NAMES + TEST_NAMES]
    for parent in split_folders or [folder]:
        for class_folder in _folders(parent):
            found = False
            for name in sorted(os.listdir(class_folder)):
                entry = entry_of(f"{parent.name}/{class_folder.name}/{name}")
                if entry is not None:
                    found = True
                    yield Entry(
                        entry.split if split_folders else "", class_folder.name, str(class_folder / name)
                    )
            if not found:
                raise EdgeBcsError(
                    f"the class folder {class_folder} holds no image ({', '.join(SUFFIXES[:3])}, …)."
                )


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))


def archive_entries(file: Path, split: str = "") -> Iterator[Entry]:
    """Yield the images of a tar that is not compressed, with the places of their bytes; nothing is
    unpacked."""
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                entry = entry_of(member.name, member.offset_data, member.size) if member.isreg() else None
                if entry is not None:
                    yield Entry(split or entry.split, entry.class_name, entry.name, entry.offset, entry.size)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise EdgeBcsError(f"{file} is not a complete tar archive ({error}).") from None


class ImageFiles(Dataset):
    """Images of one split among ``entries``; ``archive`` is the tar that holds their bytes, if any.

    Classes are all class folders in alphabetical order. Where no entry names a split, a tenth is held out.
    """

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
