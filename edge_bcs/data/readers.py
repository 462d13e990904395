"""Decoding of CIFAR-10/100 batches, SVHN .mat files, .npz files and compressed tars, row by row."""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from edge_bcs.data.dataset import Array, Shape
from edge_bcs.data.images import _LARGEST_FILE, decode, entry_of
from edge_bcs.data.store import Row
from edge_bcs.errors import EdgeBcsError

CIFAR10_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
CIFAR10_FILES = (*CIFAR10_TRAIN, "test_batch")
CIFAR100_FILES = ("train", "test")
_IMAGES = ("x", "images", "data")
_LABELS = ("y", "labels", "targets")
_LARGEST_PICKLE = 1 << 30


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that can build numbers, text, lists, dicts and numeric numpy arrays, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _empty_array
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return _numeric_dtype
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        raise EdgeBcsError(f"it asks for {module}.{name}, which CIFAR batches do not need")


def _empty_array(kind: Any, shape: Any, dtype: Any) -> Array:
    return np.empty(0, np.uint8)  # its content and shape follow by __setstate__


def _numeric_dtype(text: Any, *rest: Any) -> np.dtype[Any]:
    if text not in ("u1", "uint8", "i8", "int64", "i4", b"u1", b"i8", b"i4"):
        raise EdgeBcsError(f"it holds an array of {text!r}, which CIFAR batches do not")
    return np.dtype(text.decode() if isinstance(text, bytes) else text)


def _latin1(text: Any, encoding: Any = "latin1") -> bytes:
    return str(text).encode("latin1")


def unpickle(stream: IO[bytes], source: str) -> dict[bytes, Any]:
    """Return the dictionary (bytes keys) of a CIFAR batch, without ever running what the file says to run."""
    try:
        content = _ArraysOnly(io.BytesIO(stream.read(_LARGEST_PICKLE)), encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises almost anything
        raise EdgeBcsError(f"{source} is not a CIFAR python batch ({error}).") from None
    if not isinstance(content, dict):
        raise EdgeBcsError(f"{source} is not a CIFAR python batch (it holds no dictionary).")
    return {key.encode() if isinstance(key, str) else key: value for key, value in content.items()}


def cifar_rows(content: dict[bytes, Any], split: str, shape: Shape, source: str) -> Iterator[Row]:
    """Yield the images of one batch: data u8 [n, 3072], labels or fine_labels."""
    data, labels = content.get(b"data"), content.get(b"fine_labels", content.get(b"labels"))
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        raise EdgeBcsError(f"{source} has no data of n×3072 bytes.")
    if labels is None or len(labels) != len(data):
        raise EdgeBcsError(f"{source} does not have one label per image.")
    if shape != (3, 32, 32):
        raise EdgeBcsError(f"CIFAR images are (3, 32, 32); the network takes {shape}.")
    for number, (pixels, label) in enumerate(zip(data, labels, strict=True)):
        yield Row(split, int(label), f"{source}:{number}", pixels.reshape(3, 32, 32))


def cifar_classes(content: dict[bytes, Any], count: int) -> tuple[str, ...]:
    """Return the class names of a CIFAR meta file, or numbers if it has none."""
    names = content.get(b"fine_label_names", content.get(b"label_names"))
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
    try:
        with tarfile.open(file, "r|*") as archive:
            for member in archive:
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
    except (tarfile.TarError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise EdgeBcsError(f"{file} is truncated or not a tar archive ({error}).") from None


def svhn_rows(file: Path, split: str, shape: Shape) -> Iterator[Row]:
    """Yield the images of an SVHN cropped-digits file: X u8 [32, 32, 3, n], y [n, 1] with 10 for the digit
    0."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise EdgeBcsError(
            "reading .mat files needs scipy: run `pip install scipy`, or convert them to .npz elsewhere."
        ) from None
    try:
        content = loadmat(file)
    except Exception as error:
        raise EdgeBcsError(f"{file} is not a readable MATLAB file ({str(error)[:80]}).") from None
    x, y = content.get("X"), content.get("y")
    if (
        not isinstance(x, np.ndarray)
        or x.ndim != 4
        or x.dtype != np.uint8
        or y is None
        or y.size != x.shape[3]
    ):
        raise EdgeBcsError(f"{file} does not have SVHN's X u8 [32, 32, 3, n] and y [n, 1].")
    if (x.shape[2], x.shape[0], x.shape[1]) != shape:
        raise EdgeBcsError(f"{file} holds {x.shape[:3]} images; the network takes {shape}.")
    for number, label in enumerate(y.reshape(-1)):
        yield Row(split, int(label) % 10, f"{file}:{number}", x[..., number].transpose(2, 0, 1).copy())


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
    except (zipfile.BadZipFile, EOFError, OSError, KeyError) as error:
        raise EdgeBcsError(f"{file} is truncated or not an .npz file ({error}).") from None


def _npz_pair(
    archive: zipfile.ZipFile, file: Path, x: str, y: str, split: str, shape: Shape
) -> Iterator[Row]:
    with archive.open(f"{y}.npy") as stream:
        length, dtype = _npy_header(stream, f"{y} in {file}")
        if len(length) != 1 or dtype.kind not in "iu" or length[0] > 1 << 28:
            raise EdgeBcsError(
                f"{y} in {file} must be whole numbers of one dimension, not {dtype}{list(length)}."
            )
        labels = np.frombuffer(stream.read(length[0] * dtype.itemsize), dtype)
    with archive.open(f"{x}.npy") as stream:
        dimensions, dtype = _npy_header(stream, f"{x} in {file}")
        if not dimensions or dimensions[0] != len(labels):
            raise EdgeBcsError(f"{file} has {len(labels)} labels for images {list(dimensions)}.")
        size = int(np.prod(dimensions[1:], dtype=np.int64)) * dtype.itemsize
        if size > _LARGEST_FILE:
            raise EdgeBcsError(f"{x} in {file} has images larger than 64 MiB.")
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
        raise EdgeBcsError(f"{source} is not a numpy array ({error}).") from None
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
