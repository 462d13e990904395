"""Data sets whose classes have names, and a network that knows some."""

# mypy: disable-error-code="arg-type, call-overload, comparison-overlap, var-annotated"

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_bcs.data import ArrayDataset

Array = np.ndarray[Any, Any]
COMPOSED, DECOMPOSED = unicodedata.normalize("NFC", "caf\u00e9"), unicodedata.normalize("NFD", "caf\u00e9")
ANIMALS = ("ant", "bee", "cat")
LIT = {"ant": slice(0, 3), "bee": slice(3, 5), "cat": slice(5, 8)}  # rows of an 8×8 image; of others all


def pictures(names: Sequence[str], each: int = 12, seed: int = 0) -> tuple[Array, Array]:
    """Images u8 [n, 1, 8, 8] with the rows of their class lit, and their labels i64[n] among ``names``."""
    one = np.random.default_rng(seed).integers(0, 60, (each, 1, 8, 8)).astype(np.uint8)
    images = np.concatenate([one] * len(names))
    labels = np.repeat(np.arange(len(names)), each)
    for image, label in zip(images, labels, strict=True):
        image[0, LIT.get(names[label], slice(None))] += 150
    return images, labels


def folders(root: Path, names: Sequence[str], each: int = 12) -> Path:
    """The same images as class folders, under the same file names whichever classes are there."""
    for name in names:
        for split, seed in (("train", 0), ("test", 1)):
            (root / split / name).mkdir(parents=True)
            for number, image in enumerate(pictures([name], each, seed)[0]):
                file = root / split / name / f"{number:03}.pgm"
                file.write_bytes(b"P5 8 8 255\n" + image.tobytes())
    return root


def arrays(names: Sequence[str], order: Sequence[str] | None = None, seed: int = 1) -> ArrayDataset:
    """Images of the classes ``names``, their labels numbered in ``order`` (default: that of ``names``)."""
    images, labels = pictures(names, seed=seed)
    order = tuple(order or names)
    numbered = np.array([order.index(name) for name in names])[labels]
    return ArrayDataset(images.astype(np.float32) / 255, numbered, order)
