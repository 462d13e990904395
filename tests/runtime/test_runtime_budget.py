"""The promise that is made for the full-size network: VGG-16, 99 % sparse, AT with PGD-10, inside 12 MiB."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner
from edge_bcs.runtime import Artifact, BudgetExceeded, Trainer
from edge_bcs.runtime.attack import start_images

from edge_bcs.cli import main
from edge_bcs.core import random
from edge_bcs.simulation import simulate

MIB = 1 << 20


@pytest.fixture(scope="module")
def vgg16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch")
    import edge_bcs

    folder = tmp_path_factory.mktemp("budget") / "vgg16"
    sparse = edge_bcs.sparsify(edge_bcs.models.vgg16(num_classes=10), sparsity=0.99, seed=0)
    edge_bcs.export(sparse, folder, objective="at", memory=edge_bcs.Memory(micro_batch=4), validate=False)
    return folder


def test_a_step_runs_inside_12_mib(vgg16: Path) -> None:
    generator = np.random.default_rng(0)
    x, y = generator.random((6, 3, 32, 32), dtype=np.float32), np.arange(6)
    with Trainer(vgg16, memory="12MiB") as trainer:
        before = trainer.state()["coo.value"]
        trainer.step(x, y)
        memory = trainer.memory()
        # Every tensor lies in the program's arena, and nothing beside it.
        assert memory["bound_bytes"] < memory["peak_bytes"] == memory["placed_peak_bytes"]
        assert memory["peak_bytes"] == trainer.artifact.predicted_peak_bytes
        assert memory["exact"] and memory["cap_bytes"] == 12 * MIB
        # At least the κ arrays and the gradient, or nothing was counted.
        assert 16 * len(before) < memory["peak_bytes"] <= 12 * MIB
        assert len(trainer.state()["coo.value"]) == 153_028
        assert not np.array_equal(trainer.state()["coo.value"], before)


def test_three_mib_are_refused_in_a_sentence(vgg16: Path) -> None:
    with pytest.raises(BudgetExceeded, match=r"asked for .* of 3\.0 MiB in use"):
        Trainer(vgg16, memory="3MiB")
    with Trainer(vgg16, memory="12MiB") as trainer:  # and nothing is left behind
        trainer.predict(np.zeros((1, 3, 32, 32), np.float32))


def test_a_graph_that_ran_finds_its_memory_again(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    import edge_bcs

    sparse = edge_bcs.sparsify(edge_bcs.models.vgg16(num_classes=10), sparsity=0.99, seed=0)
    edge_bcs.export(
        sparse,
        tmp_path / "vgg16",
        objective="at",
        memory=edge_bcs.Memory(micro_batch=16),
        attack=edge_bcs.Attack(steps=2),
        validate=False,
    )
    generator = np.random.default_rng(0)
    x, y = generator.random((16, 3, 32, 32), dtype=np.float32), np.arange(16) % 10
    with Trainer(tmp_path / "vgg16") as trainer:
        for _ in range(2):
            trainer.step(x, y)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        trainer.step(x, y)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        # Two passes over tensors in newly mapped pages would cost more.
        assert faults * resource.getpagesize() < trainer.memory()["peak_bytes"] / 4


def without_places(folder: Path) -> Path:
    """The artifact as versions before 0.2 wrote it: tensors are counted and have no addresses."""
    manifest = json.loads((folder / "manifest.json").read_text())
    memory = manifest["memory"]
    bound = sum(memory["bound"].values())
    for phase in memory["phases"].values():
        alive = [0] * len(phase["nodes"])
        for tensor in phase["tensors"]:
            del tensor[6]
            for node in range(tensor[3], tensor[4] + 1):
                alive[node] += tensor[1]
        phase["peak_bytes"] = bound + max(alive, default=0)
    del memory["placed"]
    memory["predicted_peak_bytes"] = max(phase["peak_bytes"] for phase in memory["phases"].values())
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_an_artifact_without_places_is_counted_and_told(
    tiny_artifact: Callable[..., Path], tmp_path: Path
) -> None:
    """Headers alone make what is taken more than what is counted, so a cap at the peak is always below it."""
    path = without_places(Path(shutil.copytree(tiny_artifact(), tmp_path / "a")))
    need = str(Artifact.read(path).predicted_peak_bytes)

    def said(folder: Path, cap: str) -> str:
        words = ["--data", "digits", "--steps", "1", "--eval-samples", "0", "--memory", cap]
        done = CliRunner().invoke(main, ["finetune", str(folder), *words, "-o", str(tmp_path / "run")])
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        assert done.exit_code == 0, done.output
        return done.output

    assert "ONNX Runtime's own allocator took" in said(path, need)
    assert "own allocator" not in said(path, "1MiB")
    assert "own allocator" not in said(tiny_artifact(), "1MiB")
    result = simulate(path, threads=1, seconds=0)
    assert result.measured_peak_bytes == result.predicted_peak_bytes == int(need)
    with pytest.raises(BudgetExceeded):  # the holes of its program are not in the plan
        Trainer(path, memory=need, engine="native")


@pytest.mark.parametrize("kind", ["uniform", "gaussian"])
def test_an_attack_starts_where_numpy_says(kind: str) -> None:
    x = np.random.default_rng(0).random((4, 3, 225, 223), np.float32)  # no whole number of blocks
    stream = {"seed": 1, "step": 2 + (3 << 32), "purpose": 3}
    moved = start_images(x, kind, 0.03, position=5, **stream)
    assert np.array_equal(start_images(x[1:3], kind, 0.03, position=6, **stream), moved[1:3])
    assert np.array_equal(start_images(x, "none", 0.03, position=5, **stream), x)
    if kind == "uniform":
        drawn = np.float32(2) * random.uniform(x.size, start=5 * x[0].size, **stream) - np.float32(1)
        noise = drawn * np.float32(0.03)
    else:
        noise = random.normal(x.size, start=5 * x[0].size, **stream) * np.float32(0.001)
    assert np.array_equal(moved, np.clip(x + noise.reshape(x.shape), np.float32(0), np.float32(1)))


def test_what_is_needed_once_is_gone_before_the_rest_comes(
    tiny_artifact: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[int] = []
    sessions: weakref.WeakSet[onnxruntime.InferenceSession] = weakref.WeakSet()
    real = onnxruntime.InferenceSession

    def recorded(*arguments: Any, **more: Any) -> onnxruntime.InferenceSession:
        there.append(len(sessions))
        session = real(*arguments, **more)
        sessions.add(session)
        return session

    monkeypatch.setattr(onnxruntime, "InferenceSession", recorded)
    with Trainer(tiny_artifact(), threads=1):
        assert there == [0, 0, 1, 2, 3]  # the lists; training, attack, evaluation, optimizer
        kept = [value for session in sessions for value in vars(session).values()]
        assert len(sessions) == 4
        assert sum(len(value) for value in kept if isinstance(value, bytes)) == 0  # the graphs' files


def test_the_board_does_without_modules_that_take_megabytes() -> None:
    code = (
        "import sys, numpy, onnxruntime; before = set(sys.modules)\n"
        "import edge_bcs.runtime.trainer, edge_bcs.runtime.library\n"
        "print(*(set(sys.modules) - before) & {'importlib.metadata', 'email.message', 'torch', 'onnx'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
