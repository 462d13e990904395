"""Class folders in a plain tar: edge-bcs-run trains on what Python finds in it."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import board_program as board
from helpers import commands

Image = pytest.importorskip("PIL.Image")
Make = Callable[..., Path]
OPTIONS = ("--threads", 1, "--eval-samples", 6, "--eval-steps", 1, "--max-writes", "none", "--steps", 4)
LONG = "a name that is longer than the hundred bytes of a header " * 4


def photographs(classes: dict[str, int], draws: np.random.Generator) -> dict[str, bytes]:
    """Encoded images by their paths."""
    found = {}
    for label, (name, count) in enumerate(classes.items()):
        for number in range(count):
            buffer = io.BytesIO()
            size = tuple(draws.integers(8, 30, 2).tolist())
            pixels = draws.integers(0, 256, (*size, 3)).astype(np.uint8) // 4 + 50 * label
            Image.fromarray(pixels).save(buffer, ("JPEG", "PNG")[number % 2])
            found[f"{name}/photo {number}.{('jpg', 'png')[number % 2]}"] = buffer.getvalue()
    return found


def pack(file: Path, content: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(file, "w", format=form) as archive:
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file


def trained_by_both(artifact: Path, data: Path, folder: Path, *options: object) -> None:
    given = ("finetune", artifact, "--data", data, *OPTIONS, *options)
    report = board.succeed(*given, "-o", folder / "ours")
    wanted = commands.succeed(*given, "-o", folder / "theirs", "--engine", "native")
    assert board.states(folder / "ours") == board.states(folder / "theirs")
    assert board.metrics(folder / "ours") == board.metrics(folder / "theirs")
    for name in ("before", "after", "classes", "left_out"):
        assert report.get(name) == wanted.get(name)


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_a_tar_is_seen_as_by_python(tiny_artifact: Make, tmp_path: Path, form: int) -> None:
    content = photographs({"data/ant": 12, "data/Wasp": 9, "data/zebra-é": 11}, np.random.default_rng(form))
    content |= {
        "data/ant/.hidden.jpg": b"",
        "data/.git/x.jpg": b"",
        "data/notes.txt": b"1",
        "loose.jpg": b"2",
    }
    if form != tarfile.USTAR_FORMAT:
        content[f"data/ant/{LONG}.png"] = content["data/ant/photo 1.png"]
    file = pack(tmp_path / "images.tar", content, form)
    with tarfile.open(file, "a", format=form) as archive:
        link = tarfile.TarInfo("data/ant/link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "photo 0.jpg"
        archive.addfile(link)
        folder = tarfile.TarInfo("data/bee")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    trained_by_both(tiny_artifact(), file, tmp_path)


def test_splits_are_folders_or_files(tiny_artifact: Make, tmp_path: Path) -> None:
    draws = np.random.default_rng(4)
    train, test = photographs({"ant": 6, "bee": 7}, draws), photographs({"ant": 4, "bee": 2}, draws)
    both = {f"./train/{name}": data for name, data in train.items()}
    both |= {f"./VAL/{name}": data for name, data in test.items()}
    (tmp_path / "one").mkdir()
    trained_by_both(tiny_artifact(), pack(tmp_path / "one.tar", both), tmp_path / "one")
    for folder in ("two", "data"):
        (tmp_path / folder).mkdir()
    pack(tmp_path / "data" / "train.tar", train)
    pack(tmp_path / "data" / "test.tar", test)
    trained_by_both(tiny_artifact(), tmp_path / "data", tmp_path / "two")
    assert board.states(tmp_path / "one" / "ours") == board.states(tmp_path / "two" / "ours")


def test_images_that_cannot_be_used_are_named_and_left_out(tiny_artifact: Make, tmp_path: Path) -> None:
    content = photographs({"ant": 9, "bee": 9}, np.random.default_rng(5))
    content["bee/photo 3.png"] = content["bee/photo 3.png"][:40]
    file = pack(tmp_path / "images.tar", content)
    message = board.refused("finetune", tiny_artifact(), "--data", file, *OPTIONS, "-o", tmp_path / "run")
    assert message.startswith(f"the image bee/photo 3.png in {file} ")
    given = ("finetune", tiny_artifact(), "--data", file, *OPTIONS, "--on-bad", "skip")
    report = board.succeed(*given, "-o", tmp_path / "ours")
    commands.succeed(*given, "-o", tmp_path / "theirs", "--engine", "native")
    assert board.states(tmp_path / "ours") == board.states(tmp_path / "theirs")
    assert [image["image"] for image in report["left_out"]["images"]] == ["bee/photo 3.png"]


def test_folders_inside_of_class_folders_are_refused(tiny_artifact: Make, tmp_path: Path) -> None:
    content = photographs({"data/ant": 2, "data/train/bee": 2, "data/ant/young": 2}, np.random.default_rng(6))
    file = pack(tmp_path / "images.tar", content)
    given = ("evaluate", tiny_artifact(), "--data", file)
    message = board.refused(*given)
    assert f"{file} has images in data/ant/young, a folder inside the class folder data/ant" in message
    assert message in commands.run(*given).output


def test_hostile_tars_get_a_sentence(tiny_artifact: Make, tmp_path: Path) -> None:
    content = pack(
        tmp_path / "images.tar", photographs({"ant": 3, LONG: 3}, np.random.default_rng(7))
    ).read_bytes()
    draws, target, artifact = np.random.default_rng(8), tmp_path / "hostile.tar", tiny_artifact()
    for attempt in range(60):
        changed = bytearray(content)
        if attempt % 3 == 0:
            del changed[int(draws.integers(0, len(changed))) :]
        else:
            header = 512 * int(draws.integers(0, len(changed) // 512))
            for place in draws.integers(header, header + 512, 2):
                changed[place] = int(draws.integers(0, 256))
        target.write_bytes(changed)
        result = board.run("evaluate", artifact, "--data", target, "--attack", "none")
        assert result.returncode in (0, 1), result.stderr
        assert result.returncode == 0 or result.stderr.splitlines()[-1].startswith("Error: ")
    (tmp_path / "packed.tar.gz").write_bytes(content)
    assert "is packed, and edge-bcs-run reads images where they lie" in board.refused(
        "evaluate", artifact, "--data", tmp_path / "packed.tar.gz"
    )
