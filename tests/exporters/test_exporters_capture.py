"""What the compiler takes, what it refuses and how, and what it fuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from edge_bcs.exporters.frontends.torch import capture
from edge_bcs.exporters.fusion import FusedLayer, fuse
from edge_bcs.exporters.layers import BatchNorm, Convolution
from helpers.networks import EveryLayer
from torch import nn

from edge_bcs import EdgeBcsError, models


class Function(nn.Module):
    """A network around one function of the feature map."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], *modules: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.inner = nn.Sequential(*modules)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.flatten(self.function(self.inner(self.stem(x))), 1)


def identity(x: torch.Tensor) -> torch.Tensor:
    return x


REFUSED = {
    "stride of 65; at most 64": Function(identity, nn.Conv2d(4, 4, 3, stride=(1, 65))),
    "padding of 256; at most 255": Function(identity, nn.Conv2d(4, 4, 3, padding=(256, 0))),
    "window, with its dilation, of 401; at most 256": Function(
        identity, nn.Conv2d(4, 4, 3, padding=200, dilation=200)
    ),
    "padding_mode='reflect'": Function(identity, nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")),
    "at most 255 weights": Function(identity, nn.Conv2d(4, 4, 17)),
    "expects 5 channels but gets 4": Function(identity, nn.Conv2d(5, 4, 3)),
    "is larger than its input": Function(identity, nn.Conv2d(4, 4, 11)),
    "momentum=None": Function(identity, nn.BatchNorm2d(4, momentum=None)),
    "Softplus": Function(identity, nn.Softplus()),
    "'hardtanh'": Function(identity, nn.Hardtanh()),
    "LayerNorm": Function(identity, nn.LayerNorm(8)),
    "'sin'": Function(torch.sin),
    "'mul' takes (4, 8, 8) and (1, 8, 8); both must have one shape": Function(lambda x: x * x[:, :1]),
    "'permute'": Function(lambda x: x.permute(0, 2, 3, 1)),
    "not a tensor of the network": Function(lambda x: x + torch.ones(4, 8, 8)),
    "both must have one shape": Function(lambda x: x + F.max_pool2d(x, 2)),
    "dilation; only": Function(lambda x: F.max_pool2d(x, 2, dilation=2)),
    "at most 255 pixels": Function(lambda x: F.max_pool2d(F.interpolate(x, scale_factor=2), 16)),
    "has a divisor_override": Function(lambda x: F.avg_pool2d(x, 3, divisor_override=2)),
    "cannot bring 8×8 to 3×3": Function(lambda x: F.adaptive_max_pool2d(x, 3)),
    "must be over height and width": Function(lambda x: x.mean(1)),
    "keep the batch dimension": Function(lambda x: torch.flatten(x, 0, 1)),
    "gives (4·batch, 64)": Function(lambda x: x.view(-1, 64)),
    "dropout 'dropout' is active": Function(lambda x: F.dropout(x, 0.5, True)),
    "'select'": Function(lambda x: x.select(1, 0)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_name_the_reason_in_one_sentence(reason: str) -> None:
    with pytest.raises(EdgeBcsError) as error:
        capture(REFUSED[reason], (3, 8, 8))
    message = str(error.value)
    assert reason in message
    assert "\n" not in message


CONVOLUTIONS: dict[str, nn.Conv2d] = {
    "of one stride": nn.Conv2d(4, 4, 3, stride=2, padding=1),
    "each axis its own": nn.Conv2d(4, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 3)),
    "same": nn.Conv2d(4, 4, 5, padding="same", dilation=2),
    "same, even": nn.Conv2d(4, 4, (2, 4), padding="same", dilation=(3, 1)),
    "valid": nn.Conv2d(4, 4, 3, padding="valid", groups=2),
    "depthwise": nn.Conv2d(4, 8, 3, groups=4),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_captured_convolution_says_what_torch_computes(kind: str) -> None:
    module = CONVOLUTIONS[kind]
    layer = capture(Function(identity, module), (3, 9, 8)).layers[2]
    assert isinstance(layer, Convolution)
    x = torch.randn(2, 4, 9, 8)
    top, left, bottom, right = layer.pads
    geometry = (layer.strides, 0, layer.dilations, layer.groups)
    y = F.conv2d(F.pad(x, (left, right, top, bottom)), module.weight, module.bias, *geometry)
    assert layer.shape == tuple(y.shape[1:])
    assert torch.allclose(y, module(x), atol=1e-5)


def test_zeros_around_a_map_are_a_convolutions_own_pads() -> None:
    padded = Function(identity, nn.ZeroPad2d((0, 1, 2, 1)), nn.Conv2d(4, 5, 3, stride=2, padding=1))
    layers = capture(padded, (3, 8, 8)).layers
    assert [type(layer).__name__ for layer in layers] == ["Input", "Convolution", "Convolution", "Flatten"]
    assert isinstance(layers[2], Convolution) and layers[2].pads == (3, 1, 2, 2)
    for other in (nn.ConstantPad2d(1, 0.5), nn.ZeroPad2d((-1, 1, 1, 1))):
        kept = Function(identity, other, nn.Conv2d(4, 5, 3))
        assert "Pad" in [type(layer).__name__ for layer in capture(kept, (3, 8, 8)).layers]


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.flatten(self.conv(self.conv(x)), 1)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.flatten(x + self.scale, 1)


class Pair(Twice):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        x = torch.flatten(self.conv(x), 1)
        return x, x


class NoVector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Branching(), "cannot be traced"),
        (Twice(), "'conv' is used twice"),
        (Own(), "'scale'"),
        (NoVector(), "(batch, classes)"),
        (nn.Sequential(nn.Linear(8, 2)), "expects a vector of 8"),
    ],
)
def test_refused_modules(module: nn.Module, reason: str) -> None:
    with pytest.raises(EdgeBcsError) as error:
        capture(module, (3, 8, 8))
    assert reason in str(error.value)


@pytest.mark.parametrize("shape", [(3, 8), (3, 0, 8), (1, 3, 8, 8)])
def test_input_shapes_are_checked(shape: tuple[int, ...]) -> None:
    with pytest.raises(EdgeBcsError, match="channels, height, width"):
        capture(NoVector(), shape)


def shapes_in_torch(module: nn.Module, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Output shapes of the leaf modules as torch computes them."""
    found: dict[str, tuple[int, ...]] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: found.__setitem__(name, tuple(output.shape[1:]))

    for name, child in module.named_modules():
        if isinstance(child, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            child.register_forward_hook(note(name))
    with torch.no_grad():
        module.eval()(torch.zeros(2, *shape))
    return found


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (EveryLayer(), (2, 13, 13)),
        (models.vgg16(width=0.125), (3, 32, 32)),
        (models.resnet50(width=0.125), (3, 32, 32)),
        (models.wrn28_2(width=0.5), (3, 32, 32)),
    ],
    ids=["every layer", "vgg16", "resnet50", "wrn28_2"],
)
def test_shapes_are_torchs(module: nn.Module, shape: tuple[int, int, int]) -> None:
    expected = shapes_in_torch(module, shape)
    graph = capture(module, shape)
    captured = {layer.module: layer.shape for layer in graph.layers if isinstance(layer, Convolution)}
    assert captured
    for name, found in captured.items():
        assert found == expected[name], name


def test_eval_dropout_and_identity_vanish() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Identity(), nn.Linear(12, 2)).eval()
    assert [type(layer).__name__ for layer in capture(module, (3, 2, 2)).layers] == [
        "Input",
        "Flatten",
        "Convolution",
    ]


def test_what_does_not_reach_the_logits_is_left_out() -> None:
    class Unused(Twice):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            F.relu(self.conv(x))
            return torch.flatten(x, 1)

    assert [type(layer).__name__ for layer in capture(Unused(), (3, 2, 2)).layers] == ["Input", "Flatten"]


def operators(fused: list[FusedLayer]) -> Counter[str]:
    return Counter(layer.operator for layer in fused)


def test_resnet_becomes_one_operator_a_convolution() -> None:
    graph = capture(models.resnet18(width=0.125), (3, 32, 32))
    fused = fuse(graph)
    # 20 convolutions and the linear layer; eight residual additions, all of them inside.
    assert operators(fused) == {"PackInput": 1, "Conv": 21, "AveragePool": 1}
    assert sum(layer.residual is not None for layer in fused) == 8
    # Every convolution but the three projections and the linear layer is rectified.
    assert sum(bool(layer.activation) for layer in fused) == 21 - 3 - 1


def test_vgg_rectifies_in_its_poolings() -> None:
    fused = fuse(capture(models.vgg16(width=0.125), (3, 32, 32)))
    pools = [layer for layer in fused if layer.operator == "MaxPool"]
    assert len(pools) == 4 and all(pool.activation for pool in pools)
    before = [layer for layer in fused if any(layer.name in pool.inputs for pool in pools)]
    assert not any(layer.activation for layer in before)


def test_wide_resnet_scales_and_rectifies_before_convolutions() -> None:
    fused = fuse(capture(models.wrn28_2(width=0.5), (3, 32, 32)))
    # Batch norms that follow an addition: the first one of each of 12 blocks but the very first (which joins
    # the stem, whose output nothing else reads), and the last one of the network.
    assert operators(fused)["Affine"] == 12
    assert sum(layer.residual is not None for layer in fused) == 12


def test_batch_statistics_put_addition_and_relu_into_the_normalisation() -> None:
    graph = capture(models.resnet18(width=0.125), (3, 32, 32))
    fused = fuse(graph, batch=[layer.module for layer in graph.layers if isinstance(layer, BatchNorm)])
    norms = [layer for layer in fused if layer.operator == "BatchNorm"]
    assert len(norms) == 20 and sum(norm.residual is not None for norm in norms) == 8
    assert not any(layer.activation for layer in fused if layer.operator == "Conv")
