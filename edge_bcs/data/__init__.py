"""Data sets, streamed: nothing is ever held in memory beyond the batch that is asked for.

    data = open_data("digits", split="train", shape=(3, 32, 32))
    for x, y in data.batches(128, seed=0, epoch=3, shuffle=True, augment=True):
        ...                                # x f32 [n, 3, 32, 32] in [0, 1], y i64[n]

| `open_data(spec)` | what it reads |
| --- | --- |
| "digits" | scikit-learn's handwritten digits, embedded in the package |
| folder/class/image.jpg | image files by class; also folder/train/class/… with folder/test/class/… |
| .tar, .tar.gz; folder with train.tar.gz and test.tar.gz | the same, or CIFAR as published, in a tar |
| folder with data_batch_1 … test_batch, or train, test and meta | CIFAR-10 and CIFAR-100 python batches |
| train_32x32.mat with test_32x32.mat | SVHN, cropped digits |
| file.npz (or train.npz with test.npz) | x and y, images and labels, or x_train, y_train, x_test, y_test |

Images and labels in memory, torch Datasets and DataLoaders are taken by `edge_bcs.data.adapt`.

Labels are places in `classes`, a list that every source has for itself: class folders are sorted, CIFAR has
the names and the order of its meta file, and .mat (SVHN: the digits) and .npz have only numbers. A network's
labels come from edge_bcs/data/classes.py, which matches the names.

A source without a test split of its own has every tenth image of each class held out. Only numpy is needed,
plus Pillow for image files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.resizing import SQUASH, Resize
from edge_bcs.core.text import shown
from edge_bcs.data.dataset import ArrayDataset, Dataset, Shape
from edge_bcs.data.faults import Handling, OnBad, Watch

if TYPE_CHECKING:
    from edge_bcs.data.store import Decoded

__all__ = ["ArrayDataset", "Dataset", "open_data"]

_SPLITS = ("train", "test")
_TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


def open_data(
    spec: str | PathLike[str],
    split: str = "train",
    shape: Shape = (3, 32, 32),
    *,
    on_bad: OnBad = "stop",
    known: Mapping[str, str] | None = None,
    strict: bool = False,
    watch: Watch | None = None,
    resize: Resize = SQUASH,
) -> Dataset:
    """Open one split of a data set (see the module's table).

    All of it is looked at before this returns: archives and arrays are decoded into a copy, image files are
    decoded once and it is remembered that they can be.

    Args:
        spec: "digits", or the path of a folder or file.
        split: "train" or "test".
        shape: (C, H, W) that the network takes; image files and digits are resized to it, arrays must have
            it.
        on_bad: "stop" refuses data with image files that cannot be used, naming them; "skip" leaves them out
            (`Dataset.left_out` says which and why).
        known: for a training that goes on, the images that it left out, by name, with the reasons: they are
            left out again without being looked at.
        strict: refuse the data if others than these cannot be used.
        watch: called now and then while that takes its time; what it raises ends it.
        resize: how image files of other sizes are brought to ``shape``.

    Raises:
        EdgeBcsError: nothing readable there; one sentence says what.
    """
    handling = Handling(on_bad, known or {}, strict, watch or Handling.watch)
    if split not in _SPLITS:
        raise EdgeBcsError(f"the split is train or test, not {split!r}.")
    if len(shape) != 3 or min(shape) < 1:
        raise EdgeBcsError(f"images have a shape (channels, height, width), not {shape}.")
    if str(spec) == "digits":
        from edge_bcs.data.digits import Digits

        return Digits(split, shape)
    path = Path(spec)
    try:
        if path.is_dir():
            return _open_folder(path, split, shape, handling, resize)
        if not path.exists():
            raise EdgeBcsError(
                f"the data {path} does not exist; give a folder, a .tar, .npz or .mat file, or digits."
            )
        return _open_file(path, split, shape, handling, resize)
    except OSError as error:
        named = f" ({error.filename})" if error.filename not in (None, str(path)) else ""
        raise EdgeBcsError(
            f"the data {shown(str(path))} cannot be read: {error.strerror or error}{shown(named)}."
        ) from None


def _open_folder(folder: Path, split: str, shape: Shape, handling: Handling, resize: Resize) -> Dataset:
    from edge_bcs.data.images import ImageFiles
    from edge_bcs.data.listing import folder_entries

    for nested in ("cifar-10-batches-py", "cifar-100-python"):
        if (folder / nested).is_dir():
            return _open_folder(folder / nested, split, shape, handling, resize)
    if (folder / "data_batch_1").is_file() or ((folder / "meta").is_file() and (folder / "train").is_file()):
        return _open_cifar(folder, split, shape, handling)
    for suffix in (*_TAR, ".npz", ".mat"):
        for name in ("train", "train_32x32"):
            if (folder / f"{name}{suffix}").is_file():
                return _open_file(folder / f"{name}{suffix}", split, shape, handling, resize)
    entries = ((folder, entry) for entry in folder_entries(folder))
    return ImageFiles(entries, split, shape, shown(str(folder)), handling, resize)


def _open_file(file: Path, split: str, shape: Shape, handling: Handling, resize: Resize) -> Dataset:
    from edge_bcs.data.images import ImageFiles, check_channels
    from edge_bcs.data.listing import archive_entries
    from edge_bcs.data.readers import compressed_rows, npz_rows, svhn_rows
    from edge_bcs.data.store import Stored

    name = file.name.lower()
    sibling = file.with_name("test" + file.name[5:]) if name.startswith("train") else None
    files = [(file, "")] if sibling is None or not sibling.is_file() else [(file, "train"), (sibling, "test")]
    paths = [path for path, _ in files]
    if name.endswith(".tar"):
        entries = ((path, entry) for path, kind in files for entry in archive_entries(path, kind))
        return ImageFiles(entries, split, shape, shown(str(file)), handling, resize)
    readers: dict[str, Callable[[Path, str, Shape], Iterable[Decoded]]]
    unpacked = partial(compressed_rows, resize=resize)
    readers = {".npz": npz_rows, ".mat": svhn_rows, **dict.fromkeys(_TAR[1:], unpacked)}
    read = next((reader for suffix, reader in readers.items() if name.endswith(suffix)), None)
    if read is None:
        raise EdgeBcsError(
            f"{file} is not data that can be read: expected a folder, .tar, .tar.gz, .npz or .mat."
        )
    if read is unpacked:
        check_channels(shape)

    def rows() -> Iterator[Decoded]:
        for path, kind in files:
            yield from read(path, kind, shape)

    return Stored(paths, rows, split, shape, handling=handling, resize=resize if read is unpacked else SQUASH)


def _open_cifar(folder: Path, split: str, shape: Shape, handling: Handling) -> Dataset:
    from edge_bcs.data.readers import (
        CIFAR10_FILES,
        CIFAR10_NAMES,
        CIFAR100_FILES,
        CIFAR100_NAMES,
        cifar_classes,
        cifar_folder_rows,
        unpickle,
    )
    from edge_bcs.data.store import Stored

    ten = (folder / "data_batch_1").is_file()
    names = CIFAR10_FILES if ten else CIFAR100_FILES
    files = [folder / name for name in names if (folder / name).is_file()]

    def classes() -> tuple[str, ...]:
        meta = folder / (CIFAR10_NAMES if ten else CIFAR100_NAMES)
        if not meta.is_file():
            return tuple(str(label) for label in range(10 if ten else 100))
        with meta.open("rb") as stream:
            return cifar_classes(unpickle(stream, str(meta)), 10 if ten else 100)

    return Stored(files, lambda: cifar_folder_rows(folder, shape), split, shape, classes, handling)


def __dir__() -> list[str]:
    return sorted(__all__)
