"""Images held out of a training on the board: the run ends with the best epoch, whatever cuts it off."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_bcs.runtime import Trainer, validation
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.state import BEST, read_state
from helpers.commands import run

from edge_bcs.core.errors import EdgeBcsError, EdgeBcsWarning
from edge_bcs.data import open_data
from edge_bcs.data.dataset import ArrayDataset, Subset, held_apart

Make = Callable[..., Path]
Array = np.ndarray[Any, Any]
SCORES = [0.1, 0.4, 0.4, 0.3, 0.9]
"""Robust accuracies of the epochs: the third is the best one, and after the fourth patience of 2 is over."""
PER_EPOCH = 6
COMMON: dict[str, Any] = {"batch_size": 8, "progress": False}
WISHES: dict[str, Any] = {"epochs": 8, "validation": 0.25, "patience": 2, "schedule": "cosine"}


class Cut(BaseException):
    """As the handler of a signal raises."""


@pytest.fixture
def data() -> ArrayDataset:
    """64 digits, 48 of them to train on: six steps an epoch."""
    return ArrayDataset(*open_data("digits", "train", (1, 8, 8)).read(np.arange(64)))


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Let the held-out images have `SCORES`, by the number of the epoch."""
    if "measured" in request.fixturenames:
        return

    def evaluate(self: Trainer, given: Any, steps: int, *, on_batch: Any) -> dict[str, Any]:
        assert len(given) == 16 and steps == 3
        on_batch(8, 16)
        on_batch(16, 16)
        score = SCORES[self.steps // PER_EPOCH - 1]
        return {"accuracy": 0.95, "robust_accuracy": score, "samples": 16}

    monkeypatch.setattr(Trainer, "evaluate", evaluate)


@pytest.fixture
def measured() -> None:
    """Let them be measured."""


@pytest.fixture
def whole(tiny_artifact: Make, tmp_path: Path, data: ArrayDataset) -> tuple[Path, bytes]:
    """A run that nothing cut off, and the state of its best epoch."""
    states: dict[int, bytes] = {}
    trainer: Trainer

    def note(line: dict[str, Any]) -> None:
        states[line["step"]] = bits(trainer.state())

    with Trainer(tiny_artifact(), seed=3) as trainer:
        result = trainer.fit(data, save=tmp_path / "whole", on_step=note, **WISHES, **COMMON)
        assert result["early"] and result["finished"] and (result["done"], trainer.steps) == (24, 24)
        assert result["best"] == {"step": 18, "accuracy": 0.4}
        assert bits(trainer.state()) == states[18] != states[24]
    return tmp_path / "whole", states[18]


def bits(state: dict[str, Any]) -> bytes:
    return b"".join(state[name].tobytes() for name in sorted(state))


def saved(folder: Path) -> tuple[bytes, dict[str, str]]:
    state, metadata = read_state(Artifact.read(folder))
    return bits(state), metadata


def test_a_run_ends_with_its_best_epoch(whole: tuple[Path, bytes], data: ArrayDataset) -> None:
    folder, best = whole
    state, metadata = saved(folder)
    assert state == best and metadata["step"] == "24"
    with Trainer.resume(folder) as trainer:
        again = trainer.fit(data, save=folder, **COMMON)
        assert (again["steps"], again["early"]) == (0, True) and bits(trainer.state()) == best


def test_what_follows_from_the_connections_is_made_anew(
    tiny_artifact: Make, tmp_path: Path, data: Any
) -> None:
    """The trainer that went back answers, and trains on, as one that opened the run."""
    x, y = data.read(np.arange(20))
    with Trainer(tiny_artifact(), memory="1MiB", seed=3) as trainer:
        trainer.fit(data, save=tmp_path / "run", **WISHES, **COMMON)
        answers, rates = trainer.logits(x), (trainer.learning_rate, trainer.weight_decay)
        trainer.step(x, y)
        went_on = bits(trainer.state())
    with Trainer(tmp_path / "run", seed=3) as trainer:
        np.testing.assert_array_equal(trainer.logits(x), answers)
        trainer.learning_rate, trainer.weight_decay = rates
        trainer.step(x, y)
        assert bits(trainer.state()) == went_on


CUTS = ("measuring", "after the save", "before the return", "in a step")


@pytest.mark.parametrize("where", CUTS)
def test_cut_off_anywhere_it_ends_with_the_same_bits(
    whole: tuple[Path, bytes], tiny_artifact: Make, tmp_path: Path, data: ArrayDataset, where: str
) -> None:
    folder = tmp_path / "part"
    trainer: Trainer

    def cut(*_: Any, **__: Any) -> Any:
        raise Cut

    def on_wait(sentence: str) -> None:
        if where == "measuring" and trainer.steps == 18:
            raise Cut

    def on_step(line: dict[str, Any]) -> None:
        if where == "in a step" and line["step"] == 15:
            raise Cut

    with pytest.MonkeyPatch.context() as patch:
        keep = validation.keep_best
        if where == "after the save":
            patch.setattr(validation, "keep_best", lambda to: cut() if trainer.steps == 18 else keep(to))
        if where == "before the return":
            patch.setattr(Trainer, "replace_state", cut)
        with Trainer(tiny_artifact(), seed=3) as trainer:
            with pytest.raises(Cut):
                trainer.fit(data, save=folder, on_wait=on_wait, on_step=on_step, **WISHES, **COMMON)
            if where in ("measuring", "in a step"):  # as the command does when it is stopped
                trainer.save(folder)
    with Trainer.resume(folder) as trainer:
        assert trainer.steps == {"before the return": 24, "in a step": 15}.get(where, 18)
        result = trainer.fit(data, save=folder, **COMMON)
        assert result["best"] == {"step": 18, "accuracy": 0.4} and result["early"]
    assert saved(folder) == saved(whole[0])


def test_the_best_state_costs_no_bytes_where_there_are_links(
    tiny_artifact: Make, tmp_path: Path, data: ArrayDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(1, "Operation not permitted")

    written = {}
    for name in ("linked", "copied"):
        if name == "copied":
            monkeypatch.setattr(os, "link", refuse)
        with Trainer(tiny_artifact(), seed=3) as trainer:
            result = trainer.fit(data, save=tmp_path / name, **WISHES, **COMMON)
            size = result["writes"]["bytes_per_save"]
        written[name] = result["writes"]["bytes"]
    assert written["copied"] - written["linked"] == pytest.approx(3 * size, rel=0.01)
    assert saved(tmp_path / "linked") == saved(tmp_path / "copied")
    assert (tmp_path / "linked" / BEST).stat().st_size == (tmp_path / "copied" / BEST).stat().st_size
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("fault", ["torn", "gone", "of another step"])
def test_where_the_best_state_cannot_be_read_the_newest_stays(
    tiny_artifact: Make, tmp_path: Path, data: ArrayDataset, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, newest = tmp_path / "run", b""

    def spoil(line: dict[str, Any]) -> None:
        nonlocal newest
        newest = bits(trainer.state())
        if line["step"] != 24:
            return
        best = folder / BEST
        content = best.read_bytes()
        best.unlink()
        if fault == "torn":
            best.write_bytes(content[:-9])
        elif fault == "of another step":
            trainer.save(folder)
            best.write_bytes((folder / "state.safetensors").read_bytes())

    with Trainer(tiny_artifact(), seed=3) as trainer:
        with pytest.warns(EdgeBcsWarning, match=r"the best state of .* cannot be used \(its? "):
            trainer.fit(data, save=folder, on_step=spoil, **WISHES, **COMMON)
        assert bits(trainer.state()) == newest == saved(folder)[0]


def test_longer_patience_goes_on(whole: tuple[Path, bytes], data: ArrayDataset) -> None:
    with Trainer.resume(whole[0]) as trainer:
        result = trainer.fit(data, epochs=5, patience=3, save=whole[0], **COMMON)
        assert (result["steps"], result["early"], result["best"]["step"]) == (6, False, 30)
        assert saved(whole[0])[0] == bits(trainer.state())


def test_what_is_held_out_is_not_trained_on(tiny_artifact: Make, tmp_path: Path, data: ArrayDataset) -> None:
    seen: set[int] = set()

    class Seen(ArrayDataset):
        def read(self, positions: Array, **how: Any) -> tuple[Array, Array]:
            seen.update(positions.tolist())
            return super().read(positions, **how)

    x, y = data.read(np.arange(64))
    with Trainer(tiny_artifact(), seed=3) as trainer:
        trainer.fit(Seen(x, y), epochs=2, validation=0.25, save=tmp_path / "run", **COMMON)
    kept, held_out = held_apart(data, 0.25, 3)
    assert seen == set(kept.tolist()) and len(held_out) == 16 and not seen & set(held_out.tolist())
    part = Subset(data, held_out)
    np.testing.assert_array_equal(part.read(np.array([2]))[0][0], x[held_out[2]])
    assert part.name_of(2) == f"image {held_out[2]}"


@pytest.mark.parametrize(
    ("wishes", "sentence"),
    [
        ({"validation": 0.25}, "validation needs save=FOLDER"),
        ({"patience": 2}, "patience needs images that are held out"),
        ({"validation": 1.0}, "the held-out fraction must be at least 0 and below 1, not 1.0"),
        ({"validation": 0.999}, "64 images are too few to hold 0.999 of them out"),
        ({"validation": 0.001}, "64 images are too few to hold 0.001 of them out"),
    ],
)
def test_what_cannot_be_meant_is_refused(tiny_artifact: Make, data: Any, wishes: Any, sentence: str) -> None:
    with Trainer(tiny_artifact()) as trainer, pytest.raises(EdgeBcsError, match=sentence):
        trainer.fit(data, steps=1, progress=False, **wishes)


def test_another_share_is_another_training(whole: tuple[Path, bytes], data: ArrayDataset) -> None:
    with Trainer.resume(whole[0]) as trainer:
        with pytest.raises(EdgeBcsError, match=r"holds 0\.25 of its images out, not 0\.5"):
            trainer.fit(data, validation=0.5, save=whole[0], **COMMON)
        trainer.fit(data, save=whole[0], **COMMON)  # and nothing was lost


@pytest.fixture
def options(digits: Path) -> Iterator[tuple[object, ...]]:
    yield "--data", digits, "--batch-size", 8, "--eval-samples", 0, "--validation", 0.25


def test_the_command_measures_and_says(
    measured: None, tiny_artifact: Make, tmp_path: Path, options: tuple[object, ...]
) -> None:
    begun = ("finetune", tiny_artifact(), *options, "--epochs", 4, "--patience", 1)
    result = run(*begun, "-o", tmp_path / "whole")
    assert result.exit_code == 0, result.output
    said = [line for line in result.stderr.splitlines() if "held-out images" in line and "epoch" in line]
    assert said and "epoch 1: robust accuracy " in said[0] and "% on 16 held-out images, the best" in said[0]
    assert "The best epoch ended with step " in result.stdout
    training = json.loads((tmp_path / "whole" / "report.json").read_text())["training"]
    assert training["best"]["step"] % 6 == 0 and training["finished"]
    part = run(*begun, "--max-hours", 1e-9, "-o", tmp_path / "part")
    assert part.exit_code == 75
    resumed = run("finetune", tiny_artifact(), *options[:6], "--resume", "-o", tmp_path / "part")
    assert resumed.exit_code == 0, resumed.output
    assert saved(tmp_path / "whole") == saved(tmp_path / "part")
