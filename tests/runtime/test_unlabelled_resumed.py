"""Robust self-training that is cut off and goes on: the labels that were made, and the images they are of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_bcs.runtime import Trainer
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.course import packed, unpacked
from edge_bcs.runtime.state import read_state
from helpers.unlabelled import Array, bits, digits, middling

from edge_bcs import EdgeBcsError, Unlabelled
from edge_bcs.data.dataset import ArrayDataset

Make = Callable[..., Path]
QUIET: dict[str, Any] = {"progress": False, "augment": False}


@pytest.mark.parametrize("objective", ["at", "trades"])
def test_cut_off_within_an_epoch_it_ends_with_the_same_bits(
    tiny_artifact: Make, tmp_path: Path, objective: str
) -> None:
    data, more = digits(0, 8), digits(8, 32)[0]
    wishes: dict[str, Any] = {"epochs": 3, "batch_size": 8, "progress": False}
    start = tiny_artifact(objective=objective)
    confidence = middling(start, more)
    options = Unlabelled(more, confidence=confidence, share=0.5, weight=0.5)
    expected: list[dict[str, Any]] = []
    with Trainer(start, seed=3) as trainer:
        trainer.fit(data, unlabelled=options, on_step=expected.append, **wishes)
        whole = bits(trainer.state())

    folder, lines = tmp_path / "run", list[dict[str, Any]]()

    def stop(line: dict[str, Any]) -> None:
        lines.append(line)
        if line["done"] == 4:  # of six an epoch
            raise KeyboardInterrupt

    with Trainer(start, seed=3) as trainer:
        with pytest.raises(KeyboardInterrupt):
            trainer.fit(data, unlabelled=options, save=folder, on_step=stop, **wishes)
        trainer.save(folder)
        kept = read_state(Artifact.read(folder))[1]["progress"]
        sure = trainer.probabilities(more)
        now = np.where(sure.max(axis=1) >= np.float32(confidence), sure.argmax(axis=1), -1)
    saved = unpacked(json.loads(kept)["pseudo_labels"])
    assert (saved >= 0).any() and (saved != now).any()  # else it would not matter that they are kept
    with Trainer.resume(folder) as trainer:
        trainer.fit(data, unlabelled=more, save=folder, on_step=lines.append, progress=False)
        assert bits(trainer.state()) == whole
    timeless = [
        [{name: value for name, value in line.items() if name not in ("milliseconds", "peak_bytes")}
         for line in some] for some in (lines, expected)
    ]  # fmt: skip
    assert timeless[0] == timeless[1]


def test_cut_off_while_it_labels_the_epoch_has_not_begun(tiny_artifact: Make, tmp_path: Path) -> None:
    data, more = digits(0, 8), digits(8, 32)[0]
    wishes: dict[str, Any] = {"epochs": 2, "batch_size": 8, "progress": False, "save": tmp_path / "run"}
    start = tiny_artifact(objective="at")
    options = Unlabelled(more, confidence=middling(start, more))
    with Trainer(start, seed=3) as trainer:
        trainer.fit(data, unlabelled=options, **{**wishes, "save": None})
        whole = bits(trainer.state())

    def stop(sentence: str) -> None:
        if "labelling" in sentence and trainer.steps == 6:
            raise KeyboardInterrupt

    with Trainer(start, seed=3) as trainer:
        with pytest.raises(KeyboardInterrupt):
            trainer.fit(data, unlabelled=options, on_wait=stop, **wishes)
        trainer.save(tmp_path / "run")
    with Trainer.resume(tmp_path / "run") as trainer:
        assert trainer.steps == 6
        trainer.fit(data, unlabelled=more, **wishes)
        assert bits(trainer.state()) == whole


def test_a_training_goes_on_with_the_images_it_began_with(tiny_artifact: Make, tmp_path: Path) -> None:
    data, more = digits(0, 8), digits(8, 24)[0]
    folder = tmp_path / "run"

    def resumed(unlabelled: Any) -> str:
        with Trainer.resume(folder) as trainer, pytest.raises(EdgeBcsError) as error:
            trainer.fit(data, unlabelled=unlabelled, progress=False)
        return str(error.value)

    with Trainer(tiny_artifact()) as trainer:
        trainer.fit(data, epochs=1, unlabelled=more, save=folder, progress=False)
    assert "the saved training used 16 unlabelled images, too" in resumed(None)
    assert "the saved training used 16 unlabelled images, not 15" in resumed(more[1:])
    assert "filled 0.5 of a batch with unlabelled images, not 0.25" in resumed(Unlabelled(more, share=0.25))
    with Trainer(tiny_artifact()) as trainer:
        trainer.fit(data, epochs=1, save=tmp_path / "plain", progress=False)
    folder = tmp_path / "plain"
    assert "the saved training used no unlabelled images, not 16" in resumed(more)


def test_a_saved_label_that_is_no_class_is_refused(tiny_artifact: Make, tmp_path: Path) -> None:
    """So that a damaged or hostile run names no class that the network does not have."""
    data, more = digits(0, 8), digits(8, 24)[0]
    with Trainer(tiny_artifact()) as trainer:
        trainer.fit(data, steps=1, unlabelled=more, progress=False)
        metadata = trainer.metadata
        course = {**json.loads(metadata()["progress"]), "pseudo_labels": packed(np.full(16, 10))}
        trainer.metadata = lambda: {**metadata(), "progress": json.dumps(course)}  # type: ignore[method-assign]
        trainer.save(tmp_path / "run")
    with Trainer.resume(tmp_path / "run") as trainer, pytest.raises(EdgeBcsError, match="is damaged"):
        trainer.fit(data, steps=2, unlabelled=more, progress=False)


def test_the_hours_end_while_images_are_labelled(
    tiny_artifact: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The epoch has then not begun; where the run goes on they are labelled again, with the same bits."""
    clock = [0.0]

    class Slow(ArrayDataset):
        def images(self, positions: Array) -> Array:
            clock[0] += 600
            return super().images(positions)

    def fit(trainer: Trainer, run: Path, hours: float | None) -> Any:
        labelled, unlabelled = ArrayDataset(*digits(0, 8)), Slow(digits(8, 32)[0], np.zeros(24, np.int64))
        options: dict[str, Any] = {"epochs": 2, "batch_size": 8, "unlabelled": unlabelled, "save": run}
        return trainer.fit(labelled, max_hours=hours, **options, **QUIET)

    path = tiny_artifact(objective="trades")
    with Trainer(path, seed=3) as trainer:
        fit(trainer, tmp_path / "whole", None)
    monkeypatch.setattr("edge_bcs.runtime.fit.time.monotonic", lambda: clock[0])
    with Trainer(path, seed=3) as trainer:
        found = fit(trainer, tmp_path / "parts", 0.3)  # of three batches that take 0.5 hours
        assert (found["steps"], found["finished"], trainer.steps) == (0, False, 0)
        assert found["seconds"] == 1200  # two batches
    with Trainer.resume(tmp_path / "parts") as trainer:
        fit(trainer, tmp_path / "parts", None)
    states = [read_state(Artifact.read(tmp_path / name))[0] for name in ("parts", "whole")]
    assert bits(states[0]) == bits(states[1])
