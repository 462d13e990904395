"""Decoding of CIFAR-10/100 batches, SVHN .mat files, .npz files and compressed tars, a MiB at a time."""

from __future__ import annotations

import contextlib
import io
import lzma
import math
import os
import pickle
import pickletools
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.machine import ThisMachine
from edge_bcs.core.resizing import SQUASH, Resize
from edge_bcs.core.text import shown
from edge_bcs.core.units import format_bytes
from edge_bcs.data.dataset import Array, Shape
from edge_bcs.data.decoding import LARGEST_FILE, decode, is_trap, reason, require_memory
from edge_bcs.data.faults import BadImageError
from edge_bcs.data.listing import ClassFolders, TarHeader, entry_of, open_regular
from edge_bcs.data.matlab import MatlabArray, arrays
from edge_bcs.data.store import LARGEST_STORE, ClassNames, Decoded, Rows, Unreadable

CIFAR10_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
CIFAR10_FILES = (*CIFAR10_TRAIN, "test_batch")
CIFAR100_FILES = ("train", "test")
CIFAR10_NAMES, CIFAR100_NAMES = "batches.meta", "meta"
_IMAGES = ("x", "images", "data")
_LABELS = ("y", "labels", "targets")
_LARGEST_PICKLE = 1 << 30
_LARGEST_MEMO = 1 << 20
_LARGEST_TAR = 4 * LARGEST_STORE
_MOST_IMAGES = 1 << 24
_MOST_OPERATIONS = 1 << 21
_BLOCK = 1 << 20
_MOST_OF_XZ = 256 << 20
# What is kept of an image while it is decoded (label, split, checksum), twice while it is stored.
_BYTES_OF_LABEL = 48


class _StoredArray:
    """A numeric array as a pickle describes it; ``array`` is there once the description is complete."""

    array: Array | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        flat = np.frombuffer(data if isinstance(data, bytes) else data.encode("latin1"), dtype.dtype)
        self.array = flat.reshape([int(size) for size in shape], order="F" if fortran else "C")


class _StoredType:
    """The element type of such an array; what a pickle adds to it is its byte order, which must be ours."""

    def __init__(self, text: Any, *rest: Any) -> None:
        text = text.decode() if isinstance(text, bytes) else text
        if text not in ("u1", "uint8", "i8", "int64", "i4"):
            raise EdgeBcsError(f"it holds an array of {text!r}, and not of whole numbers")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("|", "<", b"|", b"<"):
            raise EdgeBcsError(f"it holds an array of the byte order {state[1]!r}")


class _Call:
    """Something that a pickle may call, and can do nothing else with: it has no attributes to replace."""

    __slots__ = ()


class _Reconstruct(_Call):
    def __call__(self, kind: Any, shape: Any, dtype: Any) -> _StoredArray:
        return _StoredArray()  # its content and shape follow by __setstate__


class _Encode(_Call):
    def __call__(self, text: Any, encoding: Any = "latin1") -> bytes:
        return str(text).encode("latin1")


class _Dtype(_Call):
    def __call__(self, text: Any, *rest: Any) -> _StoredType:
        return _StoredType(text)


_KNOWN = {
    ("numpy.core.multiarray", "_reconstruct"): _Reconstruct(),
    ("numpy._core.multiarray", "_reconstruct"): _Reconstruct(),
    ("numpy", "ndarray"): _Call(),
    ("numpy", "dtype"): _Dtype(),
    ("_codecs", "encode"): _Encode(),
}


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that can build numbers, text, lists, dicts and numeric numpy arrays, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise EdgeBcsError(f"it asks for {module}.{name}, which arrays do not need")
        return _KNOWN[module, name]


def read_arrays(stream: IO[bytes], source: str, what: str, largest: int = _LARGEST_PICKLE) -> dict[str, Any]:
    """Return the dictionary of a pickle, its arrays as numpy's, without ever running what it says to run.

    Raises EdgeBcsError for a pickle that is damaged, larger than ``largest`` bytes, holds anything but a
    dictionary, or asks for more than numbers, text, lists, dictionaries and numeric arrays.
    """
    try:
        content = stream.read(largest + 1)
        if len(content) > largest:
            raise EdgeBcsError(f"it is larger than {largest >> 20} MiB")
        for number, (operation, argument, _) in enumerate(pickletools.genops(content)):
            if number > _MOST_OPERATIONS:  # of a byte each may make an object of two hundred
                raise EdgeBcsError("it has more parts than a batch of images")
            # Python's unpickler makes a table as large as the largest number that the pickle mentions.
            if "PUT" in operation.name and int(argument or 0) > _LARGEST_MEMO:
                raise EdgeBcsError(f"it numbers an object {argument}")
        loaded = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
        if not isinstance(loaded, dict):
            raise EdgeBcsError("it holds no dictionary")
        named = {key.decode() if isinstance(key, bytes) else key: value for key, value in loaded.items()}
    except Exception as error:  # a damaged pickle raises almost anything
        raise EdgeBcsError(f"{source} is not {what} ({reason(error)}).") from None
    return {name: value.array if isinstance(value, _StoredArray) else value for name, value in named.items()}


def unpickle(stream: IO[bytes], source: str) -> dict[str, Any]:
    """Return the dictionary of a CIFAR batch, without ever running what the file says to run."""
    return read_arrays(stream, source, "a CIFAR python batch")


def cifar_rows(content: dict[str, Any], split: str, shape: Shape, source: str) -> Iterator[Rows]:
    """Yield the images of one batch: data u8 [n, 3072], labels or fine_labels."""
    data, labels = content.get("data"), content.get("fine_labels", content.get("labels"))
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        raise EdgeBcsError(f"{source} has no data of n×3072 bytes.")
    labels = _whole_numbers(labels)
    if labels is None or len(labels) != len(data):
        raise EdgeBcsError(f"{source} does not have one label per image.")
    if shape != (3, 32, 32):
        raise EdgeBcsError(f"CIFAR images are (3, 32, 32); the network takes {shape}.")
    for first in range(0, len(data), _count_in_block(3072)):
        part = slice(first, first + _count_in_block(3072))
        pixels = np.ascontiguousarray(data[part]).reshape(-1, 3, 32, 32)
        yield Rows(split, labels[part], pixels, f"{source}:{first}")


def _count_in_block(size: int) -> int:
    """How many images of ``size`` bytes are decoded at a time."""
    return max(1, _BLOCK // size)


def _whole_numbers(labels: Any) -> Array | None:
    """A list or array of labels as an array of one dimension; None if it is anything else."""
    if isinstance(labels, list) and not all(type(label) is int and abs(label) < 1 << 31 for label in labels):
        return None
    if not isinstance(labels, (list, np.ndarray)):
        return None
    array = np.asarray(labels)
    return array if array.ndim == 1 and (array.dtype.kind in "iu" or not len(array)) else None


def cifar_classes(content: dict[str, Any], count: int) -> tuple[str, ...]:
    """Return the class names of a CIFAR meta file, or numbers if it has none."""
    names = content.get("fine_label_names", content.get("label_names"))
    if not isinstance(names, list) or len(names) != count:
        return tuple(str(label) for label in range(count))
    return tuple(name.decode("ascii", "replace") if isinstance(name, bytes) else str(name) for name in names)


def cifar_folder_rows(folder: Path, shape: Shape) -> Iterator[Rows]:
    """Yield the images of every batch file in ``folder``, one file in memory at a time."""
    hundred = not (folder / "data_batch_1").exists()
    for name in CIFAR100_FILES if hundred else CIFAR10_FILES:
        file = folder / name
        if file.exists():
            with open_regular(file) as stream:
                require_memory(
                    3 * os.fstat(stream.fileno()).st_size, str(file), "free some, or read it elsewhere"
                )
                content = unpickle(stream, str(file))
            yield from cifar_rows(content, "test" if name.startswith("test") else "train", shape, str(file))


def compressed_rows(file: Path, split: str, shape: Shape, resize: Resize = SQUASH) -> Iterator[Decoded]:
    """Yield the images of a compressed tar in one pass: class folders, or CIFAR batches as they are
    published."""
    total = 0
    folders = ClassFolders(str(file))
    try:
        with (
            _unpacked(file) as packed,
            tarfile.open(fileobj=packed, mode="r|*", tarinfo=TarHeader) as archive,
        ):
            for member in archive:
                total += member.size
                if total > _LARGEST_TAR:
                    raise EdgeBcsError(f"{file} unpacks to more than {_LARGEST_TAR >> 30} GiB.")
                if not member.isreg():
                    continue
                name = member.name.rsplit("/", 1)[-1]
                source = f"{shown(member.name)} in {file}"
                hundred = "cifar-100" in member.name
                names = name == (CIFAR100_NAMES if hundred else CIFAR10_NAMES)
                if names or name in CIFAR10_FILES or (hundred and name in CIFAR100_FILES):
                    if member.size > _LARGEST_PICKLE:
                        raise EdgeBcsError(f"{source} is too large ({member.size >> 20} MiB).")
                    require_memory(3 * member.size, source, "free some, or read it elsewhere")
                    content = unpickle(_opened(archive, member), source)
                    if names:
                        yield ClassNames(cifar_classes(content, 100 if hundred else 10))
                        continue
                    kind = "test" if name.startswith("test") else "train"
                    yield from cifar_rows(content, kind, shape, source)
                    continue
                entry = entry_of(member.name, in_tar=True)
                if entry is None:
                    continue
                folders.add(member.name)
                try:
                    if member.size > LARGEST_FILE:
                        raise BadImageError(f"the image {source} is larger than 64 MiB, which is refused.")
                    require_memory(member.size, f"the image {source}", "make it smaller", kind=BadImageError)
                    pixels = decode(
                        _opened(archive, member).read(), shape, f"the image {source}", resize=resize
                    )
                except BadImageError as error:
                    yield Unreadable(split or entry.split, entry.class_name, member.name, str(error))
                    continue
                yield Rows(split or entry.split, entry.class_name, pixels[None], source, member.name)
    except EdgeBcsError:
        raise
    except Exception as error:  # each of the compressions has its own kinds
        raise EdgeBcsError(f"{file} is truncated or not a tar archive ({reason(error)}).") from None


def _opened(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    stream = archive.extractfile(member)
    assert stream is not None  # a regular member has one
    return stream


class _Unxz(io.RawIOBase):
    """The content of an .xz file, unpacked in at most ``memory`` bytes; the file itself may ask for 4 GiB."""

    def __init__(self, stream: IO[bytes], memory: int, source: str) -> None:
        self._stream, self._memory, self._source = stream, memory, source
        self._new()

    def _new(self) -> None:
        self._unpack = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=self._memory)

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while True:
            piece = self._stream.read(1 << 16) if self._unpack.needs_input else b""
            if self._unpack.eof:  # another one may follow
                piece = (self._unpack.unused_data or self._stream.read(1 << 16)).lstrip(b"\0")
                if not piece:
                    return 0
                self._new()
            elif not piece and self._unpack.needs_input:
                raise EOFError("it ends too early")
            try:
                data = self._unpack.decompress(piece, len(target))
            except lzma.LZMAError as error:
                if "limit" not in str(error):
                    raise
                raise EdgeBcsError(
                    f"{self._source} takes more than {format_bytes(self._memory)} of memory to unpack: pack "
                    "it anew, as xz does unless told otherwise."
                ) from None
            if data:
                target[: len(data)] = data
                return len(data)


@contextlib.contextmanager
def _unpacked(file: Path) -> Iterator[IO[bytes]]:
    """Open a tar, .xz being unpacked already: Python's tarfile sets no bound to the memory of that."""
    with open_regular(file) as stream:
        packed = stream.read(6) == b"\xfd7zXZ\x00"
        stream.seek(0)
        if not packed:
            yield stream
            return
        free = ThisMachine().free_memory()
        most = _MOST_OF_XZ if free is None else min(_MOST_OF_XZ, free // 2)
        yield io.BufferedReader(_Unxz(stream, most, str(file)), 1 << 16)  # type: ignore[arg-type]


def svhn_rows(file: Path, split: str, shape: Shape) -> Iterator[Rows]:
    """Yield the images of an SVHN cropped-digits file: X u8 [32, 32, 3, n], y [n, 1] with 10 for the digit
    0."""
    try:
        labels = _svhn_labels(file)
        for array in arrays(file):
            if array.name == "X":
                yield from _svhn_images(array, labels, split, file, shape)
                return
        raise EdgeBcsError(f"{file} holds no images X.")
    except (ValueError, zlib.error, OSError) as error:
        if isinstance(error, EdgeBcsError):
            raise
        raise EdgeBcsError(f"{file} is not a readable MATLAB file ({reason(error)}).") from None


def _svhn_images(found: MatlabArray, labels: Array, split: str, file: Path, shape: Shape) -> Iterator[Rows]:
    if len(found.shape) != 4 or found.dtype != np.uint8 or found.shape[3] != len(labels):
        raise EdgeBcsError(f"{file} does not have SVHN's X u8 [32, 32, 3, n] and y [n, 1].")
    height, width, channels, _ = found.shape
    if (channels, height, width) != shape:
        raise EdgeBcsError(f"{file} holds {found.shape[:3]} images; the network takes {shape}.")
    size = math.prod(shape)
    for first in range(0, len(labels), _count_in_block(size)):
        part = labels[first : first + _count_in_block(size)]
        data = found.content.read(len(part) * size)
        if len(data) != len(part) * size:
            raise EdgeBcsError(f"{file} is truncated at image {first + len(data) // size}.")
        pixels = np.frombuffer(data, np.uint8).reshape(-1, channels, width, height).transpose(0, 1, 3, 2)
        yield Rows(split, part, np.ascontiguousarray(pixels), f"{file}:{first}")


def _svhn_labels(file: Path) -> Array:
    for array in arrays(file):
        if array.name == "y":
            count = math.prod(array.shape)
            if count > _MOST_IMAGES:
                raise EdgeBcsError(f"{file} has {count} labels; at most {_MOST_IMAGES} are read.")
            require_memory(count * (array.dtype.itemsize + _BYTES_OF_LABEL), str(file), "read it elsewhere")
            labels = np.frombuffer(array.content.read(count * array.dtype.itemsize), array.dtype)
            if len(labels) != count:
                break
            wrong = ~((labels >= 0) & (labels <= 10) & (labels == np.floor(labels)))  # NaN is wrong, too
            if wrong.any():
                place = int(np.argmax(wrong))
                raise EdgeBcsError(
                    f"label {labels[place]:g} of image {place} in {file} is not one of SVHN's: whole numbers "
                    "from 1 to 10, which stands for the digit 0."
                )
            return labels.astype(np.int64) % 10
    raise EdgeBcsError(f"{file} has no labels y.")


def npz_rows(file: Path, split: str, shape: Shape) -> Iterator[Rows]:
    """Yield the images of an .npz: x and y (or images and labels), or x_train, y_train, x_test and y_test."""
    try:
        with open_regular(file) as stream, zipfile.ZipFile(stream) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}
            pairs = [(f"x_{kind}", f"y_{kind}", kind) for kind in ("train", "test") if f"x_{kind}" in names]
            if not pairs:
                x = next((name for name in _IMAGES if name in names), None)
                y = next((name for name in _LABELS if name in names), None)
                if x is None or y is None:
                    raise EdgeBcsError(f"{file} lacks the arrays x and y (or images and labels).")
                pairs = [(x, y, split)]
            for x, y, kind in pairs:
                yield from _npz_pair(archive, file, x, y, kind, shape)
    except EdgeBcsError:
        raise
    except Exception as error:  # each of the compressions has its own kinds
        raise EdgeBcsError(f"{file} is truncated or not an .npz file ({reason(error)}).") from None


def _npz_pair(
    archive: zipfile.ZipFile, file: Path, x: str, y: str, split: str, shape: Shape
) -> Iterator[Rows]:
    with _member(archive, y, file) as stream:
        length, dtype = _npy_header(stream, f"{y} in {file}")
        if len(length) != 1 or dtype.kind not in "iu" or length[0] > _MOST_IMAGES:
            raise EdgeBcsError(
                f"{y} in {file} must be at most {_MOST_IMAGES} whole numbers of one dimension, not "
                f"{dtype}{list(length)}."
            )
        size = length[0] * dtype.itemsize
        _require_size(archive, y, stream.tell() + size, file)
        require_memory(size + length[0] * _BYTES_OF_LABEL, f"{y} in {file}", "read it elsewhere")
        content = stream.read(size)
        if len(content) != size:
            raise EdgeBcsError(f"{y} in {file} is truncated.")
        labels = np.frombuffer(content, dtype)
        if dtype == np.uint64 and len(labels) and labels.max() >> np.uint64(63):
            raise EdgeBcsError(f"{y} in {file} has the label {labels.max()}.")
    with _member(archive, x, file) as stream:
        dimensions, dtype = _npy_header(stream, f"{x} in {file}")
        if not dimensions or dimensions[0] != len(labels):
            raise EdgeBcsError(f"{file} has {len(labels)} labels for images {list(dimensions)}.")
        size = math.prod(dimensions[1:]) * dtype.itemsize
        if size > LARGEST_FILE:
            raise EdgeBcsError(f"{x} in {file} has images larger than 64 MiB.")
        if size * len(labels) > LARGEST_STORE:
            raise EdgeBcsError(f"{x} in {file} is larger than {LARGEST_STORE >> 30} GiB.")
        _require_size(archive, x, stream.tell() + size * len(labels), file)
        _require_shape(dimensions[1:], shape, f"{x} in {file}")
        for first in range(0, len(labels), _count_in_block(size)):
            part = labels[first : first + _count_in_block(size)]
            data = stream.read(len(part) * size)
            if len(data) != len(part) * size:
                raise EdgeBcsError(f"{x} in {file} is truncated at image {first + len(data) // size}.")
            images = np.frombuffer(data, dtype).reshape(-1, *dimensions[1:])
            yield Rows(split, part, _as_pixels(images, shape, f"{x} in {file}"), f"{file}:{first}")


def _member(archive: zipfile.ZipFile, name: str, file: Path) -> IO[bytes]:
    """Open an array of an .npz, unless its few bytes declare that they unpack to far too many."""
    member = archive.getinfo(f"{name}.npy")
    if is_trap(member.file_size, member.compress_size):
        raise EdgeBcsError(
            f"{name} in {file} declares that its {member.compress_size} bytes unpack to {member.file_size}, "
            "which is refused."
        )
    return archive.open(member)


def _require_size(archive: zipfile.ZipFile, name: str, size: int, file: Path) -> None:
    """Raise EdgeBcsError if an array has fewer bytes than its own header says, before they are made room."""
    stated = archive.getinfo(f"{name}.npy").file_size
    if stated < size:
        raise EdgeBcsError(f"{name} in {file} is truncated: it has {stated} bytes of {size}.")


def _npy_header(stream: IO[bytes], source: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(stream)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = read(stream)
    except ValueError as error:
        raise EdgeBcsError(f"{source} is not a numpy array ({reason(error)}).") from None
    if any(isinstance(item, bool) or item < 0 for item in shape):
        raise EdgeBcsError(f"{source} has the impossible shape {list(shape)}.")
    if dtype.hasobject or dtype.kind not in "iuf" or fortran:
        raise EdgeBcsError(f"{source} must be a row-major array of numbers, not {dtype}.")
    return shape, dtype


def _require_shape(dimensions: tuple[int, ...], shape: Shape, source: str) -> None:
    channels, height, width = shape
    if dimensions not in (shape, (height, width, channels), (height, width)):
        raise EdgeBcsError(f"{source} holds images {list(dimensions)}; the network takes {list(shape)}.")


def _as_pixels(images: Array, shape: Shape, source: str) -> Array:
    """Return images [n, C, H, W], [n, H, W, C] or [n, H, W] as u8 or f32 [n, C, H, W]."""
    # A pixel that is not finite is for the training to stop at, or to skip, naming the image.
    low, high = np.nan, np.nan
    if images.dtype.kind != "f":
        low, high = float(images.min()), float(images.max())
    elif (finite := np.isfinite(images)).reshape(len(images), -1).any(1).all():
        low, high = float(images[finite].min()), float(images[finite].max())
    limit = 1.0 if images.dtype.kind == "f" else 255
    if not (low >= 0 and high <= limit):
        raise EdgeBcsError(
            f"{source} holds pixels from {low:g} to {high:g}, and 0 to {limit:g} was expected."
        )
    if images.shape[1:] != shape:
        images = images.transpose(0, 3, 1, 2) if images.ndim == 4 else images[:, None]
    images = np.broadcast_to(images, (len(images), *shape))
    return np.ascontiguousarray(images, np.float32 if images.dtype.kind == "f" else np.uint8)
