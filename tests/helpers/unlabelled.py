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
