"""Photographs as a training sees them, and classes that come up evenly."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from edge_bcs import EdgeBcsError
from edge_bcs.core import random
from edge_bcs.data.augmentation import augmented, photograph
from edge_bcs.data.balance import Balanced, imbalance, uneven
from edge_bcs.data.dataset import Array, ArrayDataset, Dataset

# Photographs


def draws(monkeypatch: pytest.MonkeyPatch, **chosen: float) -> None:
    """Let all images have these draws; the others are in the middle: the whole image, nothing changed."""
    middle = {"area": 1.0, "ratio": 0.5, "top": 0.5, "left": 0.5, "mirror": 0.0, "brightness": 0.5,
              "contrast": 0.5, "saturation": 0.5}  # fmt: skip
    words = np.array(list({**middle, **chosen}.values())) * 2**32

    def blocks(numbers: Array, **stream: Any) -> Array:
        return np.minimum(np.tile(words.reshape(2, 4), (len(numbers) // 2, 1)), 2**32 - 1).astype(np.uint32)

    monkeypatch.setattr(random, "blocks", blocks)


def photo(image: Array) -> Array:
    return np.asarray(photograph(image[None], np.array([0]), seed=0, epoch=0)[0], np.float32)


def zoomed(image: Array) -> Array:
    return np.asarray(photograph(image[None], np.array([0]), seed=0, epoch=0, zoom=True)[0], np.float32)


def some_image(channels: int = 3, height: int = 20, width: int = 20) -> Array:
    return np.random.default_rng(0).uniform(0.2, 0.7, (channels, height, width)).astype(np.float32)


def test_the_middle_of_all_draws_is_the_image_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    draws(monkeypatch)
    image = some_image()
    np.testing.assert_allclose(photo(image), image, atol=2e-6)


def test_a_crop_is_what_torch_interpolates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the image is impossible here; of 64 % of the area every side is 80 %."""
    torch = pytest.importorskip("torch")
    draws(monkeypatch, area=(0.64 - 0.35) / 0.65, top=0.0, left=1.0)
    image = some_image()
    found = photo(image)
    inside = torch.from_numpy(image[None, :, :16, 4:])
    expected = torch.nn.functional.interpolate(inside, (20, 20), mode="bilinear")[0].numpy()
    # At the edge of the crop the image goes on; a crop that was cut out does not.
    np.testing.assert_allclose(found[:, 1:-2, 2:-1], expected[:, 1:-2, 2:-1], atol=2e-5)
    draws(monkeypatch, mirror=0.5)
    np.testing.assert_allclose(photo(image), image[:, :, ::-1], atol=2e-6)


def test_what_is_seen_from_afar_is_what_torch_interpolates(monkeypatch: pytest.MonkeyPatch) -> None:
    """One and a half times the sides: the image with half of its size around it, its edges repeated."""
    torch = pytest.importorskip("torch")
    draws(monkeypatch, area=0.9)
    image = some_image()
    around = torch.nn.functional.pad(torch.from_numpy(image[None]), (5, 5, 5, 5), mode="replicate")
    expected = torch.nn.functional.interpolate(around, (20, 20), mode="bilinear")[0].numpy()
    np.testing.assert_allclose(zoomed(image), expected, atol=2e-5)
    draws(monkeypatch, area=0.4)  # sides of 100 %
    np.testing.assert_allclose(zoomed(image), image, atol=2e-6)
    draws(monkeypatch, area=0.2, top=0.0, left=1.0)  # and of 80 %
    found = zoomed(image)
    draws(monkeypatch, area=(0.64 - 0.35) / 0.65, top=0.0, left=1.0)
    np.testing.assert_allclose(found, photo(image), atol=2e-6)


def test_colours_are_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    enhance = pytest.importorskip("PIL.ImageEnhance")
    image = some_image()
    picture = pytest.importorskip("PIL.Image").fromarray(
        np.rint(image * 255).astype(np.uint8).transpose(1, 2, 0)
    )
    kinds = {"brightness": enhance.Brightness, "contrast": enhance.Contrast, "saturation": enhance.Color}
    for name, kind in kinds.items():
        for draw, factor in ((0.0, 0.7), (0.75, 1.15)):
            draws(monkeypatch, **{name: draw})
            expected = np.asarray(kind(picture).enhance(factor)).transpose(2, 0, 1) / 255
            np.testing.assert_allclose(photo(image), expected, atol=2.5 / 255, err_msg=f"{name} {factor}")


def test_crops_have_the_sizes_that_are_said() -> None:
    """Of a ramp, what is seen of each side; and no image is like another."""
    ramp = np.broadcast_to(np.linspace(0.35, 0.65, 60, dtype=np.float32), (1, 60, 60))
    images = np.broadcast_to(ramp, (500, 1, 60, 60))
    found = photograph(images, np.arange(500), seed=3, epoch=1)
    assert found.shape == images.shape and found.dtype == np.float32
    assert found.min() >= 0 and found.max() <= 1
    assert len({image.tobytes() for image in found}) == 500
    rising = found[:, 0, 30, -1] > found[:, 0, 30, 0]
    assert 200 < rising.sum() < 300
    again = photograph(images[7:9], np.array([7, 8]), seed=3, epoch=1)
    np.testing.assert_array_equal(again, found[7:9])
    assert not np.array_equal(photograph(images[7:9], np.array([7, 8]), seed=3, epoch=2), again)


def test_the_bits_are_those_of_every_machine() -> None:
    """Of whole numbers and operations that IEEE 754 rounds: this digest holds on any processor."""
    image = (np.arange(3 * 24 * 18) * 7919 % 256).reshape(1, 3, 24, 18).astype(np.float32) / np.float32(255)
    found = photograph(np.repeat(image, 20, axis=0), np.arange(20), seed=11, epoch=5)
    assert hashlib.sha256(found.tobytes()).hexdigest()[:16] == "c49086e1ab1564b3"


def test_names_and_flags_say_the_same(batch: tuple[Array, Array]) -> None:
    data, places = ArrayDataset(*batch), np.array([4, 1])
    common: dict[str, Any] = {"seed": 5, "epoch": 2}
    images, _ = data.read(places, **common)
    np.testing.assert_array_equal(data.read(places, augment="none", **common)[0], images)
    shifted = data.read(places, augment=True, **common)[0]
    np.testing.assert_array_equal(data.read(places, augment="shift", **common)[0], shifted)
    photos = data.read(places, augment="photo", **common)[0]
    np.testing.assert_array_equal(augmented(images, places, "photo", **common), photos)
    assert len({part.tobytes() for part in (images, shifted, photos)}) == 3
    with pytest.raises(
        EdgeBcsError, match="the augmentation is none, shift, photo, zoom, mix or mirror, not 'crop'"
    ):
        data.read(places, augment="crop", **common)  # type: ignore[arg-type]


def test_mirror_is_the_flip_of_shift_alone() -> None:
    """Of a ramp that rises to the right, each image is as it was or the other way round, as shift has it."""
    images = np.broadcast_to(np.linspace(0.0, 1.0, 20, dtype=np.float32), (300, 3, 20, 20))
    places = np.arange(7, 307)
    found = augmented(images, places, "mirror", seed=3, epoch=1)
    falls = found[:, 0, 0, 0] > found[:, 0, 0, -1]
    assert 120 < falls.sum() < 180
    np.testing.assert_array_equal(found[falls], images[falls][..., ::-1])
    np.testing.assert_array_equal(found[~falls], images[~falls])
    shifted = augmented(images, places, "shift", seed=3, epoch=1)
    np.testing.assert_array_equal(falls, shifted[:, 0, 0, 0] > shifted[:, 0, 0, -1])


# Balance


def skewed(counts: tuple[int, ...] = (3, 40, 17)) -> ArrayDataset:
    labels = np.repeat(np.arange(len(counts)), counts)
    images = np.arange(len(labels), dtype=np.float32)[:, None, None, None] / 100 + np.zeros((1, 1, 8, 8))
    return ArrayDataset(images.astype(np.float32), labels, ("nothing", "peace", "fist")[: len(counts)])


def test_what_is_uneven_is_said() -> None:
    data = skewed()
    assert imbalance(data.labels, data.classes) == "nothing 3, fist 17, peace 40 images"
    (told,) = uneven(data.labels, data.classes, False)
    assert told.startswith("the classes come up unevenly, nothing 3, ") and "--balance" in told
    assert "--balance" not in uneven(data.labels, data.classes, True)[0]
    assert uneven(np.array([0, 0, 0, 2, 2]), data.classes, False) == ()  # less than twice; one class has none
    assert imbalance(np.repeat([0, 1], [1, 10]), data.classes) == ""  # nine more
    many = np.repeat(np.arange(20), np.arange(1, 21))
    said = imbalance(many, [f"c{n}" for n in range(20)])
    assert said == "c0 1, c1 2, c2 3, …, c17 18, c18 19, c19 20 images"


def test_classes_come_up_evenly_in_every_stretch() -> None:
    data = Balanced(skewed())
    order = data.order(7, 2)
    assert len(order) == len(data) == 60 and order.dtype == np.int64
    labels = data.read(order)[1]
    for first in range(0, 60, 3):
        assert sorted(labels[first : first + 3]) == [0, 1, 2]
    assert len({tuple(labels[first : first + 3]) for first in range(0, 60, 3)}) > 3  # in changing order
    peace = order[labels == 1]
    assert len(set(peace)) == 20 and (peace < 60).all()  # no image twice while others were not seen
    nothing = order[labels == 0]
    places, passes = nothing % 60, nothing // 60
    assert set(places) == {0, 1, 2} and passes.tolist() == sorted(passes) and passes.max() == 6
    seen = {
        tuple(np.sort(data.order(7, epoch)[data.read(data.order(7, epoch))[1] == 1])) for epoch in range(5)
    }
    assert len(seen) == 5  # other images of the many each epoch
    np.testing.assert_array_equal(data.order(7, 2), order)
    assert not np.array_equal(data.order(8, 2), order)
    np.testing.assert_array_equal(data.order(7, 2, shuffle=False), np.arange(60))


def test_an_image_that_comes_twice_is_augmented_twice() -> None:
    plain = skewed()
    data = Balanced(plain)
    images, labels = data.read(np.array([1, 61, 121]), seed=1, augment="photo")
    assert labels.tolist() == [0, 0, 0] and len({image.tobytes() for image in images}) == 3
    np.testing.assert_array_equal(images[0], plain.read(np.array([1]), seed=1, augment="photo")[0][0])
    np.testing.assert_array_equal(data.read(np.array([61]))[0], plain.read(np.array([1]))[0])
    assert data.name_of(61) == "image 1"


def test_even_classes_and_one_class_change_nothing_but_the_order() -> None:
    for counts in ((20, 20, 20), (9,)):
        order = Balanced(skewed(counts)).order(0, 0)
        assert sorted(order) == list(range(sum(counts)))


class Own:
    """A data set of somebody else's, with augmentation of its own."""

    def __init__(self, data: Dataset) -> None:
        self.classes, self.shape, self.labels = data.classes, data.shape, data.labels
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def order(self, seed: int, epoch: int, shuffle: bool = True) -> Array:
        return self._data.order(seed, epoch, shuffle)

    def read(
        self, positions: Array, *, seed: int = 0, epoch: int = 0, augment: Any = False
    ) -> tuple[Array, Array]:
        images, labels = self._data.read(positions)
        return images + np.float32(0.5) * (augment is True), labels


def test_somebody_elses_data_augments_by_itself() -> None:
    images, _ = Balanced(Own(skewed())).read(np.array([61]), augment=True)
    assert images[0, 0, 0, 0] == np.float32(0.51)


# Trainings


@pytest.mark.parametrize("augment", ["photo", "none"])
def test_a_training_on_the_host_goes_on_to_the_bit(tmp_path: Any, augment: Any) -> None:
    """Balanced, photographs, one cycle, interrupted in the middle of an epoch."""
    torch = pytest.importorskip("torch")
    from helpers.artifacts import tiny_network

    import edge_bcs
    from edge_bcs.checkpoint import read_checkpoint

    data = skewed((6, 30, 12))
    common: dict[str, Any] = {
        "schedule": edge_bcs.Schedule(epochs=3, kind="one-cycle"),
        "attack": edge_bcs.Attack(steps=1), "batch_size": 8, "progress": False,
        "feed": edge_bcs.Feed(augment=augment, balance=True, validation=0.1),
        "compute": edge_bcs.Compute(device="cpu"),
    }  # fmt: skip

    def sparse() -> Any:
        torch.manual_seed(0)
        return edge_bcs.sparsify(tiny_network(), 0.9, seed=0)

    edge_bcs.train(sparse(), data, output=tmp_path / "whole", **common)

    from edge_bcs.training import run as run_module

    done = run_module.Batches.read
    count = 0

    def stopping(self: Any, step: int) -> Any:
        nonlocal count
        count += 1
        if count == 8:
            raise KeyboardInterrupt
        return done(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module.Batches, "read", stopping)
        with pytest.raises(KeyboardInterrupt):
            output = edge_bcs.Output(tmp_path / "part", save_seconds=0)
            edge_bcs.train(sparse(), data, output=output, **common)
    resumed = edge_bcs.Output(tmp_path / "part", resume=True)
    other = {**common, "feed": edge_bcs.Feed(augment=augment, validation=0.1)}
    with pytest.raises(EdgeBcsError, match="was begun with balance True, not False"):
        edge_bcs.train(sparse(), data, output=resumed, **other)
    edge_bcs.train(sparse(), data, output=resumed, **common)
    for name in ("last.safetensors", "checkpoint.safetensors"):
        one, two = (read_checkpoint(tmp_path / kind / name).tensors for kind in ("whole", "part"))
        assert all(one[key].tobytes() == two[key].tobytes() for key in one)
    plan = read_checkpoint(tmp_path / "part" / "last.safetensors").metadata["plan"]
    assert '"balance": true' in plan and '"schedule": "one-cycle"' in plan
