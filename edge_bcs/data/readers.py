"""Decoding of CIFAR-10/100 batches, SVHN .mat files, .npz files and compressed tars, row by row."""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from edge_bcs.data.dataset import Array, Shape
from edge_bcs.data.images import _LARGEST_FILE, TarHeader, decode, entry_of, reason
from edge_bcs.data.matlab import MatlabArray, arrays
from edge_bcs.data.store import LARGEST_STORE, Row
from edge_bcs.errors import EdgeBcsError

CIFAR10_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
CIFAR10_FILES = (*CIFAR10_TRAIN, "test_batch")
CIFAR100_FILES = ("train", "test")
_IMAGES = ("x", "images", "data")
_LABELS = ("y", "labels", "targets")
_LARGEST_PICKLE = 1 << 30
_LARGEST_MEMO = 1 << 20
_LARGEST_TAR = 4 * LARGEST_STORE
_MOST_IMAGES = 1 << 24


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
        for operation, argument, _ in pickletools.genops(content):
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


def cifar_rows(content: dict[str, Any], split: str, shape: Shape, source: str) -> Iterator[Row]:
    """Yield the images of one batch: data u8 [n, 3072], labels or fine_labels."""
    data, labels = content.get("data"), content.get("fine_labels", content.get("labels"))
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        raise EdgeBcsError(f"{source} has no data of n×3072 bytes.")
    labels = _whole_numbers(labels)
    if labels is None or len(labels) != len(data):
        raise EdgeBcsError(f"{source} does not have one label per image.")
    if shape != (3, 32, 32):
        raise EdgeBcsError(f"CIFAR images are (3, 32, 32); the network takes {shape}.")
    for number, (pixels, label) in enumerate(zip(data, labels, strict=True)):
        yield Row(split, int(label), f"{source}:{number}", pixels.reshape(3, 32, 32))


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


def cifar_folder_rows(folder: Path, shape: Shape) -> Iterator[Row]:
    """Yield the images of every batch file in ``folder``, one file in memory at a time."""
    hundred = not (folder / "data_batch_1").exists()
    for name in CIFAR100_FILES if hundred else CIFAR10_FILES:
        file = folder / name
        if file.exists():
            with file.open("rb") as stream:
                content = unpickle(stream, str(file))
            yield from cifar_rows(content, "test" if name.startswith("test") else "train", shape, str(file))


def compressed_rows(file: Path, split: str, shape: Shape) -> Iterator[Row]:
    """Yield the images of a compressed tar in one pass: class folders, or CIFAR batches as they are
    published."""
    total = 0
    try:
        with tarfile.open(file, "r|*", tarinfo=TarHeader) as archive:
            for member in archive:
                total += member.size
                if total > _LARGEST_TAR:
                    raise EdgeBcsError(f"{file} unpacks to more than {_LARGEST_TAR >> 30} GiB.")
                if not member.isreg():
                    continue
                name = member.name.rsplit("/", 1)[-1]
                cifar = name in CIFAR10_FILES or ("cifar-100" in member.name and name in CIFAR100_FILES)
                entry = entry_of(member.name)
                if not cifar and entry is None:
                    continue
                source = f"{member.name} in {file}"
                if member.size > (_LARGEST_PICKLE if cifar else _LARGEST_FILE):
                    raise EdgeBcsError(f"{source} is too large ({member.size >> 20} MiB).")
                stream = archive.extractfile(member)
                assert stream is not None  # a regular member has one
                if cifar:
                    kind = "test" if name.startswith("test") else "train"
                    yield from cifar_rows(unpickle(stream, source), kind, shape, source)
                elif entry is not None:
                    pixels = decode(stream.read(), shape, f"the image {source}")
                    yield Row(
                        split or entry.split, entry.class_name, member.name, np.ascontiguousarray(pixels)
                    )
    except EdgeBcsError:
        raise
    except Exception as error:  # each of the compressions has its own kinds
        raise EdgeBcsError(f"{file} is truncated or not a tar archive ({reason(error)}).") from None


def svhn_rows(file: Path, split: str, shape: Shape) -> Iterator[Row]:
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


def _svhn_images(found: MatlabArray, labels: Array, split: str, file: Path, shape: Shape) -> Iterator[Row]:
    if len(found.shape) != 4 or found.dtype != np.uint8 or found.shape[3] != len(labels):
        raise EdgeBcsError(f"{file} does not have SVHN's X u8 [32, 32, 3, n] and y [n, 1].")
    height, width, channels, _ = found.shape
    if (channels, height, width) != shape:
        raise EdgeBcsError(f"{file} holds {found.shape[:3]} images; the network takes {shape}.")
    for number, label in enumerate(labels):
        data = found.content.read(math.prod(shape))
        if len(data) != math.prod(shape):
            raise EdgeBcsError(f"{file} is truncated at image {number}.")
        image = np.frombuffer(data, np.uint8).reshape(channels, width, height).transpose(0, 2, 1)
        yield Row(split, int(label) % 10, f"{file}:{number}", image.copy())


def _svhn_labels(file: Path) -> Array:
    for array in arrays(file):
        if array.name == "y":
            count = math.prod(array.shape)
            if count > _MOST_IMAGES:
                raise EdgeBcsError(f"{file} has {count} labels, which is refused.")
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
            return labels.astype(np.int64)
    raise EdgeBcsError(f"{file} has no labels y.")


def npz_rows(file: Path, split: str, shape: Shape) -> Iterator[Row]:
    """Yield the images of an .npz: x and y (or images and labels), or x_train, y_train, x_test and y_test."""
    try:
        with zipfile.ZipFile(file) as archive:
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
) -> Iterator[Row]:
    with archive.open(f"{y}.npy") as stream:
        length, dtype = _npy_header(stream, f"{y} in {file}")
        if len(length) != 1 or dtype.kind not in "iu" or length[0] > _MOST_IMAGES:
            raise EdgeBcsError(
                f"{y} in {file} must be at most {_MOST_IMAGES} whole numbers of one dimension, not "
                f"{dtype}{list(length)}."
            )
        content = stream.read(length[0] * dtype.itemsize)
        if len(content) != length[0] * dtype.itemsize:
            raise EdgeBcsError(f"{y} in {file} is truncated.")
        labels = np.frombuffer(content, dtype)
    with archive.open(f"{x}.npy") as stream:
        dimensions, dtype = _npy_header(stream, f"{x} in {file}")
        if not dimensions or dimensions[0] != len(labels):
            raise EdgeBcsError(f"{file} has {len(labels)} labels for images {list(dimensions)}.")
        size = math.prod(dimensions[1:]) * dtype.itemsize
        if size > _LARGEST_FILE:
            raise EdgeBcsError(f"{x} in {file} has images larger than 64 MiB.")
        if size * len(labels) > LARGEST_STORE:
            raise EdgeBcsError(f"{x} in {file} is larger than {LARGEST_STORE >> 30} GiB.")
        for number, label in enumerate(labels):
            data = stream.read(size)
            if len(data) != size:
                raise EdgeBcsError(f"{x} in {file} is truncated at image {number}.")
            image = np.frombuffer(data, dtype).reshape(dimensions[1:])
            yield Row(split, int(label), f"{file}:{number}", _as_pixels(image, shape, f"{x} in {file}"))


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


def _as_pixels(image: Array, shape: Shape, source: str) -> Array:
    """Return one image [C, H, W], [H, W, C] or [H, W] as u8 or f32 [C, H, W]."""
    channels, height, width = shape
    if image.shape == (height, width, channels) and image.shape != shape:
        image = image.transpose(2, 0, 1)
    elif image.shape == (height, width):
        image = np.broadcast_to(image, shape)
    elif image.shape != shape:
        raise EdgeBcsError(f"{source} holds images {list(image.shape)}; the network takes {list(shape)}.")
    # A pixel that is not finite is for the training to stop at, or to skip, naming the image.
    finite = image[np.isfinite(image)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (np.nan, np.nan)
    limit = 1.0 if image.dtype.kind == "f" else 255
    if not (low >= 0 and high <= limit):
        raise EdgeBcsError(
            f"{source} holds pixels from {low:g} to {high:g}, and 0 to {limit:g} was expected."
        )
    return np.ascontiguousarray(image, np.float32 if image.dtype.kind == "f" else np.uint8)
