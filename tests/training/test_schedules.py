"""Early stopping on the host, and the command's options for schedules, augmentation and balance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.artifacts import tiny_network
from helpers.commands import run

import edge_bcs
from edge_bcs import Attack, Compute, EdgeBcsError, Feed, Output, Schedule
from edge_bcs.checkpoint import read_checkpoint
from edge_bcs.data import open_data
from edge_bcs.data.dataset import ArrayDataset
from edge_bcs.training.backends.torch import TorchBackend

torch = pytest.importorskip("torch")
COMMON: dict[str, Any] = {
    "attack": Attack(steps=1), "batch_size": 16, "progress": False, "compute": Compute(device="cpu"),
    "feed": Feed(validation=0.25, augment=False),
}  # fmt: skip


def sparse() -> Any:
    torch.manual_seed(0)
    return edge_bcs.sparsify(tiny_network(), 0.9, seed=0)


def some_digits() -> ArrayDataset:
    return ArrayDataset(*open_data("digits", "train", (1, 8, 8)).read(range(64)))  # type: ignore[arg-type]


def measured(monkeypatch: pytest.MonkeyPatch, robust: list[float]) -> None:
    """Let the epochs that are measured from now on have these robust accuracies."""
    left = iter(robust)
    monkeypatch.setattr(TorchBackend, "evaluate", lambda self, data: (0.5, next(left)))


def test_patience_ends_a_training_and_the_best_epoch_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A level epoch is the new best one, but patience does not begin anew with it."""
    monkeypatch.chdir(tmp_path)
    course = [0.1, 0.4, 0.4, 0.3, 0.9]
    schedule = Schedule(epochs=8, patience=2)
    measured(monkeypatch, course)
    network = sparse()
    report = edge_bcs.train(network, some_digits(), schedule=schedule, output="whole", **COMMON)
    assert report["early"] and (report["step"], report["best_epoch"], report["best_step"]) == (12, 2, 9)
    assert network.step == 9 and read_checkpoint(Path("whole/last.safetensors")).step == 12
    measured(monkeypatch, [])
    again = edge_bcs.train(
        sparse(), some_digits(), schedule=schedule, output=Output("whole", resume=True), **COMMON
    )
    assert again["early"] and again["step"] == 12  # over is over
    # Interrupted while patience runs, it ends where it would have.
    measured(monkeypatch, course[:3])
    with pytest.raises((StopIteration, RuntimeError)):
        edge_bcs.train(sparse(), some_digits(), schedule=schedule, output="part", **COMMON)
    measured(monkeypatch, course[3:])
    resumed = Output("part", resume=True)
    report = edge_bcs.train(sparse(), some_digits(), schedule=schedule, output=resumed, **COMMON)
    assert (report["step"], report["best_epoch"]) == (12, 2)
    for name in ("last.safetensors", "checkpoint.safetensors"):
        assert Path("whole", name).read_bytes() == Path("part", name).read_bytes()
    with pytest.raises(EdgeBcsError, match="was begun with patience 2, not None"):
        edge_bcs.train(sparse(), some_digits(), schedule=Schedule(epochs=8), output=resumed, **COMMON)


def test_without_need_of_patience_all_epochs_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, [0.1, 0.1, 0.2])
    report = edge_bcs.train(sparse(), some_digits(), schedule=Schedule(epochs=3, patience=2), **COMMON)
    assert not report["early"] and (report["step"], report["best_epoch"]) == (9, 2)


def test_patience_needs_held_out_images() -> None:
    with pytest.raises(EdgeBcsError, match="patience needs images that are held out"):
        given = {**COMMON, "feed": Feed(validation=0)}
        edge_bcs.train(sparse(), some_digits(), schedule=Schedule(patience=2), **given)


SMALL = ("--model", "resnet18", "--width", 0.0625, "--input-size", 8, "--channels", 1, "--sparsity", 0.8,
         "--attack-steps", 1, "--batch-size", 16, "--validation", 0.25)  # fmt: skip


@pytest.mark.parametrize(
    ("words", "augment"),
    [
        (("--augment",), True),
        (("--augment", "--balance"), True),
        ((), True),
        (("--no-augment",), False),
        (("--augment", "none"), False),
        (("--augment", "photo"), "photo"),
        (("--augment=photo",), "photo"),
    ],
)
def test_the_flag_of_before_and_the_names(
    tmp_path: Path, digits: Path, words: tuple[str, ...], augment: Any
) -> None:
    out = ("-o", tmp_path / "run", "--steps", 1)
    result = run("train", *words, "--data", digits, *SMALL, *out, "--schedule", "cosine")
    assert result.exit_code == 0, result.output
    plan = json.loads(read_checkpoint(tmp_path / "run" / "last.safetensors").metadata["plan"])
    assert plan["augment"] == augment and plan["schedule"] == "cosine" and plan["decay"] == "falls"
    assert plan.get("balance", False) == ("--balance" in words)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--no-augment", "--augment", "photo"), "--no-augment and --augment photo contradict each other"),
        (
            ("--method", "hydra", "--patience", 3, "--validation", 0),
            "patience needs images that are held out",
        ),
        (("--patience", 3, "--validation", 0), "patience needs images that are held out"),
    ],
)
def test_what_contradicts_itself_is_refused(
    tmp_path: Path, digits: Path, words: tuple[Any, ...], sentence: str
) -> None:
    result = run("train", "--data", digits, *SMALL, *words, "-o", tmp_path / "run")
    assert result.exit_code == 1 and sentence in result.stderr.splitlines()[-1]
    assert not list((tmp_path / "run").rglob("*.safetensors"))
