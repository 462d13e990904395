"""Schedules, augmentation and balance of a training on the board: kept with it, and resumed to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_bcs.runtime import Trainer
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.course import Course
from edge_bcs.runtime.state import read_state
from helpers.commands import run

from edge_bcs import EdgeBcsError, Schedule
from edge_bcs.data import open_data
from edge_bcs.data.dataset import ArrayDataset

Make = Callable[..., Path]


def uneven_digits() -> ArrayDataset:
    """Sixty digits: 40 noughts and 20 ones."""
    x, y = open_data("digits", "train", (1, 8, 8)).read(np.arange(1438))
    chosen = np.concatenate([np.flatnonzero(y == 0)[:40], np.flatnonzero(y == 1)[:20]])
    return ArrayDataset(x[chosen], y[chosen])


WISHES: dict[str, Any] = {"schedule": "one-cycle", "warmup": 0.4, "augment": "photo", "balance": True}


def test_what_a_training_was_begun_with_goes_on_to_the_bit(tiny_artifact: Make, tmp_path: Path) -> None:
    data = uneven_digits()
    common: dict[str, Any] = {"batch_size": 8, "progress": False, "save": tmp_path / "run"}
    with Trainer(tiny_artifact(), seed=3) as trainer:
        lines: list[dict[str, Any]] = []
        trainer.fit(data, epochs=2, batch_size=8, progress=False, on_step=lines.append, **WISHES)
        whole, steps = trainer.state(), trainer.steps

    def stop(line: dict[str, Any]) -> None:
        if line["done"] == 5:
            raise KeyboardInterrupt

    with Trainer(tiny_artifact(), seed=3) as trainer:
        with pytest.raises(KeyboardInterrupt):
            trainer.fit(data, epochs=2, on_step=stop, **WISHES, **common)
        trainer.save(tmp_path / "run")
    with Trainer.resume(tmp_path / "run") as trainer:
        trainer.fit(data, **common)  # nothing is said again
        part = trainer.state()
        assert trainer.steps == steps == 16
    assert all(part[name].tobytes() == whole[name].tobytes() for name in whole)
    schedule = Schedule(kind="one-cycle", warmup=0.4)
    expected = [schedule.rates(0.1, 1.0, step, 16)[0] for step in range(16)]
    assert [line["learning_rate"] for line in lines] == pytest.approx(expected)
    saved = json.loads(read_state(Artifact.read(tmp_path / "run"))[1]["progress"])
    assert {name: saved[name] for name in WISHES} == WISHES


def test_each_of_them_changes_what_is_learned(tiny_artifact: Make) -> None:
    states = []
    for wishes in (
        {},
        *({name: value} for name, value in WISHES.items() if name != "warmup"),
        {"warmup": 0.5},
    ):
        with Trainer(tiny_artifact(), seed=3) as trainer:
            trainer.fit(uneven_digits(), steps=4, batch_size=8, progress=False, **wishes)
            states.append(trainer.state()["coo.value"].tobytes())
    assert len(set(states)) == 5


def test_decay_keeps_its_ratio(tiny_artifact: Make) -> None:
    with Trainer(tiny_artifact()) as trainer:
        ratios = []

        def note(line: dict[str, Any]) -> None:
            ratios.append(trainer.weight_decay / trainer.learning_rate)

        trainer.fit(uneven_digits(), steps=6, batch_size=8, progress=False, schedule="cosine", on_step=note)
        hyper = trainer.artifact.hyper
    assert ratios == pytest.approx([hyper["weight_decay"] / hyper["learning_rate"]] * 6)


def test_batches_are_balanced_as_they_are_read(tiny_artifact: Make) -> None:
    labels: list[int] = []

    class Seen(ArrayDataset):
        def read(self, positions: Any, **how: Any) -> Any:
            found = super().read(positions, **how)
            labels.extend(found[1])
            return found

    x, y = uneven_digits().read(np.arange(60))
    told = pytest.warns(UserWarning, match="unevenly, 1 20, 0 40 images; they are drawn evenly")
    with Trainer(tiny_artifact()) as trainer, told:
        trainer.fit(Seen(x, y), epochs=1, batch_size=8, progress=False, balance=True)
    assert np.bincount(labels).tolist() == [30, 30]


OLD = {"first_step": 3, "first_epoch": 1, "batch_size": 8, "samples": 60, "total_steps": 16,
       "learning_rate": 0.1, "skipped": 0}  # fmt: skip


def test_a_plain_training_is_saved_as_0_1_reads_it() -> None:
    assert json.loads(Course(**OLD).dump()) == OLD  # type: ignore[arg-type]
    assert Course.parse(json.dumps(OLD), 5) == Course(**OLD)  # type: ignore[arg-type]
    more = Course(**OLD, schedule="cosine", warmup=0.1, augment="none", balance=True)  # type: ignore[arg-type]
    assert Course.parse(more.dump(), 5) == more


@pytest.mark.parametrize(
    "wrong",
    [
        {"schedule": "linear"}, {"warmup": 1.0}, {"warmup": "0.1"}, {"warmup": float("nan")},
        {"augment": True},
        {"augment": "crop"}, {"balance": 1}, {"batch_size": 0}, {"samples": 1.5}, {"learning_rate": None},
        {"first_step": 6}, {"unknown": 1},
    ],
)  # fmt: skip
def test_what_is_no_course_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(EdgeBcsError, match="the saved position of the training is damaged"):
        Course.parse(json.dumps({**OLD, **wrong}), 5)


@pytest.mark.parametrize(
    ("wishes", "sentence"),
    [
        ({"schedule": "linear"}, "the schedule is steps, cosine or one-cycle, not 'linear'"),
        ({"warmup": 1.0}, "warmup must be a share below 1"),
        ({"augment": "crop"}, "the augmentation is none, shift, photo, zoom, mix or mirror, not 'crop'"),
    ],
)
def test_what_cannot_be_meant_is_refused(tiny_artifact: Make, wishes: Any, sentence: str) -> None:
    with Trainer(tiny_artifact()) as trainer, pytest.raises(EdgeBcsError, match=sentence):
        trainer.fit(uneven_digits(), steps=1, progress=False, **wishes)


def test_the_command_goes_on_with_what_it_was_begun_with(
    tiny_artifact: Make, tmp_path: Path, digits: Path
) -> None:
    words = ("--schedule", "cosine", "--warmup", 0.25, "--augment", "photo", "--balance")
    begun = ("finetune", tiny_artifact(), "--data", digits, "--eval-samples", 0)
    assert run(*begun, *words, "--steps", 6, "-o", tmp_path / "whole").exit_code == 0
    assert run(*begun, *words, "--steps", 6, "--max-hours", 1e-9, "-o", tmp_path / "part").exit_code == 75
    resumed = run(*begun, "--resume", "-o", tmp_path / "part")
    assert resumed.exit_code == 0, resumed.output
    states = [read_state(Artifact.read(tmp_path / name)) for name in ("whole", "part")]
    assert states[0][1] == states[1][1] and '"schedule": "cosine"' in states[0][1]["progress"]
    assert all(states[0][0][name].tobytes() == states[1][0][name].tobytes() for name in states[0][0])
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    rates = [Schedule(kind="cosine", warmup=0.25).rates(0.1, 0, step, 6)[0] for step in range(6)]
    assert [line["learning_rate"] for line in lines] == pytest.approx(rates)
