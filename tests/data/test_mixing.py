"""Chains of small changes, mixed: each operation beside Pillow's or torch's, and their weights."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from edge_bcs.data import mixing
from edge_bcs.data.augmentation import photograph

Array = np.ndarray[Any, Any]
AUTOCONTRAST, EQUALIZE, POSTERIZE, SOLARIZE, ROTATE, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y = range(9)
STRONGEST, HALF = 0.5 - 2**-30, 0.25  # of the draws that give an operation's strength, both with sign +


def levels(channels: int = 3, height: int = 21, width: int = 18) -> Array:
    return np.random.default_rng(0).integers(20, 230, (channels, height, width)).astype(np.uint8)


def changed(image: Array, operation: int, strength: float) -> Array:
    """An image changed by one operation alone: one chain of length 1 has all the weight."""
    draws = np.zeros(mixing.WORDS)
    draws[0], draws[1:3] = 1, 1  # all of the mixture, and of this all is the first chain
    draws[4], draws[5] = (operation + 0.5) / 9, strength
    return mixing.mixed(image, draws)


def picture(image: Array) -> Any:
    return pytest.importorskip("PIL.Image").fromarray(image.transpose(1, 2, 0))


@pytest.mark.parametrize("operation", [AUTOCONTRAST, EQUALIZE, POSTERIZE, SOLARIZE])
@pytest.mark.parametrize("strength", [HALF, STRONGEST])
def test_tones_are_pillows(operation: int, strength: float) -> None:
    ops = pytest.importorskip("PIL.ImageOps")
    image = levels(height=120, width=130)
    part = 0.01 + 0.29 * 2 * strength
    wanted = {
        AUTOCONTRAST: ops.autocontrast,
        EQUALIZE: ops.equalize,
        POSTERIZE: lambda one: ops.posterize(one, 4 - int(4 * part)),
        SOLARIZE: lambda one: ops.solarize(one, int(np.ceil(255 * (1 - part)))),
    }[operation](picture(image))
    found = 255 * changed(image.astype(np.float32) / np.float32(255), operation, strength)
    # Pillow cuts levels off, and equalizes in steps of whole pixels: 60 of 60.9 a level here.
    difference = np.abs(found - np.asarray(wanted).transpose(2, 0, 1))
    assert difference.max() <= (5 if operation == EQUALIZE else 1.01)
    assert np.abs(found - image).max() > 10


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("operation", [ROTATE, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y])
def test_shapes_are_what_torch_samples(operation: int, sign: int) -> None:
    """By affine_grid, which counts from -1 to 1 on each axis, and x before y."""
    torch = pytest.importorskip("torch")
    image = levels().astype(np.float32) / np.float32(255)
    height, width = image.shape[1:]
    part = 0.01 + 0.29 * 0.5
    half = sign * part * np.tan(np.pi / 12)
    angle = 2 * np.arctan(half)
    lean = sign * part * 0.3
    # Rows of (y, x, 1): where a pixel comes from, in pixels from the middle.
    matrix = {
        ROTATE: [[np.cos(angle), np.sin(angle), 0], [-np.sin(angle), np.cos(angle), 0]],
        SHEAR_X: [[1, 0, 0], [lean, 1, 0]],
        SHEAR_Y: [[1, lean, 0], [0, 1, 0]],
        TRANSLATE_X: [[1, 0, 0], [0, 1, sign * part * width / 3]],
        TRANSLATE_Y: [[1, 0, sign * part * height / 3], [0, 1, 0]],
    }[operation]
    (yy, yx, dy), (xy, xx, dx) = np.array(matrix, np.float64)
    theta = torch.tensor(
        [[[xx, xy * height / width, 2 * dx / width], [yx * width / height, yy, 2 * dy / height]]]
    )
    grid = torch.nn.functional.affine_grid(theta, [1, 3, height, width], align_corners=False)
    wanted = torch.nn.functional.grid_sample(
        torch.from_numpy(image[None].astype(np.float64)), grid, padding_mode="border", align_corners=False
    )[0].numpy()
    found = changed(image, operation, HALF if sign > 0 else 0.5 + HALF)
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_operations_follow_each_other() -> None:
    """A chain of three: each one takes what the one before has made."""
    image = levels().astype(np.float32) / np.float32(255)
    draws = np.zeros(mixing.WORDS)
    draws[0], draws[1:3] = 1, 1
    draws[3] = 0.9  # three operations
    kinds = (AUTOCONTRAST, SOLARIZE, ROTATE)
    draws[4:10] = np.ravel([((kind + 0.5) / 9, HALF) for kind in kinds])
    wanted = image
    for kind in kinds:
        wanted = changed(wanted, kind, HALF)
    np.testing.assert_allclose(mixing.mixed(image, draws), wanted, atol=1e-6)
    assert not np.allclose(wanted, changed(image, ROTATE, HALF), atol=0.1)


def test_chains_and_the_image_are_weighed() -> None:
    image = levels().astype(np.float32) / np.float32(255)
    draws = np.zeros(mixing.WORDS)
    draws[:3] = 0.4, 0.7, 0.2  # weights 0.2, 0.5 and 0.3 of what is 0.4 of the whole
    kinds = (AUTOCONTRAST, SOLARIZE, TRANSLATE_X)
    for number, kind in enumerate(kinds):
        draws[3 + 7 * number : 6 + 7 * number] = 0, (kind + 0.5) / 9, HALF
    one, two, three = (changed(image, kind, HALF) for kind in kinds)
    wanted = 0.6 * image + 0.4 * (0.2 * one + 0.5 * two + 0.3 * three)
    np.testing.assert_allclose(mixing.mixed(image, draws), wanted, atol=1e-6)


def test_what_is_even_stays() -> None:
    """An image of one colour has no contrast to change."""
    image = np.full((3, 9, 9), 0.25, np.float32)
    for operation in (AUTOCONTRAST, EQUALIZE):
        np.testing.assert_array_equal(changed(image, operation, HALF), image)


def test_every_image_is_mixed_in_its_own_way() -> None:
    """Within [0, 1], by its position alone; half of all are more themselves than mixture."""
    image = levels(3, 24, 24).astype(np.float32) / np.float32(255)
    common: dict[str, Any] = {"seed": 3, "epoch": 1, "zoom": True}
    images, places = np.repeat(image[None], 60, axis=0), np.arange(60)
    found = photograph(images, places, **common, mix=True)
    assert found.min() >= 0 and found.max() <= 1 and found.dtype == np.float32
    assert len({one.tobytes() for one in found}) == 60
    np.testing.assert_array_equal(photograph(images[:1], places[7:8], **common, mix=True)[0], found[7])
    assert not np.allclose(found, photograph(images, places, **common), atol=0.05)


def test_the_bits_are_those_of_every_machine() -> None:
    image = (np.arange(3 * 24 * 18) * 7919 % 256).reshape(1, 3, 24, 18).astype(np.float32) / np.float32(255)
    images = np.repeat(image, 20, axis=0)
    found = photograph(images, np.arange(20), seed=11, epoch=5, zoom=True, mix=True)
    assert hashlib.sha256(found.tobytes()).hexdigest()[:16] == "b83a986da6e42079"
