"""`evaluate --attack autoattack` is pyautoattack's standard version, run directly."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from edge_bcs.core.answers import Batch  # noqa: E402
from edge_bcs.data import ArrayDataset  # noqa: E402
from edge_bcs.evaluation.measures import evaluate  # noqa: E402

EPSILON = 0.02


def test_the_standard_version_is_that_of_the_library() -> None:
    """Image by image: which answers stand. A fifth of the labels are wrong from the beginning."""
    library = pytest.importorskip("pyautoattack")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
    x = torch.rand(30, 3, 8, 8)
    with torch.no_grad():
        model[1].bias -= model[1](x.flatten(1)).mean(0)
        labels = model(x).argmax(1)
    labels[::5] = (labels[::5] + 1) % 10

    direct = library.AutoAttack(model, norm="Linf", eps=EPSILON, seed=0, version="standard")
    found = direct.run_standard_evaluation(x, labels, batch_size=250)[0]
    assert float((found - x).abs().max()) <= EPSILON + 1e-6
    stands = model(found).argmax(1) == labels

    told: list[Batch] = []
    data = ArrayDataset(x.numpy(), labels.numpy(), tuple("abcdefghij"))
    report = evaluate(model, data, attack="autoattack", epsilon=EPSILON, on_answers=told.append)
    assert report["clean_acc"] == 0.8
    assert report["adv_acc"] == int(stands.sum()) / 30 and 0 < report["adv_acc"] < 0.8
    (batch,) = told
    assert batch.robust is not None and batch.robust.tolist() == stands.tolist()
