"""Chains of small changes, mixed: what makes a network stand other cameras, light and weather (AugMix).

Hendrycks et al., "AugMix: A Simple Data Processing Method to Improve Robustness and Uncertainty", ICLR 2020,
algorithm 1, without its consistency loss: three chains of one to three operations each, mixed with weights
from Dirichlet(1, 1, 1), and mixed with the image itself by a share from Beta(1, 1). Operations and their
strengths are those of the paper (its severity 3 of 10): autocontrast, equalize, posterize, solarize, rotate,
shear and translate along both axes.

The same bits on every machine, as in `edge_bcs.data.augmentation`: weights are distances between sorted
uniform draws, which is Dirichlet(1, 1, 1); an angle is given by the tangent of its half.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
CHAINS, LONGEST = 3, 3
WORDS = 3 + CHAINS * (1 + 2 * LONGEST)
"""Draws that `mixed` takes of an image."""
_LEVELS = np.float32(255)
_LEAST_STRENGTH, _MOST_STRENGTH = 0.01, 0.3  # of what each operation does at most
_HALF_ANGLE = 0.2679491924311227  # tangent of 15°: an angle up to 30°
_SHEAR = 0.3  # of the other side
_TRANSLATE = 1 / 3  # of the size
_BITS = 4  # of posterize, without strength


def mixed(image: Array, draws: Array) -> Array:
    """Return an image f32 [C, H, W] in [0, 1] as AugMix changes it.

    Args:
        draws: f64 [`WORDS`], uniform in [0, 1): the share of the mixture, two that weigh the chains; of each
            chain its length, and of each operation which one it is and its strength with its sign.
    """
    share, *cuts = draws[:3]
    low, high = min(cuts), max(cuts)
    result = np.zeros_like(image)
    for number, weight in enumerate((low, high - low, 1 - high)):
        own = draws[3 + number * (1 + 2 * LONGEST) :][: 1 + 2 * LONGEST]
        changed = image
        for place in range(1 + int(own[0] * LONGEST)):
            kind, strength = own[1 + 2 * place], own[2 + 2 * place]
            changed = _OPERATIONS[int(kind * len(_OPERATIONS))](changed, *_strength(strength))
        result += np.float32(weight) * changed
    return np.clip(between(image, result, np.float32(share)), 0, 1)


def _strength(draw: float) -> tuple[float, float]:
    """A strength and a sign of one draw."""
    sign, rest = (1.0, 2 * draw) if draw < 0.5 else (-1.0, 2 * draw - 1)
    return _LEAST_STRENGTH + (_MOST_STRENGTH - _LEAST_STRENGTH) * rest, sign


def between(one: Array, other: Array, weight: Any) -> Array:
    """Return ``one`` + ``weight``·(``other`` − ``one``), each rounded by itself."""
    change = other - one
    change *= weight
    change += one
    return change


def _levels(image: Array) -> Array:
    """Levels i64 0 to 255 of an image."""
    return np.rint(image * _LEVELS).astype(np.int64)


def _autocontrast(image: Array, _: float, __: float) -> Array:
    """Each channel from its darkest to its brightest pixel."""
    low, high = image.min(axis=(1, 2), keepdims=True), image.max(axis=(1, 2), keepdims=True)
    spread = high - low
    return np.where(spread > 0, (image - low) / np.where(spread > 0, spread, np.float32(1)), image)


def _equalize(image: Array, _: float, __: float) -> Array:
    """Each channel with as many pixels of each brightness, by its histogram of 256 levels."""
    result = np.empty_like(image)
    for number, channel in enumerate(_levels(image)):
        counts = np.bincount(channel.reshape(-1), minlength=256)
        below = np.cumsum(counts)
        rest = below[-1] - counts[np.flatnonzero(counts)[-1]]
        if rest == 0:
            result[number] = image[number]
            continue
        shares = ((below - counts) / rest).astype(np.float32)
        result[number] = np.minimum(shares, np.float32(1))[channel]
    return result


def _posterize(image: Array, strength: float, _: float) -> Array:
    step = 1 << (8 - (_BITS - int(strength * _BITS)))
    return (_levels(image) // step * step).astype(np.float32) / _LEVELS


def _solarize(image: Array, strength: float, _: float) -> Array:
    """Bright pixels turned dark."""
    return np.where(image < np.float32(1 - strength), image, np.float32(1) - image)


def _rotate(image: Array, strength: float, sign: float) -> Array:
    half = sign * strength * _HALF_ANGLE
    length = 1 + half * half
    cosine, sine = (1 - half * half) / length, 2 * half / length
    return _moved(image, ((cosine, sine), (-sine, cosine)), (0.0, 0.0))


def _shear_x(image: Array, strength: float, sign: float) -> Array:
    return _moved(image, ((1.0, 0.0), (sign * strength * _SHEAR, 1.0)), (0.0, 0.0))


def _shear_y(image: Array, strength: float, sign: float) -> Array:
    return _moved(image, ((1.0, sign * strength * _SHEAR), (0.0, 1.0)), (0.0, 0.0))


def _translate_x(image: Array, strength: float, sign: float) -> Array:
    return _moved(image, ((1.0, 0.0), (0.0, 1.0)), (0.0, sign * strength * _TRANSLATE * image.shape[2]))


def _translate_y(image: Array, strength: float, sign: float) -> Array:
    return _moved(image, ((1.0, 0.0), (0.0, 1.0)), (sign * strength * _TRANSLATE * image.shape[1], 0.0))


def _moved(image: Array, turn: tuple[tuple[float, float], ...], shift: tuple[float, float]) -> Array:
    """An image whose pixel (row, column) from the middle is that at turn·(row, column) + shift, bilinearly;
    beyond its border its outermost pixels are repeated."""
    height, width = image.shape[1:]
    row = (np.arange(height) - (height - 1) / 2)[:, None]
    column = (np.arange(width) - (width - 1) / 2)[None]
    rows = turn[0][0] * row + turn[0][1] * column + shift[0] + (height - 1) / 2
    columns = turn[1][0] * row + turn[1][1] * column + shift[1] + (width - 1) / 2
    (top, bottom, down), (left, right, along) = around(rows, height), around(columns, width)
    upper = between(image[:, top, left], image[:, top, right], along)
    lower = between(image[:, bottom, left], image[:, bottom, right], along)
    return between(upper, lower, down)


def around(places: Array, length: int) -> tuple[Array, Array, Array]:
    """Return, of each place on a side: the pixels before and after it in the image, and the weight of the
    second."""
    before = np.floor(places)
    weight = (places - before).astype(np.float32)
    low = np.clip(before, 0, length - 1).astype(np.int64)
    high = np.clip(before + 1, 0, length - 1).astype(np.int64)
    return low, high, weight


_OPERATIONS: tuple[Callable[[Array, float, float], Array], ...] = (
    _autocontrast, _equalize, _posterize, _solarize, _rotate, _shear_x, _shear_y, _translate_x, _translate_y,
)  # fmt: skip
