"""The loaders, on small files that the tests write in each format."""

# mypy: disable-error-code="call-overload"

from __future__ import annotations

import io
import pickle
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.data import ArrayDataset, open_data
from edge_bcs.data.augmentation import shift_and_flip

RANDOM = np.random.default_rng(0)


def png(color: tuple[int, int, int], size: tuple[int, int] = (4, 4)) -> bytes:
    image = pytest.importorskip("PIL.Image")
    stream = io.BytesIO()
    image.new("RGB", size, color).save(stream, "PNG")
    return stream.getvalue()


def write_tar(file: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(file, mode) as archive:
        for name, content in members.items():
            information = tarfile.TarInfo(name)
            information.size = len(content)
            archive.addfile(information, io.BytesIO(content))
    return file


def laid_out(tmp_path: Path, form: str, names: Iterable[str], folder: str = "photos") -> Path:
    """Write images of these names and return what holds them: a folder among them, or data.tar[.gz]."""
    members = dict.fromkeys(names, png((1, 2, 3)))
    if form != "folder":
        return write_tar(tmp_path / f"data{form}", members, "w:gz" if form == ".tar.gz" else "w")
    for name, content in members.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path / folder


def all_of(spec: Path | str, split: str, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    parts = list(open_data(spec, split, shape).batches(3))
    return np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])


# Digits


def test_digits_are_scikit_learns() -> None:
    sklearn = pytest.importorskip("sklearn.datasets")
    reference = sklearn.load_digits()
    train, test = open_data("digits", "train", (1, 8, 8)), open_data("digits", "test", (1, 8, 8))
    assert (len(train), len(test)) == (1438, 359)
    x, y = test.read(np.arange(359))
    np.testing.assert_array_equal(y, reference.target[4::5])
    np.testing.assert_allclose(x[:, 0] * 16, reference.images[4::5], atol=1e-5)


def test_digits_are_enlarged_bilinearly() -> None:
    torch = pytest.importorskip("torch")
    small, _ = open_data("digits", "train", (1, 8, 8)).read(np.arange(5))
    large, _ = open_data("digits", "train", (3, 32, 20)).read(np.arange(5))
    expected = torch.nn.functional.interpolate(torch.from_numpy(small), (32, 20), mode="bilinear").numpy()
    np.testing.assert_allclose(large, np.repeat(expected, 3, axis=1), atol=1e-6)


# Order and augmentation


def test_an_epoch_is_a_permutation_and_can_be_entered_in_the_middle() -> None:
    data = open_data("digits", "train", (1, 8, 8))
    assert sorted(data.order(3, 0)) == list(range(1438))
    assert list(data.order(3, 0)) != list(data.order(3, 1))
    arguments: dict[str, Any] = {"seed": 3, "epoch": 1, "shuffle": True, "augment": True}
    whole = list(data.batches(100, **arguments))
    rest = list(data.batches(100, start=9, **arguments))
    assert [len(y) for _, y in whole] == [100] * 14 + [38] and len(rest) == 6
    for (x, y), (x_again, y_again) in zip(whole[9:], rest, strict=True):
        np.testing.assert_array_equal(x, x_again)
        np.testing.assert_array_equal(y, y_again)


def test_augmentation_shifts_flips_and_depends_on_the_image_alone() -> None:
    ramp = np.broadcast_to(np.arange(20, dtype=np.float32), (2000, 1, 20, 20))
    moved = shift_and_flip(ramp, np.arange(2000), seed=1, epoch=0)
    flipped = moved[:, 0, 0, 0] > moved[:, 0, 0, -1]
    assert 900 < flipped.sum() < 1100  # a fair coin, ±4.5 standard deviations
    upright = np.where(flipped[:, None], moved[:, 0, 0, ::-1], moved[:, 0, 0])
    shift = 10 - upright[:, 10]
    assert set(shift) == {-2, -1, 0, 1, 2}  # ±10 % of 20
    np.testing.assert_array_equal(upright, np.clip(np.arange(20) - shift[:, None], 0, 19))
    part = shift_and_flip(ramp[7:9], np.array([7, 8]), seed=1, epoch=0)
    np.testing.assert_array_equal(part, moved[7:9])


# Folders and archives

CLASS_FOLDERS = {
    f"{split}/{name}/{number}.png": png((red, 255, number))
    for split in ("train", "test")
    for red, name in ((0, "ant"), (51, "bee"))
    for number in (1, 2)
}


def check_class_folders(spec: Path) -> None:
    for split in ("train", "test"):
        x, y = all_of(spec, split, (3, 4, 4))
        assert open_data(spec, split, (3, 4, 4)).classes == ("ant", "bee")
        np.testing.assert_array_equal(y, [0, 0, 1, 1])
        np.testing.assert_allclose(x[:, 0, 0, 0], [0, 0, 0.2, 0.2], atol=1e-6)
        np.testing.assert_allclose(x[:, 1], 1)


def test_class_folders(tmp_path: Path) -> None:
    for name, content in CLASS_FOLDERS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    check_class_folders(tmp_path)


@pytest.mark.parametrize(("suffix", "mode"), [(".tar", "w"), (".tar.gz", "w:gz")])
def test_tar_of_class_folders(tmp_path: Path, suffix: str, mode: str) -> None:
    check_class_folders(write_tar(tmp_path / f"data{suffix}", CLASS_FOLDERS, mode))


@pytest.mark.parametrize("form", ["folder", ".tar", ".tar.gz"])
@pytest.mark.parametrize("inner", ["a/photos/cat/day/2.png", "a/photos/cat/x/day/2.png"])
def test_a_class_folder_in_another_is_refused(tmp_path: Path, form: str, inner: str) -> None:
    """In a folder its images were left out; a tar made a class of it, which shifted the labels of others."""
    for first, second in (("a/photos/cat/1.png", inner), (inner, "a/photos/cat/1.png")):
        spec = laid_out(tmp_path, form, (first, "a/photos/ant/1.png", second), "a/photos")
        with pytest.raises(
            EdgeBcsError,
            match=r"images in .*photos/cat/.*day, a folder inside the class folder .*photos/cat: ",
        ):
            all_of(spec, "train", (3, 4, 4))


@pytest.mark.parametrize("form", ["folder", ".tar", ".tar.gz"])
@pytest.mark.parametrize("above", ["photos", "photos/train"])
@pytest.mark.parametrize("others", [["ant/1.png"], ["cat/day2/1.png", "dog/day1/1.png"]])
def test_a_class_with_all_its_images_in_folders_is_refused(
    tmp_path: Path, form: str, above: str, others: list[str]
) -> None:
    """A tar made the classes day1 and day2 of them."""
    names = [f"{above}/{name}" for name in ("cat/day1/1.png", *others)]
    spec = laid_out(tmp_path, form, names)
    with pytest.raises(
        EdgeBcsError, match=rf"{above}/cat/day1, a folder inside the class folder .*{above}/cat: "
    ):
        all_of(spec, "train", (3, 4, 4))


@pytest.mark.parametrize("form", [".tar", ".tar.gz"])
def test_class_folders_of_a_tar_may_lie_below_others(tmp_path: Path, form: str) -> None:
    names = ["./a/b/train/cat/1.png", "a/b/train/dog/1.png", "a/b/test/cat/2.png", "a/b/test/dog/2.png"]
    members = dict.fromkeys(names, png((1, 2, 3)))
    spec = write_tar(tmp_path / f"data{form}", members, "w:gz" if form == ".tar.gz" else "w")
    assert open_data(spec, "train", (3, 4, 4)).classes == ("cat", "dog")
    assert len(open_data(spec, "test", (3, 4, 4))) == 2


@pytest.mark.parametrize("form", ["folder", ".tar", ".tar.gz"])
def test_what_is_hidden_is_no_class(tmp_path: Path, form: str) -> None:
    hidden = ("photos/.thumbs/1.png", "photos/ant/.thumbs/1.png", "photos/ant/._1.png", "./1.png")
    names = (*(f"photos/{name}/{number}.png" for name in ("ant", "bee") for number in (1, 2)), *hidden)
    spec = laid_out(tmp_path, form, names)
    data = open_data(spec, "train", (3, 4, 4))
    assert data.classes == ("ant", "bee")
    assert len(data) + len(open_data(spec, "test", (3, 4, 4))) == 4


@pytest.mark.parametrize(("suffix", "mode"), [(".tar", "w"), (".tar.gz", "w:gz")])
def test_one_tar_for_each_split(tmp_path: Path, suffix: str, mode: str) -> None:
    for split in ("train", "test"):
        members = {name: content for name, content in CLASS_FOLDERS.items() if name.startswith(split)}
        write_tar(tmp_path / f"{split}{suffix}", members, mode)
    check_class_folders(tmp_path)
    check_class_folders(tmp_path / f"train{suffix}")


def test_a_tenth_is_held_out_where_there_is_no_test_split(tmp_path: Path) -> None:
    members = {f"photos/{name}/{number:02}.png": png((number, 0, 0)) for name in "ab" for number in range(20)}
    file = write_tar(tmp_path / "photos.tar", members)
    x, _ = all_of(file, "test", (3, 4, 4))
    np.testing.assert_allclose(x[:, 0, 0, 0] * 255, [9, 19, 9, 19], atol=1e-4)
    assert len(open_data(file, "train", (3, 4, 4))) == 36


def test_images_are_resized_and_made_grey(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "a.tar", {f"a/{number}.png": png((255, 0, 0), (9, 7)) for number in range(2)})
    x, _ = all_of(file, "train", (1, 5, 6))
    np.testing.assert_allclose(x, np.full((1, 1, 5, 6), 76 / 255), atol=1e-6)  # ITU-R 601 luma of pure red


# CIFAR, SVHN, npz


def cifar_batch(count: int, label: str, classes: int) -> tuple[dict[bytes, object], np.ndarray, list[int]]:
    data = RANDOM.integers(0, 256, (count, 3072), dtype=np.uint8)
    labels = RANDOM.integers(0, classes, count).tolist()
    return {b"data": data, label.encode(): labels, b"batch_label": b"x"}, data, labels


def write_cifar(
    folder: Path, label: str, files: tuple[str, ...], classes: int
) -> dict[str, tuple[np.ndarray, list[int]]]:
    folder.mkdir()
    written = {}
    for name in files:
        content, data, labels = cifar_batch(4, label, classes)
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        written[name] = data.reshape(-1, 3, 32, 32), labels
    names = {f"{label[:-1]}_names".encode(): [f"class{number}".encode() for number in range(classes)]}
    (folder / ("meta" if classes == 100 else "batches.meta")).write_bytes(pickle.dumps(names, protocol=2))
    return written


@pytest.mark.parametrize("packed", [False, True])
def test_cifar_10(tmp_path: Path, packed: bool) -> None:
    names = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
    folder = tmp_path / "cifar-10-batches-py"
    written = write_cifar(folder, "labels", names, 10)
    spec = tmp_path
    if packed:
        members = {f"cifar-10-batches-py/{file.name}": file.read_bytes() for file in sorted(folder.iterdir())}
        spec = write_tar(tmp_path / "cifar-10-python.tar.gz", members, "w:gz")
    assert open_data(spec).classes[3] == "class3"
    x, y = all_of(spec, "train", (3, 32, 32))
    np.testing.assert_allclose(x * 255, np.concatenate([written[name][0] for name in names[:5]]), atol=1e-4)
    assert y.tolist() == [label for name in names[:5] for label in written[name][1]]
    assert all_of(spec, "test", (3, 32, 32))[1].tolist() == written["test_batch"][1]


@pytest.mark.parametrize("packed", [False, True])
def test_cifar_100(tmp_path: Path, packed: bool) -> None:
    folder = tmp_path / "cifar-100-python"
    written = write_cifar(folder, "fine_labels", ("train", "test"), 100)
    spec = tmp_path
    if packed:
        members = {f"cifar-100-python/{file.name}": file.read_bytes() for file in sorted(folder.iterdir())}
        spec = write_tar(tmp_path / "cifar-100-python.tar.gz", members, "w:gz")
    x, y = all_of(spec, "test", (3, 32, 32))
    np.testing.assert_allclose(x * 255, written["test"][0], atol=1e-4)
    assert y.tolist() == written["test"][1]
    assert open_data(spec).classes[99] == "class99"


def test_cifar_in_a_tar_without_names_has_numbers(tmp_path: Path) -> None:
    content, _, _ = cifar_batch(4, "labels", 10)
    members = {name: pickle.dumps(content, protocol=2) for name in ("data_batch_1", "test_batch")}
    spec = write_tar(tmp_path / "cifar.tar.gz", members, "w:gz")
    assert set(open_data(spec).classes) <= set("0123456789")


class Exploit:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (eval, ("open('/tmp/edge-bcs-owned', 'w')",))


def test_a_pickle_that_wants_more_than_arrays_is_refused(tmp_path: Path) -> None:
    write_cifar(tmp_path / "cifar-10-batches-py", "labels", ("data_batch_1",), 10)
    file = tmp_path / "cifar-10-batches-py" / "data_batch_1"
    file.write_bytes(pickle.dumps({b"data": Exploit(), b"labels": [0]}))
    with pytest.raises(EdgeBcsError, match=r"builtins\.eval"):
        open_data(tmp_path)
    assert not Path("/tmp/edge-bcs-owned").exists()


def test_svhn(tmp_path: Path) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    pixels = {}
    for split, labels in (("train", [1, 10, 9]), ("test", [10, 2])):
        pixels[split] = RANDOM.integers(0, 256, (32, 32, 3, len(labels)), dtype=np.uint8)
        file = tmp_path / f"{split}_32x32.mat"
        scipy_io.savemat(file, {"X": pixels[split], "y": np.array(labels, np.uint8)[:, None]})
    x, y = all_of(tmp_path, "train", (3, 32, 32))
    np.testing.assert_allclose(x * 255, pixels["train"].transpose(3, 2, 0, 1), atol=1e-4)
    assert y.tolist() == [1, 0, 9]
    assert all_of(tmp_path / "train_32x32.mat", "test", (3, 32, 32))[1].tolist() == [0, 2]


@pytest.mark.parametrize("wrong", [1e300, -7.0, 11.0, 2.5, np.nan, np.inf])
def test_svhn_labels_are_digits(tmp_path: Path, wrong: float) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    content = {"X": np.zeros((32, 32, 3, 3), np.uint8), "y": np.array([[1.0], [10.0], [wrong]])}
    scipy_io.savemat(tmp_path / "train_32x32.mat", content)
    with pytest.raises(
        EdgeBcsError, match=f"label {re.escape(f'{wrong:g}')} of image 2 in .* is not one of SVHN's"
    ):
        open_data(tmp_path / "train_32x32.mat")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "float"])
def test_npz(tmp_path: Path, save: object, layout: str) -> None:
    images = RANDOM.integers(0, 256, (12, 3, 5, 6), dtype=np.uint8)
    stored = {"NCHW": images, "NHWC": images.transpose(0, 2, 3, 1), "float": images.astype(np.float32) / 255}[
        layout
    ]
    labels = np.arange(12) % 3
    save(
        tmp_path / "data.npz",
        x_train=np.ascontiguousarray(stored),
        y_train=labels,
        x_test=images[:2],
        y_test=[1, 1],
    )  # type: ignore[operator]
    if layout == "float":  # one file, one kind of pixel
        save(tmp_path / "data.npz", x_train=stored, y_train=labels, x_test=stored[:2], y_test=[1, 1])  # type: ignore[operator]
    x, y = all_of(tmp_path / "data.npz", "train", (3, 5, 6))
    np.testing.assert_allclose(x * 255, images, atol=1e-4)
    np.testing.assert_array_equal(y, labels)
    assert all_of(tmp_path / "data.npz", "test", (3, 5, 6))[1].tolist() == [1, 1]


def test_the_decoded_copy_is_used_again_and_renewed_with_its_source(tmp_path: Path) -> None:
    file = tmp_path / "data.npz"
    np.savez(file, x=np.zeros((10, 1, 2, 2), np.uint8), y=np.zeros(10, int))
    open_data(file, "train", (1, 2, 2))
    np.savez(file, x=np.full((20, 1, 2, 2), 255, np.uint8), y=np.zeros(20, int))
    x, _ = all_of(file, "train", (1, 2, 2))
    assert x.shape == (18, 1, 2, 2) and x.min() == 1


# What goes wrong is one sentence


def truncated(tmp_path: Path, suffix: str, mode: str) -> Path:
    file = write_tar(tmp_path / f"data{suffix}", {f"a/{n}.png": RANDOM.bytes(5000) for n in range(3)}, mode)
    file.write_bytes(file.read_bytes()[:7000])
    return file


def bad_image(tmp_path: Path, content: bytes) -> Path:
    for number in range(2):
        (tmp_path / "photos" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / "a" / f"{number}.png").write_bytes(content)
    return tmp_path / "photos"


def bomb() -> bytes:
    """A PNG whose header declares 9000×9000 pixels."""
    import struct
    import zlib

    header = b"IHDR" + struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 100)
    chunks = [
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data, b"IEND")
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def npz(tmp_path: Path, **arrays: object) -> Path:
    np.savez(tmp_path / "data.npz", **arrays)  # type: ignore[arg-type]
    return tmp_path / "data.npz"


def half(file: Path) -> Path:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return file


FAULTS = {
    "missing": (lambda t: t / "nothing", "does not exist"),
    "wrong kind": (lambda t: (t / "x.txt").write_text("hello") and t / "x.txt", "not data that can be read"),
    "empty folder": (lambda t: t, "no images in class folders"),
    "empty class": (lambda t: (t / "cat").mkdir() or t, "class folder .*cat holds no image"),
    "not an image": (lambda t: bad_image(t, b"hello"), "not an image"),
    "truncated image": (
        lambda t: bad_image(t, png((1, 2, 3), (200, 200))[:60]),
        "truncated|not an image",
    ),
    "image bomb": (lambda t: bad_image(t, bomb()), "9000×9000"),
    "truncated tar": (lambda t: truncated(t, ".tar", "w"), "tar"),
    "truncated tar.gz": (lambda t: truncated(t, ".tar.gz", "w:gz"), "truncated"),
    "npz without arrays": (lambda t: npz(t, a=np.zeros(3)), "lacks the arrays"),
    "npz of objects": (lambda t: npz(t, x=np.array([{}] * 2), y=np.zeros(2, int)), "array of numbers"),
    "npz shape": (
        lambda t: npz(t, x=np.zeros((2, 7, 7, 3), np.uint8), y=np.zeros(2, int)),
        "the network takes",
    ),
    "npz lengths": (lambda t: npz(t, x=np.zeros((2, 3, 4, 4), np.uint8), y=np.zeros(3, int)), "3 labels"),
    "npz range": (lambda t: npz(t, x=np.full((2, 3, 4, 4), 7.0), y=np.zeros(2, int)), "0 to 1 was expected"),
    "npz not a number": (lambda t: npz(t, x=np.full((2, 3, 4, 4), np.nan), y=np.zeros(2, int)), "0 to 1"),
    "npz negative label": (lambda t: npz(t, x=np.zeros((2, 3, 4, 4)), y=np.array([0, -1])), "label -1"),
    "npz labels of floats": (
        lambda t: npz(t, x=np.zeros((2, 3, 4, 4)), y=np.array([0, 1e300])),
        "whole numbers",
    ),
    "npz label without end": (
        lambda t: npz(t, x=np.zeros((2, 3, 4, 4)), y=np.array([0, 2**64 - 7], np.uint64)),
        "label 18446744073709551609",
    ),
    "truncated npz": (lambda t: half(npz(t, x=np.zeros((9, 3, 4, 4)), y=np.zeros(9, int))), "truncated"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(tmp_path: Path, fault: str) -> None:
    make, message = FAULTS[fault]
    with pytest.raises(EdgeBcsError, match=message) as caught:
        all_of(make(tmp_path), "train", (3, 4, 4))
    assert "\n" not in str(caught.value)


def test_arrays_in_memory() -> None:
    data = ArrayDataset(np.ones((3, 1, 2, 2), np.float32), np.array([0, 2, 1]))
    assert data.classes == ("0", "1", "2") and data.shape == (1, 2, 2)
    with pytest.raises(EdgeBcsError, match="positions"):
        data.read(np.array([3]))
    with pytest.raises(EdgeBcsError, match="floats"):
        ArrayDataset(np.ones((3, 1, 2, 2), np.int64), np.array([0, 2, 1]))
