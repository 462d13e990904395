"""Passes by a network's graphs are the network's, for whoever calls and differentiates a torch module."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from edge_bcs.exporters.passes import by_graphs  # noqa: E402
from edge_bcs.runtime import Trainer  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import edge_bcs  # noqa: E402
from edge_bcs import models  # noqa: E402
from edge_bcs.core.answers import Batch  # noqa: E402
from edge_bcs.core.errors import EdgeBcsError  # noqa: E402
from edge_bcs.core.normalization import Normalization  # noqa: E402
from edge_bcs.data import ArrayDataset  # noqa: E402
from edge_bcs.evaluation.measures import evaluate  # noqa: E402
from edge_bcs.method.sparse_model import SparseModel  # noqa: E402

SHAPE = (3, 16, 16)


def network(name: str, normalize: bool = False) -> SparseModel:
    """A network whose batch norms have the statistics of images."""
    torch.manual_seed(3)
    sparse = edge_bcs.sparsify(models.create(name, num_classes=7, width=0.25, input_size=16), 0.8, seed=1)
    if normalize:
        sparse.normalize = Normalization((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    for norm in (module for module in sparse.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.momentum = 1.0
    with torch.no_grad():
        sparse.train()(torch.rand(32, *SHAPE))
    return sparse.eval()


def exact(sparse: SparseModel, x: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and the gradient of the images for ``seed``, by torch in float64."""
    x = x.detach().double().requires_grad_()
    logits = copy.deepcopy(sparse).double()(x)
    return logits.detach(), torch.autograd.grad((logits * seed.double()).sum(), x)[0]


def distances(found: Tensor, expected: Tensor) -> Tensor:
    """Of each image."""
    difference = (found.double() - expected).flatten(1).norm(dim=1)
    return difference / expected.flatten(1).norm(dim=1)


@pytest.mark.parametrize(("name", "normalize"), [("resnet18", False), ("vgg16", True)])
@pytest.mark.parametrize("count", [1, 39])
def test_logits_and_gradients_are_those_of_float64(name: str, normalize: bool, count: int) -> None:
    """A rounding may shut a unit at its threshold, as in torch's own float32; so not of every image."""
    sparse = network(name, normalize)
    x, seed = torch.rand(count, *SHAPE, requires_grad=True), torch.randn(count, 7)
    expected = exact(sparse, x, seed)
    with by_graphs(sparse, SHAPE, threads=2):
        logits = sparse(x)
        assert type(logits.grad_fn).__name__ == "_LogitsBackward"
        gradient = torch.autograd.grad((logits * seed).sum(), x)[0]
    assert float(distances(logits.detach(), expected[0]).max()) < 1e-5
    assert float(distances(gradient, expected[1]).median()) < 1e-5
    assert int((distances(gradient, expected[1]) > 1e-4).sum()) <= count // 10


class Added(nn.Module):
    """The image is an addend, whose gradient lies in the halo of a convolution; a smooth activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.last = nn.Linear(4 * 10 * 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits f32 [n, 3]."""
        hidden: Tensor = nn.functional.gelu(x + self.first(x))
        logits: Tensor = self.last(self.second(hidden).flatten(1))
        return logits


def test_a_network_that_adds_the_image_and_is_not_square() -> None:
    torch.manual_seed(0)
    sparse = edge_bcs.sparsify(Added(), 0.5, seed=0, dense=[]).eval()
    x, seed = torch.rand(50, 3, 10, 6, requires_grad=True), torch.randn(50, 3)
    expected = exact(sparse, x, seed)
    with by_graphs(sparse, (3, 10, 6), threads=1):
        logits = sparse(x)
        gradients = [
            torch.autograd.grad((logits * seed).sum(), x, retain_graph=again)[0] for again in (True, False)
        ]
    assert float(distances(logits.detach(), expected[0]).max()) < 1e-5
    assert float(distances(gradients[0], expected[1]).max()) < 1e-5
    assert torch.equal(*gradients)


def test_a_trainers_budget_is_not_theirs(tmp_path: Path) -> None:
    sparse = network("resnet18")
    x = torch.rand(70, *SHAPE, requires_grad=True)
    artifact = edge_bcs.export(sparse, tmp_path / "a", input_shape=SHAPE, memory="5MiB", validate=False)
    with by_graphs(sparse, SHAPE, threads=1), Trainer(artifact, threads=1) as trainer:
        kept = sparse(x)
        torch.autograd.grad(kept.sum(), x)
        trainer.step(x.detach().numpy()[:16], np.arange(16) % 7)


def test_what_passes_cannot_do() -> None:
    sparse = network("resnet18")
    with by_graphs(sparse, SHAPE):
        for wrong in (torch.rand(32, 3, 16, 8), torch.rand(5, 1, 16, 16), torch.rand(32, *SHAPE).double()):
            with pytest.raises(EdgeBcsError, match=r"the network takes images f32 \[n, 3, 16, 16\], not "):
                sparse(wrong)
        x = torch.rand(2, *SHAPE, requires_grad=True)
        gradient = torch.autograd.grad(sparse(x).square().sum(), x, create_graph=True)[0]
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


def test_only_while_the_context_lasts_and_only_in_evaluation_mode() -> None:
    sparse = network("resnet18")
    x = torch.rand(4, *SHAPE)
    with pytest.raises(KeyError), by_graphs(sparse, SHAPE):
        assert sparse.passes is not None
        sparse.passes = lambda images: torch.full((len(images), 7), 5.0)
        assert bool((sparse(x) == 5).all())
        assert not bool((sparse.train()(x) == 5).any())
        raise KeyError
    assert sparse.passes is None and not bool((sparse.eval()(x) == 5).any())


def test_autoattack_finds_by_them_what_it_finds_in_torch() -> None:
    """Image by image; a fifth of the labels are wrong from the beginning."""
    pytest.importorskip("pyautoattack")
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    sparse = edge_bcs.sparsify(module, 0.5, seed=0).eval()
    sparse.classes = tuple("abcdefghij")
    x = torch.rand(30, 3, 8, 8)
    with torch.no_grad():
        module[3].bias -= sparse(x).mean(0)
        labels = sparse(x).argmax(1)
    labels[::5] = (labels[::5] + 1) % 10
    data = ArrayDataset(x.numpy(), labels.numpy(), sparse.classes)

    def measured() -> tuple[dict[str, object], list[bool]]:
        told: list[Batch] = []
        report = evaluate(sparse, data, attack="autoattack", epsilon=0.01, on_answers=told.append)
        (batch,) = told
        assert batch.robust is not None
        return {name: report[name] for name in ("clean_acc", "adv_acc", "warnings")}, batch.robust.tolist()

    in_torch = measured()
    with by_graphs(sparse, (3, 8, 8)):
        assert measured() == in_torch
    assert in_torch[0]["clean_acc"] == 0.8 and 0 < sum(in_torch[1]) < 24
