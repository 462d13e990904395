"""That a network which `export` would refuse is told before it is trained, once, with export's sentence."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from helpers.networks import EveryLayer
from torch import Tensor, nn

import edge_bcs
from edge_bcs import Attack, Feed, Schedule, exporters, models
from edge_bcs.core.errors import EdgeBcsError, EdgeBcsWarning
from edge_bcs.data import open_data
from edge_bcs.exportable import warn_if_not_exportable
from edge_bcs.training import loop as training

SHORT: dict[str, Any] = {
    "schedule": Schedule(steps=1),
    "batch_size": 8,
    "attack": Attack(steps=1),
    "feed": Feed(validation=0.0),
    "progress": False,
}


class Own(nn.Module):
    """A user's module for images [1, 8, 8], which does something to the map and something to the vector."""

    def __init__(self, middle: nn.Module, features: int = 4, end: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.middle = middle
        self.head = nn.Linear(features, 10)
        self.end = end or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.middle(self.conv(x)), 1).flatten(1)
        out: Tensor = self.end(self.head(x))
        return out


class WindowOfTheSize(Own):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        out: Tensor = self.head(F.avg_pool2d(x, x.size(2)).flatten(1))
        return out


class OfTheData(Own):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.head((x if x.mean() > 0 else -x).mean((2, 3)))  # type: ignore[no-any-return]


NOT_EXPORTABLE: dict[str, tuple[Any, str]] = {
    "activation": (lambda: Own(nn.Softplus()), r"module 'middle' \(Softplus\) is not supported"),
    "stride": (lambda: Own(nn.Conv2d(4, 4, 3, stride=65)), "convolution 'middle' has a stride of 65"),
    "softmax": (
        lambda: Own(nn.Softmax(1)),
        r"module 'middle' \(Softmax\) is supported only as the last operation",
    ),
    "two eps": (
        lambda: Own(nn.Sequential(nn.BatchNorm2d(4, 1e-3), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))),
        "batch norms have different eps",
    ),
    "control flow": (lambda: OfTheData(nn.Identity()), "the network cannot be traced"),
}


@pytest.mark.parametrize("kind", NOT_EXPORTABLE)
def test_it_is_told_at_once_with_the_sentence_of_export(kind: str, tmp_path: Path) -> None:
    make, message = NOT_EXPORTABLE[kind]
    with pytest.warns(EdgeBcsWarning, match=f"can be trained, but not exported: .*{message}") as told:
        sparse = edge_bcs.sparsify(make(), 0.5)
    assert len(told) == 1 and told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error", EdgeBcsWarning)  # once is enough
        training.train(sparse, open_data("digits", shape=(1, 8, 8)), objective="natural", **SHORT)
    with pytest.raises(EdgeBcsError, match=message) as refused:
        exporters.export(sparse, tmp_path / "artifact", input_shape=(1, 8, 8))
    if kind != "no map":  # which export knows the size of
        assert str(told[0].message).endswith(str(refused.value))


def test_what_only_the_size_of_images_shows_is_told_by_train() -> None:
    """Maxima over windows that differ: nobody knows before the images are there."""

    class Quarters(Own):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(F.adaptive_max_pool2d(self.conv(x), 4).mean((2, 3)))
            return out

    with warnings.catch_warnings():
        warnings.simplefilter("error", EdgeBcsWarning)
        sparse = edge_bcs.sparsify(Quarters(nn.Identity()), 0.5)
    data = open_data("digits", shape=(1, 8, 6))
    with pytest.warns(EdgeBcsWarning, match="cannot bring 8×6 to 4×4 with windows of one") as told:
        training.train(sparse, data, objective="natural", **SHORT)
    assert len([one for one in told if one.category is EdgeBcsWarning]) == 1
    assert told[0].filename == __file__


def test_what_can_be_exported_is_not_talked_about() -> None:
    """Also where nothing says which images a module takes; dropout is off by the time of the export."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", EdgeBcsWarning)
        for name in models.FACTORIES:
            edge_bcs.sparsify(models.create(name, width=0.1), 0.9)
        edge_bcs.sparsify(EveryLayer(), 0.5)
        sizes = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Dropout(), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
        sparse = edge_bcs.sparsify(sizes, 0.5)
        assert sizes[1].training
        training.train(sparse, open_data("digits", shape=(1, 8, 8)), objective="natural", **SHORT)
        warn_if_not_exportable(sparse, (1, 8, 8))
    with pytest.warns(EdgeBcsWarning) as told:
        warn_if_not_exportable(sparse, (1, 9, 9))
    assert str(told[0].message) == (
        "this network can be trained, but not exported: linear layer '4' expects a vector of 144 but gets "
        "(196,); flatten before it"
    )


def test_it_is_told_where_onnx_is_not_installed() -> None:
    code = (
        "import sys; sys.modules.update(onnx=None, onnxruntime=None)\n"
        "import warnings, torch, edge_bcs\n"
        "warnings.simplefilter('error')\n"
        "edge_bcs.sparsify(edge_bcs.models.vgg16(width=0.1), 0.9)\n"
        "try: edge_bcs.sparsify(torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.Softplus()), 0.5)\n"
        "except edge_bcs.core.errors.EdgeBcsWarning as told: print(told)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "module '1' (Softplus) is not supported" in done.stdout
