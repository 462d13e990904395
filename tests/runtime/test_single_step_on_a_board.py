"""Single-step attacks on the board: by their definition, watched, and PGD where they collapse."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_bcs.runtime import Trainer
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.course import Course

from edge_bcs.core import random
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.data.dataset import ArrayDataset

Make = Callable[..., Path]
Array = np.ndarray[Any, Any]
RADIUS = 8 / 255
LOOKS = {0: (0.12, 0.1), 3: (0.5, 0.4), 6: (0.9, 0.0)}
"""Shares under the own attack and under PGD, by steps done: it collapses after the second epoch."""


class Cut(BaseException):
    """As the handler of a signal raises."""


@pytest.fixture
def data(batch: tuple[Array, Array]) -> ArrayDataset:
    """Sixteen images; in batches of six three steps an epoch."""
    images = np.random.default_rng(1).random((16, 1, 8, 8), np.float32)
    return ArrayDataset(images, np.arange(16) % 10)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let looks find `LOOKS`, after each epoch though they are short."""

    def watch(self: Trainer, given: Any, on_batch: Any = None) -> tuple[float, float]:
        assert len(given) == 16 and self.attack.kind == "n-fgsm"
        on_batch(4, 16)
        return LOOKS[self.steps]

    monkeypatch.setattr("edge_bcs.core.collapse.APART", 1)
    monkeypatch.setattr(Trainer, "watch", watch)


@pytest.mark.parametrize("engine", ["onnxruntime", "native"])
@pytest.mark.parametrize("objective", ["at", "trades"])
@pytest.mark.parametrize(
    ("kind", "noise", "length", "ball"),
    [("fgsm-rs", RADIUS, 1.25 * RADIUS, RADIUS), ("n-fgsm", 2 * RADIUS, RADIUS, np.inf)],
)
def test_by_its_definition(
    kind: str,
    noise: float,
    length: float,
    ball: float,
    objective: str,
    engine: str,
    tiny_artifact: Make,
    batch: tuple[Array, Array],
) -> None:
    """What the board's graphs craft, against torch in float64 and arithmetic written out."""
    torch = pytest.importorskip("torch")
    from helpers.artifacts import tiny_network

    import edge_bcs

    x, y = batch[0][:4], batch[1][:4]
    path = tiny_artifact(objective=objective, training_attack=kind)
    model = edge_bcs.load(path, tiny_network()).network.double().eval()
    start = np.clip(
        x
        + noise * (2 * random.uniform(x.size, seed=0, step=0, purpose=random.PGD_START).reshape(x.shape) - 1),
        0,
        1,
    )
    images = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        clean = model(torch.tensor(x, dtype=torch.float64)).log_softmax(1)
    answers = model(images).log_softmax(1)
    if objective == "trades":
        loss = (clean.exp() * (clean - answers)).sum()
    else:
        loss = -answers[torch.arange(4), torch.tensor(y)].sum()
    (gradient,) = torch.autograd.grad(loss, images)
    moved = start + length * np.sign(gradient.numpy())
    expected = np.clip(np.clip(moved, x - ball, x + ball), 0, 1)
    with Trainer(path, engine=engine) as trainer:
        trainer.step(x, y)
        found = trainer.buffers["adversarial"][:4].copy()
    clear = (
        np.abs(gradient.numpy()) > 1e-6 * np.abs(gradient.numpy()).max()
    )  # of the others the sign is rounding
    assert clear.mean() > 0.95
    assert found[clear] == pytest.approx(expected[clear], abs=1e-6)


def graph_runs(trainer: Trainer) -> Counter[str]:
    runs: Counter[str] = Counter()
    trainer.on_run = lambda run: runs.update([run.graph])
    return runs


def test_it_falls_back_inside_the_same_budget(
    scripted: None,
    tiny_artifact: Make,
    data: ArrayDataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Trainer(tiny_artifact(training_attack="n-fgsm")) as trainer:
        runs = graph_runs(trainer)
        attacks: list[int] = []

        def note(line: dict[str, Any]) -> None:
            attacks.append(runs["attack"])
            runs.clear()

        result = trainer.fit(
            data,
            epochs=3,
            batch_size=6,
            on_step=note,
            save=tmp_path / "run",
            metrics=tmp_path / "run/metrics.jsonl",
        )
        peak, predicted = trainer.peak_bytes, trainer.artifact.predicted_peak_bytes
    # Micro-batches of 4: two runs of the graph a batch with one step, six with PGD-3; the last batch has 4.
    assert attacks == [2, 2, 1, 2, 2, 1, 6, 6, 3]
    assert result["fell_back"] == 6
    assert peak == predicted
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["attack"] for line in lines] == ["n-fgsm"] * 6 + ["pgd"] * 3
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("n-fgsm has collapsed: it leaves 90.0 % of the watched images right, PGD-20 0.0 %") == 1


@pytest.mark.parametrize("stop", [2, 7])
def test_resumed_is_as_if_never_interrupted(
    stop: int, scripted: None, tiny_artifact: Make, data: ArrayDataset, tmp_path: Path
) -> None:
    path = tiny_artifact(training_attack="n-fgsm")
    common: dict[str, Any] = {"batch_size": 6, "progress": False, "save_steps": 1, "max_writes": None}
    with Trainer(path) as trainer:
        trainer.fit(data, epochs=3, save=tmp_path / "whole", **common)
        whole = trainer.state()

    def stopping(line: dict[str, Any]) -> None:
        if line["done"] == stop + 1:
            raise Cut

    with Trainer(path) as trainer, pytest.raises(Cut):
        trainer.fit(data, epochs=3, save=tmp_path / "cut", on_step=stopping, **common)
    with Trainer.resume(tmp_path / "cut") as trainer:
        assert trainer.steps == stop
        result = trainer.fit(data, epochs=3, save=tmp_path / "cut", **common)
        resumed = trainer.state()
    assert result["fell_back"] == 6
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole)
    # A training after it begins with the artifact's attack again.
    with Trainer(tmp_path / "cut") as trainer:
        assert trainer.attack.kind == "n-fgsm"


def test_the_shares(tiny_artifact: Make, data: ArrayDataset) -> None:
    """PGD's is what `evaluate` measures with twenty steps; the own attack's lies between it and clean."""
    with Trainer(tiny_artifact(training_attack="fgsm-rs")) as trainer:
        trainer.fit(data, epochs=30, batch_size=6, progress=False)
        measured = trainer.evaluate(data, 20)
        seen: list[tuple[int, int]] = []
        own, pgd = trainer.watch(data, lambda *counts: seen.append(counts))
    assert pgd == measured["robust_accuracy"]
    assert pgd <= own <= measured["accuracy"]
    assert seen == 2 * [(4, 16), (8, 16), (12, 16), (16, 16)]


def test_what_is_watched(tiny_artifact: Make, data: ArrayDataset, tmp_path: Path, monkeypatch: Any) -> None:
    """Images that are held out, where there are some."""
    counts: list[int] = []

    def watch(self: Trainer, given: Any, on_batch: Any = None) -> tuple[float, float]:
        counts.append(len(given))
        return 0.5, 0.5

    monkeypatch.setattr(Trainer, "watch", watch)
    images = np.random.default_rng(1).random((48, 1, 8, 8), np.float32)
    more = ArrayDataset(images, np.arange(48) % 10)
    common: dict[str, Any] = {"epochs": 1, "batch_size": 16, "progress": False}
    with Trainer(tiny_artifact(training_attack="fgsm-rs")) as trainer:
        trainer.fit(more, validation=2 / 3, save=tmp_path / "run", **common)
        assert counts == [32, 32]  # at the beginning and at the end
        trainer.fit(more, validation=1 / 3, save=tmp_path / "run", **common)
        assert counts[2:] == [32, 32]  # 16 are too few: some, here all, of the others
        trainer.fit(more, **common)
        assert counts[4:] == [48, 48]
    counts.clear()
    with Trainer(tiny_artifact()) as trainer:
        assert "fell_back" not in trainer.fit(data, epochs=1, batch_size=6, progress=False)
    assert counts == []


def test_artifacts_say_so(tiny_artifact: Make, tmp_path: Path) -> None:
    artifact = Artifact.read(tiny_artifact(training_attack="n-fgsm"))
    assert artifact.manifest["version"] == 3  # earlier releases would train with PGD, and refuse it
    assert artifact.manifest["objective"]["training_attack"] == "n-fgsm"
    assert artifact.objective.attack.kind == "n-fgsm" and artifact.objective.attack.steps == 3
    plain = Artifact.read(tiny_artifact())
    assert plain.manifest["version"] == 1 and "training_attack" not in plain.manifest["objective"]


@pytest.mark.parametrize(
    ("version", "attack", "match"),
    [
        (1, "n-fgsm", "format version is 1, and its training attack n-fgsm"),
        (3, "pgd", "format version is 3, and its training attack pgd"),
        (3, "fgsm", "training_attack must be pgd or fgsm-rs or n-fgsm, not 'fgsm'"),
        (3, 7, "training_attack must be"),
    ],
)
def test_manifests_that_cannot_be_right(version: int, attack: Any, match: str, tmp_path: Path) -> None:
    from helpers.artifacts import write_artifact

    def change(manifest: dict[str, Any]) -> None:
        manifest["version"] = version
        manifest["objective"]["training_attack"] = attack

    with pytest.raises(EdgeBcsError, match=match):
        Artifact.read(write_artifact(tmp_path / "bad", change))


def test_a_damaged_course_is_refused() -> None:
    course = {
        "first_step": 0,
        "first_epoch": 0,
        "batch_size": 4,
        "samples": 8,
        "total_steps": 9,
        "learning_rate": 0.1,
    }
    good = {"step": 6, "best": 0.4, "fell_back": 6}
    read = Course.parse(json.dumps({**course, "watch": good}), 6)
    assert read.watch is not None and read.watch.fell_back == 6
    assert json.loads(read.dump())["watch"] == good
    for bad in ({**good, "best": 2}, {**good, "more": 1}, {"step": "six"}, [1], "none"):
        with pytest.raises(EdgeBcsError, match="position of the training is damaged"):
            Course.parse(json.dumps({**course, "watch": bad}), 6)
