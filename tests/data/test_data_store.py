"""The decoded copy of a data set: never trusted, never left half written, and never in the way."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edge_bcs.core import files
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import remove_abandoned, replacing
from edge_bcs.data import open_data, store

SHAPE = (1, 4, 4)
IMAGES = np.random.default_rng(0).integers(1, 256, (40, *SHAPE), np.uint8)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    np.savez(tmp_path / "data.npz", x=IMAGES, y=np.arange(40) % 4)
    return tmp_path / "data.npz"


def copy_of() -> Path:
    """The decoded copy in the cache, of which there is one."""
    (file,) = Path(os.environ["EDGE_BCS_CACHE"]).glob("*.pixels")
    return file


def everything(source: Path) -> np.ndarray:
    data = open_data(source, "train", SHAPE)
    return data.images(np.arange(len(data)))


def zeroed(first: float, last: float) -> Callable[[Path], object]:
    """A file whose blocks never reached the medium: of the right size, and zero between two shares of it."""

    def damage(file: Path) -> object:
        content = bytearray(file.read_bytes())
        place = slice(int(first * len(content)), int(last * len(content)))
        content[place] = bytes(len(content[place]))
        return file.write_bytes(content)

    return damage


def cut(share: float) -> Callable[[Path], object]:
    return lambda file: os.truncate(file, int(share * file.stat().st_size))


def flipped(share: float) -> Callable[[Path], object]:
    def damage(file: Path) -> object:
        content = bytearray(file.read_bytes())
        content[int(share * (len(content) - 1))] ^= 1
        return file.write_bytes(content)

    return damage


DAMAGES = {
    "empty": cut(0),
    "cut in the pixels": cut(0.1),
    "cut in the index": cut(0.8),
    "cut in the end": lambda file: os.truncate(file, file.stat().st_size - 1),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "zero": zeroed(0, 1),
    "pixels zero": zeroed(0, 0.15),
    "index zero": zeroed(0.5, 0.9),
    "a bit of a pixel": flipped(0.01),
    "a bit of the index": flipped(0.7),
    "a bit of the end": flipped(1),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_copy_is_made_again(source: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Found when it is opened or when its images are read; either way the images are the source's."""
    first = everything(source)
    assert first.tobytes() == (IMAGES[np.arange(40) // 4 != 9] / np.float32(255)).tobytes()
    assert capsys.readouterr().err == ""
    whole = copy_of().read_bytes()
    DAMAGES[name](copy_of())
    assert everything(source).tobytes() == first.tobytes()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{source} is decoded again." in said
    assert copy_of().read_bytes() == whole


@pytest.mark.parametrize("name", ["empty", "pixels zero", "gone"])
def test_damage_while_training_costs_time_and_no_bits(
    source: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = open_data(source, "train", SHAPE)
    expected = [x.tobytes() for x, _ in data.batches(8, seed=1, shuffle=True, augment=True)]
    found = []
    for number, (x, _) in enumerate(data.batches(8, seed=1, shuffle=True, augment=True)):
        found.append(x.tobytes())
        if number == 2:
            Path.unlink(copy_of()) if name == "gone" else DAMAGES[name](copy_of())
    assert found == expected
    assert capsys.readouterr().err.count("is decoded again.") == 1


def test_what_cannot_be_mended_is_one_sentence(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_data(source, "train", SHAPE)
    decode = store.decode

    def on_a_failing_medium(file: Path, *arguments: object) -> object:
        index = decode(file, *arguments)  # type: ignore[arg-type]
        zeroed(0, 0.2)(file)
        return index

    zeroed(0, 0.2)(copy_of())
    monkeypatch.setattr(store, "decode", on_a_failing_medium)
    with pytest.raises(EdgeBcsError, match="its medium fails; set EDGE_BCS_CACHE"):
        data.images(np.arange(9))
    np.savez(source, x=255 - IMAGES, y=np.arange(40) % 4)  # another time of change
    os.utime(source, (1, 1))
    with pytest.raises(EdgeBcsError, match="has changed since it was opened"):
        data.images(np.arange(9))


def test_images_that_differ_are_not_trained_on(source: Path) -> None:
    """A source with the size and time that it had, and other pixels: the medium lies."""
    data = open_data(source, "train", SHAPE)
    before = source.stat()
    np.savez(source, x=IMAGES[::-1], y=np.arange(40) % 4)
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    zeroed(0, 0.2)(copy_of())
    with pytest.raises(EdgeBcsError, match="no longer gives the same images"):
        data.images(np.arange(9))


def test_the_copy_is_on_the_medium_before_it_has_its_name(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).suffix)
        fsync(descriptor)

    def replaced(old: Path, new: Path) -> None:
        events.append(f"{old.suffix} → {new.suffix}")
        replace(old, new)

    monkeypatch.setattr(files.os, "fsync", synced)
    monkeypatch.setattr(files.os, "replace", replaced)
    open_data(source, "train", SHAPE)
    assert events == [".partial", ".partial → .pixels", ""]  # the file, its name, the folder


# What is left of processes that were killed


WRITER = """
import sys, time
from pathlib import Path
from edge_bcs.core.files import replacing
with replacing(Path(sys.argv[1]), shared=True) as stream:
    stream.write(b"half")
    stream.flush()
    print("writing", flush=True)
    time.sleep(60)
"""


def test_only_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    file = tmp_path / "x.pixels"
    with subprocess.Popen([sys.executable, "-c", WRITER, str(file)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        (partial,) = tmp_path.glob(f"x.pixels.{writer.pid}-*.partial")
        remove_abandoned(tmp_path)
        assert partial.exists()  # it is being written
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    # The number of a process that is gone, and locked: it is another container's.
    with partial.open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        remove_abandoned(tmp_path)
        assert partial.exists()
    others = [tmp_path / "state.safetensors.partial", tmp_path / f"x.pixels.{os.getpid()}.partial"]
    for other in others:
        other.touch()
    remove_abandoned(tmp_path)
    assert not partial.exists() and all(other.exists() for other in others)


def test_the_cache_is_cleared_of_them(source: Path) -> None:
    abandoned = Path(os.environ["EDGE_BCS_CACHE"]) / f"0.pixels.{2**31 - 1}.partial"  # no such process
    abandoned.write_bytes(b"half")
    open_data(source, "train", SHAPE)
    assert not abandoned.exists()


@pytest.mark.parametrize("form", ["arrays", "images"])
def test_a_folder_in_the_place_of_a_file_of_the_cache(source: Path, tmp_path: Path, form: str) -> None:
    data = source
    if form == "images":
        image = pytest.importorskip("PIL.Image").new("L", (4, 4))
        data = tmp_path / "photos"
        (data / "ant").mkdir(parents=True)
        for number in range(2):
            image.save(data / "ant" / f"{number}.png")
    open_data(data, "train", SHAPE)
    (file,) = Path(os.environ["EDGE_BCS_CACHE"]).iterdir()
    file.unlink()
    file.mkdir()
    with pytest.raises(EdgeBcsError, match=f"^{file} is a folder, where edge-bcs keeps a file .*: remove it"):
        open_data(data, "train", SHAPE)
    file.rmdir()
    assert len(open_data(data, "train", SHAPE))


def test_two_write_the_same_file_at_once(tmp_path: Path) -> None:
    file = tmp_path / "x"
    with subprocess.Popen([sys.executable, "-c", WRITER, str(file)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        with replacing(file, shared=True) as stream:
            stream.write(b"whole")
        writer.kill()
    assert file.read_bytes() == b"whole"


def test_a_disk_with_less_room_than_is_kept_free(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = store.shutil.disk_usage(source.parent)._replace(free=1 << 20)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: room)
    with pytest.raises(EdgeBcsError, match="needs more than the 0 MiB that its decoded copy may take"):
        open_data(source, "train", SHAPE)
