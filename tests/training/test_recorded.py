"""What is recorded as a CUDA graph against the same launched kernel by kernel; both need a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import edge_bcs
from edge_bcs import Attack, Compute, Feed, Schedule
from edge_bcs.training import backends as engines
from edge_bcs.training.backends.cuda import Recorded

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")


def test_a_replay_reads_what_is_there_now() -> None:
    """Inputs and the tensors beside them change between the calls; what a call returned does not."""
    weight = torch.ones(4, device="cuda")
    scaled = Recorded(lambda x, *, factor: x * weight * factor)
    results, expected = [], []
    for turn in range(6):
        for length in (4, 1):
            for factor in (2.0, 3.0):
                weight.fill_(turn + 1.0)
                results.append(scaled(torch.full((length,), float(turn), device="cuda"), factor=factor))
                expected.append(torch.full((4,), turn * (turn + 1.0) * factor))
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(result.cpu(), wanted)


@pytest.mark.parametrize("objective", ["at", "trades", "mixed"])
@pytest.mark.parametrize("schedule", ["steps", "cosine"])
def test_a_recorded_training_is_the_launched_one(
    objective: str, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve steps in float32, deterministic kernels: the same connections, weights and statistics."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    rng = np.random.default_rng(0)
    data = rng.random((96, 3, 16, 16), np.float32), rng.integers(0, 10, 96)

    def trained(recorded: Any) -> tuple[dict[str, Any], float]:
        monkeypatch.setattr(engines, "Recorded", recorded)
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(4096, 10)
        )
        sparse = edge_bcs.sparsify(network, 0.9, seed=0)
        report = edge_bcs.train(
            sparse, data, objective=objective, schedule=Schedule(steps=12, kind=schedule), batch_size=16,
            feed=Feed(validation=0), attack=Attack(steps=3), compute=Compute(device="cuda", precision="f32"),
            progress=False,
        )  # fmt: skip
        return sparse.state(), report["loss"]

    def launched(function: Any) -> Any:
        return function

    (first, first_loss), (second, second_loss) = trained(launched), trained(Recorded)
    assert first_loss == pytest.approx(second_loss, rel=1e-4)
    for name in first:
        np.testing.assert_allclose(second[name], first[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_what_is_recorded_survives_in_a_tensor_of_its_own() -> None:
    doubled = Recorded(lambda x: x + x)
    kept: list[Tensor] = [doubled(torch.full((2,), float(number), device="cuda")) for number in range(5)]
    assert [float(result[0]) for result in kept] == [0, 2, 4, 6, 8]
