"""Image files of any size as a network's evaluation has them, wherever they are read."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_bcs.runtime import Trainer
from edge_bcs.runtime.artifact import Artifact
from helpers.artifacts import write_artifact
from helpers.commands import run

import edge_bcs
from edge_bcs import EdgeBcsError
from edge_bcs.core.resizing import SQUASH, Resize
from edge_bcs.data import open_data
from edge_bcs.data.decoding import decode

Image = pytest.importorskip("PIL.Image")
Make = Callable[..., Path]


def ramps(width: int, height: int) -> Any:
    """An image whose red grows to the right and whose green grows downwards."""
    red = np.broadcast_to(np.linspace(0, 255, width), (height, width))
    green = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    return Image.fromarray(np.stack([red, green, np.zeros_like(red)], axis=-1).astype(np.uint8))


def encoded(image: Any, **how: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, **{"format": "PNG", **how})
    return stream.getvalue()


def cropped(image: Any, size: int, share: float) -> np.ndarray[Any, Any]:
    """Resize the shorter side, cut the middle out: as torchvision's evaluation does."""
    scale = size / share / min(image.size)
    whole = image.resize([round(side * scale) for side in image.size], Image.Resampling.BILINEAR)
    left, top = ((side - size) / 2 for side in whole.size)
    part = whole.crop((round(left), round(top), round(left) + size, round(top) + size))
    return np.asarray(part).transpose(2, 0, 1).astype(int)


@pytest.mark.parametrize(("width", "height"), [(96, 64), (64, 96), (80, 80), (40, 30)])
@pytest.mark.parametrize("share", [1.0, 0.875])
def test_a_crop_is_that_of_torchvisions_evaluation(width: int, height: int, share: float) -> None:
    image = ramps(width, height)
    found = decode(encoded(image), (3, 28, 28), "it", resize=Resize(share)).astype(int)
    steps = 255 / min(width, height) * max(1, min(width, height) / 28)  # half a pixel may lie between them
    assert np.abs(found - cropped(image, 28, share))[:, 1:-1, 1:-1].max() <= 1 + steps / 2
    squashed = decode(encoded(image), (3, 28, 28), "it").astype(int)
    assert squashed[0, 14, 0] < 10 and squashed[0, 14, -1] > 245  # the whole width


def test_what_is_turned_or_large_is_cropped_alike() -> None:
    """A photograph whose EXIF turns it, and a JPEG of which a fraction is decoded."""
    image = ramps(120, 80)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90°
    turned = decode(encoded(image, exif=exif), (3, 20, 10), "it", resize=Resize(1.0))
    by_hand = encoded(image.transpose(Image.Transpose.ROTATE_270))
    upright = decode(by_hand, (3, 20, 10), "it", resize=Resize(1.0))
    assert np.abs(turned.astype(int) - upright).max() <= 1
    large = ramps(1200, 800)
    by_fraction = decode(encoded(large, format="JPEG", quality=95), (3, 20, 20), "it", resize=Resize(0.5))
    whole = decode(encoded(large), (3, 20, 20), "it", resize=Resize(0.5))
    assert np.abs(by_fraction.astype(int) - whole).max() <= 8


@pytest.mark.parametrize("text", ["squash", "crop", "crop:0.875"])
def test_texts_and_boxes(text: str) -> None:
    assert Resize.parse(text).text == text
    assert Resize.parse("crop:1") == Resize.parse("crop") == Resize(1.0)
    assert SQUASH.box((90, 60), (30, 30)) == (0, 0, 90, 60)
    assert Resize(1.0).box((90, 60), (30, 30)) == (15, 0, 75, 60)
    assert Resize(0.5).box((90, 60), (60, 20)) == pytest.approx((22.5, 22.5, 67.5, 37.5))


@pytest.mark.parametrize("text", ["cut", "crop:", "crop:0", "crop:1.5", "crop:x", "squash:1", "", "crop:nan"])
def test_what_is_no_way_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(EdgeBcsError):
        Resize.parse(text)
    folder = write_artifact(tmp_path / "a", lambda manifest: manifest["network"].update(resize=text))
    with pytest.raises(EdgeBcsError, match=r"the manifest's field network\.resize"):
        Artifact.read(folder)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for label, name in enumerate(("ant", "bee")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(3):
            image = ramps(40 + 7 * number, 20 + 5 * label)
            (tmp_path / "photos" / name / f"{number}.png").write_bytes(encoded(image))
    return tmp_path / "photos"


def test_folders_and_archives_are_read_alike(photos: Path, tmp_path: Path) -> None:
    import tarfile

    for name, mode in (("plain.tar", "w"), ("packed.tar.gz", "w:gz")):
        with tarfile.open(tmp_path / name, mode) as archive:  # type: ignore[call-overload]
            archive.add(photos, "photos")
    expected = open_data(photos, "train", (3, 8, 8), resize=Resize(0.875)).read(np.arange(4))[0]
    assert not np.array_equal(open_data(photos, "train", (3, 8, 8)).read(np.arange(4))[0], expected)
    for name in ("plain.tar", "packed.tar.gz"):
        for resize in (SQUASH, Resize(0.875), SQUASH):  # a copy of one is none of the other
            found = open_data(tmp_path / name, "train", (3, 8, 8), resize=resize).read(np.arange(4))[0]
            assert np.array_equal(found, expected) == (resize != SQUASH)


def test_a_network_keeps_it_from_host_to_board(photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    small = ("--model", "resnet18", "--width", 0.0625, "--input-size", 8, "--sparsity", 0.8)
    short = ("--attack-steps", 1, "--batch-size", 4, "--batch-norm", "frozen", "--steps", 1)
    train = ("train", *small, *short, "--data", photos, "-o", tmp_path / "host")
    assert run(*train, "--resize", "crop:0.875").exit_code == 0
    refused = run(*train, "--resize", "crop", "--resume")
    assert refused.exit_code == 1 and "begun with resize 'crop:0.875', not 'crop'" in refused.stderr
    assert edge_bcs.load(tmp_path / "host").resize == Resize(0.875)
    exported = run("export", "--checkpoint", tmp_path / "host", "--no-validate", "-o", tmp_path / "artifact")
    assert exported.exit_code == 0, exported.output
    manifest = json.loads((tmp_path / "artifact" / "manifest.json").read_text())
    assert manifest["network"]["resize"] == "crop:0.875"
    tuned = run("finetune", tmp_path / "artifact", "--data", photos, "--steps", 1, "--eval-samples", 0,
                "-o", tmp_path / "run")  # fmt: skip
    assert tuned.exit_code == 0, tuned.output
    image = open_data(photos, "train", (3, 8, 8), resize=Resize(0.875)).read(np.array([0]))[0]
    with Trainer(tmp_path / "run") as trainer:
        expected = trainer.probabilities(image)[0]
        report = trainer.evaluate(str(photos), 0)
    answer = json.loads(run("predict", tmp_path / "run", photos / "ant" / "0.png", "--json").stdout)
    shares = {one["name"]: one["probability"] for one in answer["images"][0]["classes"]}
    np.testing.assert_allclose([shares["ant"], shares["bee"]], expected, rtol=1e-6)
    for engine in ("board", "torch"):
        clean = ("--data", photos, "--attack", "none", "--json")
        found = run("evaluate", tmp_path / "run", "--engine", engine, *clean)
        assert json.loads(found.stdout)["accuracy"] == report["accuracy"], found.output
    again = run("export", "--checkpoint", tmp_path / "run", "--resize", "crop", "-o", tmp_path / "b")
    assert again.exit_code == 1 and "--resize belongs to a new network" in again.stderr
