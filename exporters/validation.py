"""Self-validation: what the artifact computes in ONNX Runtime against torch's float64 autograd.

How near float32 can come depends on the network: batch statistics over few numbers (two images on a 1×1
map) make every normalised value ±1 and the gradient a difference of nearly equal numbers. So the allowed
difference is measured, not guessed: where the artifact differs by more than rounding usually does, torch's
own float32 on the same images, network and statistics is compared with float64 too, and the artifact may
differ by a few times as much.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.sessions import session_options
from edge_bcs.runtime.state import read_state
from torch import Tensor, nn

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.method import losses
from edge_bcs.method.attacks import evaluation_mode
from edge_bcs.method.sparse_model import SparseModel

from .plain_eval import PLAIN_EVAL

TOLERANCE = 1e-4
"""Relative difference that is always allowed."""
FLOAT32_FACTOR = 5.0
"""How many times the difference of torch's own float32 is allowed beyond that: sums in another order."""
MEANINGLESS = 0.05
"""Difference of torch's own float32 from which images say nothing."""
NARROW_TOLERANCE = {"frozen": 0.03, "batch": 0.3}
"""Of gradients where activations are kept as bfloat16; a batch norm amplifies the rounding."""
_SAMPLES = {"frozen": 2, "batch": 4}
"""Images that count, spread over the micro-batch; the others have weight 0. Torch in float64 is most of the
time that an export takes, and with running statistics an image's result does not depend on the others."""
_DRAWS = 3

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Differences:
    """Relative differences from torch in float64: ‖a − b‖ / ‖b‖ of each quantity.

    Attributes:
        float32: the same of torch in float32, what rounding alone does here; None where it was not asked for.
    """

    logits: float
    loss: float
    coo_gradient: float
    dense_gradient: float
    float32: Differences | None = None

    @property
    def largest(self) -> float:
        """The largest of the four."""
        return max(self.logits, self.loss, self.coo_gradient, self.dense_gradient)

    def summary(self) -> str:
        """One line for the user."""
        rounding = f" (torch's own float32: {self.float32.largest:.1e})" if self.float32 else ""
        return (
            f"validated against torch float64: relative difference of logits {self.logits:.1e}, "
            f"loss {self.loss:.1e}, "
            f"gradient of connections {self.coo_gradient:.1e}, of other parameters "
            f"{self.dense_gradient:.1e}{rounding}"
        )


def validate(artifact: Artifact, sparse: SparseModel, tolerance: float = TOLERANCE) -> Differences:
    """Compare logits, loss and the full training gradient on random images.

    An activation within rounding of zero may be rectified differently in float32 and float64, which changes
    the gradient visibly; so several draws of images are tried, and one that agrees is enough.

    Raises:
        EdgeBcsError: no draw agrees within ``tolerance``, or within what float32 can do; or none says
            anything because torch's own float32 is far from float64.
    """
    differences = None
    for draw in range(_DRAWS):
        found = compare(artifact, sparse, draw, tolerance)
        if _agrees(artifact, found, tolerance):
            return found
        if differences is None or not _telling(differences):
            differences = found
    assert differences is not None and differences.float32 is not None
    if not _telling(differences):
        raise EdgeBcsError(
            "the artifact cannot be validated: batch statistics of so few numbers make the gradient rounding "
            f"(torch's own float32 differs from float64 by {differences.float32.largest:.1e}); take a larger "
            "micro-batch, --batch-norm frozen, or --no-validate"
        )
    raise EdgeBcsError(
        f"the artifact does not agree with torch: relative differences of logits {differences.logits:.1e}, "
        f"loss {differences.loss:.1e}, gradients {differences.coo_gradient:.1e} and "
        f"{differences.dense_gradient:.1e} "
        f"(allowed {tolerance:.0e}, or {FLOAT32_FACTOR:.0f} times {differences.float32.largest:.1e}, which "
        "is torch's own in float32); this is a defect of edge-bcs, please report it"
    )


def _telling(differences: Differences) -> bool:
    return differences.float32 is None or differences.float32.largest < MEANINGLESS


def _agrees(artifact: Artifact, differences: Differences, tolerance: float) -> bool:
    rounding = differences.float32
    if rounding is None:
        return differences.largest <= tolerance
    if not _telling(differences):
        return False
    logits = max(tolerance, FLOAT32_FACTOR * rounding.logits)
    loss = max(tolerance, FLOAT32_FACTOR * rounding.loss)
    gradients = max(tolerance, FLOAT32_FACTOR * max(rounding.coo_gradient, rounding.dense_gradient))
    if artifact.manifest["memory"].get("choice", {}).get("narrowed"):
        gradients = max(gradients, NARROW_TOLERANCE[artifact.batch_norm])
    return (
        differences.logits <= logits
        and differences.loss <= loss
        and max(differences.coo_gradient, differences.dense_gradient) <= gradients
    )


def run(path: str, tensors: dict[str, Array], threads: int = 0) -> dict[str, Array]:
    """Run one graph file; inputs that the graph updates in place are changed in ``tensors``."""
    session = onnxruntime.InferenceSession(path, session_options(threads), providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in tensors.items()}
    for item in session.get_inputs():
        binding.bind_ortvalue_input(item.name, values[item.name])
    outputs = {}
    for item in session.get_outputs():
        chained = item.name.removesuffix(".out")
        if chained in tensors:
            outputs[item.name] = tensors[chained]
        else:
            dtype = {"tensor(bool)": np.bool_, "tensor(float)": np.float32}[item.type]
            outputs[item.name] = np.zeros(item.shape, dtype)
            chained, values[item.name] = (
                item.name,
                onnxruntime.OrtValue.ortvalue_from_numpy(outputs[item.name]),
            )
        binding.bind_ortvalue_output(item.name, values[chained])
    session.run_with_iobinding(binding)
    return outputs


def _run_plain(path: Path, images: Array) -> Array:
    """Logits of the evaluation model in ONNX's own operators, without the operator library."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    logits: Array = session.run(["logits"], {"input": images})[0]
    return logits


def compare(artifact: Artifact, sparse: SparseModel, draw: int, tolerance: float) -> Differences:
    """The differences on one draw of images; those of torch's float32 beside them if one is above
    ``tolerance``."""
    n = artifact.micro_batch
    counted = np.unique(np.linspace(0, n - 1, _SAMPLES[artifact.batch_norm]).astype(int))
    random = np.random.default_rng(draw)
    clean = random.random((n, *artifact.input_shape), dtype=np.float32)
    moved = clean + random.uniform(-1, 1, clean.shape).astype(np.float32) * np.float32(
        artifact.objective.attack.epsilon
    )
    labels = random.integers(0, artifact.num_classes, n)
    weight = np.zeros(n, np.float32)
    weight[counted] = 1 / len(counted)

    state, _ = read_state(artifact)
    names = ("coo.value", "dense.value", "batchnorm.mean", "batchnorm.variance")
    buffers = {name: state[name] for name in names}
    lists = np.zeros(artifact.lists_length, np.int32)
    run(str(artifact.graph("lists")), {"coo.index": state["coo.index"], "coo.lists": lists})
    held = np.zeros((artifact.attack_micro_batch, *artifact.input_shape), np.float32)
    held[:n] = clean
    logits = run(str(artifact.graph("eval")), {"input": held, **buffers, "coo.lists": lists})["logits"][:n]
    plain = artifact.path / PLAIN_EVAL
    plain_logits = _run_plain(plain, clean) if plain.is_file() else logits
    feeds = {
        "input": clean,
        "adversarial": np.clip(moved, 0, 1),
        "labels": labels,
        "sample_weight": weight,
        **buffers,
        "coo.lists": lists,
        # Anything but zero: the reset must clear it.
        "coo.value_grad.accumulation.buffer": np.ones(artifact.trained.kappa, np.float32),
        "dense.value_grad.accumulation.buffer": np.ones(artifact.trained.dense_size, np.float32),
        "lazy_reset_grad": np.ones(1, np.bool_),
    }
    loss = run(str(artifact.graph("training")), feeds)["loss"]
    images = [feeds[name][counted] for name in ("input", "adversarial")]
    exact = _torch(artifact, sparse, images, labels[counted], torch.float64)
    if sparse.ending:  # torch's are then logits up to a number for each image
        logits, plain_logits, exact["logits"] = map(_centred, (logits, plain_logits, exact["logits"]))
    found = {
        "logits": logits[counted],
        "loss": loss,
        "coo": feeds["coo.value_grad.accumulation.buffer"],
        "dense": feeds["dense.value_grad.accumulation.buffer"],
    }
    differences = _differences(found, exact)
    plain_difference = _relative(plain_logits[counted], exact["logits"])
    differences = replace(differences, logits=max(differences.logits, plain_difference))
    if differences.largest <= tolerance:
        return differences
    rounded = _torch(artifact, sparse, images, labels[counted], torch.float32)
    if sparse.ending:
        rounded["logits"] = _centred(rounded["logits"])
    return replace(differences, float32=_differences(rounded, exact))


def _differences(found: dict[str, Array], exact: dict[str, Array]) -> Differences:
    logits, loss, coo, dense = (
        _relative(found[name], exact[name]) for name in ("logits", "loss", "coo", "dense")
    )
    return Differences(logits, loss, coo, dense)


def _torch(
    artifact: Artifact, sparse: SparseModel, images: list[Array], labels: Array, dtype: torch.dtype
) -> dict[str, Array]:
    """Logits, mean loss and gradients of a copy of the network with numbers of type ``dtype``."""
    network = copy.deepcopy(sparse.network).to(dtype).requires_grad_(True)
    clean, adversarial = (torch.tensor(array, dtype=dtype) for array in images)
    batch_statistics = artifact.batch_norm == "batch"
    if batch_statistics:
        with torch.no_grad(), evaluation_mode(network):
            logits = network(clean)
    rule = artifact.objective
    with evaluation_mode(network, but=_moving(artifact, sparse, network)):
        logits_clean = network(clean)
        logits_adversarial = network(adversarial) if rule.two_branches else None
        targets = torch.tensor(labels)
        per_sample = losses.per_sample(rule.kind, targets, logits_clean, logits_adversarial, rule.beta)
        loss = per_sample.mean()
        loss.backward()  # type: ignore[no-untyped-call]
    if not batch_statistics:
        logits = logits_clean.detach()
    index = sparse.index.cpu()
    offsets = [*(layer.offset for layer in sparse.layers), sparse.size]
    bounds = torch.searchsorted(index, torch.tensor(offsets))
    kernels = [  # of the connections alone: all positions of a large network are hundreds of megabytes
        _gradient(network.get_submodule(layer.name).weight)[index[first:last] - layer.offset]
        for layer, first, last in zip(sparse.layers, bounds[:-1], bounds[1:], strict=True)
    ]
    others = [_gradient(network.get_parameter(item.name)) for item in artifact.trained.dense]
    learn = torch.from_numpy(artifact.trained.connections(index.numpy()))
    return {
        "logits": logits.numpy(),
        "loss": loss.detach().numpy(),
        "coo": torch.cat(kernels)[learn].numpy(),
        "dense": torch.cat(others).numpy() if others else np.zeros(0),
    }


def _moving(artifact: Artifact, sparse: SparseModel, network: nn.Module) -> list[nn.Module]:
    """The batch norms of ``network`` that take the statistics of their batch: of those, what is trained."""
    if artifact.batch_norm != "batch":
        return []
    trained = {parameter.name for parameter in artifact.trained.dense}
    return [
        network.get_submodule(norm.name)
        for norm in sparse.statistics
        if artifact.trained.part.everything
        or not trained.isdisjoint((f"{norm.name}.weight", f"{norm.name}.bias"))
    ]


def _centred(logits: Array) -> Array:
    centred: Array = logits - logits.mean(axis=1, keepdims=True)
    return centred


def _gradient(parameter: Any) -> Tensor:
    """The flat gradient; zero where the parameter does not reach the loss."""
    gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
    return gradient.reshape(-1)


def _relative(actual: Array, expected: Array) -> float:
    if not expected.size:
        return 0.0
    norm = float(np.linalg.norm(expected))
    return float(np.linalg.norm(actual.astype(np.float64) - expected)) / (norm or 1.0)
