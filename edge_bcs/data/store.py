"""A file of decoded images that is read one image at a time, for sources that cannot be: gzip, pickles,
.mat, .npz.

The source is decoded once, some images at a time, into one file in the cache folder (the environment variable
EDGE_BCS_CACHE, else $XDG_CACHE_HOME/edge-bcs, else ~/.cache/edge-bcs; a temporary folder where none of these
can be written). Its size is bounded, and it is used again as long as the source keeps its size and time.

The file holds the raw pixels, then an index (labels, splits, a checksum of every image, what was left out),
then the lengths of both and the index's checksum. It takes its place in one piece when all of it is on the
medium. Each image is compared with its checksum whenever it is read (some microseconds), so that nothing has
to be read whole at the start and nothing damaged is trained on: whatever is found wrong, the source is
decoded again, and the reading goes on with the same bits.
"""

from __future__ import annotations

import functools
import io
import json
import os
import shutil
import struct
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_bcs.core.digest import sha256
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import remove_abandoned, replacing, sync_folder
from edge_bcs.core.progress import Progress, say
from edge_bcs.core.resizing import SQUASH, Resize
from edge_bcs.core.scratch import ScratchFolder
from edge_bcs.core.text import shown
from edge_bcs.data.dataset import MOST_CLASSES, Array, Dataset, Shape, held_out
from edge_bcs.data.faults import Handling, LeftOut, require_utf8

LARGEST_STORE = 16 << 30
_KEPT_FREE = 64 << 20
_MOST_OF_NAMES = 64 << 20
_FORMAT = 6
_SPLITS = ("", "train", "test")
# Bytes of pixels, bytes of the index, CRC-32 of the index, what this is.
_END = struct.Struct("<QQI8s")
_MAGIC = b"edge-bcs"
_ARRAYS = ("labels", "splits", "good", "checks", "names", "ends")


@dataclass(frozen=True)
class Rows:
    """Some decoded images that follow one another.

    Attributes:
        split: "train", "test" or "" (unknown).
        labels: whole numbers [n], or the name of the class of all of them.
        pixels: u8 or f32 [n, C, H, W], contiguous.
        source: where they are from, for a sentence.
        name: of an image that comes alone, in the source; "" if it has none.
    """

    split: str
    labels: Array | str
    pixels: Array
    source: str
    name: str = ""


@dataclass(frozen=True)
class Unreadable:
    """An image of a class that cannot be used: its ``name`` in the source, and ``why``, a sentence."""

    split: str
    class_name: str
    name: str
    why: str


@dataclass(frozen=True)
class ClassNames:
    """The names of all classes in the order of their labels, where a source has them beside its images."""

    names: tuple[str, ...]


Decoded = Rows | Unreadable | ClassNames


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
    return _temporary().path


@functools.cache
def _temporary() -> ScratchFolder:
    return ScratchFolder("cache")


def cache_file(name: str) -> Path:
    """Return where the cache folder has the file of that name, after removing what was abandoned there.

    Raises EdgeBcsError if a folder lies in its place.
    """
    folder = cache_folder()
    remove_abandoned(folder)
    if (folder / name).is_dir():
        raise EdgeBcsError(
            f"{shown(str(folder / name))} is a folder, where edge-bcs keeps a file of its cache: remove it."
        )
    return folder / name


def _key(sources: list[Path], shape: Shape, resize: Resize) -> str:
    how = "" if resize == SQUASH else f" {resize.text}"
    digest = sha256(f"{_FORMAT} {shape}{how}".encode())
    for source in sources:
        status = source.stat()
        digest.update(f"|{source.resolve()} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:24]


class _DamagedError(Exception):
    """The decoded copy is not what was written."""


@dataclass(frozen=True)
class _Index:
    """What a decoded copy says of its images, N in all, of which those that are ``good`` have pixels.

    Attributes:
        labels: i64[N]. splits: u8[N], places in _SPLITS. good: bool[N]. checks: CRC-32 u32[sum(good)].
        classes: names in the order of the labels. named: whether they are those of class folders.
        dtype: of the pixels.
        left_out: of each image that is not good, in their order.
        names: bytes u8 of the names of the first images with pixels, one behind the other. ends: i64, where
            each of them ends; fewer than there are images where names are too long, or there are none.
    """

    labels: Array
    splits: Array
    good: Array
    checks: Array
    names: Array
    ends: Array
    classes: tuple[str, ...]
    named: bool
    dtype: np.dtype[Any]
    left_out: tuple[LeftOut, ...]

    def written(self) -> bytes:
        """Return the index as it is stored."""
        described = {
            "classes": self.classes,
            "dtype": self.dtype.str,
            "named": self.named,
            "left_out": [[image.name, image.why] for image in self.left_out],
        }
        buffer = io.BytesIO()
        np.savez(
            buffer,
            labels=self.labels,
            splits=self.splits,
            good=self.good,
            checks=self.checks,
            names=self.names,
            ends=self.ends,
            described=np.frombuffer(json.dumps(described).encode(), np.uint8),
        )
        return buffer.getvalue()

    @classmethod
    def read(cls, file: Path, shape: Shape) -> _Index:
        """Return the index of a decoded copy; _DamagedError or OSError unless it is whole."""
        with file.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - _END.size))
            end = stream.read()
            if len(end) != _END.size:
                raise _DamagedError("it is too short")
            pixels, length, check, magic = _END.unpack(end)
            if magic != _MAGIC or pixels + length + _END.size != size:
                raise _DamagedError("its end is missing")
            stream.seek(pixels)
            content = stream.read(length)
        if zlib.crc32(content) != check:
            raise _DamagedError("the checksum of its index differs")
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in _ARRAYS}
            described = json.loads(stored["described"].tobytes())
        index = cls(
            **arrays,
            classes=tuple(described["classes"]),
            named=described["named"],
            dtype=np.dtype(described["dtype"]),
            left_out=tuple(LeftOut(name, why) for name, why in described["left_out"]),
        )
        if pixels != len(index.checks) * int(np.prod(shape)) * index.dtype.itemsize:
            raise _DamagedError("its size is not that of its images")
        return index

    def name(self, row: int) -> str | None:
        """Return the name of the ``row``-th image with pixels, None if it has none."""
        if row >= len(self.ends):
            return None
        first = int(self.ends[row - 1]) if row else 0
        return self.names[first : int(self.ends[row])].tobytes().decode(errors="surrogateescape")

    def same_images(self, other: _Index) -> bool:
        """Whether ``other`` has the same images in the same order."""
        names = ("labels", "splits", "good", "checks")
        return (self.classes, self.dtype) == (other.classes, other.dtype) and all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in names
        )


class Stored(Dataset):
    """One split of a source, read from its decoded copy.

    Args:
        sources: the files that the copy is made from.
        rows: called to decode them, whenever there is no intact copy.
        split: "train", "test", or "" for all that is not meant for testing, nothing held out.
        classes: names in label order, or None where rows carry class names, which then are sorted, or come
            with the rows.
        handling: of images that cannot be used.
    """

    def __init__(
        self,
        sources: list[Path],
        rows: Callable[[], Iterable[Decoded]],
        split: str,
        shape: Shape,
        classes: Callable[[], tuple[str, ...]] | None = None,
        handling: Handling | None = None,
        resize: Resize = SQUASH,
    ) -> None:
        handling = handling or Handling()
        self._sources, self._decoder, self._class_names = sources, rows, classes
        self._source = " and ".join(shown(str(path)) for path in sources[:2])
        self._watch = handling.watch
        self.shape, self._resize = shape, resize
        self._key = _key(sources, shape, resize)
        self._file = cache_file(f"{self._key}.pixels")
        self._index = index = self._open()
        if not split:
            chosen = index.splits != _SPLITS.index("test")
        elif index.splits.any():
            # Where some images name a split, those that do not are for training.
            chosen = np.where(index.splits == 0, 1, index.splits) == _SPLITS.index(split)
        else:
            chosen = held_out(index.labels) == (split == "test")
        self.classes, self.named = index.classes, index.named
        self.left_out = self._left_out(chosen, handling)
        self._rows = (np.cumsum(index.good) - 1)[chosen & index.good]
        self.labels = index.labels[chosen & index.good]
        if not len(self._rows):
            raise EdgeBcsError(f"{self._source} holds no {split} images.")

    def name_of(self, position: int) -> str:
        """Return the image's path in its archive, or its number where it has none."""
        return self._index.name(int(self._rows[position])) or super().name_of(position)

    def images(self, positions: Array) -> Array:
        """Read the images at ``positions``, one by one, each compared with its checksum."""
        try:
            return self._read(positions)
        except (_DamagedError, OSError) as error:
            self._tell(error)
        index = self._decode()
        if not index.same_images(self._index):
            raise EdgeBcsError(
                f"{self._source} no longer gives the same images: it has changed, or its medium fails."
            )
        try:
            return self._read(positions)
        except (_DamagedError, OSError) as error:
            raise EdgeBcsError(
                f"the decoded copy {self._file} is damaged as soon as it is written ({error}): its medium "
                "fails; set EDGE_BCS_CACHE to a folder on another one."
            ) from None

    def _read(self, positions: Array) -> Array:
        size = int(np.prod(self.shape)) * self._index.dtype.itemsize
        result = np.empty((len(positions), *self.shape), np.float32)
        with self._file.open("rb") as stream:
            for number, position in enumerate(positions):
                row = int(self._rows[position])
                stream.seek(row * size)
                data = stream.read(size)
                if len(data) != size or zlib.crc32(data) != self._index.checks[row]:
                    raise _DamagedError(f"the checksum of image {row} differs")
                pixels = np.frombuffer(data, self._index.dtype).reshape(self.shape)
                if self._index.dtype == np.uint8:
                    np.divide(pixels, np.float32(255), out=result[number])
                else:
                    result[number] = pixels
        return result

    def _left_out(self, chosen: Array, handling: Handling) -> tuple[LeftOut, ...]:
        """The images of this split that are left out; where a training goes on, exactly those of before."""
        bad = np.flatnonzero(~self._index.good)
        found = [image for image, row in zip(self._index.left_out, bad, strict=True) if chosen[row]]
        missing = set(handling.known) - {image.name for image in self._index.left_out}
        if missing and handling.strict:
            raise EdgeBcsError(
                f"{shown(min(missing))} in {self._source} can be used now, and this training began without "
                "it: begin a new training."
            )
        return handling.settle(found, self._source)

    def _open(self) -> _Index:
        """The index of the decoded copy, which is made if there is none that is whole."""
        try:
            return _Index.read(self._file, self.shape)
        except FileNotFoundError:
            pass
        except (_DamagedError, OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            self._tell(error)
        return self._decode()

    def _tell(self, error: Exception) -> None:
        why = (isinstance(error, OSError) and error.strerror) or error
        say(f"The decoded copy {self._file} cannot be used ({why}); {self._source} is decoded again.")

    def _decode(self) -> _Index:
        try:
            if _key(self._sources, self.shape, self._resize) != self._key:
                raise EdgeBcsError(f"{self._source} has changed since it was opened: begin again.")
            classes = self._class_names() if self._class_names else None
            return decode(self._file, self._decoder(), self.shape, classes, self._source, self._watch)
        except OSError as error:
            raise EdgeBcsError(f"{self._source} cannot be read: {error.strerror or error}.") from None


class _Gathered:
    """Labels and splits of the images of a source as they come, 14 bytes for each, and names, of
    `_MOST_OF_NAMES` bytes at the most."""

    def __init__(self) -> None:
        self.labels, self.splits = array("q"), array("B")
        self.good, self.checks = array("B"), array("I" if array("I").itemsize == 4 else "L")
        self.left_out: list[LeftOut] = []
        self.names: dict[str, int] = {}
        self.of_labels: tuple[str, ...] | None = None
        self.numbered = False
        self.titles, self.ends = bytearray(), array("q")

    def add(self, rows: Rows | Unreadable) -> None:
        if isinstance(rows, Unreadable):
            label: Array | str = rows.class_name
            count = 1
            self.left_out.append(LeftOut(rows.name, rows.why))
        else:
            label, count = rows.labels, len(rows.pixels)
            images = rows.pixels.reshape(count, -1).view(np.uint8)
            self.checks.extend(zlib.crc32(image.data) for image in images)
            title = rows.name.encode(errors="surrogateescape")
            all_named = len(self.ends) == len(self.checks) - 1
            if title and all_named and len(self.titles) + len(title) <= _MOST_OF_NAMES:
                self.titles += title
                self.ends.append(len(self.titles))
        if isinstance(label, str):
            number = self.names.setdefault(require_utf8(label), len(self.names))
            self.labels.extend([number] * count)
        else:
            self.numbered = True
            self.labels.frombytes(np.ascontiguousarray(label, np.int64).tobytes())
        self.splits.frombytes(bytes([_SPLITS.index(rows.split)]) * count)
        self.good.frombytes(bytes([not isinstance(rows, Unreadable)]) * count)

    def index(self, classes: tuple[str, ...] | None, dtype: np.dtype[Any], source: str) -> _Index:
        classes = self.of_labels or classes
        labels = np.frombuffer(self.labels, np.int64)
        if self.names and self.numbered:
            raise EdgeBcsError(f"{source} holds class folders and numbered images: give one kind of data.")
        if self.names:
            names = sorted(self.names)
            place = np.empty(len(names), np.int64)
            place[[self.names[name] for name in names]] = np.arange(len(names))
            labels, classes = place[labels], tuple(names)
        low, high = int(labels.min()), int(labels.max())
        if classes is None:
            classes = tuple(str(label) for label in range(min(high, MOST_CLASSES) + 1))
        if low < 0 or high >= len(classes):
            wrong = low if low < 0 else high
            raise EdgeBcsError(f"{source}: label {wrong} is not one of its {len(classes)} classes.")
        return _Index(
            labels=labels,
            splits=np.frombuffer(self.splits, np.uint8),
            good=np.frombuffer(self.good, np.uint8).astype(bool),
            checks=np.frombuffer(self.checks, np.uint32),
            names=np.frombuffer(self.titles, np.uint8),
            ends=np.frombuffer(self.ends, np.int64),
            classes=classes,
            named=bool(self.names),
            dtype=dtype,
            left_out=tuple(self.left_out),
        )


def decode(
    file: Path,
    decoded: Iterable[Decoded],
    shape: Shape,
    classes: tuple[str, ...] | None,
    source: str,
    watch: Callable[[], None],
) -> _Index:
    """Write the pixels and the index, and return it."""
    try:
        limit = max(0, min(LARGEST_STORE, shutil.disk_usage(file.parent).free - _KEPT_FREE))
        gathered, dtype, written = _Gathered(), None, 0
        progress = Progress(f"decoding {source}, once", unit="images")
        with progress, replacing(file, shared=True) as stream:
            for rows in decoded:
                watch()
                if isinstance(rows, ClassNames):
                    gathered.of_labels = rows.names
                    continue
                gathered.add(rows)
                progress.update(len(gathered.labels))
                if isinstance(rows, Unreadable):
                    continue
                dtype = dtype or rows.pixels.dtype
                if rows.pixels.shape[1:] != shape or rows.pixels.dtype != dtype:
                    raise EdgeBcsError(
                        f"{source}: {rows.source} is {rows.pixels.dtype}{list(rows.pixels.shape[1:])}, and "
                        f"{dtype}{list(shape)} was expected."
                    )
                written += rows.pixels.nbytes
                if written > limit:
                    raise EdgeBcsError(
                        f"{source} needs more than the {limit >> 20} MiB that its decoded copy may take in "
                        f"{file.parent}; free some space or set EDGE_BCS_CACHE to a folder on a larger disk."
                    )
                stream.write(rows.pixels.data)
            if not len(gathered.labels):
                raise EdgeBcsError(f"{source} holds no images.")
            index = gathered.index(classes, dtype or np.dtype(np.uint8), source)
            content = index.written()
            stream.write(content + _END.pack(written, len(content), zlib.crc32(content), _MAGIC))
        sync_folder(file.parent)
        return index
    except OSError as error:
        raise EdgeBcsError(
            f"{source} cannot be decoded into {file.parent}: {error.strerror or error}."
        ) from None
