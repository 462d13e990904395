"""The blocks that families of networks are made of, written out small, each through the whole path: exported,
stepped, and its gradients beside torch's in float64, tensor by tensor."""

# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from edge_bcs.runtime import Trainer
from helpers.networks import sparse_of
from torch import Tensor, nn

import edge_bcs
from edge_bcs.bench.gradients import TOLERANCE, Batch, by_artifact, compare

CHANNELS, SIZE = 8, 9
"""What goes into a block; maps of an odd size leave windows that lie half outside."""


def norm(conv: nn.Conv2d, *then: nn.Module) -> nn.Sequential:
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), *then)


def pointwise(before: int, after: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, 1, bias=False)


def depthwise(channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, inner: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)
        self.inner, self.gate = inner, gate

    def forward(self, x: Tensor) -> Tensor:
        scale = self.expand(self.inner(self.reduce(F.adaptive_avg_pool2d(x, 1))))
        return self.gate(scale) * x


class InvertedResidual(nn.Module):
    """MobileNetV2's; with a gate MobileNetV3's and EfficientNet's."""

    def __init__(self, act: nn.Module, gate: list[nn.Module], kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.block = nn.Sequential(
            norm(pointwise(CHANNELS, 12), act),
            norm(depthwise(12, kernel, stride), act),
            *gate,
            norm(pointwise(12, CHANNELS)),
        )
        self.residual = stride == 1

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.residual else self.block(x)


class Fire(nn.Module):
    """SqueezeNet's, and the pooling behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(CHANNELS, 4, 1)
        self.one, self.three = nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        x = torch.cat([F.relu(self.one(x)), F.relu(self.three(x))], 1)
        return F.max_pool2d(x, 3, 2, ceil_mode=True)


class DenseBlock(nn.Module):
    """DenseNet's: two layers that read all before them, and the transition."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(width),
                nn.ReLU(),
                pointwise(width, 6),
                nn.BatchNorm2d(6),
                nn.ReLU(),
                nn.Conv2d(6, 4, 3, padding=1, bias=False),
            )
            for width in (CHANNELS, CHANNELS + 4)
        )
        self.transition = nn.Sequential(
            nn.BatchNorm2d(CHANNELS + 8), nn.ReLU(), pointwise(CHANNELS + 8, 6), nn.AvgPool2d(2, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for layer in self.layers:
            found.append(layer(torch.cat(found, 1)))
        return self.transition(torch.cat(found, 1))


class Inception(nn.Module):
    """GoogLeNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.one = norm(pointwise(CHANNELS, 4), nn.ReLU())
        self.three = nn.Sequential(
            norm(pointwise(CHANNELS, 4), nn.ReLU()),
            norm(nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.ReLU()),
        )
        self.pool = nn.Sequential(
            nn.MaxPool2d(3, 1, 1, ceil_mode=True), norm(pointwise(CHANNELS, 3), nn.ReLU())
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.pool(x)], 1)


class ShuffleUnit(nn.Module):
    """ShuffleNetV2's, as torchvision writes it; without a stride its left branch is there and not used."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        width = CHANNELS // 2
        before = width if stride == 1 else CHANNELS
        self.stride = stride
        self.left = nn.Sequential(
            norm(depthwise(before, 3, stride)), norm(pointwise(before, width), nn.ReLU())
        )
        self.right = nn.Sequential(
            norm(pointwise(before, width), nn.ReLU()),
            norm(depthwise(width, 3, stride)),
            norm(pointwise(width, width), nn.ReLU()),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            first, second = x.chunk(2, dim=1)
            out = torch.cat((first, self.right(second)), dim=1)
        else:
            out = torch.cat((self.left(x), self.right(x)), dim=1)
        n, channels, height, width = out.size()
        out = out.view(n, 2, channels // 2, height, width)
        return torch.transpose(out, 1, 2).contiguous().view(n, channels, height, width)


class Ghost(nn.Module):
    """GhostNet's module: half of the channels are cheap functions of the others, and some too many."""

    def __init__(self) -> None:
        super().__init__()
        self.primary = norm(pointwise(CHANNELS, 5), nn.ReLU())
        self.cheap = norm(depthwise(5, 3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        first = self.primary(x)
        return torch.cat([first, self.cheap(first)], dim=1)[:, :9]


class RepVGG(nn.Module):
    """3×3, 1×1 and the identity, each with a batch norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.three = norm(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False))
        self.one, self.identity = norm(pointwise(CHANNELS, CHANNELS)), nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.three(x) + self.one(x) + self.identity(x))


class MobileOne(nn.Module):
    """Several branches of a depthwise and of a pointwise convolution, beside a scale and the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.ModuleList(norm(depthwise(CHANNELS, 3, 2)) for _ in range(2))
        self.scale = norm(depthwise(CHANNELS, 1, 2))
        self.points = nn.ModuleList(norm(pointwise(CHANNELS, CHANNELS)) for _ in range(2))
        self.identity = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        out = self.scale(x)
        for branch in self.wide:
            out = out + branch(x)
        x = F.relu(out)
        out = self.identity(x)
        for branch in self.points:
            out = out + branch(x)
        return F.relu(out)


class ConvNeXt(nn.Module):
    """A 7×7 depthwise convolution, and linear layers on the channels, which lie last."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(CHANNELS, CHANNELS, 7, padding=3, groups=CHANNELS)
        self.norm = nn.LayerNorm(CHANNELS, eps=1e-6)
        self.wide, self.narrow = nn.Linear(CHANNELS, 16), nn.Linear(16, CHANNELS)
        self.layer_scale = nn.Parameter(torch.linspace(0.5, 1.5, CHANNELS).reshape(CHANNELS, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        out = self.narrow(F.gelu(self.wide(out))).permute(0, 3, 1, 2)
        return x + self.layer_scale * out


class UniversalBottleneck(nn.Module):
    """MobileNetV4's: depthwise before and between the pointwise convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(
            norm(depthwise(CHANNELS, 3)),
            norm(pointwise(CHANNELS, 12), nn.ReLU()),
            norm(depthwise(12, 5, 2), nn.ReLU()),
            norm(pointwise(12, CHANNELS)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class Grouped(nn.Module):
    """RegNet's and ResNeXt's: a grouped convolution between pointwise ones, and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(
            norm(pointwise(CHANNELS, 12), nn.ReLU()),
            norm(nn.Conv2d(12, 12, 3, 2, 1, groups=3, bias=False), nn.ReLU()),
            SqueezeExcite(12, nn.ReLU(), nn.Sigmoid()),
            norm(pointwise(12, 10)),
        )
        self.skip = norm(nn.Conv2d(CHANNELS, 10, 1, 2, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip(x) + self.block(x))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "inverted residual, ReLU6": lambda: InvertedResidual(nn.ReLU6(), [], 3),
    "inverted residual, hardswish and gate": lambda: InvertedResidual(
        nn.Hardswish(), [SqueezeExcite(12, nn.ReLU(), nn.Hardsigmoid())], 5
    ),
    "inverted residual, SiLU and gate, strided": lambda: InvertedResidual(
        nn.SiLU(), [SqueezeExcite(12, nn.SiLU(), nn.Sigmoid())], 3, stride=2
    ),
    "fire": Fire,
    "dense block": DenseBlock,
    "inception": Inception,
    "shuffle unit": lambda: ShuffleUnit(1),
    "shuffle unit, strided": lambda: ShuffleUnit(2),
    "ghost": Ghost,
    "RepVGG": RepVGG,
    "MobileOne": MobileOne,
    "ConvNeXt": ConvNeXt,
    "universal inverted bottleneck": UniversalBottleneck,
    "grouped bottleneck": Grouped,
}


class Around(nn.Module):
    """A convolution that makes maps, the block, and a linear layer on their means."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stem = norm(nn.Conv2d(3, CHANNELS, 3, padding=1, bias=False), nn.ReLU())
        self.block = block
        width = block.eval()(torch.zeros(1, CHANNELS, SIZE, SIZE)).shape[1]
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)).mean((2, 3)))


@pytest.mark.filterwarnings("ignore:of th.* a part is not:edge_bcs.core.errors.EdgeBcsWarning")
@pytest.mark.parametrize(
    ("objective", "statistics", "images", "micro_batch", "dense_by_default"),
    [
        ("natural", "batch", 9, 4, True),
        ("at", "frozen", 4, 2, False),
        ("trades", "frozen", 5, 3, True),
        ("trades", "batch", 8, 4, False),
    ],
)
@pytest.mark.parametrize("block", BLOCKS)
def test_a_step_is_torchs_and_of_the_predicted_size(
    block: str,
    objective: str,
    statistics: str,
    images: int,
    micro_batch: int,
    dense_by_default: bool,
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    sparse = sparse_of(Around(BLOCKS[block]()), density=0.6, dense_by_default=dense_by_default)
    artifact = edge_bcs.export(
        sparse,
        tmp_path / "artifact",
        objective=objective,
        input_shape=(3, SIZE, SIZE),
        memory=edge_bcs.Memory(micro_batch=micro_batch),
        attack=edge_bcs.Attack(steps=1),
        batch_norm=statistics,
        batch_size=images,
        validate=False,
    )
    batch = Batch.random(artifact, images)
    with Trainer(artifact, threads=1) as trainer:
        trainer.step(batch.images, batch.labels)
        assert trainer.peak_bytes == artifact.predicted_peak_bytes
    found = by_artifact(artifact, sparse, batch, threads=2)
    assert found.same_bits(by_artifact(artifact, sparse, batch, threads=1))
    difference = compare(artifact, sparse, batch, found)
    assert not difference.excess
    # Statistics of a batch make some gradients differences of nearly equal numbers: those of a 1×1 depthwise
    # kernel before them, for one. There torch's own float32 is the measure.
    assert statistics == "batch" or difference.worst[1] < TOLERANCE
