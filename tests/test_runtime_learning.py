"""A 99 % sparse network that starts at random learns to be robust, on real images, through the whole line."""

from __future__ import annotations

from pathlib import Path

import pytest
from edge_bcs.runtime import Trainer

from edge_bcs.data import open_data


def test_a_random_99_percent_sparse_network_becomes_robust(tmp_path: Path) -> None:
    """ResNet-18 of a quarter of the width on the digits at 32×32; chance is 10 %."""
    pytest.importorskip("torch")
    from edge_bcs.exporters import export

    from edge_bcs.connectivity import sparsify
    from edge_bcs.models import resnet18

    sparse = sparsify(resnet18(width=0.25), "0.99", seed=0)
    options = {
        "batch_norm": "batch",
        "micro_batch": 32,
        "batch_size": 64,
        "attack_steps": 2,
        "validate": False,
    }
    export(sparse, tmp_path / "resnet18", **options)
    training, held_out = open_data("digits", "train"), open_data("digits", "test")
    with Trainer(tmp_path / "resnet18") as trainer:
        before = trainer.evaluate(held_out, 10, limit=96)
        trainer.fit(training, steps=100, augment=False, progress=False)
        after = trainer.evaluate(held_out, 10, limit=96)
        assert len(trainer.state()["coo.value"]) == sparse.kappa
    assert before["robust_accuracy"] < 0.25
    assert after["accuracy"] > 0.7 and after["robust_accuracy"] > 0.35
