"""Images in the operator library: Pillow's resizing and our augmentation in numpy, to the bit."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.native_images import KINDS, augmented

from edge_bcs.core.resizing import SQUASH, Box, Resize
from edge_bcs.data import augmentation
from edge_bcs.data.resampling import Resizer

Image = pytest.importorskip("PIL.Image")
Array = np.ndarray[Any, Any]


def resized(image: Any, size: tuple[int, int], box: Box, rows: int = 7) -> Array:
    """The image as the library resizes it, given so many rows at a time."""
    pixels = np.asarray(image)
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    with Resizer(image.size, pixels.shape[2], box, size) as resizer:
        for first in range(0, len(pixels), rows):
            resizer.take(pixels[first : first + rows])
    return resizer.result


def by_pillow(image: Any, size: tuple[int, int], box: Box) -> tuple[Array, Array]:
    """The image as Pillow resizes it, first across and then down, and in the order that its version takes."""
    across = image.resize(
        (size[0], image.height), Image.Resampling.BILINEAR, (box[0], 0, box[2], image.height)
    )
    both = across.resize(size, Image.Resampling.BILINEAR, (0, box[1], size[0], box[3]))
    whole = image.resize(size, Image.Resampling.BILINEAR, box)
    shape = (size[1], size[0], -1)
    return np.asarray(both).reshape(shape), np.asarray(whole).reshape(shape).astype(int)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("seed", range(40))
def test_resizing_gives_the_bits_of_pillow(mode: str, seed: int) -> None:
    draws = np.random.default_rng(seed)
    width, height = draws.integers(1, 300, 2)
    shape = (height, width) if mode == "L" else (height, width, 3)
    image = Image.fromarray(draws.integers(0, 256, shape).astype(np.uint8))
    size = tuple(draws.integers(1, 100, 2).tolist())
    for resize in (SQUASH, Resize(1.0), Resize(float(draws.uniform(0.05, 1)))):
        box = resize.box((float(width), float(height)), size)
        found, (theirs, of_this_version) = resized(image, size, box), by_pillow(image, size, box)
        assert (found == theirs).all()
        assert np.abs(found - of_this_version).max() <= 1


@pytest.mark.slow
def test_resizing_gives_the_bits_of_pillow_on_photographs() -> None:
    """Those of a tar that EDGE_BCS_PHOTOGRAPHS names: every image, at three sizes."""
    photographs = Path(os.environ.get("EDGE_BCS_PHOTOGRAPHS", "none"))
    if not photographs.is_file():
        pytest.skip("EDGE_BCS_PHOTOGRAPHS names no tar of photographs")
    with tarfile.open(photographs) as archive:
        for member in archive:
            if member.name.lower().endswith((".jpg", ".jpeg", ".png")):
                stream = archive.extractfile(member)
                assert stream is not None
                image = Image.open(io.BytesIO(stream.read())).convert("RGB")
                for side, resize in ((32, SQUASH), (96, Resize(1.0)), (224, Resize(0.875))):
                    box = resize.box((float(image.width), float(image.height)), (side, side))
                    assert (resized(image, (side, side), box) == by_pillow(image, (side, side), box)[0]).all()


def test_an_image_of_the_size_wanted_stays_as_it_is() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 14, 3)).astype(np.uint8)
    assert (resized(Image.fromarray(pixels), (14, 9), (0, 0, 14, 9)) == pixels).all()


def test_rows_of_another_kind_are_not_taken() -> None:
    with Resizer((4, 2), 3, (0, 0, 4, 2), (2, 2)) as resizer:
        for rows in (np.zeros((1, 4, 3), np.float32), np.zeros((1, 3, 3), np.uint8)):
            with pytest.raises(ValueError, match="u8, whole"):
                resizer.take(rows)
    with pytest.raises(ValueError, match="before the resizer is closed"):
        resizer.take(np.zeros((1, 4, 3), np.uint8))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (3, 17, 40), (2, 5, 3)])
def test_augmentation_gives_the_bits_of_the_reference(kind: str, shape: tuple[int, int, int]) -> None:
    images = np.random.default_rng(1).random((6, *shape), np.float32)
    images[0] = 0
    images[1] = 1
    positions = np.array([0, 1, 7, 1000, 2**33, 2**40 + 5])
    wanted = augmentation.augmented(images, positions, kind, seed=2**63 + 9, epoch=3)  # type: ignore[arg-type]
    for image, position, theirs in zip(images, positions, wanted, strict=True):
        found = augmented(image, kind, seed=2**63 + 9, epoch=3, position=int(position))
        assert (found.view(np.uint32) == theirs.view(np.uint32)).all()
