"""Images as a training sees them: shifted and mirrored, or cropped and coloured as photographs are.

| name | each image is |
| --- | --- |
| none | as it is |
| mirror | mirrored with probability ½ |
| shift | shifted by up to ±10 % on each axis, and mirrored with probability ½ |
| photo | cropped, mirrored with probability ½, and given another brightness, contrast and saturation |
| zoom | the same, but nearer or farther: what it shows has sides of 60 to 160 % of the image's |
| mix | what zoom does, and then chains of small changes, mixed (`edge_bcs.data.mixing`) |

A crop has 35 to 100 % of the image's area, sides from 3:4 to 4:3, lies anywhere, and is brought back to the
image's size. Farther away, the image's outermost pixels are repeated around it. Brightness, contrast and
saturation change by a factor from 0.7 to 1.3 each.

What happens to an image is a function of (seed, epoch, position), whoever reads it with whom. Only operations
that IEEE 754 rounds exactly are used, in an order of their own, and sums of whole numbers: the same bits on
every machine. The crop is taken from the image at the network's size, so that it works for every kind of
data, in the memory of one image more.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import numpy as np

from edge_bcs.core import random
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.settings import AUGMENTATIONS
from edge_bcs.data import mixing

Array = np.ndarray[Any, Any]
Augment = bool | Literal["none", "shift", "photo", "zoom", "mix", "mirror"]
"""True is "shift", False is "none"."""
SHIFT = 0.1  # of the size, on each axis
_WORDS = 8  # of an image, before mixing
_LEAST_AREA = 0.35
_LEAST_SIDE = 0.6  # from here on by up to 1
_COLOUR = 0.3
_GREY = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601
_FINE = 1 << 24  # steps of brightness from 0 to 1 in which an image's mean is summed


def named(augment: Augment | str) -> str:
    """Return the augmentation's name; EdgeBcsError if there is none of it."""
    name = {True: "shift", False: "none"}.get(augment, augment) if isinstance(augment, bool) else augment
    if name not in AUGMENTATIONS:
        *others, last = AUGMENTATIONS
        raise EdgeBcsError(f"the augmentation is {', '.join(others)} or {last}, not {augment!r}.")
    return str(name)


def augmentation_of(augment: Augment | str) -> Augment:
    """Return it as every data set takes it: True or False, which is all that there was in 0.1, or a name."""
    name = named(augment)
    return name == "shift" if name in ("none", "shift") else cast(Augment, name)


def augmented(images: Array, positions: Array, augment: Augment, *, seed: int, epoch: int) -> Array:
    """Return images f32 [m, C, H, W] in [0, 1], as a training sees those at ``positions`` in an epoch."""
    name = named(augment)
    if name == "none":
        return images
    if name == "shift":
        return shift_and_flip(images, positions, seed=seed, epoch=epoch)
    if name == "mirror":
        mirrored = _mirrored(_words(positions, seed, epoch))
        return np.where(mirrored[:, None, None, None], images[..., ::-1], images)
    return photograph(images, positions, seed=seed, epoch=epoch, zoom=name != "photo", mix=name == "mix")


def shift_and_flip(images: Array, positions: Array, *, seed: int, epoch: int) -> Array:
    """Return images f32 [m, C, H, W] shifted by up to ±10 % on each axis and mirrored with probability ½.

    What leaves on one side is filled with the nearest pixel on the other. Word 0, 1 and 2 of block
    ``position`` of the stream (seed, epoch, AUGMENT) give the vertical shift, the horizontal shift and the
    mirror.
    """
    height, width = images.shape[2:]
    words = _words(positions, seed, epoch)
    rows, columns = _shifted(height, words[:, 0]), _shifted(width, words[:, 1])
    mirrored = _mirrored(words)
    columns[mirrored] = columns[mirrored, ::-1]
    result = np.empty_like(images)
    for number, image in enumerate(images):
        result[number] = image[:, rows[number][:, None], columns[number]]
    return result


def _words(positions: Array, seed: int, epoch: int) -> Array:
    """Return i64[m, 4], of the images at these positions."""
    return random.blocks(positions, seed=seed, step=epoch, purpose=random.AUGMENT).astype(np.int64)


def _mirrored(words: Array) -> Array:
    """Which images are mirrored, bool[m]: the same with "shift" and "mirror"."""
    return np.asarray(words[:, 2] >> 31 == 1)


def _shifted(length: int, words: Array) -> Array:
    """Which place of a side each one shows, i64[m, length], of the images with these words i64[m]."""
    reach = round(SHIFT * length)
    shifts = (words * (2 * reach + 1) >> 32) - reach
    return np.clip(np.arange(length) - shifts[:, None], 0, length - 1)


def photograph(
    images: Array, positions: Array, *, seed: int, epoch: int, zoom: bool = False, mix: bool = False
) -> Array:
    """Return images f32 [m, C, H, W] in [0, 1], cropped, mirrored and coloured at random.

    With ``zoom`` they are seen from nearer or farther instead of cropped alone; with ``mix`` they are changed
    by `mixing.mixed` after that.

    Blocks n·``position`` to n·(``position`` + 1) − 1 of the stream (seed, epoch, AUGMENT), n = 2 and with
    ``mix`` 8, give, a word each: area, ratio of the sides, top, left; mirror, brightness, contrast,
    saturation; and what `mixing.mixed` takes.
    """
    height, width = images.shape[2:]
    count = (_WORDS + mixing.WORDS * mix) // 4
    blocks = count * np.asarray(positions)[:, None] + np.arange(count)
    words = random.blocks(blocks.reshape(-1), seed=seed, step=epoch, purpose=random.AUGMENT)
    words = words.reshape(-1, 4 * count)
    draws = random.uniform_from_words(words).astype(np.float64)
    result = np.empty_like(images)
    for number, (image, draw) in enumerate(zip(images, draws, strict=True)):
        tall, wide = (_zoomed if zoom else _cropped)(draw[0], _aspect(draw[1]))
        rows = _places(height, tall, draw[2])
        columns = _places(width, wide, draw[3])
        if draw[4] >= 0.5:
            columns = columns[0][::-1], columns[1][::-1], columns[2][::-1]
        seen = _coloured(_resampled(image, rows, columns), *(1 + _COLOUR * (2 * draw[5:_WORDS] - 1)))
        result[number] = mixing.mixed(seen, draw[_WORDS:]) if mix else seen
    return result


def _aspect(draw: float) -> float:
    """From 3/4 to 4/3, and as often above 1 as below; a logarithm would not be the same everywhere."""
    return (6 + 2 * draw) / (8 - 2 * draw)


def _cropped(draw: float, aspect: float) -> tuple[float, float]:
    """Height and width of a crop as shares of the image's, from a draw in [0, 1)."""
    area = _LEAST_AREA + (1 - _LEAST_AREA) * draw
    tall, wide = np.sqrt(area / aspect), np.sqrt(area * aspect)
    return min(float(tall), 1.0), min(float(wide), 1.0)


def _zoomed(draw: float, aspect: float) -> tuple[float, float]:
    """The same, where they may be larger than the image."""
    area = (_LEAST_SIDE + draw) * (_LEAST_SIDE + draw)
    return float(np.sqrt(area / aspect)), float(np.sqrt(area * aspect))


def _places(length: int, share: float, draw: float) -> tuple[Array, Array, Array]:
    """Of each pixel of a side: between which two it lies, as `mixing.around` has it."""
    first = draw * (1 - share) * length
    return mixing.around(first + (np.arange(length) + 0.5) * share - 0.5, length)


def _resampled(image: Array, rows: tuple[Array, Array, Array], columns: tuple[Array, Array, Array]) -> Array:
    """An image [C, H, W], bilinearly at these rows and columns."""
    low, high, weight = rows
    lines = mixing.between(image[:, low], image[:, high], weight[:, None])
    low, high, weight = columns
    return mixing.between(lines[:, :, low], lines[:, :, high], weight)


def _coloured(image: Array, brightness: float, contrast: float, saturation: float) -> Array:
    """An image [C, H, W] in [0, 1], with these factors one after the other; beyond [0, 1] it is cut."""
    image = np.clip(image * np.float32(brightness), 0, 1)
    sums = np.rint(_grey(image).astype(np.float64) * _FINE).astype(np.int64).sum()
    mean = np.float32(int(sums) / (_FINE * image.shape[1] * image.shape[2]))
    image = np.clip(mixing.between(np.broadcast_to(mean, image.shape), image, np.float32(contrast)), 0, 1)
    if len(image) == 3:
        image = np.clip(mixing.between(_grey(image)[None], image, np.float32(saturation)), 0, 1)
    return image


def _grey(image: Array) -> Array:
    if len(image) != 3:
        total = image[0].copy()
        for channel in image[1:]:
            total += channel
        return np.asarray(total / np.float32(len(image)))
    grey = image[0] * np.float32(_GREY[0])
    for channel, share in zip(image[1:], _GREY[1:], strict=True):
        grey += channel * np.float32(share)
    return np.asarray(grey)
