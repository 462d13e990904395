"""The trained state of a sparse network as one safetensors file, written atomically.

The file holds exactly the seven buffers of `edge_bcs.core.state`, under the names that an artifact and the
board use, and string metadata: format "edge-bcs-state", version "1", step, seed,
`network` (JSON with name and arguments), `layers` (JSON: names and shapes of the kernels), sparsity,
distribution, objective, `classes` (JSON: names of the outputs in label order, if they are known) and whatever
else the writer adds. A file whose `momentum` is "none" leaves both momenta out: they are zero.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import reading, write_atomically
from edge_bcs.core.metadata import counters, exact_sparsity, parse_json, parse_object
from edge_bcs.core.state import FORMAT, STATE_NAMES, VERSION, state_fault
from edge_bcs.core.tensor_file import TensorFile, write_tensors
from edge_bcs.core.text import check_text
from edge_bcs.data.classes import Names, parse_names
from edge_bcs.method.sparse_model import SparseModel

_MOMENTUM, _NONE = "momentum", "none"
_MOMENTA = {"coo.momentum": "coo.value", "dense.momentum": "dense.value"}
"""Momentum → what it is the momentum of."""


@dataclass(frozen=True)
class Checkpoint:
    """What a state file holds: the buffers by their names, and the metadata as it was written."""

    tensors: dict[str, NDArray[Any]]
    metadata: dict[str, str]

    @property
    def step(self) -> int:
        """Number of training steps done."""
        return counters(self.metadata)[0]

    @property
    def seed(self) -> int:
        """Seed of signs and random numbers."""
        return counters(self.metadata)[1]

    @property
    def sparsity(self) -> str:
        """What `sparsify` was asked for, in decimal."""
        return str(exact_sparsity(self.metadata.get("sparsity", "0")))

    @property
    def classes(self) -> Names | None:
        """Names of the outputs, None if they are not stored; EdgeBcsError if they cannot be read."""
        text = self.metadata.get("classes")
        return None if text is None else parse_names(text)

    def network(self) -> dict[str, Any]:
        """What rebuilds the network, {"name", "arguments"}; ValueError if that cannot be read."""
        network = parse_object(self.metadata["network"])
        check_text(network, "the description of its network")
        return network

    def layers(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape of every kernel, in order; ValueError if they cannot be read."""
        try:
            layers = [(name, tuple(shape)) for name, shape in parse_json(self.metadata["layers"])]
        except TypeError as error:
            raise ValueError(str(error)) from None
        for name, shape in layers:
            if type(name) is not str or not all(type(size) is int and size > 0 for size in shape):
                raise ValueError(f"the layer {name!r} has the shape {shape}")
        check_text(layers, "the table of its layers")
        return layers


def save_checkpoint(
    path: str | Path,
    sparse: SparseModel,
    *,
    metadata: Mapping[str, str] | None = None,
    more: Mapping[str, NDArray[Any]] | None = None,
    momentum: bool = True,
) -> None:
    """Write the state of `sparse` to a file; a crash at any moment leaves the old file or the new one.

    Args:
        path: where; missing folders are made.
        sparse: the network.
        metadata: further strings, such as objective.
        more: further arrays under names of their own, which only the training that wrote them reads.
        momentum: whether it is written; without it the file is a third smaller, and a training that goes on
            from it begins without momentum.

    Raises:
        EdgeBcsError: the file cannot be written (no space, no permission), or a number is not finite; the old
            file is kept.
    """
    state = sparse.state()
    fault = state_fault(state, sparse.parts) or _not_finite(more or {})
    if fault is not None:
        raise EdgeBcsError(f"{path} was not written: {fault}; an earlier one is kept")
    described = {
        **(metadata or {}),
        **state_metadata(sparse, sparse.step, sparse.seed, sparse.classes),
    }
    if not momentum:
        state = {name: array for name, array in state.items() if name not in _MOMENTA}
        described[_MOMENTUM] = _NONE
    content = io.BytesIO()
    write_tensors(content, {**(more or {}), **state}, described)
    write_atomically(Path(path), content.getbuffer(), make_folder=True)


def _not_finite(arrays: Mapping[str, NDArray[Any]]) -> str | None:
    wrong = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    return f"{wrong[0]} holds a number that is not finite" if wrong else None


def state_metadata(sparse: SparseModel, step: int, seed: int, classes: Names | None) -> dict[str, str]:
    """Return what the metadata of every state of a network say, in a checkpoint and in an artifact.

    Args:
        sparse: the network. step, seed: of the training that goes on from there.
        classes: names of its outputs; nothing is said of them while they are unknown.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "network": json.dumps(sparse.record),
        "layers": json.dumps([[layer.name, list(layer.shape)] for layer in sparse.layers]),
        "sparsity": sparse.sparsity,
        "distribution": sparse.distribution,
        "step": str(step),
        "seed": str(seed),
        **({} if classes is None else {"classes": json.dumps(list(classes))}),
    }


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Return what a state file holds.

    Raises:
        EdgeBcsError: there is no such file, or it cannot be read, is truncated, or not a state of edge-bcs
            of this version.
    """
    path = Path(path)
    try:
        with reading(path):
            if not path.is_file():
                raise EdgeBcsError(f"there is no checkpoint file {path}")
            with TensorFile(path) as stored:
                metadata = stored.metadata
                if metadata.get("format") != FORMAT:
                    raise EdgeBcsError(_foreign(path, stored))
                tensors = {name: stored.read(name) for name in stored.tensors}
    except EdgeBcsError:
        raise
    except ValueError as error:
        kind = kind_of(path)
        if kind is not None:
            instead = _INSTEAD if "orch" in kind else _READ
            raise EdgeBcsError(f"{path} is {kind}, and not a state of edge-bcs; {instead}") from None
        raise EdgeBcsError(f"{path} is truncated or not a safetensors file ({error})") from None
    except MemoryError:
        raise EdgeBcsError(f"{path} is larger than the memory of this machine") from None
    if metadata.get("version") != VERSION:
        raise EdgeBcsError(
            f"{path} has the format version {metadata.get('version')}; this edge-bcs reads version {VERSION}"
        )
    if metadata.get(_MOMENTUM) == _NONE:
        for name, beside in _MOMENTA.items():
            if beside in tensors:
                tensors.setdefault(name, np.zeros_like(tensors[beside]))
    missing = [name for name in STATE_NAMES if name not in tensors]
    if missing:
        raise EdgeBcsError(f"{path} lacks {missing[0]}")
    try:
        counters(metadata)
    except EdgeBcsError as error:
        raise EdgeBcsError(f"{path}: {error}") from None
    return Checkpoint(tensors, metadata)


_READ = "edge-bcs reads what it trained, exported or saved"
_INSTEAD = (
    f"{_READ}; load this into its module with torch: edge_bcs.evaluation.evaluate measures that module, and "
    'edge_bcs.sparsify(module, start="new") makes a sparse network like it, with new weights'
)
TORCHSCRIPT = "a TorchScript module"
_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number with which such a pickle begins


def _foreign(path: Path, stored: TensorFile) -> str:
    first = next(iter(stored.tensors.items()), None)
    holds = (
        ""
        if first is None
        else f" ({len(stored.tensors)} arrays, the first one {first[0][:60]!r} {first[1]})"
    )
    return f"{path} is a safetensors file{holds}, but not a state of edge-bcs; {_INSTEAD}"


def kind_of(path: Path) -> str | None:
    """Return what a file is that holds no safetensors, told without loading anything; None if unknown."""
    try:
        with path.open("rb") as stream:
            head = stream.read(len(_LEGACY_TORCH))
        if head == _LEGACY_TORCH:
            return "a pickle of torch.save in its old format"
        if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
            return "a pickle"
        if not head.startswith(b"PK\x03\x04"):
            return None
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
    except zipfile.BadZipFile:
        return "a truncated zip archive, such as torch.save writes"
    except (OSError, ValueError, NotImplementedError):
        return None
    if "data.pkl" not in names:
        return "a zip archive"
    return TORCHSCRIPT if "constants.pkl" in names else "a file of torch.save"
