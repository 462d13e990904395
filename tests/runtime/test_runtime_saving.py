"""How often a training is saved, how many bytes an hour that is, and what its metrics file holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_bcs.runtime import Trainer
from edge_bcs.runtime.board.saving import MetricsFile, SaveSchedule, parse_max_writes

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.tensor_file import TensorFile
from edge_bcs.data import open_data

Make = Callable[..., Path]
MIB = 1 << 20


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def simulated(schedule: SaveSchedule, clock: Clock, seconds_per_step: float, hours: float) -> list[float]:
    """Times of the saves of a training of so many hours."""
    times, step, end = [], 0, clock.now + 3600 * hours
    while clock.now < end:
        clock.now += seconds_per_step
        step += 1
        if schedule.due(step):
            schedule.saved(step, schedule.size)
            times.append(clock.now)
    return times


def test_every_minute_unless_told_otherwise() -> None:
    clock = Clock()
    assert len(simulated(SaveSchedule(MIB, step=0, clock=clock), clock, 1.0, 1)) == 60


def test_every_so_many_steps_or_seconds_whichever_comes_first() -> None:
    clock = Clock()
    assert len(simulated(SaveSchedule(MIB, step=0, steps=100, clock=clock), clock, 1.0, 1)) == 36
    both = SaveSchedule(MIB, step=0, steps=100, seconds=50, clock=clock)
    assert len(simulated(both, clock, 1.0, 1)) == 72
    both = SaveSchedule(MIB, step=0, steps=100, seconds=50, clock=clock)
    assert len(simulated(both, clock, 0.25, 1)) == 144  # 100 steps are 25 seconds


@pytest.mark.parametrize("options", [{"seconds": 1.0}, {"steps": 1}, {}])
@pytest.mark.parametrize("size", [MIB // 100, MIB, 50 * MIB])
def test_saves_never_write_more_than_allowed(options: dict[str, Any], size: int) -> None:
    clock = Clock()
    schedule = SaveSchedule(size, step=0, max_writes=100 * MIB, clock=clock, **options)
    times = simulated(schedule, clock, 0.5, 10)
    assert times and len(times) * size <= 10 * 90 * MIB  # nine tenths; the rest is for the metrics
    assert schedule.bytes_per_hour(0.5) == pytest.approx(len(times) * size / 10, rel=0.15)


def test_it_says_what_it_does() -> None:
    for options, expected in (
        ({"max_writes": 200 * MIB}, "every 1 min, 120 MiB an hour (--max-writes allows 200 MiB)"),
        ({"max_writes": 20 * MIB}, "every 6.67 min, 18.0 MiB an hour (--max-writes allows 20.0 MiB)"),
        ({"steps": 9, "max_writes": 20 * MIB}, "every 9 steps (--max-writes allows 20.0 MiB an hour)"),
        ({"seconds": 9.0}, "every 9 s, 800 MiB an hour"),
    ):
        schedule = SaveSchedule(2 * MIB, step=0, **options)  # type: ignore[arg-type]
        assert schedule.describe() == f"Saves 2.0 MiB {expected}"


def test_limits_as_people_write_them() -> None:
    assert parse_max_writes("200MiB") == parse_max_writes("200MiB/h") == 200 * MIB
    assert parse_max_writes("none") is parse_max_writes(None) is None
    with pytest.raises(EdgeBcsError, match="not a size"):
        parse_max_writes("much")


def test_metrics_stay_within_their_share(tmp_path: Path) -> None:
    clock = Clock()
    metrics = MetricsFile(tmp_path / "m", max_writes=100_000, clock=clock)
    for step in range(20_000):  # ten hours of lines of 14 bytes or more: 280 kB
        clock.now += 1.8
        metrics.write({"step": step})
    metrics.close()
    size = (tmp_path / "m").stat().st_size
    assert size == metrics.bytes <= 10_000 * (1 + 10)  # a tenth of the limit, and an hour's worth at once
    assert size > 10_000 * 10
    assert all(json.loads(line) for line in (tmp_path / "m").read_text().splitlines())


def test_lines_that_a_resumed_training_writes_again_are_removed(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}) + "\n" for step in range(1, 10)]
    for torn in ("", '{"st', '{"step": 5', "\0" * 40, "[1]\n", '{"step": "x"}\n'):
        file.write_text("".join(lines) + torn)
        metrics = MetricsFile(file, resumed_at=4)
        metrics.write({"step": 5})
        metrics.close()
        assert file.read_text() == "".join(lines[:5])
    file.write_text("\xff not lines of metrics")
    MetricsFile(file).close()
    assert file.read_text() == "\xff not lines of metrics"  # only a resumed training removes anything


def test_what_a_training_wrote_is_what_lies_on_the_disk(tiny_artifact: Make, tmp_path: Path) -> None:
    data = open_data("digits", "train", (1, 8, 8))
    with Trainer(tiny_artifact()) as trainer:
        result = trainer.fit(
            data, steps=7, progress=False, save=tmp_path / "run", save_steps=2, max_writes=None,
            metrics=tmp_path / "m",
        )  # fmt: skip
    writes = result["writes"]
    assert writes["saves"] == 4  # after 2, 4 and 6 steps, and at the end
    assert abs(writes["bytes_per_save"] - (tmp_path / "run/state.safetensors").stat().st_size) < 8
    assert abs(writes["bytes"] - 4 * writes["bytes_per_save"] - (tmp_path / "m").stat().st_size) < 32
    assert result["steps"] == result["done"] == 7 and result["finished"]


def test_a_small_limit_keeps_a_training_from_saving_often(tiny_artifact: Make, tmp_path: Path) -> None:
    data = open_data("digits", "train", (1, 8, 8))
    with Trainer(tiny_artifact()) as trainer:
        result = trainer.fit(
            data, steps=20, progress=False, save=tmp_path / "run", save_steps=1, max_writes="1MiB"
        )
    assert result["writes"]["saves"] == 1  # the end is saved in any case
    assert result["writes"]["bytes_per_hour"] <= MIB == result["writes"]["max_bytes_per_hour"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_steps": 0}, "every 1 or more steps"),
        ({"save_seconds": -1.0}, "seconds between saves"),
        ({"save_seconds": float("nan")}, "seconds between saves"),
        ({"max_writes": "fast"}, "not a size"),
        ({"max_hours": 0.0}, "hours of a training"),
        ({"on_nan": "ignore"}, "on_nan is .stop. or .skip., not .ignore."),
    ],
)
def test_impossible_options(tiny_artifact: Make, options: dict[str, Any], message: str) -> None:
    data = open_data("digits", "train", (1, 8, 8))
    with Trainer(tiny_artifact()) as trainer:
        with pytest.raises(EdgeBcsError, match=message):
            trainer.fit(data, steps=1, progress=False, **options)
        assert trainer.steps == 0


def test_a_resumed_training_goes_on_with_its_metrics(tiny_artifact: Make, tmp_path: Path) -> None:
    """Stopped between two saves: the lines after the last save come again, and each step is there once."""
    data = open_data("digits", "train", (1, 8, 8))

    class Cut(Exception):  # noqa: N818
        pass

    def cut(record: dict[str, Any]) -> None:
        if record["step"] == 8:
            raise Cut

    options: dict[str, Any] = {
        "steps": 12, "progress": False, "metrics": tmp_path / "m", "save": tmp_path / "run",
        "save_steps": 5, "max_writes": None,
    }  # fmt: skip
    with Trainer(tiny_artifact()) as trainer, pytest.raises(Cut):
        trainer.fit(data, on_step=cut, **options)
    with Trainer.resume(tmp_path / "run") as trainer:
        assert trainer.steps == 5
        result = trainer.fit(data, **options)
    steps = [json.loads(line)["step"] for line in (tmp_path / "m").read_text().splitlines()]
    assert steps == list(range(1, 13)) and result["steps"] == 7 and result["done"] == 12
    np.testing.assert_equal(result["skipped"], 0)


@pytest.mark.parametrize("steps", [4, 5])
def test_a_last_step_on_which_a_save_fell_due_is_not_saved_again(
    tiny_artifact: Callable[..., Path], tmp_path: Path, steps: int
) -> None:
    """The slot before it is that of the save before, and both are told of."""
    data = np.zeros((8, 1, 8, 8), np.float32), np.arange(8)
    with Trainer(tiny_artifact()) as trainer:
        found = trainer.fit(
            data,
            steps=steps,
            batch_size=4,
            save=tmp_path / "run",
            save_steps=2,
            max_writes=None,
            progress=False,
        )
    assert found["writes"]["saves"] == (2 if steps == 4 else 3)
    kept = []
    for name in ("state.safetensors", "state.previous.safetensors"):
        with (tmp_path / "run" / name).open("rb", buffering=0) as file, TensorFile(file) as stored:
            kept.append(int(stored.metadata["step"]))
    assert kept == ([4, 2] if steps == 4 else [5, 4])
