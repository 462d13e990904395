"""The second data set of RST: images with the labels that a network gave them (Carmon et al., 2019).

Read from an .npz (x and y, or images and labels), whole: nothing is held out for testing. The file that the
authors publish is a pickle, {"data": u8 [n, 32, 32, 3], "extrapolated_targets": int [n]}; it is read only if
the caller says so, by an unpickler that builds arrays and runs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.data.dataset import Dataset, Shape
from edge_bcs.data.decoding import require_memory
from edge_bcs.data.readers import npz_rows, read_arrays
from edge_bcs.data.store import Rows, Stored

_PICKLES = (".pickle", ".pkl")
_LABELS = ("extrapolated_targets", "targets", "labels")
_LARGEST = 4 << 30
_AT_A_TIME = 256


def open_pseudo_labelled(path: str | Path, shape: Shape, *, trust_pickle: bool = False) -> Dataset:
    """Open a pseudo-labelled data set of images of `shape` (C, H, W).

    Raises:
        EdgeBcsError: no such file, neither .npz nor pickle, a pickle without `trust_pickle`, or a file that
            is damaged, holds something else, or asks for more than arrays.
    """
    file = Path(path)
    if not file.is_file():
        raise EdgeBcsError(f"the pseudo-labelled data {file} does not exist; give an .npz file.")
    if file.suffix == ".npz":
        return Stored([file], lambda: npz_rows(file, "", shape), "", shape)
    if file.suffix not in _PICKLES:
        raise EdgeBcsError(f"pseudo-labelled data is an .npz file (or the authors' .pickle), not {file}.")
    if not trust_pickle:
        raise EdgeBcsError(f"{file} is a pickle; convert it to .npz, or say --trust-pickle to read it.")
    return Stored([file], lambda: _pickle_rows(file, shape), "", shape)


def _pickle_rows(file: Path, shape: Shape) -> Iterator[Rows]:
    require_memory(3 * file.stat().st_size, str(file), "convert it to .npz on a larger machine")
    with file.open("rb") as stream:
        named = read_arrays(stream, str(file), "a pickle of arrays", _LARGEST)
    images = named.get("data")
    labels = next((named[name] for name in _LABELS if name in named), None)
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4 or labels is None:
        raise EdgeBcsError(f"{file} lacks data u8 [n, H, W, C] or {_LABELS[0]}.")
    channels, height, width = shape
    if images.shape[1:] != (height, width, channels):
        raise EdgeBcsError(
            f"{file} holds images {list(images.shape[1:])}; the network takes {[height, width, channels]}."
        )
    labels = np.asarray(labels)
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu" or (len(labels) and labels.min() < 0):
        raise EdgeBcsError(f"{file} does not have one label, from 0, for each image.")
    for first in range(0, len(labels), _AT_A_TIME):
        part = slice(first, first + _AT_A_TIME)
        pixels = np.ascontiguousarray(images[part].transpose(0, 3, 1, 2))
        yield Rows("", labels[part], pixels, f"{file}:{first}")
