"""The corruptions of CIFAR-10-C (Hendrycks & Dietterich, 2019) but frost, which is made of photographs.

Their definitions and strengths are those of the paper's released code, written anew in numpy and scipy, on
images of 8 bits a channel; a result is cut to whole levels, as the released images are. Where the code
says lengths in pixels, of images of 32×32, they are the same in larger ones, so that these are corrupted
less; what it says in shares of the side follows the image. Draws are Philox's, keyed by the seed, the
corruption, its severity and the image's place in its data set, so that an image is always corrupted alike.

Two notes on what the released images are: the swap of glass_blur copies one pixel over its neighbour,
since numpy's swap of two views does that; and an angle of a motion blur is drawn for each image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np

from edge_bcs.core import random
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.progress import Progress
from edge_bcs.core.settings import check_choice
from edge_bcs.data.dataset import Data, Dataset

try:
    from PIL import Image
    from scipy import ndimage
    from scipy.stats import poisson
except ImportError:  # on a board
    raise EdgeBcsError(
        "corruptions need scipy and Pillow: measure them on the host, or pip install 'edge-bcs[host]'"
    ) from None

Array = np.ndarray[Any, Any]
SEVERITIES = (1, 2, 3, 4, 5)
_GREY = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Draws:
    """Random numbers of a few images, one corruption and one severity.

    Attributes:
        places: of the images in their data set. seed, stream: what the numbers are keyed by.
    """

    places: Array
    seed: int
    stream: int

    def uniform(self, *shape: int, part: int = 0) -> Array:
        """Return f64 [n, *shape] in [0, 1); of another ``part`` other ones."""
        return self._each(random.uniform, shape, part)

    def normal(self, *shape: int, part: int = 0) -> Array:
        """Return f64 [n, *shape] of mean 0 and deviation 1."""
        return self._each(random.normal, shape, part)

    def _each(self, draw: Callable[..., Array], shape: tuple[int, ...], part: int) -> Array:
        count, step = math.prod(shape), self.stream << 8 | part
        rows = [
            draw(count, seed=self.seed, step=step, purpose=random.CORRUPTION, start=int(place) << 32)
            for place in self.places
        ]
        return np.stack(rows).astype(np.float64).reshape(-1, *shape)


Corruption = Callable[[Array, int, Draws], Array]
"""From images f64 [n, C, H, W] in [0, 1], of whole levels, and a severity to images of any number."""


def gaussian_noise(x: Array, severity: int, draws: Draws) -> Array:
    """Add normal noise."""
    return x + (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1] * draws.normal(*x.shape[1:])


def shot_noise(x: Array, severity: int, draws: Draws) -> Array:
    """Count photons, of which white has so many on average."""
    photons = (500, 250, 100, 75, 50)[severity - 1]
    levels = np.rint(x * 255).astype(np.int64)
    ends = _poisson_ends(photons)
    # The counts of all levels in one ascending row: level + probability of at most so many.
    found = np.searchsorted(ends.ravel(), levels + draws.uniform(*x.shape[1:]), side="right")
    return np.asarray((found - levels * ends.shape[1]) / photons)


@lru_cache(maxsize=8)
def _poisson_ends(photons: int) -> Array:
    """level + P(at most k photons), f64 [256, k]; what lies above the last k is at most that."""
    most = photons + 12 * math.isqrt(photons) + 12
    levels = np.arange(256)[:, None]
    return np.asarray(levels + np.minimum(poisson.cdf(np.arange(most), levels / 255 * photons), 1 - 2**-26))


def impulse_noise(x: Array, severity: int, draws: Draws) -> Array:
    """Make a share of the numbers 0 or 1."""
    share = (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
    hit = draws.uniform(*x.shape[1:]) <= share
    return np.where(hit, draws.uniform(*x.shape[1:], part=1) <= 0.5, x)


def defocus_blur(x: Array, severity: int, draws: Draws) -> Array:
    """Convolve with a disk, itself blurred against its steps."""
    radius, alias = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))[severity - 1]
    across = np.arange(-8, 9)
    disk = (across[:, None] ** 2 + across**2 <= radius**2).astype(np.float64)
    weights = np.exp(-(np.arange(-1, 2) ** 2) / (2 * alias**2))
    kernel = ndimage.convolve(
        disk / disk.sum(), np.outer(weights, weights) / weights.sum() ** 2, mode="mirror"
    )
    return np.asarray(ndimage.correlate(x, kernel[None, None], mode="mirror"))


def glass_blur(x: Array, severity: int, draws: Draws) -> Array:
    """Move pixels by one at random, between two blurs."""
    sigma, reach, rounds = ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))[severity - 1]
    x = _levels(_blurred(x, sigma))
    height, width = x.shape[2:]
    moves = np.floor(draws.uniform(rounds, height, width, 2) * 2 * reach).astype(np.int64) - reach
    every = np.arange(len(x))
    for moved in range(rounds):
        for row in range(height - reach, reach, -1):
            for column in range(width - reach, reach, -1):
                across, down = moves[:, moved, row, column].T
                x[every, :, row, column] = x[every, :, row + down, column + across]
    return _blurred(x, sigma)


def motion_blur(x: Array, severity: int, draws: Draws) -> Array:
    """Blur along a line of up to 45° to the horizontal."""
    radius, sigma = ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))[severity - 1]
    angles = 90 * draws.uniform() - 45
    blurred = [_along_a_line(image, radius, sigma, angle) for image, angle in zip(x, angles, strict=True)]
    return np.asarray(np.rint(np.stack(blurred) * 255) / 255)


def _along_a_line(image: Array, radius: int, sigma: float, angle: float) -> Array:
    """ImageMagick's motion blur of [C, H, W]: half a Gaussian along a line, whose pixels are the nearest."""
    height, width = image.shape[1:]
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    down, across = (
        np.ceil(steps * turn(math.radians(angle)) - 0.5).astype(np.int64) for turn in (math.sin, math.cos)
    )
    blurred = np.zeros_like(image)
    for weight, below, beside in zip(weights / weights.sum(), down, across, strict=True):
        rows = np.clip(np.arange(height) + below, 0, height - 1)
        columns = np.clip(np.arange(width) + beside, 0, width - 1)
        blurred += weight * image[:, rows[:, None], columns]
    return blurred


def zoom_blur(x: Array, severity: int, draws: Draws) -> Array:
    """Average the image with what is seen from nearer and nearer."""
    factors = np.arange(1, (1.06, 1.11, 1.16, 1.21, 1.26)[severity - 1], 0.01)
    return np.asarray((x + sum(_zoomed(x, factor) for factor in factors)) / (len(factors) + 1))


def _zoomed(x: Array, factor: float) -> Array:
    """The middle of images [n, C, H, W], bilinearly enlarged to their size."""
    height, width = x.shape[2:]
    tall, wide = math.ceil(height / factor), math.ceil(width / factor)
    top, left = (height - tall) // 2, (width - wide) // 2
    part = x[:, :, top : top + tall, left : left + wide]
    down, across = _enlarging(tall, factor), _enlarging(wide, factor)
    large = down @ part @ across.T
    top, left = (large.shape[2] - height) // 2, (large.shape[3] - width) // 2
    return np.asarray(large[:, :, top : top + height, left : left + width])


def _enlarging(length: int, factor: float) -> Array:
    """What makes a side longer, f64 [longer, length]: bilinear, and both ends stay where they are, as
    `scipy.ndimage.zoom` has it."""
    longer = round(length * factor)
    places = np.arange(longer) * ((length - 1) / max(longer - 1, 1))
    return np.asarray(np.maximum(0.0, 1 - np.abs(places[:, None] - np.arange(length))))


def snow(x: Array, severity: int, draws: Draws) -> Array:
    """Let it snow: flakes that fall along a line, and a whiter image."""
    mean, deviation, zoom, least, radius, sigma, share = (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    )[severity - 1]
    flakes = _zoomed(mean + deviation * draws.normal(1, *x.shape[2:]), zoom)
    flakes = _levels(np.where(flakes < least, 0, flakes))
    angles = -135 + 90 * draws.uniform(part=1)
    fallen = np.stack(
        [_along_a_line(layer, int(radius), sigma, angle) for layer, angle in zip(flakes, angles, strict=True)]
    )
    fallen = np.rint(fallen * 255) / 255
    white = np.maximum(x, _grey(x) * 1.5 + 0.5)
    return np.asarray(share * x + (1 - share) * white + fallen + fallen[:, :, ::-1, ::-1])


def fog(x: Array, severity: int, draws: Draws) -> Array:
    """Add a fractal, and keep the largest number where it was."""
    amount, decay = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))[severity - 1]
    height, width = x.shape[2:]
    largest = x.max(axis=(1, 2, 3), keepdims=True)
    haze = _plasma(1 << (max(height, width) - 1).bit_length(), decay, draws)[:, None, :height, :width]
    return np.asarray((x + amount * haze) * largest / (largest + amount))


def _plasma(size: int, decay: float, draws: Draws) -> Array:
    """Heights f64 [n, size, size] from 0 to 1 by diamonds and squares, on a torus."""
    heights = np.zeros((len(draws.places), size, size))
    step, wibble, part = size, 100.0, 0

    def wibbled(sums: Array) -> Array:
        nonlocal part
        part += 1
        return np.asarray(sums / 4 + wibble * wibble * (2 * draws.uniform(*sums.shape[1:], part=part) - 1))

    while step >= 2:
        half = step // 2
        corners = heights[:, ::step, ::step]
        sums = corners + np.roll(corners, -1, axis=1)
        heights[:, half::step, half::step] = wibbled(sums + np.roll(sums, -1, axis=2))
        middles = heights[:, half::step, half::step]
        above = middles + np.roll(middles, 1, axis=1) + corners + np.roll(corners, -1, axis=2)
        heights[:, ::step, half::step] = wibbled(above)
        beside = middles + np.roll(middles, 1, axis=2) + corners + np.roll(corners, -1, axis=1)
        heights[:, half::step, ::step] = wibbled(beside)
        step, wibble = half, wibble / decay
    heights -= heights.min(axis=(1, 2), keepdims=True)
    return np.asarray(heights / heights.max(axis=(1, 2), keepdims=True))


def brightness(x: Array, severity: int, draws: Draws) -> Array:
    """Raise the value of each pixel, its largest number; hue and saturation stay."""
    value = x.max(axis=1, keepdims=True)
    raised = np.clip(value + (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1], 0, 1)
    return np.asarray(np.where(value > 0, x / np.where(value > 0, value, 1), 1) * raised)


def contrast(x: Array, severity: int, draws: Draws) -> Array:
    """Draw the numbers of each channel towards their mean."""
    mean = x.mean(axis=(2, 3), keepdims=True)
    return np.asarray(mean + (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1] * (x - mean))


def elastic_transform(x: Array, severity: int, draws: Draws) -> Array:
    """Move three points of the image at random, and then every pixel a little."""
    height, width = x.shape[2:]
    side = min(height, width)
    far, sigma, bend = (
        side * part
        for part in (
            (0, 0, 0.08),
            (0.05, 0.2, 0.07),
            (0.08, 0.06, 0.06),
            (0.1, 0.04, 0.05),
            (0.1, 0.03, 0.03),
        )[severity - 1]
    )
    # Points are [column, row].
    centre, reach = np.array([width // 2, height // 2]), side // 3
    before = centre + reach * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = before + bend * (2 * draws.uniform(3, 2) - 1)
    fields = 2 * draws.uniform(2, height, width, part=1) - 1
    result = np.empty_like(x)
    for number, image in enumerate(x):
        # From where points came, as [row, column] = turn · [row, column] + shift.
        ends = np.column_stack([moved[number][:, ::-1], np.ones(3)])
        turn = np.linalg.solve(ends, before[:, ::-1].astype(np.float64)).T
        field = [
            far * ndimage.gaussian_filter(part, sigma, mode="reflect", truncate=3) for part in fields[number]
        ]
        rows, columns = np.mgrid[:height, :width] + np.stack(field)
        for channel, plane in enumerate(image):
            warped = ndimage.affine_transform(plane, turn[:, :2], turn[:, 2], order=1, mode="mirror")
            result[number, channel] = ndimage.map_coordinates(
                warped, [rows, columns], order=1, mode="reflect"
            )
    return result


def pixelate(x: Array, severity: int, draws: Draws) -> Array:
    """Make it smaller and large again."""
    share = (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1]
    height, width = x.shape[2:]
    small = (max(1, int(width * share)), max(1, int(height * share)))

    def made(plane: Image.Image) -> Image.Image:
        return plane.resize(small, Image.Resampling.BOX).resize((width, height), Image.Resampling.BOX)

    return _by_pillow(x, made)


def jpeg_compression(x: Array, severity: int, draws: Draws) -> Array:
    """Store it as JPEG."""
    quality = (80, 65, 58, 50, 40)[severity - 1]

    def made(picture: Image.Image) -> Image.Image:
        stored = BytesIO()
        picture.save(stored, "JPEG", quality=quality)
        return Image.open(stored)

    return _by_pillow(x, made)


def _by_pillow(x: Array, made: Callable[[Image.Image], Image.Image]) -> Array:
    """What Pillow makes of images of three channels, or of each channel."""
    levels = np.rint(x * 255).astype(np.uint8)
    if x.shape[1] == 3:
        pictures = [np.asarray(made(Image.fromarray(image.transpose(1, 2, 0)))) for image in levels]
        return np.stack(pictures).transpose(0, 3, 1, 2) / 255
    planes = [[np.asarray(made(Image.fromarray(plane))) for plane in image] for image in levels]
    return np.asarray(planes) / 255


def _levels(x: Array) -> Array:
    """Cut numbers to whole levels of 255 in [0, 1]."""
    return np.asarray(np.floor(np.clip(x, 0, 1) * 255) / 255)


def _blurred(x: Array, sigma: float) -> Array:
    return np.asarray(ndimage.gaussian_filter(x, (0, 0, sigma, sigma), mode="nearest", truncate=4))


def _grey(x: Array) -> Array:
    if x.shape[1] != 3:
        return np.asarray(x.mean(axis=1, keepdims=True))
    return np.asarray(np.tensordot(x, np.array(_GREY), axes=(1, 0))[:, None])


CORRUPTIONS: dict[str, Corruption] = {
    corruption.__name__: corruption
    for corruption in (
        gaussian_noise,
        shot_noise,
        impulse_noise,
        defocus_blur,
        glass_blur,
        motion_blur,
        zoom_blur,
        snow,
        fog,
        brightness,
        contrast,
        elastic_transform,
        pixelate,
        jpeg_compression,
    )
}
"""By the names of CIFAR-10-C's files, in its order."""


def corrupted(images: Array, places: Array, name: str, severity: int, *, seed: int = 0) -> Array:
    """Return images f32 [n, C, H, W] in [0, 1] corrupted, of whole levels of 255.

    Args:
        images: f32 [n, C, H, W] in [0, 1]. places: int [n], theirs in their data set, which draws go by.
        name: of the corruption. severity: 1 to 5. seed: of the draws.

    Raises:
        EdgeBcsError: a corruption or a severity that there is not.
    """
    check_choice("corruption", name, tuple(CORRUPTIONS))
    if severity not in SEVERITIES:
        raise EdgeBcsError(f"the severity of a corruption is 1 to 5, not {severity}")
    stream = list(CORRUPTIONS).index(name) * len(SEVERITIES) + severity
    levels = np.rint(np.asarray(images, np.float64) * 255) / 255
    made = CORRUPTIONS[name](levels, severity, Draws(np.asarray(places), seed, stream))
    # A hair above: what was a whole level and is only divided and multiplied again must stay one.
    whole = np.floor(np.clip(made, 0, 1) * 255 + 1e-6)
    return np.asarray(whole / 255, np.float32)


class Corrupted(Dataset):
    """A data set whose images are corrupted when they are read.

    Args:
        data: the other one. name, severity, seed: see `corrupted`.
    """

    named = True

    def __init__(self, data: Data, name: str, severity: int, seed: int = 0) -> None:
        self.classes, self.shape, self.labels = data.classes, data.shape, data.labels
        self._data, self._name, self._severity, self._seed = data, name, severity, seed

    def images(self, positions: Array) -> Array:
        """Return the images at ``positions``, corrupted."""
        images = self._data.read(positions)[0]
        return corrupted(images, positions, self._name, self._severity, seed=self._seed)


def under_corruptions(
    answer: Callable[[Array], Array],
    data: Data,
    *,
    samples: int | None = None,
    seed: int = 0,
    batch_size: int = 128,
    progress: bool = False,
) -> dict[str, Any]:
    """Return how often a network is right about corrupted images.

    Args:
        answer: from images f32 [n, C, H, W] in [0, 1] to the classes i64[n] that the network takes them for.
        data: with the network's labels.
        samples: only so many images, the first of the shuffle that `measures.evaluate` takes.
        seed: of the corruptions. batch_size: images at a time. progress: show how far it is.

    Returns:
        {"corruptions": {name: [share of right answers at severity 1, …, 5]}, "mean_corruption_acc": the mean
        of all of them}.
    """
    order = data.order(0, 0, shuffle=samples is not None and samples < len(data))[:samples]
    shares: dict[str, list[float]] = {name: [] for name in CORRUPTIONS}
    total = len(order) * len(CORRUPTIONS) * len(SEVERITIES)
    done = 0
    with Progress("corruptions", total, unit="images", shown=progress) as bar:
        for name, found in shares.items():
            for severity in SEVERITIES:
                images, right = Corrupted(data, name, severity, seed), 0
                for first in range(0, len(order), batch_size):
                    x, labels = images.read(order[first : first + batch_size])
                    right += int((answer(x) == labels).sum())
                    done += len(x)
                    bar.update(done, text=f"{name}, severity {severity}")
                found.append(right / len(order))
    return {"corruptions": shares, "mean_corruption_acc": float(np.mean(list(shares.values())))}
