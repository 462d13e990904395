"""Names of classes in edge-bcs-run: composed (NFC) as Python composes them, whatever the file system has."""

from __future__ import annotations

import json
import random
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import board_program as board
from helpers import commands

Make = Callable[..., Path]
OPTIONS = ("--threads", 1, "--attack", "none")


def names(draws: random.Random) -> list[str]:
    """Ten names of 250 characters: letters that are decomposed, marks in any order, parts of Hangul."""
    known = [chr(code) for code in range(sys.maxunicode + 1) if chr(code).isprintable()]
    letters = [letter for letter in known if unicodedata.decomposition(letter)]
    marks = [letter for letter in known if unicodedata.combining(letter)]
    hangul = [chr(code) for code in (*range(0x1100, 0x1200), *range(0xAC00, 0xAC00 + 300))]
    parts = [draws.choice((letters, marks, marks, hangul, hangul, "aeo,")) for _ in range(2500)]
    text = "".join(draws.choice(part) for part in parts).replace(",", "n")
    return [f"{number}{text[250 * number : 250 * number + 250]}" for number in range(10)]


@pytest.mark.parametrize("seed", range(4))
def test_names_are_composed_as_by_python(tiny_artifact: Make, tmp_path: Path, seed: int) -> None:
    np.savez(tmp_path / "images.npz", x=np.zeros((20, 8, 8), np.uint8), y=np.arange(20) % 10)
    given = names(random.Random(seed))
    (tmp_path / "names.txt").write_text("\n".join(given))
    words: tuple[object, ...] = (
        "evaluate",
        tiny_artifact(),
        "--data",
        tmp_path / "images.npz",
        *OPTIONS,
        "--split",
        "train",
    )
    words += ("--class-names", tmp_path / "names.txt")
    found, wanted = board.succeed(*words)["classes"], commands.succeed(*words)["classes"]
    assert found == wanted == [unicodedata.normalize("NFC", name.strip()) for name in given]


def test_folders_of_either_form_are_one_class(tiny_artifact: Make, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for form in ("NFC", "NFD"):
        for name in ("café", "한국", "zoo"):
            folder = tmp_path / form / unicodedata.normalize(form, name)
            folder.mkdir(parents=True)
            for number in range(3):
                image.new("L", (8, 8), 40 * number).save(folder / f"{number}.png")
    train = ("--threads", 1, "--eval-samples", 0, "--max-writes", "none", "--steps", 1)
    board.succeed("finetune", tiny_artifact(), "--data", tmp_path / "NFD", *train, "-o", tmp_path / "run")
    measured = board.succeed("evaluate", tmp_path / "run", "--data", tmp_path / "NFC", *OPTIONS)
    assert measured["matched_by"] == "name" and measured["missing_classes"] == []
    assert measured["classes"][:3] == sorted(["café", "zoo", "한국"])
    (tmp_path / "NFC" / unicodedata.normalize("NFD", "café")).mkdir()
    image.new("L", (8, 8)).save(tmp_path / "NFC" / unicodedata.normalize("NFD", "café") / "0.png")
    told = board.refused("evaluate", tmp_path / "run", "--data", tmp_path / "NFC", *OPTIONS)
    assert "must be distinct" in told


def test_a_backslash_is_part_of_a_name(tiny_artifact: Make, tmp_path: Path) -> None:
    """A photograph in such a folder that was left out, and is gone since, keeps its class."""
    image = pytest.importorskip("PIL.Image")
    for folder, names in {"a": ["0.png", "1\\2.png"], "b\\c": ["0.png"], "d": ["0.png", "1.png"]}.items():
        (tmp_path / "photos" / folder).mkdir(parents=True)
        for name in names:
            image.new("L", (8, 8), 40).save(tmp_path / "photos" / folder / name)
    given: tuple[object, ...] = ("finetune", tiny_artifact(), "--data", tmp_path / "photos", "--threads", 1)
    given += ("--eval-samples", 0)
    given += ("--max-writes", "none", "--epochs", 2, "--save-steps", 1, "--batch-size", 2, "--on-bad", "skip")
    for name, program in (("ours", board.run), ("theirs", commands.run)):
        bad = tmp_path / "photos" / "b\\c" / "0.png"
        bad.parent.mkdir(exist_ok=True)
        bad.write_bytes(b"no photograph")
        begun = program(*given, "-o", tmp_path / name, "--max-hours", 1e-9)
        assert "1 of 3 images (train) are left out" in begun.stderr
        bad.unlink()
        bad.parent.rmdir()
        program(*given, "-o", tmp_path / name, "--resume")
        assert json.loads((tmp_path / name / "report.json").read_text())["classes"][:3] == ["a", "b\\c", "d"]
    assert board.states(tmp_path / "ours") == board.states(tmp_path / "theirs")
