"""The networks: prunable counts against the paper's, geometry, tracing and rebuilding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edge_bcs import models
from edge_bcs.core.errors import EdgeBcsError


def prunable(model: nn.Module) -> int:
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))


# The counts of the paper's networks, known independently of this code.
@pytest.mark.parametrize(
    ("name", "classes", "expected"),
    [
        ("vgg16", 10, 15_302_848),
        ("resnet18", 10, 11_164_352),
        ("resnet18", 100, 11_210_432),
        ("resnet34", 10, 21_265_088),
        ("resnet50", 10, 23_467_712),
        ("wrn28_2", 10, 1_463_984),
        ("wrn28_4", 10, 5_841_840),
    ],
)
def test_prunable_counts(name: str, classes: int, expected: int) -> None:
    with torch.device("meta"):
        model = models.create(name, num_classes=classes)
    assert prunable(model) == expected


def test_vgg_layers() -> None:
    with torch.device("meta"):
        model = models.vgg16()
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    dense = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(convolutions) == 13
    assert all(m.bias is None for m in convolutions)
    assert [tuple(m.weight.shape) for m in dense] == [(256, 2048), (256, 256), (10, 256)]
    assert all(m.bias is not None for m in dense)


@pytest.mark.parametrize("name", models.FACTORIES)
@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 28), (3, 16)])
def test_forward_backward_and_trace(name: str, channels: int, size: int) -> None:
    if size == 28 and name.endswith("10"):
        pytest.skip("the widest networks are exercised at two sizes")
    model = models.create(name, num_classes=5, width=0.05, input_channels=channels, input_size=size)
    x = torch.rand(2, channels, size, size)
    logits = model(x)
    assert logits.shape == (2, 5)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    traced = torch.fx.symbolic_trace(model.eval())
    assert torch.equal(traced(x), model(x))
    convolutional = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.ReLU)
    allowed = (*convolutional, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Flatten)
    for node in traced.graph.nodes:
        if node.op == "call_module":
            assert isinstance(traced.get_submodule(node.target), allowed)
        else:
            assert node.op in ("placeholder", "output") or node.target.__name__ == "add"


def test_rebuilt_from_record() -> None:
    model = models.wrn28_2(num_classes=7, width=0.25, input_channels=1, input_size=8)
    assert model.network["name"] == "wrn28_2"
    again = models.create(model.network["name"], **model.network["arguments"])
    again.load_state_dict(model.state_dict())
    x = torch.rand(1, 1, 8, 8)
    assert torch.equal(model.eval()(x), again.eval()(x))


def test_refusals() -> None:
    with pytest.raises(EdgeBcsError, match="at least 16x16 pixels, not 8x8"):
        models.vgg16(input_size=8)
    with pytest.raises(EdgeBcsError, match="no network named 'vgg19'"):
        models.create("vgg19")
    with pytest.raises(EdgeBcsError, match="no argument 'depth'"):
        models.create("resnet18", depth=3)
    with pytest.raises(EdgeBcsError, match="2 classes"):
        models.resnet18(num_classes=1)
