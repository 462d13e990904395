"""Image files in class folders, on disk or in a plain tar (`listing`), decoded when they are read."""

from __future__ import annotations

import contextlib
import json
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from edge_bcs.core.digest import sha256
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import replacing
from edge_bcs.core.progress import Progress
from edge_bcs.core.resizing import SQUASH, Resize
from edge_bcs.core.text import shown
from edge_bcs.data.dataset import Array, Dataset, Shape, held_out
from edge_bcs.data.decoding import (
    LARGEST_FILE,
    decode,
    decode_aloud,
    one_at_a_time,
    quietly,
    require_memory,
)
from edge_bcs.data.faults import BadImageError, Handling, LeftOut
from edge_bcs.data.listing import Entry, entry_of, open_regular
from edge_bcs.data.store import cache_file

_MOST_BAD = 20  # after which it is no use to look at the others, if they are not left out
_LOOKED_AT_ONCE = 64
# Of the memory that is free: when an image is looked at, and later, when the training has taken its own.
_SHARE, _SHARE_LATER = 0.5, 0.9
_REMEMBERED_EVERY = 60.0  # seconds
_READER = "1"  # another number where what can be used changes

Decode = Callable[[bytes, Shape, str, float, Resize], Array]


def check_channels(shape: Shape) -> None:
    """Raise EdgeBcsError unless images of ``shape`` have 1 or 3 channels."""
    if shape[0] not in (1, 3):
        raise EdgeBcsError(f"image files have 1 or 3 channels; the network takes {shape[0]}.")


class ImageFiles(Dataset):
    """Images of one split among ``entries``, each beside the folder or tar that holds it.

    Classes are all class folders in alphabetical order. Where no entry names a split, a tenth is held out;
    which images that are does not depend on which can be used.

    Every image is looked at (decoded as the training will) before this returns, unless it was once before
    and has kept its size and time; the cache folder remembers that.

    Attributes:
        files: each image beside the folder or tar that holds it.
        files_of_all_splits: the same of every split, whether they can be used or not.
    """

    named = True
    files: list[tuple[Path, Entry]]
    files_of_all_splits: list[tuple[Path, Entry]]

    def __init__(
        self,
        entries: Iterable[tuple[Path, Entry]],
        split: str,
        shape: Shape,
        source: str,
        handling: Handling | None = None,
        resize: Resize = SQUASH,
    ) -> None:
        check_channels(shape)
        handling = handling or Handling()
        listed = list(entries)
        listed += self._known_and_gone(listed, handling)
        found = sorted(listed, key=lambda item: (item[1].class_name, item[1].name))
        if not found:
            raise EdgeBcsError(f"{source} holds no images in class folders (expected …/class/image.jpg).")
        self.classes = tuple(sorted({entry.class_name for _, entry in found}))
        number = {name: label for label, name in enumerate(self.classes)}
        labels = np.array([number[entry.class_name] for _, entry in found], np.int64)
        if any(entry.split for _, entry in found):
            chosen = np.array([(entry.split or "train") == split for _, entry in found])
        else:
            chosen = held_out(labels) == (split == "test")
        self.shape, self._source, self._resize = shape, source, resize
        self.files_of_all_splits = found
        self._remembered = _Remembered(found)
        self.files = [item for item, wanted in zip(found, chosen, strict=True) if wanted]
        bad = self._looked_at(handling)
        found_bad = [LeftOut(self.files[n][1].name, why) for n, why in bad.items()]
        if handling.on_bad == "stop" and not handling.strict:
            # What can be seen without opening it stops the reading in whichever split it is.
            others = zip(found, chosen, strict=True)
            found_bad += [
                LeftOut(item[1].name, item[1].why) for item, here in others if item[1].why and not here
            ]
        self.left_out = handling.settle(found_bad, source)
        good = [n for n in range(len(self.files)) if n not in bad]
        self.labels = labels[chosen][good]
        self.files = [self.files[n] for n in good]
        if not self.files:
            raise EdgeBcsError(f"{source} holds no {split} images.")

    def entry_of(self, name: str, why: str, in_tar: bool) -> Entry | None:
        """Return the entry of an image that can no longer be used, by its path; None if that names none."""
        return entry_of(name, why=why, in_tar=in_tar)

    def _known_and_gone(
        self, listed: list[tuple[Path, Entry]], handling: Handling
    ) -> list[tuple[Path, Entry]]:
        """Images that the training left out and that were removed since: they keep their places in the order,
        so that every other image keeps its own."""
        if not handling.known or not listed:
            return []
        gone = set(handling.known) - {entry.name for _, entry in listed}
        in_tar = listed[0][1].offset >= 0
        entries = (self.entry_of(name, handling.known[name], in_tar) for name in sorted(gone))
        return [(listed[0][0], entry) for entry in entries if entry is not None]

    def name_of(self, position: int) -> str:
        """Return the image's path in its folder or tar."""
        return self.files[position][1].name

    def images(self, positions: Array) -> Array:
        """Decode the images at ``positions``."""
        result = np.empty((len(positions), *self.shape), np.float32)
        for number, position in enumerate(positions):
            holder, entry = self.files[position]
            try:
                pixels = decode_file(holder, entry, self.shape, self._resize, _SHARE_LATER)
            except BadImageError as error:
                self._remembered.forget(holder, entry)
                raise EdgeBcsError(
                    f"{error} It could be used when this data was opened: put it back as it was."
                ) from None
            np.divide(pixels, np.float32(255), out=result[number])
        return result

    def _looked_at(self, handling: Handling) -> dict[int, str]:
        """Places of the files that cannot be used, and why."""
        bad = {
            number: why
            for number, (_, entry) in enumerate(self.files)
            if (why := handling.known.get(entry.name, entry.why))
        }
        new = [
            number
            for number, (holder, entry) in enumerate(self.files)
            if number not in bad and not self._remembered.is_good(holder, entry)
        ]
        progress = Progress(f"looking at {self._source}, once", len(new), unit="images", shown=bool(new))
        # Pillow decodes outside of Python's lock; what takes much memory is decoded one at a time.
        with progress, quietly(), self._remembered.kept(), ThreadPoolExecutor(_processors()) as pool:
            for first in range(0, len(new), _LOOKED_AT_ONCE):
                part = new[first : first + _LOOKED_AT_ONCE]
                for done, (number, why) in enumerate(zip(part, pool.map(self._why_not, part), strict=True)):
                    handling.watch()
                    progress.update(first + done + 1)
                    if why:
                        bad[number] = why
                    else:
                        self._remembered.add(*self.files[number])
                if len(bad) >= _MOST_BAD and handling.on_bad == "stop":
                    break
        return dict(sorted(bad.items()))

    def _why_not(self, number: int) -> str:
        try:
            decode_file(*self.files[number], self.shape, self._resize, _SHARE, decode_aloud)
        except BadImageError as error:
            return str(error)
        return ""


def _processors() -> int:
    available = getattr(os, "sched_getaffinity", None)
    return min(8, len(available(0)) if available else os.cpu_count() or 1)


class _Remembered:
    """Which images were looked at and can be used: by name, size, time of change and place, kept in a file of
    the cache folder for each folder or tar. What is damaged in that file counts as forgotten.

    Images that cannot be used are not remembered: they are few, and may be mended without a trace.
    """

    def __init__(self, found: list[tuple[Path, Entry]]) -> None:
        holders = sorted({str(holder.resolve()) for holder, _ in found})
        key = sha256("|".join([_READER, *holders]).encode(errors="surrogateescape")).hexdigest()[:24]
        self._file = cache_file(f"{key}.looked")
        self._names = {_named(*item) for item in found}
        self._times = {holder: _marked(holder) for holder in {holder for holder, _ in found}}
        self._good = self._read()
        self._changed, self._saved_at = False, time.monotonic()

    def is_good(self, holder: Path, entry: Entry) -> bool:
        mark = self._mark(holder, entry)
        return mark is not None and self._good.get(_named(holder, entry)) == mark

    def add(self, holder: Path, entry: Entry) -> None:
        mark = self._mark(holder, entry)
        if mark is not None:
            self._good[_named(holder, entry)] = mark
            self._changed = True
        if time.monotonic() - self._saved_at > _REMEMBERED_EVERY:
            self._save()

    def forget(self, holder: Path, entry: Entry) -> None:
        if self._good.pop(_named(holder, entry), None) is not None:
            self._changed = True
            self._save()

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Save what the block adds, however it ends."""
        try:
            yield
        finally:
            self._save()

    def _mark(self, holder: Path, entry: Entry) -> list[int] | None:
        if entry.offset >= 0:
            return [*self._times[holder], entry.offset, entry.size] if self._times[holder] else None
        return _marked(holder / entry.name) or None

    def _read(self) -> dict[str, list[int]]:
        try:
            check, content = self._file.read_bytes().split(b"\n", 1)
            good = json.loads(content) if int(check, 16) == zlib.crc32(content) else {}
        except (OSError, ValueError):
            return {}
        return {name: mark for name, mark in good.items() if name in self._names}

    def _save(self) -> None:
        """Keep it; where that cannot be, everything is looked at again the next time."""
        self._saved_at = time.monotonic()
        if not self._changed:
            return
        content = json.dumps(self._good).encode()
        with contextlib.suppress(OSError), replacing(self._file, shared=True) as stream:
            stream.write(b"%08x\n" % zlib.crc32(content) + content)
            self._changed = False


def _named(holder: Path, entry: Entry) -> str:
    return f"{holder.name}:{entry.name}" if entry.offset >= 0 else entry.name


def _marked(file: Path) -> list[int]:
    try:
        status = file.stat()
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]


def _source(holder: Path, entry: Entry) -> str:
    if entry.offset >= 0:
        return f"the image {shown(entry.name)} in {holder}"
    return f"the image {shown(str(holder / entry.name))}"


def decode_file(
    holder: Path,
    entry: Entry,
    shape: Shape,
    resize: Resize = SQUASH,
    share: float = _SHARE,
    decode: Decode = decode,
) -> Array:
    """Return the pixels u8 [C, H, W] of an image; of those that take much memory one is read and decoded at a
    time.

    Args:
        holder: the tar or the folder that ``entry`` lies in.
        shape, resize: of the pixels, and how they are made.
        share: of the free memory that this may take. decode: what decodes.

    Raises BadImageError if it cannot be used.
    """
    source = _source(holder, entry)
    try:
        with open_regular(holder if entry.offset >= 0 else holder / entry.name) as stream:
            size = entry.size if entry.offset >= 0 else os.fstat(stream.fileno()).st_size
            if size > LARGEST_FILE:
                raise BadImageError(f"{source} is larger than 64 MiB, which is refused.")
            with one_at_a_time(size):
                require_memory(size, source, "make it smaller", share, BadImageError)
                stream.seek(max(entry.offset, 0))
                return decode(stream.read(size), shape, source, share, resize)
    except OSError as error:
        raise BadImageError(f"{source} cannot be read: {error.strerror}.") from None
