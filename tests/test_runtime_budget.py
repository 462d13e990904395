"""The promise that is made for the full-size network: VGG-16, 99 % sparse, AT with PGD-10, inside 12 MiB."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
from edge_bcs.runtime import BudgetExceeded, Trainer

MIB = 1 << 20


@pytest.fixture(scope="module")
def vgg16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch")
    import edge_bcs

    folder = tmp_path_factory.mktemp("budget") / "vgg16"
    sparse = edge_bcs.sparsify(edge_bcs.models.vgg16(num_classes=10), sparsity=0.99, seed=0)
    edge_bcs.export(sparse, folder, objective="at", micro_batch=4, attack_steps=10, validate=False)
    return folder


def test_a_step_runs_inside_12_mib(vgg16: Path) -> None:
    generator = np.random.default_rng(0)
    x, y = generator.random((6, 3, 32, 32), dtype=np.float32), np.arange(6)
    with Trainer(vgg16, memory="12MiB") as trainer:
        before = trainer.state()["coo.value"]
        trainer.step(x, y)
        memory = trainer.memory()
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
        sparse, tmp_path / "vgg16", objective="at", micro_batch=16, attack_steps=2, validate=False
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
