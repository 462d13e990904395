"""The gradients of a whole step beside torch's in float64, tensor by tensor, whatever the micro-batches.

`exporters.validation` asks every export the same of one micro-batch, all parameters together. Here nothing is
lumped: the loss, the gradient of each parameter, that of the image; over a batch of several
micro-batches, the last of which may have empty places.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from edge_bcs.method import losses
from edge_bcs.method.attacks import evaluation_mode

if TYPE_CHECKING:
    from edge_bcs.method.sparse_model import SparseModel
    from edge_bcs.runtime.artifact import Artifact
    from edge_bcs.runtime.sessions import SessionEngine

TOLERANCE = 1e-4
"""Of a tensor's norm, always allowed."""
FLOAT32_FACTOR = 5.0
"""How many times the difference of torch's own float32 is allowed beyond that."""
ROUNDING, MOVES = 1e-7, 8
"""Of each pixel, how far images are moved, and how often at most, to learn what rounding does."""
POOL = 6
"""Of how many times as many images those are chosen that are away from kinks."""
ZERO, AGAINST = 1e-10, 1e-3
"""Of the whole gradient's norm: a tensor's that is smaller is zero but for rounding, as that of a bias before
batch statistics; its difference is measured against so much of the whole instead."""

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Batch:
    """Images f32 [n, C, H, W] in [0, 1], the attacked ones beside them, and labels i64 [n]."""

    images: Array
    adversarial: Array
    labels: Array

    @classmethod
    def random(cls, artifact: Artifact, count: int, seed: int = 0) -> Batch:
        """Return ``count`` random images that fit an artifact, moved inside its ε if it trains on such."""
        return cls.moved(artifact, count, seed).fitting(artifact)

    @classmethod
    def moved(cls, artifact: Artifact, count: int, seed: int = 0) -> Batch:
        """Return ``count`` random images, all of them moved inside an artifact's ε."""
        generator = np.random.default_rng(seed)
        images = generator.random((count, *artifact.input_shape), dtype=np.float32)
        epsilon = artifact.objective.attack.epsilon
        moved = images + generator.uniform(-epsilon, epsilon, images.shape).astype(np.float32)
        labels = generator.integers(0, artifact.num_classes, count)
        return cls(images, np.clip(moved, 0, 1), labels)

    def fitting(self, artifact: Artifact) -> Batch:
        """The same images, unmoved if the artifact trains on unmoved ones alone."""
        return self if "adversarial" in _sides(artifact) else replace(self, adversarial=self.images)

    def part(self, first: int, end: int) -> Batch:
        """Those at the places [first, end)."""
        return Batch(self.images[first:end], self.adversarial[first:end], self.labels[first:end])

    def __len__(self) -> int:
        """How many images."""
        return len(self.labels)


class Pool:
    """`POOL` times as many random images as are wanted, of which an artifact gets those away from kinks.

    Where some activation of an image is within rounding of a kink, as of ReLU, it may fall to its other
    side, and the whole gradient of that image is another one, by some thousandths. So those images count
    whose own gradients, which the attack takes by running statistics, are nearest to torch's. An operator
    that is wrong is so for all of them.

    One pool serves all artifacts of a network whose images are of one size and ε: neither the objective nor
    the micro-batch reaches such a gradient.
    """

    def __init__(self, artifact: Artifact, sparse: SparseModel, count: int, seed: int) -> None:
        self.images = Batch.moved(artifact, POOL * count, seed)
        self._sparse = sparse
        self._distances: dict[str, Array] = {}

    def chosen(self, engine: SessionEngine, count: int) -> Batch:
        """Return the ``count`` images whose gradients are nearest to torch's."""
        distances = [self._distance(side, engine) for side in _sides(engine.artifact)]
        best = np.sort(np.argsort(np.max(distances, axis=0), kind="stable")[:count])
        pool = self.images
        return Batch(pool.images[best], pool.adversarial[best], pool.labels[best]).fitting(engine.artifact)

    def _distance(self, side: str, engine: SessionEngine) -> Array:
        """Relative, of each image; ``side`` is "images" or "adversarial"."""
        if side not in self._distances:
            pool = replace(self.images, adversarial=getattr(self.images, side))
            network = copy.deepcopy(self._sparse.network).double().requires_grad_(False).eval()
            exact = image_gradient(network, pool, torch.float64)
            away = attack_gradient(engine, pool) - exact
            norms = (np.linalg.norm(array.reshape(len(pool), -1), axis=1) for array in (away, exact))
            self._distances[side] = np.divide(*norms)
        return self._distances[side]


def _sides(artifact: Artifact) -> tuple[str, ...]:
    """Which images of a `Batch` an artifact trains on."""
    rule = artifact.objective
    if rule.two_branches:
        return "images", "adversarial"
    return ("images",) if rule.kind.training_input == "input" else ("adversarial",)


@dataclass(frozen=True)
class Found:
    """Loss, gradient of each parameter (of its connections alone, where it has some), and of the image."""

    loss: float
    parameters: dict[str, Array]
    image: Array

    def flat(self) -> dict[str, Array]:
        """Everything under one name each."""
        return {"loss": np.array([self.loss]), "image": self.image, **self.parameters}

    def same_bits(self, other: Found) -> bool:
        """Whether two runs agree in every bit."""
        mine, theirs = self.flat(), other.flat()
        return mine.keys() == theirs.keys() and all(
            mine[name].tobytes() == theirs[name].tobytes() for name in mine
        )


@dataclass(frozen=True)
class Difference:
    """‖a − b‖ / ‖b‖ of each tensor.

    Attributes:
        tensors: of what was found.
        float32: of torch's float32, where something differs by more than `TOLERANCE`.
        moved: the largest of float64 itself with the images moved by rounding, where something differs by
            more than float32 explains.
    """

    tensors: Mapping[str, float]
    float32: Mapping[str, float] = field(default_factory=dict)
    moved: Mapping[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> tuple[str, float]:
        """The tensor that differs most, and by how much."""
        name = max(self.tensors, key=lambda name: self.tensors[name])
        return name, self.tensors[name]

    @property
    def excess(self) -> dict[str, float]:
        """The tensors that differ by more than is allowed."""
        return {name: value for name, value in self.tensors.items() if not value <= self._allowed(name)}

    def _allowed(self, name: str) -> float:
        rounding = max(self.float32.get(name, 0.0), self.moved.get(name, 0.0))
        return max(TOLERANCE, FLOAT32_FACTOR * rounding)


def compare(artifact: Artifact, sparse: SparseModel, batch: Batch, found: Found) -> Difference:
    """Return how far ``found``, which the artifact computed of ``batch``, is from torch in float64.

    Torch's float32 is asked only where a tensor differs by more than `TOLERANCE`, and float64 of moved images
    only where one differs by more than float32 explains: a kink that one rounding crosses is one that another
    may not cross, and then both are right.
    """
    exact = by_torch(artifact, sparse, batch, torch.float64).flat()
    difference = Difference(_differences(found.flat(), exact))
    if not difference.excess:
        return difference
    rounded = by_torch(artifact, sparse, batch, torch.float32).flat()
    difference = replace(difference, float32=_differences(rounded, exact))
    for seed in range(MOVES):
        if not difference.excess:
            break
        moved = _differences(by_torch(artifact, sparse, _moved(batch, seed), torch.float64).flat(), exact)
        largest = {name: max(value, difference.moved.get(name, 0.0)) for name, value in moved.items()}
        difference = replace(difference, moved=largest)
    return difference


def _moved(batch: Batch, seed: int) -> Batch:
    """The same images in float64, each pixel moved by about so much of itself as float32 rounds it."""
    generator = np.random.default_rng(seed)
    sides = []
    for side in (batch.images, batch.adversarial):
        pixels = side.astype(np.float64)
        sides.append(pixels * (1 + ROUNDING * generator.standard_normal(pixels.shape)))
    return replace(batch, images=sides[0], adversarial=sides[1])


def _differences(found: Mapping[str, Array], exact: Mapping[str, Array]) -> dict[str, float]:
    norms = {name: float(np.linalg.norm(array)) for name, array in exact.items()}
    whole = float(np.linalg.norm([norms[name] for name in norms if name not in ("loss", "image")]))
    zeros = {name for name in norms if norms[name] < ZERO * whole} - {"loss", "image"}
    return {
        name: float(np.linalg.norm(found[name].astype(np.float64) - exact[name]))
        / (AGAINST * whole if name in zeros else norms[name] or 1.0)
        for name in norms
    }


# Torch


def by_torch(artifact: Artifact, sparse: SparseModel, batch: Batch, dtype: torch.dtype) -> Found:
    """The same of a copy of the network with numbers of type ``dtype``."""
    network = copy.deepcopy(sparse.network).to(dtype).requires_grad_(True).eval()
    image = image_gradient(network, batch, dtype)
    rule, total = artifact.objective, 0.0
    network.zero_grad(set_to_none=True)
    norms = [network.get_submodule(item.name) for item in sparse.statistics]
    with evaluation_mode(network, but=norms if artifact.batch_norm == "batch" else ()):
        for first in range(0, len(batch), artifact.micro_batch):
            part = batch.part(first, first + artifact.micro_batch)
            clean, adversarial = (torch.tensor(a, dtype=dtype) for a in (part.images, part.adversarial))
            one = network(clean if "images" in _sides(artifact) else adversarial)
            other = network(adversarial) if rule.two_branches else None
            per_sample = losses.per_sample(rule.kind, torch.tensor(part.labels), one, other, rule.beta)
            loss = per_sample.sum() / len(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
    parameters = {parameter.name: _gradient(network, parameter.name) for parameter in sparse.dense}
    return Found(total, _of_connections(sparse, lambda name: _gradient(network, name)) | parameters, image)


def image_gradient(network: nn.Module, batch: Batch, dtype: torch.dtype) -> Array:
    """That of the sum of the images' cross-entropies, by running statistics, as the attack computes it."""
    image = torch.tensor(batch.adversarial, dtype=dtype, requires_grad=True)
    loss = nn.functional.cross_entropy(network(image), torch.tensor(batch.labels), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, image)
    return gradient.numpy()


def _gradient(network: nn.Module, name: str) -> Array:
    parameter: Tensor = network.get_parameter(name)
    gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
    return gradient.reshape(-1).numpy()


def _of_connections(sparse: SparseModel, gradient: Callable[[str], Array]) -> dict[str, Array]:
    """The gradients at the connections of each sparse kernel, from those of all its weights."""
    from edge_bcs.method.sparse_model import weight_name

    found = {}
    index = sparse.index.cpu().numpy()
    for layer in sparse.layers:
        name = weight_name(layer)
        first, last = np.searchsorted(index, [layer.offset, layer.offset + layer.size])
        found[name] = gradient(name)[index[first:last] - layer.offset]
    return found


# The artifact


def by_artifact(artifact: Artifact, sparse: SparseModel, batch: Batch, threads: int) -> Found:
    """The same as the artifact computes it, in so many threads."""
    from edge_bcs.runtime.sessions import SessionEngine

    with closing(SessionEngine(artifact, None, threads)) as engine:
        return by_engine(engine, sparse, batch)


def by_engine(engine: SessionEngine, sparse: SparseModel, batch: Batch) -> Found:
    """The same, by an engine whose state is left as it was."""
    from edge_bcs.method.sparse_model import weight_name

    arrays, size, total = engine.arrays, engine.artifact.micro_batch, 0.0
    image = attack_gradient(engine, batch)
    running = {name: arrays[name].copy() for name in ("batchnorm.mean", "batchnorm.variance")}
    for first in range(0, len(batch), size):
        part = batch.part(first, first + size)
        engine.load(part.images, part.labels, 1 / len(batch))
        arrays["adversarial"][...] = arrays["input"]
        arrays["adversarial"][: len(part)] = part.adversarial
        arrays["lazy_reset_grad"][0] = first == 0
        engine.run("training")
        total += float(arrays["loss"])
    connections = arrays["coo.value_grad.accumulation.buffer"].copy()
    dense = arrays["dense.value_grad.accumulation.buffer"].copy()
    for name, values in running.items():
        arrays[name][...] = values
    index = sparse.index.cpu().numpy()
    parameters = {}
    for layer in sparse.layers:
        first, last = np.searchsorted(index, [layer.offset, layer.offset + layer.size])
        parameters[weight_name(layer)] = connections[first:last]
    for item in sparse.dense:
        parameters[item.name] = dense[item.offset : item.offset + item.size]
    return Found(total, parameters, image)


def attack_gradient(engine: SessionEngine, batch: Batch) -> Array:
    """The gradient of each image as the attack computes it, f32 [n, C, H, W].

    That is what the attack's step takes the sign of: the graph as it is, with that tensor as one more output.
    """
    import onnx
    import onnxruntime

    from edge_bcs.exporters.passes import unstacked
    from edge_bcs.runtime.sessions import session_options

    model = onnx.load_from_string(engine.artifact.read_graph("attack"))
    step = next(node for node in model.graph.node if node.op_type == "PgdStep")
    tensor = step.input[2]
    halo = next((item.i for item in step.attribute if item.name == "dx_halo"), 0)
    model.graph.output.append(onnx.helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), session_options(engine.threads), providers=["CPUExecutionProvider"]
    )
    arrays, size = engine.arrays, engine.artifact.micro_batch
    found = []
    for first in range(0, len(batch), size):
        part = batch.part(first, first + size)
        count = len(part)
        engine.load(part.images, part.labels, 1.0)
        arrays["adversarial"][...] = arrays["input"]
        arrays["adversarial"][:count] = part.adversarial
        arrays["target"][...] = 0
        arrays["target"][np.arange(count), part.labels] = 1
        arrays["epsilon"][0] = arrays["step_size"][0] = 0
        (stack,) = session.run([tensor], {item.name: arrays[item.name] for item in session.get_inputs()})
        images = unstacked(stack, engine.artifact.input_shape, halo)
        found.append(images[:count].copy())  # a view would keep memory of ONNX Runtime's, which is counted
    return np.concatenate(found)
