"""Image files that cannot be used: found before the first step, told, left out, and left out again."""

# mypy: disable-error-code="assignment"

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.state import read_state
from helpers.commands import run

from edge_bcs.cli.reading import Reading
from edge_bcs.core import progress
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.text import shown
from edge_bcs.data import images, listing, open_data

Image = pytest.importorskip("PIL.Image")
Make = Callable[..., Path]
SHAPE = (1, 8, 8)


def photograph(seed: int, form: str = "JPEG") -> bytes:
    grey = np.random.default_rng(seed).integers(0, 256, (8, 8), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(grey).resize((40, 40)).save(stream, form)
    return stream.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten classes of eleven photographs: nine to train on, then one held out, then another to train on."""
    folder = tmp_path / "photos"
    for name in range(10):
        (folder / str(name)).mkdir(parents=True)
        for number in range(11):
            (folder / str(name) / f"{number:02}.jpg").write_bytes(photograph(100 * name + number))
    return folder


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-60])


def packed(photos: Path, mode: str) -> Path:
    file = photos.with_name(f"photos.tar{mode[1:].replace(':', '.')}")
    with tarfile.open(file, mode) as archive:  # type: ignore[call-overload]
        archive.add(photos, ".")
    return file


def contents(data: Any) -> list[tuple[bytes, int]]:
    x, y = data.read(np.arange(len(data)))
    return [(image.tobytes(), int(label)) for image, label in zip(x, y, strict=True)]


@pytest.mark.parametrize("mode", ["folder", "w"])
def test_a_backslash(tmp_path: Path, mode: str) -> None:
    """On disk it is part of a name; in a tar, which may come from Windows, it separates.

    An image that was left out and is gone since is found in the same class, so that no label moves.
    """
    photos = tmp_path / "photos"
    files = {"a": ["0.jpg", "1\\2.jpg", "3.jpg"], "b\\c": ["0.jpg", "1.jpg"], "d": ["0.jpg"]}
    for folder, names in files.items():
        (photos / folder).mkdir(parents=True)
        for name in names:
            (photos / folder / name).write_bytes(photograph(len(name)))
    bad = photos / "b\\c" / "0.jpg"
    truncate(bad)

    def read(known: dict[str, str]) -> Any:
        if mode == "folder":
            return open_data(photos, "train", SHAPE, on_bad="skip", known=known)
        file = tmp_path / "photos.tar"
        with tarfile.open(file, "w") as archive:
            for path in sorted(photos.rglob("*.jpg")):
                archive.add(
                    path, path.relative_to(photos).as_posix().replace("\\c/", "c\\").replace("\\2", "2")
                )
        return open_data(file, "train", SHAPE, on_bad="skip", known=known)

    before = read({})
    assert before.classes == (("a", "b\\c", "d") if mode == "folder" else ("a", "bc", "d"))
    assert before.labels.tolist() == [0, 0, 2]  # of a class, one is held out
    kept = [one for one in contents(before) if one[1] != 1]
    shutil.rmtree(bad.parent)
    after = read({image.name: image.why for image in before.left_out})
    assert after.classes == before.classes and contents(after) == kept


@pytest.mark.parametrize("mode", ["folder", "w", "w:gz"])
def test_what_is_bad_is_named_or_left_out(photos: Path, mode: str) -> None:
    """And the split, the labels and the order of all others stay."""
    spec = photos if mode == "folder" else packed(photos, mode)
    whole = {split: contents(open_data(spec, split, SHAPE)) for split in ("train", "test")}
    assert {split: len(found) for split, found in whole.items()} == {"train": 100, "test": 10}
    for bad in ("3/02.jpg", "3/09.jpg", "7/00.jpg"):
        truncate(photos / bad)
    for name in (photos / "5").iterdir():  # a class of which nothing is left keeps its number
        name.write_bytes(b"<html>404</html>")
    spec = photos if mode == "folder" else packed(photos, mode)
    with pytest.raises(EdgeBcsError) as caught:
        open_data(spec, "train", SHAPE)
    sentence = str(caught.value)
    assert sentence.startswith(f"12 images of {spec} cannot be used: the image ")
    assert "3/02.jpg" in sentence and "truncated" in sentence and "\n" not in sentence
    assert sentence.endswith("; and 9 more; mend or remove them, or leave them out with --on-bad skip.")
    train = open_data(spec, "train", SHAPE, on_bad="skip")
    test = open_data(spec, "test", SHAPE, on_bad="skip")
    gone = {3 * 10 + 2, 7 * 10, *range(50, 60)}
    assert contents(train) == [image for n, image in enumerate(whole["train"]) if n not in gone]
    assert contents(test) == [image for n, image in enumerate(whole["test"]) if n not in (3, 5)]
    assert train.classes == tuple("0123456789")
    names = [image.name.removeprefix("./") for image in train.left_out]
    assert sorted(names) == sorted(["3/02.jpg", "7/00.jpg", *(f"5/{n:02}.jpg" for n in range(11) if n != 9)])
    assert all(name in image.why for name, image in zip(names, train.left_out, strict=True))


def test_one_that_is_bad_is_one_sentence(photos: Path) -> None:
    truncate(photos / "3/02.jpg")
    with pytest.raises(EdgeBcsError) as caught:
        open_data(photos, "train", SHAPE)
    assert str(caught.value) == (
        f"the image {photos}/3/02.jpg is truncated: the end of the JPEG is missing; mend or remove it, or "
        "leave it out with --on-bad skip."
    )
    with pytest.raises(EdgeBcsError, match="on_bad is 'stop' or 'skip', not 'hope'"):
        open_data(photos, "train", SHAPE, on_bad="hope")  # type: ignore[arg-type]


# Looking at them


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the images that are looked at, as they are."""
    found: list[str] = []
    look = images.decode_aloud

    def spied(data: bytes, shape: Any, source: str, share: float, resize: Any) -> Any:
        found.append(Path(source).name)
        return look(data, shape, source, share, resize)

    monkeypatch.setattr(images, "decode_aloud", spied)
    return found


@pytest.mark.parametrize("mode", ["folder", "w"])
def test_each_is_looked_at_once(photos: Path, looked_at: list[str], mode: str) -> None:
    spec = photos if mode == "folder" else packed(photos, mode)
    open_data(spec, "train", SHAPE)
    assert len(looked_at) == 100
    open_data(spec, "train", SHAPE)
    assert len(looked_at) == 100
    open_data(spec, "test", SHAPE)
    open_data(spec, "train", SHAPE)
    assert len(looked_at) == 110
    if mode == "folder":
        truncate(photos / "3/02.jpg")
        del looked_at[:]
        for _ in range(2):  # a bad one is not believed to stay so
            open_data(spec, "train", SHAPE, on_bad="skip")
        assert looked_at == ["02.jpg"] * 2
        (photos / "3/02.jpg").write_bytes(photograph(302))
        assert len(open_data(spec, "train", SHAPE)) == 100
    else:
        os.utime(spec, (1, 1))
        open_data(spec, "train", SHAPE)
        assert len(looked_at) == 210


@pytest.mark.parametrize("damage", [b"", b"0000", b"00000000\n{}", b"{]\n", None])
def test_a_memory_that_is_damaged_counts_as_none(
    photos: Path, looked_at: list[str], damage: bytes | None
) -> None:
    open_data(photos, "train", SHAPE)
    (memory,) = Path(os.environ["EDGE_BCS_CACHE"]).glob("*.looked")
    content = memory.read_bytes()
    memory.write_bytes(content[:-9] + b"000000000" if damage is None else damage)
    open_data(photos, "train", SHAPE)
    assert len(looked_at) == 200 and memory.read_bytes() == content


def test_looking_can_be_ended_and_goes_on(photos: Path, looked_at: list[str]) -> None:
    calls = 0

    def watch() -> None:
        nonlocal calls
        calls += 1
        if calls == 70:
            raise StopIteration

    with pytest.raises(StopIteration):
        open_data(photos, "train", SHAPE, watch=watch)
    before = len(looked_at)
    assert before < 140
    open_data(photos, "train", SHAPE)
    assert len(looked_at) - before == 100 - 69  # the 70th was not settled


def test_how_far_it_is_is_told(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.02)
    open_data(photos, "train", SHAPE, watch=lambda: time.sleep(0.002))
    assert f"looking at {photos}, once: " in (said := capsys.readouterr().err) and " of 100 images, " in said
    open_data(photos, "train", SHAPE, watch=lambda: time.sleep(1))
    assert capsys.readouterr().err == ""


def test_an_image_that_goes_bad_later_is_told_and_looked_at_again(photos: Path, looked_at: list[str]) -> None:
    data = open_data(photos, "train", SHAPE)
    file, changed = photos / "0/00.jpg", (photos / "0/00.jpg").stat().st_mtime_ns
    file.write_bytes(file.read_bytes()[:-60] + bytes(60))  # of the size and time that it had
    os.utime(file, ns=(changed, changed))
    with pytest.raises(
        EdgeBcsError, match=r"0/00.jpg is truncated.*It could be used when this data was opened"
    ):
        data.images(np.arange(3))
    assert len(open_data(photos, "train", SHAPE, on_bad="skip")) == 99


# What is no file


def make_link(file: Path, target: Path | str) -> None:
    file.symlink_to(target)


def beside(file: Path, name: bytes) -> Path:
    return Path(os.fsdecode(bytes(file.parent) + b"/" + name))


NO_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a link to itself": (lambda file: make_link(file, file.name), "link to nothing, or in a circle"),
    "a dangling link": (lambda file: make_link(file, "gone.jpg"), "link to nothing, or in a circle"),
    "a link out": (lambda file: make_link(file, "/etc/passwd"), "link out of"),
    "a link to a device": (lambda file: make_link(file, "/dev/zero"), "link out of"),
    "a pipe": (os.mkfifo, "is not a file"),
    "a folder": (os.mkdir, "is not a file"),
    "empty": (lambda file: file.touch(), "not an image"),
    "a name of two lines": (
        lambda file: beside(file, b"a\nb\x1b[2J.jpg").write_bytes(b"x"), r"a\\nb\\x1b\[2J.jpg",
    ),
    "a name that is not UTF-8": (lambda file: beside(file, b"caf\xe9.jpg").touch(), r"caf\\udce9.jpg"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_FILES)
def test_what_is_no_image_file(photos: Path, name: str) -> None:
    make, message = NO_FILES[name]
    make(photos / "1" / "00a.jpg")
    with pytest.raises(EdgeBcsError, match=message) as caught:
        open_data(photos, "train", SHAPE)
    assert str(caught.value) == shown(str(caught.value))
    data = open_data(photos, "train", SHAPE, on_bad="skip")
    assert len(data.left_out) == 1 and len(data) + len(data.left_out) == 101
    json.dumps(data.left_out[0].name)


def test_good_images_may_be_called_anything(photos: Path) -> None:
    for name in (b"caf\xe9.jpg", b"a\nb.jpg"):
        (photos / "0/00.jpg").rename(beside(photos / "0/00.jpg", name))
        shutil.copy(photos / "0/01.jpg", photos / "0/00.jpg")
    assert len(open_data(photos, "train", SHAPE)) == 102
    assert len(open_data(packed(photos, "w"), "train", SHAPE)) == 102
    assert len(open_data(packed(photos, "w:gz"), "train", SHAPE)) == 102


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a link to itself": (lambda photos: make_link(photos / "z", "z"), "z is a link to nothing, or in a"),
    "a dangling link": (lambda photos: make_link(photos / "z", "gone"), "z is a link to nothing"),
    "a link to the whole": (lambda photos: make_link(photos / "z", "."), "inside the class folder .*z: "),
    "a name that is not UTF-8": (
        lambda photos: (photos / "1").rename(beside(photos / "1", b"caf\xe9")), r"caf\\udce9 is not UTF-8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("on_bad", ["stop", "skip"])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_class_is_never_left_out(photos: Path, name: str, on_bad: Any) -> None:
    """Without it the labels of the others would change."""
    make, message = FOLDERS[name]
    make(photos)
    with pytest.raises(EdgeBcsError, match=message):
        open_data(photos, "train", SHAPE, on_bad=on_bad)


@pytest.mark.parametrize("unreadable", ["photos", "1"])
def test_folders_that_cannot_be_read(photos: Path, monkeypatch: pytest.MonkeyPatch, unreadable: str) -> None:
    scandir = os.scandir

    def scanned(folder: Path) -> Any:
        if Path(folder).name == unreadable:
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(listing.os, "scandir", scanned)
    with pytest.raises(EdgeBcsError, match=rf"the folder .*{unreadable} cannot be read: Permission denied\."):
        open_data(photos, "train", SHAPE, on_bad="skip")


def test_what_is_neither_image_nor_class_is_passed_over(photos: Path) -> None:
    os.mkfifo(photos / "pipe")
    os.mkfifo(photos / "1" / "pipe")
    (photos / "README").write_text("hello")
    (photos / "1" / "loop").symlink_to("loop")
    (photos / "1" / "up").symlink_to("..")
    (photos / ".cache").mkdir()
    assert len(open_data(photos, "train", SHAPE)) == 100


@pytest.mark.parametrize("kind", ["pipe", "device", "loop"])
def test_data_that_is_no_file(tmp_path: Path, kind: str) -> None:
    spec = Path("/dev/zero") if kind == "device" else tmp_path / "x.npz"
    if kind == "pipe":
        os.mkfifo(spec)
    elif kind == "loop":
        spec.symlink_to(spec)
    with pytest.raises(EdgeBcsError, match=r"not a file|not data that can be read|does not exist"):
        open_data(spec, "train", SHAPE)


# The commands


def state_of(folder: Path) -> dict[str, bytes]:
    tensors, _ = read_state(Artifact.read(folder))
    return {name: tensor.tobytes() for name, tensor in tensors.items()}


def test_finetune_leaves_out_and_goes_on_with_the_same_images(
    tiny_artifact: Make, photos: Path, tmp_path: Path
) -> None:
    """Also if one of them is mended, and another removed, before it goes on."""
    bad = ("3/02.jpg", "3/09.jpg", "4/05.jpg")
    for name in bad:
        truncate(photos / name)
    common = ("finetune", tiny_artifact(), "--data", photos, "--eval-samples", 10, "--eval-steps", 1)
    stopped = run(*common, "--steps", 1, "-o", tmp_path / "a")
    assert stopped.exit_code == 1 and "2 images of " in stopped.stderr and "--on-bad skip" in stopped.stderr
    assert not (tmp_path / "a").exists()
    skipped = run(*common, "--steps", 4, "--on-bad", "skip", "-o", tmp_path / "whole")
    assert skipped.exit_code == 0, skipped.output
    assert "2 of 100 images (train) are left out:\n" in skipped.stderr
    assert "1 of 10 images (test) are left out:\n" in skipped.stderr
    assert all(name in skipped.stderr for name in bad)
    assert "Left out 3 images that cannot be used; report.json lists them." in skipped.stdout
    left_out = json.loads((tmp_path / "whole/report.json").read_text())["left_out"]
    assert left_out["count"] == 3
    assert [(image["split"], image["image"]) for image in left_out["images"]] == [
        ("train", "3/02.jpg"), ("train", "4/05.jpg"), ("test", "3/09.jpg"),
    ]  # fmt: skip
    assert "truncated" in left_out["images"][0]["why"]

    first = run(*common, "--steps", 4, "--on-bad", "skip", "-o", tmp_path / "parts", "--json")
    assert json.loads(first.stdout)["left_out"] == left_out
    assert run(*common, "--steps", 9, "--resume", "-o", tmp_path / "whole").exit_code == 0
    (photos / "3/02.jpg").write_bytes(photograph(302))
    (photos / "4/05.jpg").unlink()
    rest = run(*common, "--steps", 9, "--resume", "-o", tmp_path / "parts", "--json")
    assert rest.exit_code == 0, rest.output
    assert json.loads(rest.stdout)["left_out"] == left_out
    assert state_of(tmp_path / "parts") == state_of(tmp_path / "whole")

    truncate(photos / "6/06.jpg")
    new = run(*common, "--steps", 12, "--resume", "--on-bad", "skip", "-o", tmp_path / "parts")
    assert new.exit_code == 1 and new.stderr.count("\n") == 1
    assert "6/06.jpg is truncated" in new.stderr and "this training began with it" in new.stderr
    assert state_of(tmp_path / "parts") == state_of(tmp_path / "whole")


def test_a_split_that_is_opened_later(tiny_artifact: Make, photos: Path, tmp_path: Path) -> None:
    """Its images were not among those that the training began with; what is left out then stays so."""
    for name in ("3/02.jpg", "3/09.jpg"):
        truncate(photos / name)
    common = ("finetune", tiny_artifact(), "--data", photos, "--on-bad", "skip", "-o", tmp_path / "run")
    assert run(*common, "--eval-samples", 0, "--steps", 2).exit_code == 0
    measured = ("--eval-samples", 10, "--eval-steps", 1, "--resume", "--json")
    for steps in (3, 4):
        done = run(*common, *measured, "--steps", steps)
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["left_out"]["count"] == 2
        (photos / "3/09.jpg").write_bytes(photograph(309))
    (tmp_path / "run/left-out.json").write_text("{")  # damaged, it counts as none
    done = run(*common, *measured, "--steps", 5)
    assert done.exit_code == 0 and json.loads(done.stdout)["left_out"]["count"] == 1


def test_a_record_that_is_not_there_is_not_removed(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is read-only refuses that, too; what is wrong is said where something is to be saved."""

    def read_only(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "unlink", read_only)
    Reading(str(photos), (1, 8, 8), "stop", folder=tmp_path).record(tmp_path)


def test_evaluate_leaves_out(tiny_artifact: Make, photos: Path) -> None:
    truncate(photos / "3/09.jpg")
    common = ("evaluate", tiny_artifact(), "--data", photos, "--attack", "none")
    assert "3/09.jpg is truncated" in run(*common).stderr
    done = run(*common, "--on-bad", "skip", "--json")
    report = json.loads(done.stdout)
    assert report["samples"] == 9 and report["left_out"]["count"] == 1
    assert report["left_out"]["images"][0]["image"] == "3/09.jpg"
    assert "1 of 10 images (test) are left out" in done.stderr
    assert "left out        1 images" in run(*common, "--on-bad", "skip").stdout


def test_train_leaves_out_and_goes_on(photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    truncate(photos / "3/02.jpg")
    common = ("train", "--data", photos, "--model", "resnet18", "--width", 0.0625, "--channels", 1)
    common = (*common, "--input-size", 8, "--sparsity", 0.5, "--distribution", "uniform", "--device", "cpu")
    common = (*common, "--attack-steps", 1, "--batch-size", 32, "--epochs", 1, "-o", tmp_path / "run")
    assert "3/02.jpg is truncated" in run(*common).stderr
    done = run(*common, "--on-bad", "skip", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["left_out"]["count"] == 1
    (photos / "3/02.jpg").write_bytes(photograph(302))
    again = run(*common, "--on-bad", "skip", "--json", "--resume")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["left_out"] == json.loads(done.stdout)["left_out"]
    fresh = run(*common, "--on-bad", "skip")
    assert fresh.exit_code == 1 and "holds a training already" in fresh.stderr
    assert list(json.loads((tmp_path / "run/left-out.json").read_text())["left_out"]["train"]) == ["3/02.jpg"]
    truncate(photos / "3/09.jpg")
    evaluate = ("evaluate", tmp_path / "run", "--data", photos, "--attack", "none", "--device", "cpu")
    report = json.loads(run(*evaluate, "--on-bad", "skip", "--json").stdout)
    assert report["engine"] == "torch" and report["samples"] == 9 and report["left_out"]["count"] == 1
