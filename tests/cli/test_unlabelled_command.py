"""finetune --unlabelled: photographs without labels on the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.state import read_state
from helpers.commands import run
from helpers.unlabelled import bits, written_photographs

Make = Callable[..., Path]


@pytest.fixture
def photos(tmp_path: Path) -> tuple[Path, Path]:
    return written_photographs(tmp_path)


def tuned(artifact: Path, photos: Path, more: Path, *words: object, exit_code: int = 0) -> Any:
    begun = ("finetune", artifact, "--data", photos, "--unlabelled", more, "--eval-samples", 0)
    result = run(*begun, *words)
    assert result.exit_code == exit_code, result.output
    return result


def test_the_command_reports_what_it_used(
    tiny_artifact: Make, tmp_path: Path, photos: tuple[Path, Path]
) -> None:
    words = ("--confidence", 0.1, "--unlabelled-share", 0.25, "--unlabelled-weight", 2, "--batch-size", 8)
    artifact = tiny_artifact(objective="rst")
    result = tuned(artifact, *photos, *words, "--epochs", 1, "-o", tmp_path / "whole")
    assert "unlabelled images: 12 of 12 (100 %) have a label, at 0.1 or above" in result.stderr
    report = json.loads((tmp_path / "whole" / "report.json").read_text())
    used = report["training"]["unlabelled"]
    assert (used["images"], used["labelled"], sum(used["classes"].values())) == (12, 12, 12)
    assert "Of 12 unlabelled images the network labelled 12 (100 %) in the last epoch: " in result.stdout
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["unlabelled"] for line in lines] == [2] * 6 and report["training"]["done"] == 6
    # Cut off and resumed, nothing is said again but where the photographs are.
    tuned(
        artifact, *photos, *words, "--epochs", 1, "--max-hours", 1e-9, "-o", tmp_path / "part", exit_code=75
    )
    tuned(artifact, *photos, "--resume", "-o", tmp_path / "part")
    states = [read_state(Artifact.read(tmp_path / name)) for name in ("whole", "part")]
    assert states[0][1] == states[1][1] and bits(states[0][0]) == bits(states[1][0])


def test_what_is_labelled_or_held_out_is_not_unlabelled(
    tiny_artifact: Make, tmp_path: Path, photos: tuple[Path, Path]
) -> None:
    """Whichever split it belongs to, and whatever it is called there."""
    labelled = sorted(photos[0].rglob("*.png"))
    for number, file in enumerate(labelled):
        shutil.copy(file, photos[1] / f"copy-{number}.jpg")
    result = tuned(tiny_artifact(), *photos, "--steps", 1, "-o", tmp_path / "run")
    assert (
        "the unlabelled copy-0.jpg, the same file as 0/0.png of the labelled data, and 19 more, are left out"
        in (result.stderr)
    )
    assert (
        json.loads((tmp_path / "run" / "report.json").read_text())["training"]["unlabelled"]["images"] == 12
    )
    result = tuned(tiny_artifact(), photos[0], photos[0], "-o", tmp_path / "all", exit_code=1)
    assert "all 20 unlabelled images are among the labelled ones, too" in result.stderr
    assert "Traceback" not in result.output


def test_photographs_that_cannot_be_used_are_left_out_for_good(
    tiny_artifact: Make, tmp_path: Path, photos: tuple[Path, Path]
) -> None:
    bad = photos[1] / "a" / "b" / "00.png"
    bad.write_bytes(b"no photograph")
    result = tuned(tiny_artifact(), *photos, "--steps", 1, "-o", tmp_path / "run", exit_code=1)
    assert "00.png" in result.stderr and "--on-bad skip" in result.stderr
    words = ("--on-bad", "skip", "-o", tmp_path / "run")
    result = tuned(tiny_artifact(), *photos, *words, "--epochs", 3, "--max-hours", 1e-9, exit_code=75)
    assert "1 of 13 images (unlabelled) are left out" in result.stderr
    bad.unlink()  # it keeps its place, so that the others keep theirs
    result = tuned(tiny_artifact(), *photos, *words, "--resume")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [one["split"] for one in report["left_out"]["images"]] == ["unlabelled"]
    assert report["training"]["unlabelled"]["images"] == 12


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda folder: None, "does not exist; unlabelled images are a folder of photographs"),
        (lambda folder: folder.write_text(""), "is a file; unlabelled images are a folder of photographs"),
        (lambda folder: folder.mkdir(), "holds no image"),
        (lambda folder: (folder / "a.txt").parent.mkdir() or (folder / "a.txt").touch(), "holds no image"),
    ],
)
def test_folders_without_photographs_are_refused(
    tiny_artifact: Make, tmp_path: Path, photos: tuple[Path, Path], make: Callable[[Path], Any], sentence: str
) -> None:
    make(tmp_path / "given")
    result = tuned(tiny_artifact(), photos[0], tmp_path / "given", "-o", tmp_path / "run", exit_code=1)
    assert sentence in result.stderr and "Traceback" not in result.output
    assert not (tmp_path / "run" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--confidence", 0.5), "--confidence belongs to --unlabelled, which is not given"),
        (("--unlabelled-share", 0.5), "--unlabelled-share belongs to --unlabelled, which is not given"),
        (("--unlabelled-weight", 2), "--unlabelled-weight belongs to --unlabelled, which is not given"),
        (("--unlabelled", "x", "--confidence", 90), "90.0 is not in the range 0<=x<=1"),
        (("--unlabelled", "x", "--unlabelled-share", 1), "1.0 is not in the range 0<x<1"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(
    tiny_artifact: Make, tmp_path: Path, words: tuple[object, ...], sentence: str
) -> None:
    result = run("finetune", tiny_artifact(), "--data", "digits", *words, "-o", tmp_path / "run")
    assert result.exit_code in (1, 2) and sentence in result.stderr and "Traceback" not in result.output


def test_the_service_finds_them(tiny_artifact: Make, photos: tuple[Path, Path], tmp_path: Path) -> None:
    result = tuned(tiny_artifact(), *photos, "-o", tmp_path / "run", "--print-service")
    words = result.stdout.split()
    assert words[words.index("--unlabelled") + 1] == str(photos[1].resolve())
    assert str(photos[1].resolve()) in next(line for line in result.stdout.splitlines() if "PATHS" in line or
                                            "RequiresMountsFor" in line)  # fmt: skip
