"""Small networks, batches and torch's answers for the tests of the compiler."""

# mypy: disable-error-code="arg-type"

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from edge_bcs.exporters.network import Network
from torch import nn

from edge_bcs import models
from edge_bcs.core.objectives import WEIGHTED
from edge_bcs.method.sparse_model import SparseModel
from helpers.reference_ends import mart_loss, trades_loss
from helpers.reference_layouts import Array, build_lists

NETWORKS = ("vgg16", "resnet18", "resnet34", "resnet50", "wrn28_2", "wrn28_4", "wrn28_10")


class EveryLayer(nn.Module):
    """What the compiler takes, in forms that the paper's networks do not use, on images [2, 13, 13]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 5, stride=2, padding=2)
        self.wide = nn.Conv2d(6, 6, (1, 3), padding=0)
        self.norm = nn.BatchNorm2d(6)
        self.same = nn.Conv2d(6, 6, 3, padding="same", bias=False)
        self.after = nn.BatchNorm2d(6)
        self.shrink = nn.Conv2d(6, 4, 2, stride=3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.hidden = nn.Linear(4 * 3 * 2, 7)
        self.vector_norm = nn.BatchNorm1d(7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.first(x))  # 6×7×7
        y = F.relu(self.norm(x))
        x = x + self.after(self.same(y))
        x = F.max_pool2d(torch.relu(x), kernel_size=3, stride=1, padding=1)
        x = self.wide(x)  # 6×7×5
        x = F.avg_pool2d(x, 2, stride=1)  # 6×6×4
        x = self.shrink(x).relu()  # 4×3×2
        x = torch.add(x, x)
        x = F.max_pool2d(x, 2, 1, 1)  # 4×4×3
        x = F.max_pool2d(x, 2, 1)  # 4×3×2
        x = self.drop(x).view(x.size(0), -1)
        x = self.vector_norm(self.hidden(x)).relu()
        return self.head(x)


class EveryActivation(nn.Module):
    """All activations but ReLU, after convolutions, batch norms, sums and poolings; images 2×13×13."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.SiLU())
        self.left = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Hardswish())
        self.right = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))
        self.gate = nn.Sequential(nn.MaxPool2d(3, stride=2), nn.GELU(), nn.Conv2d(6, 6, 1), nn.Sigmoid())
        self.down = nn.Sequential(nn.Conv2d(6, 6, 3), nn.GELU(approximate="tanh"), nn.AvgPool2d(2), nn.Tanh())
        self.head = nn.Sequential(nn.Linear(6 * 2 * 2, 9), nn.LeakyReLU(0.2), nn.Linear(9, 7), nn.ReLU6())
        self.last = nn.Sequential(nn.Linear(7, 7), nn.Hardsigmoid(), nn.Linear(7, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = F.silu(self.right(self.left(x)) + x) + F.gelu(x + x)
        logits: torch.Tensor = self.last(self.head(torch.flatten(self.down(self.gate(x)), 1)))
        return logits


class Residual(nn.Module):
    """Joins of every kind: a sum of three branches, a tensor added to itself, a pooled and an unpooled
    reader.
    """

    def __init__(self, variant: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.left, self.right = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 9, 3)
        self.variant = variant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        if self.variant == 0:
            x = (self.left(x) + self.right(x) + x).relu()
        elif self.variant == 1:
            x = self.norm(x + x) + self.left(x)
        elif self.variant == 2:
            x = F.max_pool2d(x, 3, 1, 1) + F.relu(self.norm(x)) + self.right(x)
        elif self.variant == 3:
            x = F.relu(F.max_pool2d(x, 3, 1, 1)) + F.avg_pool2d(F.max_pool2d(x, 1), 1)
        elif self.variant == 4:
            x = F.relu(F.relu(self.left(x)) + F.relu(self.norm(self.right(x)) + x))
        else:
            y = self.left(x)
            x = F.relu(y) + y + self.norm(y)
        return self.head(torch.flatten(x, 1))


def pooled(outputs: int = 4) -> nn.Sequential:
    """A convolution, a batch norm and a linear layer on 2×2 means, for images [3, H, W] of any size."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, outputs),
    )


def tiny(
    name: str, width: float = 0.0625, size: int = 16, classes: int = 5, density: float = 0.5, seed: int = 3
) -> SparseModel:
    """A network of the registry at reduced width, with statistics, scales and shifts that are not the trivial
    ones.
    """
    torch.manual_seed(seed)
    return sparse_of(getattr(models, name)(num_classes=classes, width=width, input_size=size), density, seed)


class Dense(nn.Sequential):
    """Layers whose weights stay dense in `sparse_of`."""


def sparse_of(
    module: nn.Module, density: float = 0.5, seed: int = 3, dense_by_default: bool = False
) -> SparseModel:
    """``module`` with random connections, batch norms away from their initial values; the kernels inside a
    `Dense` stay dense, or those that do by default."""
    dense: list[str] | None = [
        f"{name}.{inner}"
        for name, child in module.named_modules()
        if isinstance(child, Dense)
        for inner, _ in child.named_children()
    ]
    if dense_by_default:
        dense = None
    import edge_bcs

    generator = torch.Generator().manual_seed(seed)
    for child in module.modules():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            child.weight.data = 0.5 + torch.rand(child.num_features, generator=generator)
            child.bias.data = 0.4 * torch.randn(child.num_features, generator=generator)
            child.running_mean = 0.3 * torch.randn(child.num_features, generator=generator)
            child.running_var = 0.5 + torch.rand(child.num_features, generator=generator)
        elif isinstance(child, nn.Conv2d | nn.Linear) and child.bias is not None:
            child.bias.data = 0.3 * torch.randn(child.bias.shape, generator=generator)
    return edge_bcs.sparsify(
        module, sparsity=1 - density, seed=seed, distribution="uniform", start="new", dense=dense
    )


def batch(network: Network, n: int, seed: int = 5) -> tuple[Array, Array]:
    """(images f32 [n, C, H, W] in [0, 1], labels i64 [n])."""
    random = np.random.default_rng(seed)
    images = random.random((n, *network.input_shape)).astype(np.float32)
    return images, random.integers(0, network.num_classes, n)


def state_feeds(sparse: SparseModel, network: Network) -> dict[str, Array]:
    """The bound buffers that every graph reads."""
    state = sparse.state()
    geometry = network.lists.attributes["layers"]
    lists = build_lists(state["coo.index"].astype(np.int64), geometry, network.lists_length)
    names = ("coo.value", "dense.value", "batchnorm.mean", "batchnorm.variance")
    return {**{name: state[name] for name in names}, "coo.lists": lists}


def training_feeds(
    sparse: SparseModel,
    network: Network,
    objective: str,
    images: Array,
    adversarial: Array,
    labels: Array,
    weight: Array,
) -> dict[str, Array]:
    """All inputs of a training graph; the gradient buffers start at random and are to be reset."""
    random = np.random.default_rng(7)
    branches = {"adversarial": adversarial} if objective in WEIGHTED else {}
    return {
        "input": images,
        **branches,
        "labels": labels,
        "sample_weight": weight,
        **state_feeds(sparse, network),
        "coo.value_grad.accumulation.buffer": random.uniform(1, 2, network.kappa).astype(np.float32),
        "dense.value_grad.accumulation.buffer": random.uniform(1, 2, network.dense_size).astype(np.float32),
        "lazy_reset_grad": np.array([True]),
    }


def double(sparse: SparseModel, batch_statistics: bool) -> nn.Module:
    """A float64 copy of the network that normalises as asked; dropout is the identity."""
    import copy

    network = copy.deepcopy(sparse.network).double().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.train(batch_statistics)
    return network


def loss_of(objective: str, beta: float) -> Callable[..., torch.Tensor]:
    """Per-sample loss of (network, images, adversarial images, labels)."""

    def loss(
        network: nn.Module, x: torch.Tensor, adversarial: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        if objective in ("trades", "rst"):
            return trades_loss(network(x), network(adversarial), labels, beta)
        if objective == "mart":
            return mart_loss(network(x), network(adversarial), labels, beta)
        return F.cross_entropy(network(x), labels, reduction="none")

    return loss


def torch_gradients(
    sparse: SparseModel,
    objective: str,
    x: Array,
    adversarial: Array,
    labels: Array,
    weight: Array,
    beta: float,
    batch_statistics: bool,
) -> dict[str, Array]:
    """Loss, gradients and running statistics that torch's autograd gives in float64."""
    network = double(sparse, batch_statistics)
    tensors = [torch.tensor(v, dtype=torch.float64) for v in (x, adversarial)]
    per_sample = loss_of(objective, beta)(network, *tensors, torch.tensor(labels))
    loss = (per_sample * torch.tensor(weight, dtype=torch.float64)).sum()
    loss.backward()
    coo = torch.cat([_gradient(network.get_submodule(layer.name).weight) for layer in sparse.layers])
    dense = [_gradient(network.get_parameter(item.name)) for item in sparse.dense]
    norms = [network.get_submodule(item.name) for item in sparse.statistics]
    return {
        "loss": loss.detach().numpy(),
        "coo": coo[sparse.index].numpy(),
        "dense": torch.cat(dense).numpy() if dense else np.zeros(0),
        "mean": torch.cat([norm.running_mean for norm in norms]).numpy() if norms else np.zeros(0),
        "variance": torch.cat([norm.running_var for norm in norms]).numpy() if norms else np.zeros(0),
    }


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    """Flat gradient; zero for a parameter that the network does not use."""
    return (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).reshape(-1)


def relative(actual: Array, expected: Array) -> float:
    """Largest difference, relative to the largest expected magnitude."""
    if expected.size == 0:
        return 0.0
    return float(np.abs(actual - expected).max() / max(float(np.abs(expected).max()), 1e-30))
