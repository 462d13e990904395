"""Pixel normalisation inside the network: in torch, in the artifact, in plain ONNX, and stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from edge_bcs.exporters.network import network_of
from edge_bcs.exporters.validation import run as run_graph
from edge_bcs.runtime.manifest import graph_file
from edge_bcs.runtime.trainer import Trainer
from helpers.commands import run
from helpers.networks import state_feeds
from torch import nn

import edge_bcs
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.normalization import Normalization

IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 15, 4),
    )


@pytest.fixture
def sparse() -> edge_bcs.SparseModel:
    found = edge_bcs.sparsify(network(), 0.5, 1)
    found.normalize = IMAGENET
    return found.eval()


def by_hand(sparse: edge_bcs.SparseModel, x: torch.Tensor) -> torch.Tensor:
    """What torchvision's transform makes of the pixels, then the layers one after the other."""
    mean, std = torch.tensor(IMAGENET.mean), torch.tensor(IMAGENET.std)
    x = x.sub(mean[:, None, None]).div(std[:, None, None])
    assert isinstance(sparse.network, nn.Sequential)
    for layer in sparse.network:
        x = layer(x)
    return x


def test_torch_normalises_before_the_first_layer_and_zero_pads_after(sparse: edge_bcs.SparseModel) -> None:
    x = torch.rand(3, 3, 10, 6)
    with torch.no_grad():
        assert torch.equal(sparse(x), by_hand(sparse, x))
        double = edge_bcs.sparsify(network(), 0.5, 1)
        double.normalize = Normalization((0.5,), (0.25,))
        assert torch.allclose(double(x), double.network(x * 1), atol=0)
        double.normalize = None
        assert torch.allclose(double(4 * x - 2), double((x - 0.5) / 0.25))
    assert set(dict(sparse.network.named_parameters())) == set(dict(network().named_parameters()))


def test_the_artifact_is_torchs_network(sparse: edge_bcs.SparseModel, tmp_path: Path) -> None:
    edge_bcs.export(
        sparse,
        tmp_path / "a",
        input_shape=(3, 10, 6),
        memory=edge_bcs.Memory(micro_batch=5),
        publish=edge_bcs.Publishing(plain_eval=True),
    )
    x = np.random.default_rng(0).random((7, 3, 10, 6), np.float32)
    with torch.no_grad():
        expected = by_hand(sparse, torch.from_numpy(x)).numpy()
    with Trainer(tmp_path / "a") as trainer:
        assert np.abs(trainer.logits(x) - expected).max() < 1e-5 * np.abs(expected).max()
    plain = onnxruntime.InferenceSession(str(tmp_path / "a" / "eval_model.plain.onnx"))
    assert np.abs(plain.run(None, {"input": x})[0] - expected).max() < 1e-5 * np.abs(expected).max()


def test_a_step_of_the_attack_has_its_size_in_units_of_pixels(
    sparse: edge_bcs.SparseModel, tmp_path: Path
) -> None:
    edge_bcs.export(sparse, tmp_path / "a", input_shape=(3, 10, 6), memory=edge_bcs.Memory(micro_batch=4))
    images = np.random.default_rng(0).uniform(0.2, 0.8, (4, 3, 10, 6)).astype(np.float32)
    labels = torch.arange(4)
    feeds = {
        "adversarial": images.copy(),
        "input": images,
        "target": np.eye(4, dtype=np.float32),
        "step_size": np.array([0.01], np.float32),
        "epsilon": np.array([0.1], np.float32),
        **state_feeds(sparse, network_of(sparse, (3, 10, 6))),
    }
    run_graph(str(tmp_path / "a" / graph_file("attack")), feeds)
    x = torch.tensor(images, requires_grad=True)
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(by_hand(sparse, x), labels), x)
    sure = (gradient.abs() > 1e-4 * gradient.abs().max()).numpy()
    assert sure.mean() > 0.5
    step = (feeds["adversarial"] - images) / 0.01
    assert np.allclose(step[sure], gradient.sign().numpy()[sure], atol=1e-4)


def test_it_is_stored_and_found_again(sparse: edge_bcs.SparseModel, tmp_path: Path) -> None:
    from edge_bcs.checkpoint import save_checkpoint

    save_checkpoint(tmp_path / "c.safetensors", sparse)
    edge_bcs.export(sparse, tmp_path / "a", input_shape=(3, 10, 6))
    for place in ("c.safetensors", "a"):
        assert edge_bcs.load(tmp_path / place, network()).normalize == IMAGENET
    small = edge_bcs.sparsify(edge_bcs.models.resnet18(width=0.05, input_size=8), 0.5)
    small.normalize = Normalization((0.5,), (0.5,))
    save_checkpoint(tmp_path / "r.safetensors", small)
    found = edge_bcs.load(tmp_path / "r.safetensors")
    assert found.normalize == Normalization((0.5,), (0.5,))
    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(found(x), small.eval()(x))


@pytest.mark.parametrize(
    ("text", "mean", "std"),
    [
        ("imagenet", IMAGENET.mean, IMAGENET.std),
        ("0.5:0.5", (0.5,), (0.5,)),
        ("0.1,0.2,0.3:0.25", (0.1, 0.2, 0.3), (0.25,)),
    ],
)
def test_texts(text: str, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    found = Normalization.parse(text)
    assert (found.mean, found.std) == (mean, std)
    assert Normalization.of_record(found.record) == found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cifar", "is imagenet or MEAN:STD"),
        ("0.5", "is imagenet or MEAN:STD"),
        ("0.5:x", "is imagenet or MEAN:STD"),
        ("0.5:0", "standard deviations positive"),
        ("nan:1", "must be finite"),
        ("0.1,0.2:1,1,1", "2 means and 3 standard deviations"),
    ],
)
def test_what_is_no_normalisation_is_refused(text: str, said: str) -> None:
    with pytest.raises(EdgeBcsError, match=said):
        Normalization.parse(text)


def test_three_numbers_are_not_for_grey_images() -> None:
    sparse = edge_bcs.sparsify(nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten(), nn.Linear(4, 2)), 0.5)
    sparse.normalize = IMAGENET
    with pytest.raises(EdgeBcsError, match="for images of 3 channels, and these have 1"):
        edge_bcs.export(sparse, "never", input_shape=(1, 8, 8))


def test_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),\n"
        "                         nn.Linear(4, 10))\n"
    )
    common = ("--model", "net.py:make", "--input-size", "8x8", "--channels", 1, "--normalize", "0.3:0.35")
    short = ("--data", "digits", "--steps", 1)
    result = run("train", *common, *short, "--sparsity", 0.5, "--device", "cpu", "-o", "t")
    assert result.exit_code == 0, result.output
    assert edge_bcs.load("t/checkpoint.safetensors", network_of_file(tmp_path)).normalize == Normalization(
        (0.3,), (0.35,)
    )
    again = ("export", "--model", "net.py:make", "--checkpoint", "t", "-o", "a")
    refused = run(*again, "--normalize", "0.3:0.35")
    assert refused.exit_code != 0 and "--normalize belongs to a new network" in refused.output
    assert run(*again).exit_code == 0
    assert run("finetune", "a", *short, "-o", "b").exit_code == 0
    wrong = run("train", *common[:2], "--input-size", "8by8", "--data", "digits")
    assert wrong.exit_code != 0 and "neither a number of pixels, such as 96, nor HEIGHTxWIDTH" in wrong.output


def network_of_file(folder: Path) -> nn.Module:
    content: dict[str, object] = {}
    exec((folder / "net.py").read_text(), content)
    made = content["make"]
    assert callable(made)
    network = made()
    assert isinstance(network, nn.Module)
    return network
