"""The corruptions of CIFAR-10-C on given images, against hand-worked results and definitions written out."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.commands import run
from scipy import ndimage

import edge_bcs
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.data.dataset import ArrayDataset
from edge_bcs.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupted
from edge_bcs.evaluation.measures import evaluate

Array = np.ndarray[Any, Any]


def whole(levels: Any) -> Array:
    return np.asarray(np.asarray(levels, np.float64) / 255, np.float32)


def grey(level: int, size: int = 32, count: int = 1) -> Array:
    return np.full((count, 3, size, size), level / 255, np.float32)


@pytest.fixture
def images() -> Array:
    """Four smooth images of whole levels."""
    noise = np.random.default_rng(0).random((4, 3, 32, 32))
    return whole(np.rint(255 * np.clip(4 * ndimage.gaussian_filter(noise, (0, 0, 3, 3)) - 1.5, 0, 1)))


def levels_of(x: Array) -> Array:
    return np.asarray(np.rint(x * 255), np.int64)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_one_is_drawn_alike_and_of_whole_levels(name: str, images: Array) -> None:
    places = np.array([7, 3, 9, 12])
    for severity in SEVERITIES:
        made = corrupted(images, places, name, severity, seed=2)
        assert made.shape == images.shape and made.dtype == np.float32
        assert np.array_equal(made, whole(levels_of(made))) and made.min() >= 0 and made.max() <= 1
        assert not np.array_equal(made, images)
        # An image by itself, by its place: the others of its batch do not matter.
        alone = corrupted(images[2:3], places[2:3], name, severity, seed=2)
        assert np.array_equal(alone[0], made[2])
    drawn = name not in (
        "defocus_blur",
        "zoom_blur",
        "brightness",
        "contrast",
        "pixelate",
        "jpeg_compression",
    )
    for moved, seed in ((1, 2), (0, 3)):
        other = corrupted(images, places + moved, name, 5, seed=seed)
        assert np.array_equal(other, corrupted(images, places, name, 5, seed=2)) != drawn


@pytest.mark.parametrize(
    "name", ["gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "contrast"]
)
def test_stronger_is_further(name: str, images: Array) -> None:
    distances = [np.abs(corrupted(images, np.arange(4), name, s) - images).mean() for s in SEVERITIES]
    assert distances == sorted(distances) and distances[4] > 1.5 * distances[0]


def test_noise_has_its_moments() -> None:
    x = grey(102, count=40)  # 0.4
    for severity, deviation in zip(SEVERITIES, (0.04, 0.06, 0.08, 0.09, 0.10), strict=True):
        change = corrupted(x, np.arange(40), "gaussian_noise", severity) - x
        assert change.mean() + 0.5 / 255 == pytest.approx(0, abs=1e-3)  # cut to levels: half a level lower
        assert change.std() == pytest.approx(deviation, rel=0.02)
    for severity, photons in zip(SEVERITIES, (500, 250, 100, 75, 50), strict=True):
        made = corrupted(x, np.arange(40), "shot_noise", severity)
        assert made.mean() + 0.5 / 255 == pytest.approx(0.4, abs=2e-3)
        assert made.std() == pytest.approx(math.sqrt(0.4 / photons), rel=0.03)
        # A count over the photons of white, cut to a level.
        counts = {math.floor(255 * min(1.0, k / photons) + 1e-6) for k in range(3 * photons)}
        assert set(levels_of(made).ravel()) <= counts
    assert not corrupted(grey(0), np.arange(1), "shot_noise", 5).any()
    for severity, share in zip(SEVERITIES, (0.01, 0.02, 0.03, 0.05, 0.07), strict=True):
        made = corrupted(x, np.arange(40), "impulse_noise", severity)
        hit = made != x
        assert hit.mean() == pytest.approx(share, rel=0.05)
        assert set(np.unique(made[hit])) == {0.0, 1.0} and made[hit].mean() == pytest.approx(0.5, abs=0.05)


def test_brightness_and_contrast_by_hand() -> None:
    x = grey(0)
    x[0, :, 0, 0] = whole([100, 50, 0])  # value 100: at severity 3 raised by 0.15·255 = 38.25
    x[0, :, 0, 1] = whole([255, 255, 255])
    made = levels_of(corrupted(x, np.arange(1), "brightness", 3))
    assert made[0, :, 0, 0].tolist() == [138, 69, 0]  # 138.25, 69.125, 0: hue and saturation stay
    assert made[0, :, 0, 1].tolist() == [255, 255, 255]
    assert made[0, :, 5, 5].tolist() == [38, 38, 38]  # black has no hue
    half = grey(0)
    half[:, :, 16:] = 200 / 255  # mean 100; severity 2 halves the distance to it
    made = levels_of(corrupted(half, np.arange(1), "contrast", 2))
    assert set(made[0, 0, :16].ravel()) == {50} and set(made[0, 0, 16:].ravel()) == {150}


def test_defocus_by_hand() -> None:
    """A white dot becomes the kernel: of radius 1 a cross of five, blurred by exp(−1/(2·0.2²)) = 3.7e-6."""
    x = grey(0)
    x[:, :, 16, 16] = 1
    made = levels_of(corrupted(x, np.arange(1), "defocus_blur", 4))[0, 0]
    expected = np.zeros((32, 32), int)
    for row, column in ((16, 16), (15, 16), (17, 16), (16, 15), (16, 17)):
        expected[row, column] = 50  # a fifth of 255 is 51, less what the blur takes and the middle gives back
    expected[16, 16] = 51
    assert np.array_equal(made, expected)
    # Of radius 0.3 a single pixel, blurred by a Gaussian of 0.4 over three.
    weights = np.exp([-1 / (2 * 0.16), 0, -1 / (2 * 0.16)])
    weights /= weights.sum()
    made = levels_of(corrupted(x, np.arange(1), "defocus_blur", 1))[0, 1, 15:18, 15:18]
    assert np.array_equal(made, np.floor(255 * np.outer(weights, weights)))


def test_motion_by_hand() -> None:
    """A white dot becomes half a Gaussian on a line that leads to it, by the nearest pixels."""
    x = grey(0)
    x[:, :, 16, 16] = 1
    weights = np.exp(-(np.arange(13) ** 2) / (2 * 1.0))
    weights /= weights.sum()
    for place in range(4):
        made = levels_of(corrupted(x, np.array([place]), "motion_blur", 1))[0, 0]
        assert made[16, 16] == round(255 * weights[0])
        rows, columns = np.nonzero(made)  # the first four weights are half a level and more
        assert 2 <= len(rows) <= 4 and abs(made.sum() - 255) <= 2
        assert columns.max() == 16 and columns.min() in (13, 14)  # 3·cos of at most 45°
        slope = (rows[columns.argmin()] - 16) / (16 - columns.min())
        assert abs(slope) <= 1 and np.abs(rows - 16 - slope * (16 - columns)).max() <= 1
    flat = corrupted(grey(90), np.array([0]), "motion_blur", 5)
    assert np.array_equal(flat, grey(90))


def test_zoom_is_what_scipy_enlarges(images: Array) -> None:
    for severity, end in zip(SEVERITIES, (1.06, 1.11, 1.16, 1.21, 1.26), strict=True):
        factors = np.arange(1, end, 0.01)
        x = images[0].astype(np.float64)
        total = x.copy()
        for factor in factors:
            size = math.ceil(32 / factor)
            top = (32 - size) // 2
            large = ndimage.zoom(x[:, top : top + size, top : top + size], (1, factor, factor), order=1)
            trim = (large.shape[1] - 32) // 2
            total += large[:, trim : trim + 32, trim : trim + 32]
        expected = np.clip(total / (len(factors) + 1), 0, 1) * 255
        made = levels_of(corrupted(images[:1], np.arange(1), "zoom_blur", severity))[0]
        assert np.array_equal(made, np.floor(expected + 1e-6))


def test_glass_takes_pixels_from_beside() -> None:
    """Without a blur to speak of (σ = 0.05) each pixel inside is one of the four at and before it."""
    rng = np.random.default_rng(3)
    x = whole(rng.permutation(1024 * 3).reshape(1, 3, 32, 32) % 256)
    before, after = levels_of(x)[0], levels_of(corrupted(x, np.arange(1), "glass_blur", 1))[0]
    # From below to above and from right to left: what is read has not been written yet.
    moved = 0
    for row in range(2, 32):
        for column in range(2, 32):
            near = [before[:, row - down, column - across] for down in (0, 1) for across in (0, 1)]
            assert any(np.array_equal(after[:, row, column], pixel) for pixel in near)
            moved += not np.array_equal(after[:, row, column], before[:, row, column])
    assert 0.65 < moved / 900 < 0.85  # three of four
    assert np.array_equal(after[:, :2], before[:, :2]) and np.array_equal(after[:, :, :2], before[:, :, :2])


def test_fog_is_on_a_torus_and_keeps_the_largest() -> None:
    made = corrupted(grey(200), np.arange(1), "fog", 5)[0]
    assert np.array_equal(made[0], made[1]) and np.array_equal(made[0], made[2])
    # (x + 1.5·h)·m/(m + 1.5) with m = x = 200/255: between x²/(x + 1.5) and x.
    low, high = 200 / 255 * (200 / 255) / (200 / 255 + 1.5), 200 / 255
    assert made.min() == pytest.approx(low, abs=1 / 255) and made.max() == pytest.approx(high, abs=1 / 255)
    edges = np.abs(made[0, 0] - made[0, -1]).mean(), np.abs(made[0, 15] - made[0, 16]).mean()
    assert edges[0] < 3 * edges[1]
    assert not corrupted(grey(0), np.arange(1), "fog", 5).any()


def test_snow_by_its_formula() -> None:
    """Without flakes it is only the whitening; a flake and its turned twin are added."""
    made = levels_of(corrupted(grey(60), np.arange(1), "snow", 1))[0]
    ground = math.floor(0.95 * 60 + 0.05 * (60 * 1.5 + 127.5) + 1e-6)
    assert made.min() == ground
    assert np.array_equal(made, made[:, ::-1, ::-1]) and (made > ground).mean() < 0.5


def test_elastic_leaves_a_flat_image_and_moves_a_little(images: Array) -> None:
    assert np.array_equal(corrupted(grey(77), np.arange(1), "elastic_transform", 5), grey(77))
    steps = np.arange(32) * 8
    x = whole(np.broadcast_to(steps, (1, 3, 32, 32)))
    made = levels_of(corrupted(x, np.arange(1), "elastic_transform", 5))[0]
    # The three points, 10 from the middle, move by at most 0.96, a pixel then by some 0.1·32 at most.
    assert np.abs(made[:, 4:28, 4:28] - steps[4:28]).max() < 8 * 5
    assert np.array_equal(made[0], made[2])


def test_pixelate_by_hand() -> None:
    """At severity 5 there are 20 of 32: of each side every 1.6 pixels become one."""
    x = grey(0)
    x[:, :, :, 1] = 1  # of the first 1.6 columns the second one, whose middle is at 1.5
    made = levels_of(corrupted(x, np.arange(1), "pixelate", 5))[0, 0, 0]
    assert made[:4].tolist() == [128, 128, 0, 0]  # the mean of two columns; then columns 2 and 3


def test_jpeg_is_what_pillow_stores(images: Array) -> None:
    from io import BytesIO

    from PIL import Image

    for severity, quality in zip(SEVERITIES, (80, 65, 58, 50, 40), strict=True):
        stored = BytesIO()
        Image.fromarray(levels_of(images[1]).astype(np.uint8).transpose(1, 2, 0)).save(
            stored, "JPEG", quality=quality
        )
        expected = np.asarray(Image.open(stored)).transpose(2, 0, 1)
        made = corrupted(images[1:2], np.arange(1), "jpeg_compression", severity)
        assert np.array_equal(levels_of(made)[0], expected)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 20, 33), (4, 40, 24)])
def test_images_of_any_size(shape: tuple[int, int, int]) -> None:
    x = np.random.default_rng(0).random((2, *shape), np.float32)
    for name in CORRUPTIONS:
        made = corrupted(x, np.arange(2), name, 4)
        assert made.shape == x.shape and np.isfinite(made).all()


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EdgeBcsError, match=r"the corruption is gaussian_noise, .*not 'frost'"):
        corrupted(grey(0), np.arange(1), "frost", 1)
    with pytest.raises(EdgeBcsError, match="severity of a corruption is 1 to 5, not 6"):
        corrupted(grey(0), np.arange(1), "fog", 6)
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.delitem(sys.modules, "edge_bcs.evaluation.corruptions")
    with pytest.raises(EdgeBcsError, match="corruptions need scipy and Pillow: measure them on the host"):
        import edge_bcs.evaluation.corruptions  # noqa: F401


def test_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a network that says whether an image is bright: what is counted, by hand."""
    torch = pytest.importorskip("torch")

    class Bright(torch.nn.Module):  # type: ignore[misc,name-defined]
        def forward(self, x: Any) -> Any:
            mean = x.mean(dim=(1, 2, 3))
            return torch.stack([0.5 - mean, mean - 0.5], 1)

    levels = np.array([100, 110, 120, 140, 200], np.uint8)
    data = ArrayDataset(np.repeat(levels, 3 * 64).reshape(5, 3, 8, 8), (levels > 127).astype(int))
    report = evaluate(Bright(), data, attack="none", corruptions=True)
    assert report["clean_acc"] == 1.0
    # 0.05 and more are added: 120/255 = 0.47, 110/255 = 0.43 and 100/255 = 0.39 pass 0.5 one after the other.
    assert report["corruptions"]["brightness"] == [0.8, 0.6, 0.4, 0.4, 0.4]
    assert report["corruptions"]["contrast"] == [1.0] * 5
    assert set(report["corruptions"]) == set(CORRUPTIONS)
    shares = [share for found in report["corruptions"].values() for share in found]
    assert report["mean_corruption_acc"] == pytest.approx(sum(shares) / 70)
    some = evaluate(Bright(), data, attack="none", corruptions=True, samples=2)
    chosen = levels[data.order(0, 0)[:2]]
    assert some["corruptions"]["brightness"][4] == pytest.approx(
        np.mean((chosen + 76 > 127) == (chosen > 127))
    )
    with pytest.raises(EdgeBcsError, match="corruptions need a data set"):
        evaluate(Bright(), [data.read(np.arange(5))], attack="none", corruptions=True)


def test_the_command(tiny_artifact: Callable[..., Path], digits: Path, tmp_path: Path) -> None:
    """By the board's graphs as in PyTorch; a table for people."""
    common = ("--data", digits, "--attack", "none", "--corruptions", "--limit", 8)
    result = run("evaluate", tiny_artifact(), *common, "--json", tmp_path / "report.json")
    assert result.exit_code == 0, result.output
    assert "mean corruption accuracy" in result.output and "jpeg compression" in result.output
    found = json.loads((tmp_path / "report.json").read_text())
    from helpers.artifacts import tiny_network

    from edge_bcs.data import open_data

    model = edge_bcs.load(tiny_artifact(), tiny_network())
    data = open_data(str(digits), "test", (1, 8, 8))
    report = evaluate(model, data, attack="none", samples=8, corruptions=True)
    assert found["corruptions"] == report["corruptions"]
    assert found["mean_corruption_acc"] == report["mean_corruption_acc"]
