"""`edge-bcs predict`, and what a Trainer says of photographs by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_bcs.runtime import Trainer
from helpers.commands import run

from edge_bcs.data import open_data

Make = Callable[..., Path]
NAMES = ("nought", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six digits as photographs in two class folders, larger than the network's input, and what is none."""
    x, _ = open_data("digits", "train", (1, 8, 8)).read(np.arange(6))
    folder = tmp_path / "photos"
    for number, image in enumerate(x):
        file = folder / ("a", "b")[number // 3] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.rint(image[0] * 255).astype(np.uint8)).resize((20, 30)).save(file)
    (folder / "a" / "notes.txt").write_text("no image, and no image's name")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "9.png").write_bytes((folder / "a" / "0.png").read_bytes())
    return folder


def predicted(*arguments: object, exit_code: int = 0) -> dict[str, Any]:
    result = run("predict", *arguments, "--json")
    assert result.exit_code == exit_code, result.output
    content: dict[str, Any] = json.loads(result.stdout)
    return content


def test_the_pixels_are_those_of_the_evaluation(tiny_artifact: Make, photos: Path) -> None:
    """Read as a data set reads them, in whatever micro-batches: the probabilities are those of its images."""
    data = open_data(photos, "train", (1, 8, 8))
    held_out = open_data(photos, "test", (1, 8, 8))
    with Trainer(tiny_artifact()) as trainer:
        expected = {trainer.probabilities(part.read(np.array([n]))[0]).tobytes() for part in (data, held_out)
                    for n in range(len(part))}  # fmt: skip
        rows = trainer.probabilities(data.read(np.arange(len(data)))[0])
        x = data.read(np.arange(len(data)))[0]
        assert trainer.predict_names(x) == [str(label) for label in trainer.predict(x)]
        assert [row.argmax() for row in rows] == trainer.predict(x).tolist()
    np.testing.assert_allclose(rows.sum(axis=1), 1, rtol=1e-6)
    answer = predicted(tiny_artifact(), photos, "--top", 10)
    assert [Path(one["image"]).name for one in answer["images"]] == [f"{n}.png" for n in range(6)]
    found = set()
    for one in answer["images"]:
        shares = {each["label"]: each["probability"] for each in one["classes"]}
        assert list(shares.values()) == sorted(shares.values(), reverse=True)
        found.add(np.array([shares[label] for label in range(10)], np.float32).tobytes())
    assert found == expected and answer["failed"] == []


def test_names_probabilities_and_how_many(tiny_artifact: Make, photos: Path) -> None:
    common = ("predict", tiny_artifact(), photos / "a" / "0.png", photos / "b")
    lines = run(*common, "--class-names", ",".join(NAMES)).stdout.splitlines()
    assert len(lines) == 4 and lines[0].startswith(f"{photos / 'a' / '0.png'}: ")
    for line in lines:
        named = [part.rsplit(" ", 2) for part in line.split(": ")[1].split(", ")]
        assert len(named) == 3 and {name for name, *_ in named} <= set(NAMES)
        assert all(0 <= float(share) <= 100 and sign == "%" for _, share, sign in named)
    one = predicted(*common[1:], "--top", 1)
    assert [len(image["classes"]) for image in one["images"]] == [1] * 4
    assert one["images"][0]["classes"][0]["name"] in {str(n) for n in range(10)}  # names are not known


def test_what_is_no_image_gets_a_sentence_and_the_others_go_on(tiny_artifact: Make, photos: Path) -> None:
    (photos / "a" / "1.png").write_bytes((photos / "a" / "1.png").read_bytes()[:40])
    (photos / "empty").mkdir()
    given = (photos / "a" / "notes.txt", photos / "missing.jpg", photos / "empty", photos)
    result = run("predict", tiny_artifact(), *given)
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert len(result.stdout.splitlines()) == 5
    sentences = result.stderr.splitlines()
    assert len(sentences) == 4 and all(sentence.endswith(".") for sentence in sentences)
    for name, sentence in zip(("notes.txt", "missing.jpg", "empty", "1.png"), sentences, strict=True):
        assert name in sentence
    answer = predicted(tiny_artifact(), *given, exit_code=1)
    assert [Path(one["image"]).name for one in answer["images"]] == [
        "0.png",
        *(f"{n}.png" for n in range(2, 6)),
    ]
    assert [one["why"] for one in answer["failed"]] == sentences


def test_a_network_that_diverged_gives_no_probabilities(
    tiny_artifact: Make, photos: Path, tmp_path: Path
) -> None:
    with Trainer(tiny_artifact()) as trainer:
        trainer.buffers["dense.value"][...] = 3e38
        trainer.save(tmp_path / "run")
    result = run("predict", tmp_path / "run", photos / "b")
    assert result.exit_code == 1 and "is not finite: its training has diverged" in result.stderr
    assert "nan" not in result.output


def test_it_stays_inside_the_budget(tiny_artifact: Make, photos: Path) -> None:
    refused = run("predict", tiny_artifact(), photos, "--memory", "1KiB")
    assert refused.exit_code == 1 and "memory budget exceeded" in refused.stderr
    allowed = predicted(tiny_artifact(), photos, "--memory", "1MiB")
    assert 0 < allowed["peak_bytes"] <= 1 << 20
