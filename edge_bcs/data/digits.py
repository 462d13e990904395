"""The embedded data: scikit-learn's handwritten digits, enlarged by bilinear interpolation."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edge_bcs.data.dataset import Array, Dataset, Shape


class Digits(Dataset):
    """1,438 training and 359 test images (every fifth) of ten digits, real scans, 8×8 grey enlarged to
    ``shape``."""

    named = True

    def __init__(self, split: str, shape: Shape) -> None:
        with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as stored:
            images, labels = stored["images"], stored["labels"]
        chosen = (np.arange(len(labels)) % 5 == 4) == (split == "test")
        self.classes = tuple(str(digit) for digit in range(10))
        self.shape = shape
        self.labels = labels[chosen].astype(np.int64)
        self._pixels = images[chosen]
        self._rows = _bilinear(self._pixels.shape[1], shape[1])
        self._columns = _bilinear(self._pixels.shape[2], shape[2])

    def images(self, positions: Array) -> Array:
        """Return the digits at ``positions``, grey in every channel."""
        grey = self._pixels[positions].astype(np.float32) / np.float32(16)
        enlarged = np.einsum("yi,nij,xj->nyx", self._rows, grey, self._columns).clip(0, 1)
        return np.repeat(enlarged[:, None].astype(np.float32), self.shape[0], axis=1)


def _bilinear(source: int, target: int) -> Array:
    """Return the interpolation weights f32 [target, source]; pixel centres at (i + ½)/length, edges
    repeated."""
    place = ((np.arange(target) + 0.5) * source / target - 0.5).clip(0, source - 1)
    low = np.floor(place).astype(np.int64)
    high = np.minimum(low + 1, source - 1)
    weights = np.zeros((target, source))
    np.add.at(weights, (np.arange(target), low), 1 - (place - low))
    np.add.at(weights, (np.arange(target), high), place - low)
    return weights.astype(np.float32)
