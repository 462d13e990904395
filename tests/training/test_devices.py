"""How images lie in memory on a GPU, as far as a machine without one can tell."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import edge_bcs
from edge_bcs.training import devices
from edge_bcs.training.devices import fastest_layout, takes_pixels


class Small(nn.Module):
    """A convolution and a linear layer, with what is between them as users write it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.conv, self.linear, self.way = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(256, 10), way

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        ways = {"view": lambda: x.view(len(x), -1), "flatten": lambda: x.flatten(1)}
        logits: Tensor = self.linear(ways[self.way]())
        return logits


@pytest.mark.parametrize(("way", "takes"), [("view", False), ("flatten", True)])
def test_a_network_that_looks_at_its_maps_by_view_keeps_their_order(way: str, takes: bool) -> None:
    sparse = edge_bcs.sparsify(Small(way), 0.5)
    before = {name: tensor.clone() for name, tensor in sparse.state_dict().items()}
    assert takes_pixels(sparse, (3, 8, 8)) is takes
    assert all(torch.equal(tensor, before[name]) for name, tensor in sparse.state_dict().items())
    assert sparse.training and fastest_layout(sparse, (3, 8, 8)) is torch.contiguous_format


@pytest.mark.parametrize(("takes", "layout"), [(True, torch.channels_last), (False, torch.contiguous_format)])
def test_the_layout_on_a_gpu(
    takes: bool, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "takes_pixels", lambda *_: takes)
    on_gpu: Any = SimpleNamespace(index=SimpleNamespace(device=torch.device("cuda")))
    assert fastest_layout(on_gpu, (3, 8, 8)) is layout
