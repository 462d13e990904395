"""A 99 % sparse network that starts at random learns to be robust, on real images, through the whole line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from edge_bcs.runtime import Trainer

from edge_bcs.data import ArrayDataset, open_data


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


CIFAR10 = Path(
    os.environ.get("EDGE_BCS_CIFAR10", Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10")
)


@pytest.mark.slow
def test_it_becomes_robust_on_photographs(tmp_path: Path) -> None:
    """ResNet-18 of half the width on 5,000 images of CIFAR-10, PGD-10, 250 steps; chance is 10 %, and the
    standard deviation of an accuracy of 20 % on 400 images is 2 %."""
    pytest.importorskip("torch")
    if not (CIFAR10 / "train.tar.gz").is_file():
        pytest.skip(f"no CIFAR-10 images in {CIFAR10} (train.tar.gz and test.tar.gz of class folders)")
    from edge_bcs.exporters import export

    from edge_bcs.connectivity import sparsify
    from edge_bcs.models import resnet18

    sparse = sparsify(resnet18(width=0.5), "0.99", seed=0, distribution="uniform")
    export(sparse, tmp_path / "a", batch_norm="batch", micro_batch=64, batch_size=64, validate=False)
    archive = open_data(str(CIFAR10 / "train.tar.gz"), "train")
    order = archive.order(0, 0)
    training, held_out = (ArrayDataset(*archive.read(part)) for part in (order[:5000], order[5000:5400]))
    with Trainer(tmp_path / "a") as trainer:
        before = trainer.evaluate(held_out, 10)
        trainer.fit(training, steps=250, progress=False)
        after = trainer.evaluate(held_out, 10)
        assert len(trainer.state()["coo.value"]) == sparse.kappa
    print(f"\nCIFAR-10 (JPEG), 400 held-out images, PGD-10: {before} → {after}")
    assert before["robust_accuracy"] < 0.15
    assert after["accuracy"] > 0.25 and after["robust_accuracy"] > 0.20
