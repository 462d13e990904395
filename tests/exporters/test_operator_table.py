"""Every operator in a network of its own, through the compiled library, against torch in float64.

To add an operator, add a row to ``ROWS``: its name, and torch modules that come to it, between a
convolution that gives them 6×7×6 maps and a linear layer that takes what they leave. Each row is checked
forwards (logits, in the compiled graph and in ONNX's own operators), backwards (loss, gradients of all
parameters, the sign of the image's gradient), with batches whose images fill vectors and batches that do
not, and for its memory: the peak that is predicted is the one that the allocator measures.
"""

# mypy: disable-error-code="arg-type"

from __future__ import annotations

import ast
from collections.abc import Callable
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edge_bcs.exporters.compiler import compile_network
from edge_bcs.exporters.memory.choice import Job
from edge_bcs.exporters.network import network_of
from edge_bcs.exporters.operators import OPERATORS
from edge_bcs.exporters.validation import run, validate
from edge_bcs.runtime import Trainer
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.state import read_state
from helpers import TESTS
from helpers.networks import Dense, double, sparse_of
from torch import nn

import edge_bcs
from edge_bcs.core.objectives import objective_named

IMAGE, CHANNELS, MAP = (2, 7, 6), 6, (7, 6)


class Sum(nn.Module):
    """x + f(x)."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.branch(x)


class Gate(nn.Module):
    """Squeeze-and-excite: x · f(the mean of x), a number for each channel."""

    def __init__(self, *branch: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.branch(x)


class Function(nn.Module):
    """A function of its input."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class Joined(nn.Module):
    """All that came before, one behind the other, and a convolution of it, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(6, 2, 3, padding=1), nn.Conv2d(8, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.relu(x)
        y = nn.functional.relu(self.first(x))
        return torch.cat([x, y, self.second(torch.cat([x, y], 1))], 1)


def shuffled(x: torch.Tensor) -> torch.Tensor:
    """The unit of a ShuffleNet without its convolutions: halves, joined and shuffled."""
    left, right = x.chunk(2, 1)
    x = torch.cat([left * right, nn.functional.relu(right)], 1)
    batch, channels, height, width = x.shape
    x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous()
    return x.view(batch, channels, height, width)


class ChannelsLast(nn.Module):
    """A block of a ConvNeXt: a layer norm and linear layers with the channels last, scaled and added."""

    def __init__(self) -> None:
        super().__init__()
        self.spread = nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)
        self.scale = nn.Parameter(0.5 + torch.rand(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.spread(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(nn.functional.relu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


class Scaled(nn.Module):
    """A learned number for each channel."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(0.5 + torch.rand(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


def with_numbers(module: nn.Module) -> nn.Module:
    """A norm away from its initial scale and shift."""
    for parameter in module.parameters():
        parameter.data = parameter.data + 0.4 * torch.randn_like(parameter)
    return module


def wide() -> nn.Module:
    """A batch norm whose results reach beyond the limits of ReLU6 and of the hard functions."""
    norm = nn.BatchNorm2d(6)
    nn.init.constant_(norm.weight, 4.0)
    return norm


ROWS: dict[str, Callable[[], list[nn.Module]]] = {
    "convolution": lambda: [nn.Conv2d(6, 4, 3, padding=1)],
    "convolution, strided": lambda: [nn.Conv2d(6, 4, 3, stride=2, padding=1)],
    "convolution, one by three": lambda: [nn.Conv2d(6, 4, (1, 3), bias=False)],
    "convolution, one by seven": lambda: [nn.Conv2d(6, 4, (1, 7), padding=(0, 3))],
    "convolution, seven by one": lambda: [nn.Conv2d(6, 4, (7, 1), padding=(3, 0), bias=False)],
    "convolution, strides of its own": lambda: [nn.Conv2d(6, 4, 3, stride=(2, 1), padding=(1, 0))],
    "convolution, dilated": lambda: [nn.Conv2d(6, 4, 3, padding=(2, 3), dilation=(2, 3))],
    "convolution, even kernel": lambda: [nn.Conv2d(6, 4, (2, 4), padding="same")],
    "convolution, two groups": lambda: [
        nn.Conv2d(6, 4, 3, padding=1, groups=2, bias=False),
        nn.BatchNorm2d(4),
    ],
    "convolution, depthwise": lambda: [nn.Conv2d(6, 12, 3, stride=2, padding=1, groups=6), nn.ReLU()],
    "dense convolution": lambda: [Dense(nn.Conv2d(6, 8, 3, padding=1)), nn.ReLU()],
    "dense convolution, strided": lambda: [
        Dense(nn.Conv2d(6, 9, 3, stride=(2, 3), padding=1, dilation=(1, 2)))
    ],
    "dense convolution, groups": lambda: [
        Dense(nn.Conv2d(6, 6, 3, padding=1, groups=2, bias=False)),
        nn.BatchNorm2d(6),
        nn.ReLU(),
    ],
    "dense convolutions around an addition": lambda: [
        Sum(Dense(nn.Conv2d(6, 6, 3, padding="same", bias=False))),
        nn.ReLU(),
        Dense(nn.Conv2d(6, 4, 2)),
    ],
    "depthwise, 3 by 3": lambda: [
        Dense(nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)),
        nn.BatchNorm2d(6),
    ],
    "depthwise, 3 by 3, strided": lambda: [Dense(nn.Conv2d(6, 6, 3, 2, 1, groups=6)), nn.ReLU()],
    "depthwise, 5 by 5": lambda: [Dense(nn.Conv2d(6, 6, 5, padding=2, groups=6)), nn.ReLU()],
    "depthwise, 5 by 5, strided": lambda: [Dense(nn.Conv2d(6, 6, 5, 2, 2, groups=6, bias=False))],
    "depthwise, 7 by 7": lambda: [Dense(nn.Conv2d(6, 6, 7, padding=3, groups=6))],
    "depthwise, 7 by 7, strided": lambda: [Dense(nn.Conv2d(6, 6, 7, 2, 3, groups=6))],
    "depthwise, twice the channels": lambda: [
        Dense(nn.Conv2d(6, 12, 3, padding="same", dilation=2, groups=6)),
        nn.ReLU(),
        Dense(nn.Conv2d(12, 24, (2, 4), padding="same", groups=12)),
    ],
    "depthwise around an addition": lambda: [Sum(Dense(nn.Conv2d(6, 6, 3, padding=1, groups=6))), nn.ReLU()],
    "dense linear": lambda: [nn.Flatten(), Dense(nn.Linear(6 * 7 * 6, 9)), nn.ReLU()],
    "linear": lambda: [nn.Flatten(), nn.Linear(6 * 7 * 6, 9)],
    "batch norm": lambda: [nn.BatchNorm2d(6)],
    "batch norm on its own": lambda: [nn.ReLU(), nn.BatchNorm2d(6)],
    "group norm": lambda: [with_numbers(nn.GroupNorm(3, 6)), nn.ReLU(), nn.Conv2d(6, 4, 1)],
    "group norm, of all, read twice": lambda: [nn.ReLU(), Sum(with_numbers(nn.GroupNorm(1, 6)))],
    "instance norm": lambda: [nn.ReLU(), nn.InstanceNorm2d(6), nn.Conv2d(6, 4, 3, padding=1)],
    "layer norm of a vector": lambda: [nn.AdaptiveAvgPool2d(1), nn.Flatten(), with_numbers(nn.LayerNorm(6))],
    "layer norm of a map": lambda: [nn.ReLU(), nn.LayerNorm([6, 7, 6], elementwise_affine=False)],
    "layer norm of pixels": lambda: [nn.ReLU(), ChannelsLast(), nn.Conv2d(6, 4, 3, padding=1)],
    "scale": lambda: [nn.ReLU(), Scaled(6, 1, 1), nn.Conv2d(6, 4, 1)],
    "scale behind a convolution": lambda: [nn.Conv2d(6, 5, 1), Scaled(1, 5, 1, 1), nn.ReLU()],
    "scale of a vector": lambda: [nn.Flatten(), nn.Linear(252, 7), nn.ReLU(), Scaled(7), nn.ReLU()],
    "ReLU": lambda: [nn.ReLU()],
    "LeakyReLU read twice": lambda: [Sum(nn.LeakyReLU(0.3)), nn.Conv2d(6, 4, 1)],
    "SiLU read twice": lambda: [Sum(nn.SiLU()), nn.Conv2d(6, 4, 1)],
    "addition": lambda: [Sum(nn.Conv2d(6, 6, 3, padding=1)), nn.ReLU()],
    "product": lambda: [Gate(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU())],
    "product with itself": lambda: [nn.ReLU(), Function(lambda x: x * x), nn.Conv2d(6, 4, 1)],
    "gate": lambda: [
        nn.ReLU(),
        Gate(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 3, 1), nn.ReLU(), nn.Conv2d(3, 6, 1)),
        nn.Conv2d(6, 4, 3, padding=1),
    ],
    "gate by a vector": lambda: [
        Gate(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 6), nn.Unflatten(1, (6, 1, 1))),
    ],
    "constants": lambda: [nn.ReLU(), Function(lambda x: 1 - (2 * x + 3) / 4 - x), nn.Conv2d(6, 4, 1)],
    "concatenation": lambda: [Joined()],
    "concatenation of vectors": lambda: [
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        Function(lambda x: torch.cat([x, x[:, ::2]], 1)),
    ],
    "channel shuffle": lambda: [Function(shuffled), nn.Conv2d(6, 4, 1)],
    "channels of zeros": lambda: [
        nn.ReLU(),
        Function(lambda x: nn.functional.pad(x[:, 1:4], (0, 0, 0, 0, 1, 2))),
        nn.Conv2d(6, 4, 1),
    ],
    "max pooling": lambda: [nn.MaxPool2d(2)],
    "max pooling, overlapping": lambda: [nn.ReLU(), nn.MaxPool2d(3, stride=1, padding=1)],
    "max pooling, any window": lambda: [
        nn.MaxPool2d((3, 2), stride=(2, 1), padding=(1, 0), ceil_mode=True),
        nn.Conv2d(6, 4, 1),
    ],
    "average pooling": lambda: [nn.AvgPool2d(3, stride=2)],
    "average pooling, any window": lambda: [
        nn.ReLU(),
        nn.AvgPool2d((3, 2), stride=(3, 2), padding=(1, 1), ceil_mode=True),
        nn.Conv2d(6, 4, 1),
    ],
    "average pooling, pads left out": lambda: [nn.AvgPool2d(3, 2, 1, count_include_pad=False)],
    "average pooling, windows that differ": lambda: [nn.AdaptiveAvgPool2d((3, 4))],
    "global pooling": lambda: [Function(lambda x: x.mean((2, 3)))],
    "padding": lambda: [nn.ReLU(), nn.ConstantPad2d((1, 0, 2, 3), 0.5), nn.Conv2d(6, 4, 3)],
    "zeros before a convolution": lambda: [
        nn.ReLU(),
        nn.ZeroPad2d((0, 1, 0, 1)),
        nn.Conv2d(6, 4, 3, stride=2),
    ],
    "cropping": lambda: [nn.ReLU(), nn.ZeroPad2d((-1, 2, -2, -1)), nn.Conv2d(6, 4, 1)],
    "upsampling": lambda: [
        nn.ReLU(),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(6, 4, 1),
        nn.AdaptiveAvgPool2d(3),
    ],
    "upsampling, bilinear": lambda: [
        nn.ReLU(),
        nn.Upsample(scale_factor=(2, 3), mode="bilinear"),
        nn.Conv2d(6, 4, 1),
        nn.AvgPool2d(3),
    ],
    "upsampling, odd sizes": lambda: [
        nn.Upsample((9, 5)),
        nn.Upsample(scale_factor=1.7, mode="bilinear"),
        nn.Upsample((5, 8), mode="bilinear", align_corners=True),
    ],
    "rows and columns": lambda: [Function(lambda x: x[:, :, 1::2, :-1]), nn.Conv2d(6, 4, 1)],
}

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "ReLU6": nn.ReLU6,
    "LeakyReLU": lambda: nn.LeakyReLU(0.1),
    "LeakyReLU, falling": lambda: nn.LeakyReLU(-0.3),
    "Hardsigmoid": nn.Hardsigmoid,
    "Hardswish": nn.Hardswish,
    "Sigmoid": nn.Sigmoid,
    "Tanh": nn.Tanh,
    "SiLU": nn.SiLU,
    "GELU": nn.GELU,
    "GELU, tanh": lambda: nn.GELU(approximate="tanh"),
}


def everywhere(make: Callable[[], nn.Module]) -> list[nn.Module]:
    """An activation after a convolution, a sum, a batch norm and a pooling, and before a max pooling."""
    added = [Sum(nn.Conv2d(6, 6, 3, padding=1)), make()]
    pooled = [wide(), make(), nn.MaxPool2d(2), nn.AvgPool2d(2, stride=1), make()]
    return [make(), *added, *pooled, nn.Conv2d(6, 4, (1, 2))]


def rows_of(name: str, make: Callable[[], nn.Module]) -> dict[str, Callable[[], list[nn.Module]]]:
    """An activation in each place."""
    return {
        f"{name} after a convolution": lambda: [make(), nn.Conv2d(6, 5, 3, padding=1)],
        f"{name} after a depthwise convolution": lambda: [
            Dense(nn.Conv2d(6, 6, 3, padding=1, groups=6)),
            make(),
            nn.Conv2d(6, 4, 1),
        ],
        f"{name} on its own": lambda: [nn.MaxPool2d(3, stride=2), make()],
        f"{name} after a batch norm": lambda: [wide(), make(), nn.Conv2d(6, 4, 1)],
        f"{name} after a group norm": lambda: [with_numbers(nn.GroupNorm(3, 6)), make(), nn.Conv2d(6, 4, 1)],
        f"{name} after a pre-activation": lambda: [nn.ReLU(), wide(), make()],
        f"{name} after a sum": lambda: [Sum(nn.Conv2d(6, 6, 3, padding=1)), make(), nn.Conv2d(6, 4, 1)],
        f"{name} after a sum of pools": lambda: [Sum(nn.AvgPool2d(1)), make(), nn.Conv2d(6, 4, 3)],
        f"{name} before a max pooling": lambda: [wide(), make(), nn.MaxPool2d(2)],
    }


ROWS |= {f"{name} everywhere": lambda make=make: everywhere(make) for name, make in ACTIVATIONS.items()}
for kind in ("ReLU6", "Tanh", "SiLU"):  # bits, the output, and what it is applied to, tell their derivatives
    ROWS |= rows_of(kind, ACTIVATIONS[kind])


class Around(nn.Module):
    """A convolution, the modules of a row, and a linear layer."""

    def __init__(self, middle: list[nn.Module]) -> None:
        super().__init__()
        self.first = nn.Conv2d(IMAGE[0], CHANNELS, 3, padding=1)
        self.middle = nn.Sequential(*middle)
        size = self.middle(torch.zeros(2, CHANNELS, *MAP)).flatten(1).shape[1]
        self.last = nn.Linear(size, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.last(torch.flatten(self.middle(self.first(x)), 1))
        return logits


def made(row: str, folder: Path, **options: Any) -> tuple[edge_bcs.SparseModel, Artifact]:
    torch.manual_seed(1)
    sparse = sparse_of(Around(ROWS[row]()), density=0.6)
    return sparse, edge_bcs.export(
        sparse,
        folder,
        input_shape=IMAGE,
        publish=edge_bcs.Publishing(plain_eval=True),
        validate=False,
        batch_size=8,
        **options,
    )


@pytest.mark.parametrize(
    (
        "statistics",
        "micro_batch",
    ),  # part of a vector of images, and whole ones; the other two of the four are slow
    [
        ("frozen", 3),
        ("batch", 16),
        pytest.param("batch", 3, marks=pytest.mark.slow),
        pytest.param("frozen", 16, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("row", ROWS)
def test_logits_loss_and_gradients_are_torchs(
    row: str, statistics: str, micro_batch: int, tmp_path: Path
) -> None:
    options = {
        "batch_norm": statistics,
        "memory": edge_bcs.Memory(micro_batch=micro_batch),
        "objective": "trades",
    }
    sparse, artifact = made(row, tmp_path / "artifact", **options)
    assert validate(artifact, sparse).largest < 1e-5


@pytest.mark.parametrize("row", ROWS)
def test_the_attack_follows_the_sign_of_torchs_gradient(row: str, tmp_path: Path) -> None:
    sparse, artifact = made(row, tmp_path / "artifact", memory=edge_bcs.Memory(micro_batch=4))
    random = np.random.default_rng(2)
    x = random.uniform(0.2, 0.8, (4, *IMAGE)).astype(np.float32)
    labels = np.arange(4) % 3
    state, _ = read_state(artifact)
    lists = np.zeros(artifact.lists_length, np.int32)
    run(str(artifact.graph("lists")), {"coo.index": state["coo.index"], "coo.lists": lists})
    buffers = ("coo.value", "dense.value", "batchnorm.mean", "batchnorm.variance")
    feeds = {
        "adversarial": x.copy(),
        "input": x,
        "target": np.eye(3, dtype=np.float32)[labels],
        "step_size": np.float32([0.01]),
        "epsilon": np.float32([0.1]),
        "coo.lists": lists,
        **{name: state[name] for name in buffers},
    }
    run(str(artifact.graph("attack")), feeds)

    image = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    loss = nn.functional.cross_entropy(double(sparse, False)(image), torch.tensor(labels), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, image)
    sure = np.abs(gradient.numpy()) > 1e-6 * np.abs(gradient.numpy()).max()
    assert sure.mean() > 0.5
    step = (feeds["adversarial"] - x) / 0.01
    assert np.allclose(step[sure], np.sign(gradient.numpy())[sure], atol=1e-4)


@pytest.mark.parametrize("row", ROWS)
def test_the_peak_is_the_one_that_was_predicted(row: str, tmp_path: Path) -> None:
    made(
        row,
        tmp_path / "artifact",
        objective="at",
        memory=edge_bcs.Memory(micro_batch=3),
        attack=edge_bcs.Attack(steps=1),
    )
    with Trainer(tmp_path / "artifact") as trainer:
        random = np.random.default_rng(3)
        trainer.step(random.random((8, *IMAGE), np.float32), random.integers(0, 3, 8))
        assert trainer.memory()["peak_bytes"] == trainer.artifact.predicted_peak_bytes


def test_every_operator_is_in_a_row_or_in_a_test_of_its_own() -> None:
    """A test of its own gives the operator's name to `helpers.operators.run`."""
    missing = OPERATORS.keys() - {"RewireStep"}  # method/test_rewiring.py
    for file in (TESTS / "native").glob("test_*.py"):
        constants = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant))
        missing -= {node.value for node in constants if isinstance(node.value, str)}

    def likeness(row: str) -> float:
        return max(SequenceMatcher(None, row.lower(), name.lower()).ratio() for name in missing)

    rows = set(ROWS)
    while missing and rows:
        row = max(sorted(rows), key=likeness)  # most are found in the first rows that are called like them
        rows.remove(row)
        network = network_of(sparse_of(Around(ROWS[row]()), density=0.6), IMAGE)
        graphs = compile_network(network, Job(objective_named("at")), 4).graphs
        missing -= {node.op_type for graph in graphs.values() for node in graph.to_onnx().graph.node}
    assert missing == set()
