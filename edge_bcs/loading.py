"""`edge_bcs.load`: from a checkpoint, an artifact or a saved run of the board back to a torch module; and
`edge_bcs.pretrained`: from the zoo to one."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from edge_bcs import models, zoo
from edge_bcs.checkpoint import Checkpoint, read_checkpoint
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.normalization import Normalization
from edge_bcs.core.resizing import Resize
from edge_bcs.core.state import TYPES
from edge_bcs.data.classes import Names, check_names
from edge_bcs.data.dataset import MOST_CLASSES
from edge_bcs.exportable import look_at
from edge_bcs.method import heads
from edge_bcs.method.sparse_model import KERNELS, SparseModel, prunable_layers
from edge_bcs.method.wrappers import unwrapped
from edge_bcs.runtime.archive import is_artifact

_CHECKPOINT = "checkpoint.safetensors"


def load(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    trust_keys: Sequence[str | Path] = (),
    min_release: int | None = None,
) -> SparseModel:
    """Return the sparse network stored at `path`, in evaluation mode, ready to be called or attacked.

    Args:
        path: a checkpoint file of `edge_bcs.train`, the folder it wrote, an artifact folder or archive of
            `edge_bcs.export`, a run folder saved on the board, or a `checkpoint` that ONNX Runtime's training
            API saved.
        model: the module that the state belongs to, for networks that are not in `edge_bcs.models`; it is
            copied, not changed.
        trust_keys: Ed25519 public keys (PEM files); if there are any, `path` must be an artifact that one of
            them signed.
        min_release: with `trust_keys`, the least release that is taken.

    Raises:
        EdgeBcsError: nothing usable at `path`, a truncated or altered file, or a module that does not fit.
    """
    path = Path(path)
    if not path.exists():
        raise EdgeBcsError(f"there is no file or folder {path}")
    if is_artifact(path):
        return _from_artifact(path, model, trust_keys, min_release)
    check_unsigned(path, trust_keys, min_release)
    path, checkpoint = _checkpoint_at(path)
    try:
        record, layers, sparsity = checkpoint.network(), checkpoint.layers(), checkpoint.sparsity
    except (ValueError, KeyError):
        raise EdgeBcsError(f"{path} describes its network in a way that cannot be read") from None
    return _assemble(
        path,
        record,
        layers,
        model,
        checkpoint.tensors,
        seed=checkpoint.seed,
        step=checkpoint.step,
        sparsity=sparsity,
        distribution=checkpoint.metadata.get("distribution", "paper"),
        classes=_classes(path, checkpoint, record),
    )


def check_unsigned(path: str | Path, trust_keys: Sequence[str | Path], min_release: int | None) -> None:
    """Raise `EdgeBcsError` if a file that is no artifact is asked for a signature; arguments as of `load`."""
    if trust_keys or min_release is not None:
        from edge_bcs.runtime.signature import how_to_trust_none

        raise EdgeBcsError(
            f"{path} is not an artifact, and only artifacts carry a signature: {how_to_trust_none()}"
        )


def record_of(path: str | Path) -> dict[str, Any]:
    """Return what is said of the network at a ``path`` that `load` takes (see `SparseModel.record`).

    Raises:
        EdgeBcsError: nothing usable there.
    """
    path = Path(path)
    if is_artifact(path):
        from edge_bcs.runtime.artifact import Artifact

        return {**Artifact.read(path).manifest["network"]}
    path, checkpoint = _checkpoint_at(path)
    try:
        return checkpoint.network()
    except (ValueError, KeyError):
        raise EdgeBcsError(f"{path} describes its network in a way that cannot be read") from None


def rebuilds(record: dict[str, Any]) -> bool:
    """Whether a record names a network of `edge_bcs.models`, so that `load` needs no module."""
    return record.get("name") in models.FACTORIES and "factory" not in record


def pretrained(name: str) -> SparseModel:
    """Return a network of the zoo, in evaluation mode, ready to be called, attacked, trained or exported.

    `edge-bcs zoo` lists their names, with what was measured of each. Nothing is downloaded: they come with
    edge-bcs.

    Args:
        name: such as "resnet18-digits-16x16-99-at".

    Raises:
        EdgeBcsError: there is none of that name, or its file is not the one that was measured.
    """
    return load(zoo.file_of(zoo.card_of(name)))


def _classes(path: Path, checkpoint: Checkpoint, record: dict[str, Any]) -> Names | None:
    """Return the names that a checkpoint stores, one for each output as far as the network's record tells."""
    arguments = record.get("arguments")
    outputs = arguments.get("num_classes") if isinstance(arguments, dict) else None
    try:
        classes = checkpoint.classes
        if classes is not None and type(outputs) is int:
            check_names(classes, "its classes", outputs)
    except EdgeBcsError as error:
        raise EdgeBcsError(f"{path}: {error}") from None
    return classes


def _checkpoint_at(path: Path) -> tuple[Path, Checkpoint]:
    """Return the checkpoint in a file or a folder, and the file."""
    if path.is_dir():
        path = path / _CHECKPOINT
        if not path.is_file():
            raise EdgeBcsError(f"{path.parent} holds neither an artifact (manifest.json) nor {_CHECKPOINT}")
    checkpoint = _from_ort(path) or read_checkpoint(path)
    if "network" not in checkpoint.metadata:
        raise EdgeBcsError(f"{path} does not describe its network; load the folder that contains it")
    return path, checkpoint


def _from_ort(path: Path) -> Checkpoint | None:
    """Return the state in a `checkpoint` of ONNX Runtime's training API; None if the file is none."""
    from edge_bcs.runtime.ort.checkpoint import is_ort_checkpoint, read_state

    return Checkpoint(*read_state(path)) if is_ort_checkpoint(path) else None


def _from_artifact(
    path: Path, model: nn.Module | None, trust_keys: Sequence[str | Path], min_release: int | None
) -> SparseModel:
    # The runtime knows how its folders are verified and which of a run's saved states is intact.
    from edge_bcs.runtime.artifact import Artifact
    from edge_bcs.runtime.state import read_state

    artifact = Artifact.read(path, trust_keys, min_release)
    tensors, metadata = read_state(artifact)
    tensors = artifact.trained.whole(tensors)
    return _assemble(
        path,
        artifact.manifest["network"],
        [(layer.name, tuple(layer.shape)) for layer in artifact.layers],
        model,
        tensors,
        seed=int(metadata["seed"]),
        step=int(metadata["step"]),
        sparsity=str(artifact.manifest["sparsity"]),
        distribution=str(artifact.manifest.get("distribution", "paper")),
        classes=artifact.classes,
    )


def _assemble(
    path: Path,
    record: dict[str, Any],
    layers: list[tuple[str, tuple[int, ...]]],
    model: nn.Module | None,
    tensors: dict[str, NDArray[Any]],
    *,
    seed: int,
    step: int,
    sparsity: str,
    distribution: str,
    classes: Names | None,
) -> SparseModel:
    if model is not None:
        network = copy.deepcopy(model.network if isinstance(model, SparseModel) else unwrapped(model))
        head = _with_head(path, network, record)
    else:
        name, arguments = record.get("name"), record.get("arguments", {})
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise EdgeBcsError(f"{path} describes its network in a way that cannot be read")
        if not rebuilds(record):
            raise EdgeBcsError(
                f"{path} holds the network {name[:60]!r}{_made(record)}, which is not one of edge-bcs: name "
                "what makes it with --model FILE.py:FACTORY, or in Python give the module, load(path, module)"
            )
        try:
            network = models.outline(name, **arguments)
        except EdgeBcsError as error:
            raise EdgeBcsError(f"{path}: {error}") from None
    for name, kind in TYPES.items():
        tensor, wanted = tensors[name], np.dtype(kind)
        if tensor.ndim != 1 or tensor.dtype.kind != wanted.kind or tensor.itemsize < wanted.itemsize:
            raise EdgeBcsError(f"{path}: {name} is {tensor.dtype}{list(tensor.shape)}")
    dense = _dense_kernels(
        f"{path} belongs to another network{_made(record)}", network, layers, len(tensors["dense.value"])
    )
    # Only what belongs to these numbers takes memory.
    if model is None:
        network = models.create(record["name"], **record.get("arguments", {}))
    elif head is not None:
        head.to_empty(device=next(model.parameters()).device)
    sparse = SparseModel(
        network,
        tensors["coo.value"],
        tensors["coo.index"],
        seed=seed,
        sparsity=sparsity,
        distribution=distribution,
        dense=dense,
    )
    sparse.load_state(tensors)
    sparse.step, sparse.classes = step, classes
    if "resize" in record:
        sparse.resize = _resize(path, record["resize"])
    if "normalize" in record:
        sparse.normalize = _normalization(path, record["normalize"])
    if sparse.own:
        _describe(path, sparse, record)
        look_at(sparse)
    return sparse.eval()


def _with_head(path: Path, network: nn.Module, record: dict[str, Any]) -> nn.Module | None:
    """Give a module the outputs that its file says its last layer has; return that layer, whose weights have
    no memory yet, if it had others."""
    said = record.get("head")
    if said is None:
        return None
    layer, classes = (said.get(name) if isinstance(said, dict) else None for name in ("layer", "classes"))
    if not isinstance(layer, str) or type(classes) is not int or not 1 <= classes <= MOST_CLASSES:
        raise EdgeBcsError(f"{path} describes the last layer of its network in a way that cannot be read")
    module = dict(network.named_modules()).get(layer)
    if not isinstance(module, KERNELS):
        return None  # another network, as will be seen
    if module.weight.shape[0] == classes:
        heads.remember(network, layer)
        return None
    module.to("meta")
    heads.reshape(network, layer, classes)
    return module


def _made(record: dict[str, Any]) -> str:
    """What made a network of the user's own, as its file says, within a sentence."""
    factory = record.get("factory")
    return f" (made by {factory[:200]})" if isinstance(factory, str) else ""


def _resize(path: Path, text: Any) -> Resize:
    try:
        return Resize.parse(str(text))
    except EdgeBcsError as error:
        raise EdgeBcsError(f"{path} describes its network in a way that cannot be read: {error}") from None


def _normalization(path: Path, record: Any) -> Normalization:
    try:
        return Normalization.of_record(record)
    except ValueError as error:
        raise EdgeBcsError(
            f"{path} describes its normalisation in a way that cannot be read ({error})"
        ) from None


def _describe(path: Path, sparse: SparseModel, record: dict[str, Any]) -> None:
    """Let a user's own network know what its file says of it."""
    factory, shape = record.get("factory"), record.get("input_shape")
    if isinstance(factory, str) and sparse.factory is None:
        sparse.factory = factory
    if shape is not None:
        if not (isinstance(shape, list) and len(shape) == 3 and all(type(n) is int and n > 0 for n in shape)):
            raise EdgeBcsError(f"{path} describes the images of its network in a way that cannot be read")
        sparse.input_shape = (shape[0], shape[1], shape[2])


def _dense_kernels(
    differs: str, network: nn.Module, layers: list[tuple[str, tuple[int, ...]]], others: int
) -> frozenset[str]:
    """Return the modules whose kernels stay dense: those that the stored table of connections leaves out.

    Args:
        differs: that this is another network, for a message. network: the module that the state belongs to.
        layers: the stored table. others: how many other parameters are stored.

    Raises:
        EdgeBcsError: the state belongs to another network.
    """
    kernels = [(layer.name, layer.shape) for layer in prunable_layers(network)]
    named = {name for name, _ in layers}
    dense = [(name, shape) for name, shape in kernels if name not in named]
    if [kernel for kernel in kernels if kernel[0] in named] != layers:
        raise EdgeBcsError(
            f"{differs}: it has {len(layers)} kernels "
            f"({_differing(layers, kernels)}), the module {len(kernels)} ({_differing(kernels, layers)})"
        )
    inside = sum(math.prod(shape) for _, shape in layers)
    expected = sum(parameter.numel() for parameter in network.parameters()) - inside
    if others != expected:
        kept = f", {len(dense)} kernels that stay dense among them" if dense else ""
        raise EdgeBcsError(
            f"{differs}: beside its {len(layers)} kernels it has {others:,} "
            f"parameters, the module {expected:,}{kept}"
        )
    return frozenset(name for name, _ in dense)


def _differing(layers: list[tuple[str, tuple[int, ...]]], others: list[tuple[str, tuple[int, ...]]]) -> str:
    """Return the first layer that is not in the other network, for a message."""
    for name, shape in layers:
        if (name, shape) not in others:
            return f"{name} {list(shape)}"
    return "in another order"
