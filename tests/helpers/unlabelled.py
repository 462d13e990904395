"""Images with and without labels, what a network says of them, and a state as bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_bcs.runtime import Trainer
from edge_bcs.runtime import unlabelled as self_training

from edge_bcs.data import open_data

Array = np.ndarray[Any, Any]


def digits(first: int, end: int) -> tuple[Array, Array]:
    return open_data("digits", "train", (1, 8, 8)).read(np.arange(first, end))


def written_photographs(folder: Path, endings: tuple[str, ...] = ("png",)) -> tuple[Path, Path]:
    """Twenty labelled photographs in two class folders, and twelve others, in folders that say nothing."""
    image = pytest.importorskip("PIL.Image")
    folders = folder / "photos", folder / "more"
    for number, pixels in enumerate(digits(0, 32)[0]):
        places = [folders[0] / str(number % 2), folders[1], folders[1] / "a" / "b", folders[1] / "0"]
        place = places[0 if number < 20 else 1 + number % 3]
        place.mkdir(parents=True, exist_ok=True)
        grey = image.fromarray(np.rint(pixels[0] * 255).astype(np.uint8)).resize((20 + number, 30))
        grey.save(place / f"{number}.{endings[number % len(endings)]}")
    (folders[1] / "notes.txt").write_text("no photograph")
    return folders


def bits(state: dict[str, Array]) -> bytes:
    return b"".join(state[name].tobytes() for name in sorted(state))


def answering(monkeypatch: pytest.MonkeyPatch, answers: Callable[[int], tuple[int, float]]) -> None:
    """Let the network say (class, probability) of each image in turn, whenever it labels."""
    asked = 0

    def answered(trainer: Trainer, x: Array) -> tuple[Array, Array]:
        nonlocal asked
        found = [answers(asked + place) for place in range(len(x))]
        asked += len(x)
        return np.array([label for label, _ in found]), np.array([share for _, share in found], np.float32)

    monkeypatch.setattr(self_training, "answers", answered)


def middling(artifact: Path, images: Array) -> float:
    """The confidence that the network has of half of the images at the beginning."""
    with Trainer(artifact) as trainer:
        return float(np.median(trainer.probabilities(images).max(axis=1)))
