"""A file of decoded images that is read one image at a time, for sources that cannot be: gzip, pickles,
.mat, .npz.

The source is decoded once, image by image, into a file of raw pixels in the cache folder (the environment
variable EDGE_BCS_CACHE, else $XDG_CACHE_HOME/edge-bcs, else ~/.cache/edge-bcs; a temporary folder where none
of these can be written). The size is bounded, and the file is used again as long as the source keeps its
size and time.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_bcs.data.dataset import MOST_CLASSES, Array, Dataset, Shape, held_out
from edge_bcs.errors import EdgeBcsError

LARGEST_STORE = 16 << 30
_KEPT_FREE = 64 << 20
_FORMAT = 2


@dataclass(frozen=True)
class Row:
    """One decoded image: pixels u8 or f32 [C, H, W]; ``split`` "train", "test" or "" (unknown); name for
    sorting."""

    split: str
    label: int | str
    name: str
    pixels: Array


def cache_folder() -> Path:
    """Return a folder that can be written, creating it if need be."""
    named = os.environ.get("EDGE_BCS_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for folder in [Path(named)] if named else [base / "edge-bcs"]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
        except OSError:
            continue
    folder = Path(tempfile.mkdtemp(prefix="edge-bcs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _key(sources: list[Path], shape: Shape) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {shape}".encode())
    for source in sources:
        status = source.stat()
        digest.update(f"|{source.resolve()} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:24]


class Stored(Dataset):
    """One split of a source, read from its decoded copy.

    Args:
        sources: the files that the copy is made from. rows: called to decode them, if there is no copy yet.
        split: "train", "test", or "" for all that is not meant for testing, nothing held out.
        classes: names in label order, or None where rows carry class names, which then are sorted.
    """

    def __init__(
        self,
        sources: list[Path],
        rows: Callable[[], Iterable[Row]],
        split: str,
        shape: Shape,
        classes: Callable[[], tuple[str, ...]] | None = None,
    ) -> None:
        source = " and ".join(str(path) for path in sources[:2])
        folder, key = cache_folder(), _key(sources, shape)
        self._file, index = folder / f"{key}.pixels", folder / f"{key}.npz"
        if not _complete(self._file, index):
            _decode(self._file, index, rows(), shape, classes() if classes else None, source)
        with np.load(index, allow_pickle=False) as stored:
            labels, splits = stored["labels"], stored["splits"]
            self.classes = tuple(str(name) for name in stored["classes"])
            self._dtype = np.dtype(str(stored["dtype"]))
        known = splits != ""
        if not split:
            chosen = splits != "test"
        elif known.any():
            chosen = np.where(known, splits, "train") == split
        else:
            chosen = held_out(labels) == (split == "test")
        self.shape = shape
        self._rows = np.flatnonzero(chosen)
        self.labels = labels[self._rows]
        if not len(self._rows):
            raise EdgeBcsError(f"{source} holds no {split} images.")

    def images(self, positions: Array) -> Array:
        """Read the images at ``positions``, one by one."""
        size = int(np.prod(self.shape)) * self._dtype.itemsize
        result = np.empty((len(positions), *self.shape), np.float32)
        try:
            with self._file.open("rb") as stream:
                for number, position in enumerate(positions):
                    stream.seek(int(self._rows[position]) * size)
                    pixels = np.frombuffer(stream.read(size), self._dtype).reshape(self.shape)
                    if self._dtype == np.uint8:
                        np.divide(pixels, np.float32(255), out=result[number])
                    else:
                        result[number] = pixels
        except (OSError, ValueError) as error:
            raise EdgeBcsError(
                f"the decoded copy {self._file} cannot be read ({error}); delete it."
            ) from None
        return result


def _complete(file: Path, index: Path) -> bool:
    try:
        with np.load(index, allow_pickle=False) as stored:
            return bool(file.stat().st_size == int(stored["bytes"]))
    except (OSError, ValueError, KeyError, EOFError):
        return False


def _numbered(
    labels: list[int | str], classes: tuple[str, ...] | None, source: str
) -> tuple[tuple[str, ...], list[int]]:
    """Return (class names, label numbers) of labels that are all names or all numbers."""
    names = sorted({label for label in labels if isinstance(label, str)})
    position = {name: number for number, name in enumerate(names)}
    numbers = [position[label] if isinstance(label, str) else label for label in labels]
    if classes is None:
        classes = tuple(names) or tuple(str(label) for label in range(min(max(numbers), MOST_CLASSES) + 1))
    if min(numbers) < 0 or max(numbers) >= len(classes):
        wrong = min(numbers) if min(numbers) < 0 else max(numbers)
        raise EdgeBcsError(f"{source}: label {wrong} is not one of its {len(classes)} classes.")
    return classes, numbers


def _decode(
    file: Path, index: Path, rows: Iterable[Row], shape: Shape, classes: tuple[str, ...] | None, source: str
) -> None:
    """Write the pixels, then the index: the index is there only if all pixels are."""
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    limit = min(LARGEST_STORE, shutil.disk_usage(file.parent).free - _KEPT_FREE)
    names: list[tuple[int | str, str, str]] = []
    dtype, written = None, 0
    try:
        with partial.open("wb") as stream:
            for row in rows:
                dtype = dtype or row.pixels.dtype
                if row.pixels.shape != shape or row.pixels.dtype != dtype:
                    raise EdgeBcsError(
                        f"{source}: {row.name} is {row.pixels.dtype}{list(row.pixels.shape)}, and {dtype}"
                        f"{list(shape)} was expected."
                    )
                written += row.pixels.nbytes
                if written > limit:
                    raise EdgeBcsError(
                        f"{source} needs more than the {limit >> 20} MiB that its decoded copy may take in "
                        f"{file.parent}; free some space or set EDGE_BCS_CACHE to a folder on a larger disk."
                    )
                stream.write(row.pixels.tobytes())
                names.append((row.label, row.split, row.name))
        if dtype is None:
            raise EdgeBcsError(f"{source} holds no images.")
        classes, labels = _numbered([label for label, _, _ in names], classes, source)
        order = partial.with_suffix(".index")
        with order.open("wb") as stream:
            np.savez(
                stream,
                labels=np.array(labels, np.int64),
                splits=np.array([split for _, split, _ in names]),
                classes=np.array(classes),
                dtype=np.array(str(dtype)),
                bytes=np.array(written),
            )
        os.replace(partial, file)
        os.replace(order, index)
    except OSError as error:
        raise EdgeBcsError(
            f"{source} cannot be decoded into {file.parent}: {error.strerror or error}."
        ) from None
    finally:
        partial.unlink(missing_ok=True)
