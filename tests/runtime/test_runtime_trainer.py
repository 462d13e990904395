"""The Trainer on a tiny network: accumulation, determinism, resuming, the budget, bad input."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_bcs.runtime import BudgetExceeded, Trainer
from edge_bcs.runtime.artifact import Artifact
from helpers.artifacts import tiny_network

import edge_bcs
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.data import ArrayDataset, open_data

Array = np.ndarray[Any, Any]
Make = Callable[..., Path]
Batch = tuple[Array, Array]
GRADIENTS = ("coo.value_grad.accumulation.buffer", "dense.value_grad.accumulation.buffer")
OBJECTIVES = ("natural", "at", "mixed", "trades", "mart")


def same(one: dict[str, Array], other: dict[str, Array]) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in one) and one.keys() == other.keys()


def accumulated(path: Path, batch: Batch) -> list[Array]:
    """The gradient buffers of one step, as the optimizer would get them."""
    with Trainer(path) as trainer:
        trainer.run_optimizer_only = lambda: None  # type: ignore[method-assign]
        trainer.step(*batch)
        return [trainer.buffers[name].copy() for name in GRADIENTS]


# One step


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_micro_batches_accumulate_the_same_gradient(
    tiny_artifact: Make, batch: Batch, objective: str
) -> None:
    """Ten images as micro-batches of 1, 3 (the last one padded) and 16 (padded)."""
    # Without attack steps: a pixel whose gradient is within rounding of zero may step either way.
    found = [
        accumulated(tiny_artifact(objective=objective, micro_batch=size, attack_steps=0), batch)
        for size in (1, 3, 16)
    ]
    for other in found[1:]:
        for gradient, expected in zip(other, found[0], strict=True):
            assert np.linalg.norm(expected) > 1e-3
            np.testing.assert_allclose(
                gradient, expected, atol=1e-6 * float(np.abs(expected).max()), rtol=1e-4
            )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_is_that_of_torch(tiny_artifact: Make, batch: Batch, objective: str) -> None:
    """Loss, accuracies and new state against the torch reference, attack and rewiring included."""
    torch = pytest.importorskip("torch")
    from edge_bcs import Attack
    from edge_bcs.core.objectives import objective_named
    from edge_bcs.loading import load
    from edge_bcs.method import step

    path = tiny_artifact(objective=objective, attack_steps=1)
    sparse = load(path, model=tiny_network())
    with Trainer(path) as trainer:
        metrics = trainer.step(*batch)
        state = trainer.state()
    outcome = step.training_step(
        sparse,
        torch.from_numpy(batch[0]),
        torch.from_numpy(batch[1]),
        objective_named(objective),
        step=0,
        attack=Attack(steps=1),
        batch_norm="frozen",
    )
    expected = sparse.state()
    assert metrics["loss"] == pytest.approx(float(outcome.loss), rel=1e-4)
    assert metrics["accuracy"] * 10 == pytest.approx(float(outcome.correct[0]))
    if len(outcome.correct) == 2:
        assert metrics["robust_accuracy"] * 10 == pytest.approx(float(outcome.correct[1]))
    common, ours, theirs = np.intersect1d(state["coo.index"], expected["coo.index"], return_indices=True)
    assert len(common) > 0.98 * len(state["coo.index"])  # deaths within rounding of zero may differ
    np.testing.assert_allclose(state["coo.value"][ours], expected["coo.value"][theirs], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(state["dense.value"], expected["dense.value"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("batch_norm", ["frozen", "batch"])
def test_the_number_of_threads_changes_no_bit(tiny_artifact: Make, batch: Batch, batch_norm: str) -> None:
    states = []
    for threads in (1, 2):
        with Trainer(tiny_artifact(batch_norm=batch_norm), threads=threads) as trainer:
            for _ in range(3):
                trainer.step(*batch)
            states.append(trainer.state())
    assert same(*states)


def test_the_seed_decides_the_run(tiny_artifact: Make, batch: Batch) -> None:
    states = []
    for seed in (1, 1, 2):
        with Trainer(tiny_artifact(), seed=seed) as trainer:
            trainer.step(*batch)
            states.append(trainer.state())
    assert same(states[0], states[1]) and not same(states[0], states[2])


def test_training_learns_and_keeps_kappa(tiny_artifact: Make) -> None:
    data = open_data("digits", "train", (1, 8, 8))
    with Trainer(
        tiny_artifact(objective="natural", batch_norm="batch", micro_batch=16, batch_size=64)
    ) as trainer:
        kappa = len(trainer.state()["coo.index"])
        before = trainer.evaluate(data, 0, limit=200)["accuracy"]
        trainer.fit(data, steps=250, augment=False, progress=False)
        after = trainer.evaluate(data, 0, limit=200)["accuracy"]
        index = trainer.state()["coo.index"]
    assert before < 0.3 and after > 0.6
    assert len(index) == kappa and np.all(np.diff(index) > 0)


# Evaluation


def test_evaluation_agrees_with_torch(tiny_artifact: Make, batch: Batch) -> None:
    torch = pytest.importorskip("torch")
    from edge_bcs.loading import load

    path = tiny_artifact()
    sparse = load(path, model=tiny_network())
    x, y = batch
    with torch.no_grad():
        expected = sparse(torch.from_numpy(x)).numpy()
    data = ArrayDataset(x, y)
    with Trainer(path) as trainer:
        np.testing.assert_allclose(trainer.logits(x), expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(trainer.predict(x), expected.argmax(1))
        result = trainer.evaluate(data, 3)
        assert result["accuracy"] == (expected.argmax(1) == y).mean()
        assert result["robust_accuracy"] <= result["accuracy"]
        everything_right = ArrayDataset(x, expected.argmax(1), tuple("abcdefghij"))
        assert trainer.evaluate(everything_right, 0) == {"accuracy": 1.0, "samples": 10}
        # With a radius of zero no attack changes anything; with all of [0, 1] little is left.
        assert trainer.evaluate(everything_right, 3, epsilon=0.0)["robust_accuracy"] == 1.0
        assert trainer.evaluate(everything_right, 10, epsilon=1.0)["robust_accuracy"] < 0.5


# Whole trainings


def test_the_schedule(tiny_artifact: Make, tmp_path: Path) -> None:
    with Trainer(tiny_artifact()) as trainer:
        data = open_data("digits", "train", (1, 8, 8))
        trainer.fit(data, steps=8, learning_rate=0.2, progress=False, metrics=tmp_path / "metrics.jsonl")
        # Twice the artifact's 0.1, so twice its decay of 5e-4, and a hundredth of that at the end.
        assert trainer.weight_decay == pytest.approx(1e-5)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["learning_rate"] for record in records] == pytest.approx(
        [0.2] * 4 + [0.02] * 2 + [0.002] * 2
    )
    assert [record["step"] for record in records] == list(range(1, 9))
    assert all(np.isfinite(record["loss"]) and record["peak_bytes"] > 0 for record in records)


class Stop(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("batch_norm", ["frozen", "batch"])
@pytest.mark.parametrize("stop", [1, 5, 6])
def test_a_resumed_training_is_the_one_that_was_not_interrupted(
    tiny_artifact: Make, tmp_path: Path, batch_norm: str, stop: int
) -> None:
    """20 images in batches of 8: three steps an epoch, stopped in the first, the second, and at a
    boundary."""
    x, y = open_data("digits", "train", (1, 8, 8)).read(np.arange(20))
    data, path = ArrayDataset(x, y), tiny_artifact(batch_norm=batch_norm)
    options: dict[str, Any] = {"epochs": 3, "batch_size": 8, "progress": False}
    with Trainer(path) as trainer:
        trainer.fit(data, **options)
        expected = trainer.state()

    def interrupt(record: dict[str, float]) -> None:
        if record["step"] == stop:
            raise Stop

    with Trainer(path) as trainer:
        with pytest.raises(Stop):
            trainer.fit(data, on_step=interrupt, **options)
        trainer.save(tmp_path / "run")
    with Trainer.resume(tmp_path / "run") as trainer:
        assert trainer.steps == stop
        trainer.fit(data, **options)
        assert trainer.steps == 9 and same(trainer.state(), expected)
        trainer.save(tmp_path / "run")
    with Trainer.resume(tmp_path / "run") as trainer:
        trainer.fit(data, **options)  # nothing is left to do
        assert trainer.steps == 9 and same(trainer.state(), expected)


def test_a_resumed_training_needs_its_own_data(tiny_artifact: Make, tmp_path: Path) -> None:
    x, y = open_data("digits", "train", (1, 8, 8)).read(np.arange(20))
    with Trainer(tiny_artifact()) as trainer:
        trainer.fit(ArrayDataset(x, y), batch_size=8, progress=False)
        trainer.save(tmp_path / "run")
    with (
        Trainer.resume(tmp_path / "run") as trainer,
        pytest.raises(EdgeBcsError, match="20 images in batches of 8"),
    ):
        trainer.fit(ArrayDataset(x[:19], y[:19]), epochs=2, progress=False)


def test_a_run_comes_back_to_torch(tiny_artifact: Make, tmp_path: Path, batch: Batch) -> None:
    pytest.importorskip("torch")
    from edge_bcs.loading import load

    with Trainer(tiny_artifact()) as trainer:
        trainer.step(*batch)
        trainer.save(tmp_path / "run")
        expected = trainer.state()
    loaded = load(tmp_path / "run", model=tiny_network()).state()
    assert same({name: np.asarray(array) for name, array in loaded.items()}, expected)


# The budget


def test_the_prediction_is_the_measurement(tiny_artifact: Make, batch: Batch) -> None:
    for objective in OBJECTIVES:
        with Trainer(tiny_artifact(objective=objective)) as trainer:
            predicted = trainer.artifact.predicted_peak_bytes
            trainer.step(*batch)
            assert trainer.memory()["exact"]
            # Natural training runs no attack graph, whose peak the prediction covers all the same.
            peak = trainer.memory()["peak_bytes"]
            assert peak == predicted or (objective == "natural" and peak < predicted)
            assert trainer.memory()["current_bytes"] == trainer.memory()["bound_bytes"]


def test_the_budget_holds_to_the_byte(tiny_artifact: Make, batch: Batch) -> None:
    path = tiny_artifact()
    with Trainer(path) as trainer:
        trainer.step(*batch)
        needed = int(trainer.memory()["peak_bytes"] or 0)
        expected = trainer.state()
    with Trainer(path, memory=needed) as trainer:
        trainer.step(*batch)
        assert same(trainer.state(), expected)
    with Trainer(path, memory=needed - 1) as trainer:
        before = trainer.state()
        with pytest.raises(BudgetExceeded, match="the training graph asked for") as caught:
            trainer.step(*batch)
        error = caught.value
        assert error.cap == needed - 1 and error.in_use + error.asked == needed
        assert same(trainer.state(), before) and trainer.steps == 0
        assert trainer.predict(batch[0]).shape == (10,)  # and it is still usable
        with pytest.raises(BudgetExceeded):
            trainer.step(*batch)


def test_buffers_that_do_not_fit_are_named(tiny_artifact: Make) -> None:
    with pytest.raises(BudgetExceeded, match="the buffers asked for") as caught:
        Trainer(tiny_artifact(), memory=1000)
    assert str(caught.value.asked) in str(caught.value)
    Trainer(tiny_artifact()).close()  # what had been reserved is given back


def test_a_graph_that_cannot_be_read_is_named(tiny_artifact: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact, real = Artifact.read(tiny_artifact()), Path.open
    file = artifact.graph("attack")

    def failing(self: Path, *arguments: Any, **more: Any) -> Any:
        if self == file:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return real(self, *arguments, **more)

    monkeypatch.setattr(Path, "open", failing)
    with pytest.raises(EdgeBcsError) as caught:
        Trainer(artifact)
    assert str(caught.value) == f"{file} cannot be read: Input/output error."
    monkeypatch.undo()
    Trainer(artifact).close()  # nothing was left open


def test_one_trainer_at_a_time(tiny_artifact: Make) -> None:
    with Trainer(tiny_artifact()), pytest.raises(EdgeBcsError, match="owns the memory budget"):
        Trainer(tiny_artifact())
    trainer = Trainer(tiny_artifact())
    del trainer  # forgotten is closed
    with Trainer(tiny_artifact()) as trainer:
        pass
    with pytest.raises(EdgeBcsError, match="closed"):
        trainer.predict(np.zeros((1, 1, 8, 8), np.float32))


# Bad input


def nan_pixel(x: Array, y: Array) -> Batch:
    x = x.copy()
    x[7, 0, 3, 3] = np.nan
    return x, y


BAD_BATCHES: dict[str, tuple[Callable[[Array, Array], tuple[Any, Any]], str]] = {
    "NaN": (nan_pixel, "not a finite number"),
    "infinite": (lambda x, y: (np.where(x > 0.99, np.inf, x), y), "not a finite number"),
    "bytes": (lambda x, y: ((x * 255).astype(np.uint8), y), "divide by 255"),
    "not scaled": (lambda x, y: (x * 255, y), r"must lie in \[0, 1\]"),
    "wrong shape": (lambda x, y: (x[:, :, :7], y), r"\[n, 1, 8, 8\]"),
    "no channel": (lambda x, y: (x[:, 0], y), r"\[n, 1, 8, 8\]"),
    "empty": (lambda x, y: (x[:0], y[:0]), r"\[n, 1, 8, 8\]"),
    "label 10": (lambda x, y: (x, y + 1), "label 10 is out of range"),
    "label -1": (lambda x, y: (x, y - 1), "label -1 is out of range"),
    "label 0.5": (lambda x, y: (x, y + 0.5), "whole numbers"),
    "too few labels": (lambda x, y: (x, y[:9]), r"shape \[10\]"),
}


@pytest.mark.parametrize("fault", BAD_BATCHES)
def test_bad_batches_change_nothing(tiny_artifact: Make, batch: Batch, fault: str) -> None:
    make, message = BAD_BATCHES[fault]
    with Trainer(tiny_artifact(batch_norm="batch")) as trainer:
        before = trainer.state()
        with pytest.raises(EdgeBcsError, match=message):
            trainer.step(*make(*batch))
        assert same(trainer.state(), before) and trainer.steps == 0
        trainer.step(*batch)


def test_a_fault_in_a_later_micro_batch_leaves_no_trace(tiny_artifact: Make, batch: Batch) -> None:
    class Broken(ArrayDataset):
        def read(self, positions: Array, **options: Any) -> Batch:
            if 9 in positions:
                raise EdgeBcsError("this image is damaged")
            return super().read(positions, **options)

    with Trainer(tiny_artifact(batch_norm="batch")) as trainer:
        before = trainer.state()
        with pytest.raises(EdgeBcsError, match="damaged"):
            trainer.fit(Broken(*batch), batch_size=10, progress=False)
        assert same(trainer.state(), before) and trainer.steps == 0


def test_a_gradient_that_is_not_finite_changes_nothing(tiny_artifact: Make, batch: Batch) -> None:
    with Trainer(tiny_artifact(batch_norm="batch")) as trainer:
        trainer.buffers["dense.value"][...] *= np.float32(1e38)
        before = trainer.state()
        with pytest.raises(EdgeBcsError):
            trainer.step(*batch)
        assert same(trainer.state(), before) and trainer.steps == 0


def test_arguments_that_make_no_sense(tiny_artifact: Make, tmp_path: Path) -> None:
    path = tiny_artifact()
    for options, message in (
        ({"memory": "much"}, "not a size"),
        ({"threads": 0}, "threads"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises(EdgeBcsError, match=message):
            Trainer(path, **options)  # type: ignore[arg-type]
    digits = open_data("digits", "train", (1, 8, 8))
    with Trainer(path) as trainer:
        for fit_options, message in (
            ({"epochs": 1, "steps": 1}, "not both"),
            ({"steps": 0}, "at least 1"),
            ({"learning_rate": -1.0}, "positive"),
        ):
            with pytest.raises(EdgeBcsError, match=message):
                trainer.fit(digits, **fit_options)  # type: ignore[arg-type]
        with pytest.raises(EdgeBcsError, match="metrics file"):
            trainer.fit(digits, metrics=tmp_path / "no" / "folder")
        with pytest.raises(EdgeBcsError, match="images; the data has"):
            trainer.fit(open_data("digits", "train", (3, 8, 8)))
        with pytest.raises(EdgeBcsError, match="11 classes"):
            trainer.fit(ArrayDataset(np.zeros((11, 1, 8, 8), np.float32), np.arange(11)))
    with pytest.raises(EdgeBcsError, match="does not exist"):
        Trainer(tmp_path / "nothing")


# The board has no host packages

BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnx", "scipy", "sklearn"):
            raise ModuleNotFoundError(f"no module named {name!r} on a board", name=name)
sys.meta_path.insert(0, Blocker())
from edge_bcs.runtime import Trainer
from edge_bcs.data import open_data
data = open_data("digits", "train", (1, 8, 8))
with Trainer(sys.argv[1]) as trainer:
    trainer.fit(data, steps=2, progress=False)
    trainer.evaluate(data, 2, limit=8)
    trainer.save(sys.argv[2])
assert not {"torch", "onnx", "scipy", "PIL", "rich", "click"} & {name.split(".")[0] for name in sys.modules}
print("trained")
"""


def test_the_runtime_needs_nothing_of_the_host(tiny_artifact: Make, tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", BLOCKED, str(tiny_artifact()), str(tmp_path / "run")]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout == "trained\n", result.stderr


def test_resident_memory_is_this_processs_own(tiny_artifact: Any, tmp_path: Path) -> None:
    script = (
        "import sys; from edge_bcs.runtime import Trainer\n"
        "trainer = Trainer(sys.argv[1]); print(trainer.memory()['rss_bytes'])"
    )
    ballast = np.ones(
        1 << 27, np.uint8
    )  # 128 MiB, which a child that is forked off would inherit as its peak
    command = [sys.executable, "-c", script, str(tiny_artifact())]
    environment = {**os.environ, "PYTHONPATH": str(Path(edge_bcs.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert 20e6 < int(done.stdout) < ballast.nbytes + 20e6
