"""What training and evaluation take as data: arrays, tensors, torch's Datasets and loaders, paths."""

# mypy: disable-error-code="arg-type, assignment, type-arg, var-annotated"

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.data import ArrayDataset, open_data
from edge_bcs.data.adapt import batch_size_of, dataset_of

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.utils.data import (  # noqa: E402
    DataLoader,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

import edge_bcs  # noqa: E402
from edge_bcs import Compute, Feed, Schedule  # noqa: E402
from edge_bcs.evaluation.measures import evaluate  # noqa: E402
from edge_bcs.training import loop as training  # noqa: E402
from edge_bcs.training.reading import Part  # noqa: E402

Make = Callable[..., Path]
SHORT: dict[str, Any] = {
    "objective": "natural", "schedule": Schedule(steps=2), "batch_size": 4, "feed": Feed(validation=0.0),
    "progress": False, "compute": Compute(device="cpu"),
}  # fmt: skip


def pixels(count: int = 12) -> np.ndarray:
    """Images u8 [count, 1, 8, 8], all different."""
    return np.random.default_rng(3).integers(0, 256, (count, 1, 8, 8)).astype(np.uint8)


LABELS = np.array([0, 1, 2, 1, 0, 2, 2, 1, 0, 0, 1, 2])


class Items:
    """A map-style Dataset of (image, label) as users write them; it counts what is asked for."""

    def __init__(self, images: Any, labels: Any = LABELS) -> None:
        self.images, self.answers, self.asked = images, labels, []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> tuple[Any, Any]:
        self.asked.append(place)
        return self.images[place], self.answers[place]


class Named(Items):
    """One in torchvision's manner."""

    classes = ["ant", "bee", "cat"]  # noqa: RUF012

    @property
    def targets(self) -> list[int]:
        return [int(label) for label in self.answers]


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))


def floats() -> np.ndarray:
    return pixels().astype(np.float32) / np.float32(255)


def pillow_images() -> list[Any]:
    image = pytest.importorskip("PIL.Image")
    return [image.fromarray(one[0]) for one in pixels()]


SOURCES: dict[str, Callable[[], Any]] = {
    "f32 arrays": lambda: (floats(), LABELS),
    "f64 arrays": lambda: (floats().astype(np.float64), LABELS.astype(np.uint8)),
    "u8 arrays": lambda: (pixels(), LABELS),
    "a list of two arrays": lambda: [floats(), LABELS],
    "tensors": lambda: (torch.from_numpy(floats()).requires_grad_(), torch.from_numpy(LABELS)),
    "u8 tensors": lambda: (torch.from_numpy(pixels()), torch.from_numpy(LABELS)),
    "TensorDataset": lambda: TensorDataset(torch.from_numpy(floats()), torch.from_numpy(LABELS)),
    "Dataset of u8": lambda: Items(pixels()),
    "Dataset of PIL": lambda: Items(pillow_images()),
    "Dataset of tensors": lambda: Items([torch.from_numpy(one) for one in floats()], LABELS.tolist()),
    "Dataset with targets": lambda: Named(floats()),
    "a list of pairs": lambda: list(zip(floats(), LABELS, strict=True)),
    "Subset": lambda: Subset(Named(np.r_[floats()[:1] * 0, floats()], np.r_[[1], LABELS]), range(1, 13)),
    "DataLoader": lambda: DataLoader(Named(floats()), batch_size=5, shuffle=True, drop_last=True),
    "unbatched DataLoader": lambda: DataLoader(Items(floats()), batch_size=None),
    "a data set": lambda: ArrayDataset(floats(), LABELS),
}  # fmt: skip


@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_of_data_says_the_same_images(kind: str) -> None:
    data = dataset_of(SOURCES[kind]())
    places = np.array([7, 0, 11])
    x, y = data.read(places)
    assert x.dtype == np.float32 and y.dtype == np.int64
    # Rounding once, to float32; the bit pattern is what every other reader of u8 gives.
    assert np.array_equal(x, pixels()[places].astype(np.float32) / np.float32(255))
    assert y.tolist() == [1, 0, 2] and data.labels.tolist() == LABELS.tolist()
    assert data.shape == (1, 8, 8) and len(data) == 12
    named = kind in ("Dataset with targets", "Subset", "DataLoader")
    assert data.classes == (("ant", "bee", "cat") if named else ("0", "1", "2"))


@pytest.mark.parametrize("kind", SOURCES)
def test_training_takes_every_kind(kind: str) -> None:
    sparse, reference = (edge_bcs.sparsify(small(), 0.5) for _ in range(2))
    training.train(sparse, SOURCES[kind](), **SHORT)
    training.train(reference, ArrayDataset(floats(), LABELS), **SHORT)
    assert all(np.array_equal(buffer, reference.state()[name]) for name, buffer in sparse.state().items())


def test_of_a_loader_the_batch_size_counts_and_its_order_does_not() -> None:
    loader = DataLoader(Named(floats()), batch_size=5, shuffle=True)
    assert batch_size_of(loader) == 5
    assert batch_size_of(Named(floats())) is None and batch_size_of((floats(), LABELS)) is None
    report = training.train(
        edge_bcs.sparsify(small(), 0.5),
        loader,
        **{**SHORT, "batch_size": None, "schedule": Schedule(epochs=1)},
    )
    assert report["step"] == 2  # 12 // 5
    report = training.train(
        edge_bcs.sparsify(small(), 0.5), loader, **{**SHORT, "schedule": Schedule(epochs=1)}
    )
    assert report["step"] == 3  # batch_size=4 is what was asked for


def test_a_random_transform_is_asked_again_in_every_epoch() -> None:
    class Flips(Items):
        def __getitem__(self, place: int) -> tuple[Any, Any]:
            image, label = super().__getitem__(place)
            return (image if len(self.asked) % 2 else 255 - image), label

    data = dataset_of(Flips(pixels()))
    part = Part(data, np.arange(12))
    first, second = (part.read(np.array([4]))[0] for _ in range(2))
    assert not np.array_equal(first, second)  # a copy that was kept would hold one of them for good


def test_targets_save_a_pass_over_the_images() -> None:
    source = Named(floats())
    assert dataset_of(source).labels.tolist() == LABELS.tolist() and source.asked == [0]
    changed = Named(floats())
    changed.target_transform = lambda label: label  # type: ignore[attr-defined]
    dataset_of(changed)
    assert sorted(changed.asked) == [0, *range(12)]


def test_paths_and_digits(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=pixels(), y=LABELS)
    data = dataset_of(tmp_path / "data.npz", shape=(1, 8, 8))
    assert data.shape == (1, 8, 8) and data.classes == ("0", "1", "2")
    assert len(dataset_of("digits", split="test", shape=(1, 8, 8))) == 359
    with pytest.raises(EdgeBcsError, match=r"give input_shape=\(C, H, W\) beside digits"):
        dataset_of("digits")
    own = edge_bcs.sparsify(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), 0.5)
    with pytest.raises(EdgeBcsError, match="does not say which images it takes"):
        training.train(own, "digits", **SHORT)
    training.train(own, "digits", input_shape=(1, 8, 8), **SHORT)
    ours = edge_bcs.sparsify(edge_bcs.models.resnet18(width=0.05, input_channels=1, input_size=8), 0.9)
    training.train(ours, "digits", **SHORT)
    assert evaluate(ours, "digits", attack="none", samples=8)["samples"] == 8
    digits = open_data("digits", "test", (1, 8, 8))
    assert evaluate(ours, digits, attack="none") == {
        **evaluate(ours, "digits", attack="none"), "seconds": pytest.approx(0, abs=60),
    }  # fmt: skip


class Endless(IterableDataset):  # type: ignore[misc]
    def __iter__(self) -> Any:
        yield floats()[0], 0


def broken(value: float) -> np.ndarray:
    images = floats()
    images[5, 0, 2, 2] = value
    return images


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "0 to 255": (
        lambda: (floats() * 255, LABELS),
        r"images must lie in \[0, 1\], but they reach 0 to 255: divide by 255",
    ),
    "normalised": (lambda: (floats() * 4 - 2, LABELS), "reach -2 to 2: leave out the normalisation"),
    "a little beyond": (lambda: (broken(1.25), LABELS), "reach 0 to 1.25: clip them"),
    "16 bits": (lambda: (floats() * 65535, LABELS), "reach 0 to 65535: divide by the largest value"),
    "0 to 255, with NaN": (lambda: (broken(np.nan) * 255, LABELS), "reach 0 to 255: divide by 255"),
    "not a number": (
        lambda: (broken(np.nan), LABELS),
        "image 5 of the data has a pixel that is not a finite",
    ),
    "infinite": (lambda: (broken(-np.inf), LABELS), "image 5 of the data has a pixel that is not a finite"),
    "tensors 0 to 255": (
        lambda: (torch.from_numpy(floats() * 255), torch.from_numpy(LABELS)),
        "reach 0 to 255: divide by 255",
    ),
    "Dataset 0 to 255": (lambda: Items(floats() * 255), "reach 0 to 255: divide by 255"),
    "Dataset, not a number": (lambda: Items(broken(np.nan)), "image 5 of the data has a pixel that is not"),
    "data set, not a number": (
        lambda: ArrayDataset(broken(np.nan), LABELS),
        "image 5 of the data has a pixel",
    ),
    "whole numbers": (lambda: (pixels().astype(int), LABELS), r"floats in \[0, 1\] or uint8, .*not int64"),
    "labels of floats": (lambda: (floats(), LABELS / 2), "labels must be whole numbers"),
    "negative label": (lambda: (floats(), LABELS - 1), "label -1 of image 0 is out of range"),
    "a label without end": (
        lambda: (floats(), np.where(LABELS == 2, 10**12, LABELS)),
        "label 1000000000000 of image 2 is out of range",
    ),
    "Dataset, label of floats": (
        lambda: Items(floats(), LABELS / 2),
        "label of item 0 .* whole number, not '0.0'",
    ),
    "Dataset, negative label": (lambda: Items(floats(), LABELS - 1), "label of item 0 of the Items is -1"),
    "Dataset, more classes than names": (lambda: Named(floats(), LABELS + 1), "label 3 has no name among 3"),
    "Dataset of dicts": (
        lambda: [{"image": one, "label": 0} for one in floats()],
        r"item 0 of the list is a dict, and \(image, label\) was expected",
    ),
    "Dataset of triples": (lambda: [(one, 0, 0) for one in floats()], "item 0 of the list is a tuple of 3"),
    "Dataset of sizes": (
        lambda: Items([*floats()[:11], floats()[11, :, :7]]),
        r"item 11 of the Items has the shape \[1, 7, 8\], the first one \[1, 8, 8\]",
    ),
    "Dataset of text": (lambda: Items(list("abcdefghijkl")), "an array or a PIL image, not str"),
    "Dataset of flat images": (lambda: Items(floats()[:, 0]), r"must be \[C, H, W\]"),
    "Dataset without images": (lambda: Items([], []), "the data set is empty"),
    "iterable": (Endless, "Endless is an iterable-style dataset"),
    "iterable in a loader": (lambda: DataLoader(Endless()), "Endless is an iterable-style dataset"),
    "some of them": (
        lambda: DataLoader(Named(floats()), sampler=SubsetRandomSampler([1, 2])),
        "chooses its images by a SubsetRandomSampler.*torch.utils.data.Subset",
    ),
    "with replacement": (
        lambda: DataLoader(
            Named(floats()), sampler=torch.utils.data.RandomSampler(range(12), replacement=True)
        ),
        "chooses its images by a RandomSampler",
    ),
    "batches of its own": (
        lambda: DataLoader(Named(floats()), batch_sampler=[[0, 1], [2]]),
        "chooses its images by a list",
    ),
    "collation": (lambda: DataLoader(Named(floats()), collate_fn=lambda rows: rows), "collate_fn of its own"),
    "a generator": (lambda: (pair for pair in [(floats(), LABELS)]), "data must be .*, not generator"),
    "a number": (lambda: 7, "data must be .*, not int"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_be_misread_is_refused(kind: str) -> None:
    make, message = REFUSED[kind]
    with pytest.raises(EdgeBcsError, match=message) as caught:
        training.train(edge_bcs.sparsify(small(), 0.5), make(), **{**SHORT, "schedule": Schedule(steps=3)})
    assert "\n" not in str(caught.value)


def test_a_label_that_changes_is_refused() -> None:
    class Moody(Items):
        def __getitem__(self, place: int) -> tuple[Any, Any]:
            image, label = super().__getitem__(place)
            return image, label if len(self.asked) < 14 else (label + 1) % 3

    data = dataset_of(Moody(floats()))
    with pytest.raises(EdgeBcsError, match="item 3 of the Moody has the label 2, and it was 1 before"):
        data.read(np.array([3]))
        data.read(np.array([3]))


def test_deep_pillow_images_are_refused() -> None:
    image = pytest.importorskip("PIL.Image")
    deep = [image.fromarray(one[0].astype(np.int32) * 256) for one in pixels()]
    with pytest.raises(EdgeBcsError, match="PIL's mode I; convert it to 8 bits"):
        dataset_of(Items(deep))
    colours = [one.convert("RGBA") for one in pillow_images()]
    assert dataset_of(Items(colours)).shape == (3, 8, 8)


def test_evaluation_looks_at_pixels_and_labels() -> None:
    sparse = edge_bcs.sparsify(small(), 0.5)
    expected = evaluate(sparse, ArrayDataset(floats(), LABELS), attack="none")["clean_acc"]
    for data in ((floats(), LABELS), (pixels(), LABELS), Named(floats()),
                 DataLoader(Named(floats()), batch_size=5), [(floats(), LABELS)]):  # fmt: skip
        report = evaluate(sparse, data, attack="none")
        assert report["clean_acc"] == expected and report["samples"] == 12
    for data in ((floats() * 255, LABELS), [(floats() * 255, LABELS)], Items(floats() * 255)):
        with pytest.raises(EdgeBcsError, match="reach 0 to 255: divide by 255"):
            evaluate(sparse, data, attack="none")
    with pytest.raises(EdgeBcsError, match="image 5 has a pixel that is not a finite number"):
        evaluate(sparse, [(floats()[:4], LABELS[:4]), (broken(np.nan)[4:], LABELS[4:])], attack="none")
    with pytest.raises(EdgeBcsError, match="whole numbers as labels, not float32 and float64"):
        evaluate(sparse, [(floats(), LABELS / 2)], attack="none")


def test_the_board_takes_them_too(tiny_artifact: Make) -> None:
    from edge_bcs.runtime import Trainer

    sources = ("f32 arrays", "u8 tensors", "TensorDataset", "Dataset with targets", "DataLoader")
    losses, accuracies = set(), set()
    for kind in sources:
        with Trainer(tiny_artifact()) as trainer:
            accuracies.add(trainer.evaluate(SOURCES[kind](), 0)["accuracy"])
            fitted = trainer.fit(SOURCES[kind](), steps=2, batch_size=4, augment=False, progress=False)
            losses.add(fitted["loss"])
    assert len(losses) == len(accuracies) == 1
    with Trainer(tiny_artifact()) as trainer:
        assert trainer.fit(SOURCES["DataLoader"](), progress=False)["steps"] == 3  # batches of 5
    with Trainer(tiny_artifact()) as trainer:
        assert trainer.evaluate("digits", 0, limit=20)["samples"] == 20
        assert trainer.fit("digits", steps=1, progress=False)["steps"] == 1
        with pytest.raises(EdgeBcsError, match="to 255: divide by 255"):
            trainer.fit(Items(floats() * 255), progress=False)
        # A pixel that is not a number is the board's to skip.
        assert (
            trainer.fit((broken(np.nan), LABELS), batch_size=4, on_nan="skip", progress=False)["skipped"] == 1
        )
        assert trainer.fit(Items(broken(np.nan)), batch_size=4, on_nan="skip", progress=False)["skipped"] == 1


def test_the_adapter_needs_no_torch() -> None:
    code = (
        "import sys, numpy as np; from edge_bcs.data.adapt import dataset_of;"
        "dataset_of((np.zeros((2, 1, 4, 4), np.float32), np.zeros(2, int)));"
        "dataset_of([(np.zeros((1, 4, 4), np.uint8), 0)]);"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
