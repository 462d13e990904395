"""More images are attacked at once than are trained on at once, where the memory lets them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_bcs.runtime import Trainer
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.checks import NotFiniteError
from edge_bcs.runtime.engine import GraphRun
from edge_bcs.targets.advice import images_of
from edge_bcs.targets.plans import plan_of
from edge_bcs.targets.roofline import step_runs
from helpers.artifacts import tiny_network

import edge_bcs
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.data.dataset import ArrayDataset
from edge_bcs.simulation import simulate

Make = Callable[..., Path]
Array = np.ndarray[Any, Any]
BUDGET = 46_000
ENGINES = ("onnxruntime", "native")


@pytest.fixture
def make(tiny_artifact: Make) -> Make:
    """Of two images that are trained on at once, and six or eight that are attacked."""

    def wide(**options: Any) -> Path:
        return tiny_artifact(micro_batch=2, memory=BUDGET, **options)

    return wide


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("objective", ["at", "trades", "mixed"])
@pytest.mark.parametrize("batch_norm", ["frozen", "batch"])
def test_inside_the_budget_and_as_predicted(
    make: Make, batch: tuple[Array, Array], engine: str, objective: str, batch_norm: str
) -> None:
    path = make(objective=objective, batch_norm=batch_norm)
    artifact, runs = Artifact.read(path), list[GraphRun]()
    assert (artifact.micro_batch, artifact.manifest["version"]) == (2, 4)
    assert artifact.attack_micro_batch in (6, 8) and artifact.predicted_peak_bytes <= BUDGET
    assert images_of(plan_of(artifact.manifest["memory"]), artifact) == artifact.attack_micro_batch
    with Trainer(path, BUDGET, engine=engine) as trainer:
        trainer.on_run = runs.append
        trainer.step(*batch)
        assert trainer.peak_bytes == artifact.predicted_peak_bytes
        if engine == "native":  # ONNX Runtime's places depend on whether the process used it before
            assert trainer.placed_peak_bytes == artifact.predicted_peak_bytes
    held, attacked = artifact.attack_micro_batch, 10 if objective != "mixed" else 5
    groups = [min(held, 10 - first) for first in range(0, 10, held)]
    wanted = [group for first, group in zip(range(0, 10, held), groups, strict=True) if first < attacked]
    assert [run.images for run in runs if run.graph == "attack"] == [n for n in wanted for _ in range(3)]
    assert [run.images for run in runs if run.graph == "training"] == [2] * 5
    told = step_runs(artifact)  # of a batch of 16
    assert told["training"] == 8 and told["attack"] == 3 * -(-(16 if objective != "mixed" else 8) // held)


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_are_those_of_torch(make: Make, batch: tuple[Array, Array], engine: str) -> None:
    """Of all images and in their order: without a radius an attack leaves them as they are."""
    torch = pytest.importorskip("torch")
    x, y = batch
    path = make(epsilon=0.0)
    with Trainer(path, engine=engine) as trainer:
        trainer.step(x, y)
        state = trainer.state()
    network = edge_bcs.load(path, tiny_network()).network.double().eval()
    loss = torch.nn.functional.cross_entropy(network(torch.from_numpy(x).double()), torch.from_numpy(y))
    loss.backward()
    for segment in Artifact.read(path).trained.dense:
        gradient = network.get_parameter(segment.name).grad.numpy().ravel()
        found = state["dense.momentum"][segment.offset : segment.offset + segment.size]
        np.testing.assert_allclose(found, gradient, rtol=1e-4, atol=1e-6)


def test_it_learns_what_it_would_have_learnt(
    make: Make, tiny_artifact: Make, batch: tuple[Array, Array]
) -> None:
    """With as many images attacked as trained on; but for rounding, which may change the sign of a step."""
    found = []
    for path in (make(), tiny_artifact(micro_batch=2)):
        with Trainer(path) as trainer:
            metrics = trainer.step(*batch)
            found.append(
                (
                    metrics["loss"],
                    trainer.state()["dense.momentum"],
                    trainer.evaluate(ArrayDataset(*batch), 3),
                )
            )
    (wide, momentum, measured), (narrow, other, as_much) = found
    assert wide == pytest.approx(narrow, rel=1e-5) and measured == as_much
    np.testing.assert_allclose(momentum, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_image_at_fault_is_named(make: Make, batch: tuple[Array, Array], engine: str) -> None:
    """The first layer overflows on all images but black ones; this one is in the second micro-batch."""
    x, y = np.zeros_like(batch[0]), batch[1]
    x[3] = 0.5
    with Trainer(make(epsilon=0.0), engine=engine) as trainer:
        first = trainer.buffers["coo.index"] < trainer.artifact.layers[1].offset
        trainer.buffers["coo.value"][first] = 3e38
        with pytest.raises(NotFiniteError, match=r"in step 1, .* \(image 3 of the batch\)"):
            trainer.step(x, y)
        assert trainer.steps == 0


def test_a_training_that_was_cut_off_ends_with_the_same_bits(make: Make, tmp_path: Path) -> None:
    x = np.random.default_rng(5).random((23, 1, 8, 8), np.float32)
    data, path = ArrayDataset(x, np.arange(23) % 10), make(batch_norm="batch")

    def cut(record: dict[str, Any]) -> None:
        if record["step"] == 5:
            raise InterruptedError

    with Trainer(path) as trainer:
        trainer.fit(data, 3, batch_size=11)
        whole = trainer.state()
    with Trainer(path) as trainer, pytest.raises(InterruptedError):
        trainer.fit(data, 3, batch_size=11, save=tmp_path / "run", save_steps=1, max_writes=None, on_step=cut)
    with Trainer.resume(tmp_path / "run", engine="native") as trainer:
        assert trainer.steps == 4  # the last save
        trainer.fit(data, 3, batch_size=11)
        assert all(np.array_equal(whole[name], array) for name, array in trainer.state().items())


def test_what_is_simulated_is_what_it_takes(make: Make) -> None:
    found = simulate(make(), memory=BUDGET, seconds=0.05)
    assert found.fits and found.measured is not None
    assert found.measured.peak_bytes == found.predicted_peak_bytes
    assert found.to_json()["attack_micro_batch"] in (6, 8)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"attack_micro_batch": 2},
            "attack_micro_batch is 2, with a micro-batch of 2 and the format version 4",
        ),
        ({"attack_micro_batch": 5}, "attack_micro_batch is 5, with a micro-batch of 2"),
        ({"attack_micro_batch": 0}, "attack_micro_batch must be a whole number from 1"),
        ({"attack_micro_batch": "6"}, "attack_micro_batch must be a whole number"),
        ({"version": 1}, "with a micro-batch of 2 and the format version 1"),
        ({"attack_micro_batch": None}, "format version is 4, but it has no attack_micro_batch"),
        ({"attack_micro_batch": 4}, "does not fit the manifest: the buffer input"),
    ],
)
def test_what_cannot_be_is_refused(make: Make, tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    shutil.copytree(make(), tmp_path / "a")
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text()) | change
    kept = {name: value for name, value in manifest.items() if value is not None}
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(kept))
    with pytest.raises(EdgeBcsError, match=sentence):
        Trainer(tmp_path / "a")
