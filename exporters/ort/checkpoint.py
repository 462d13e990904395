"""ORT's own `checkpoint` beside the graphs, written where onnxruntime-training is installed.

It holds every buffer of the state under its usual name, so that `CheckpointState` and `Module` of
onnxruntime.training train the same `training_model.onnx`, and the state's metadata as properties, so that
`edge_bcs.load` reads a trained checkpoint back.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from onnx import numpy_helper

from edge_bcs.core.errors import EdgeBcsError

Array = np.ndarray[Any, Any]
TRAINABLE = ("coo.value", "dense.value")


def available() -> bool:
    """Whether this onnxruntime is a training build, the only one that can write the file."""
    try:
        from onnxruntime.training.api import CheckpointState  # noqa: F401
    except ImportError:
        return False
    return True


def write_ort_checkpoint(path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Write the checkpoint of a network.

    Args:
        path: the file.
        tensors: the seven buffers of a state by name, and coo.lists i32[M], which the graphs read.
        metadata: the state's (network, layers, step, seed, …).

    Raises:
        EdgeBcsError: ONNX Runtime cannot write the file.
    """
    from onnxruntime.capi import _pybind_state
    from onnxruntime.training.api import CheckpointState

    serialized = {
        name: numpy_helper.from_array(np.ascontiguousarray(array), name).SerializeToString()
        for name, array in tensors.items()
        if array.size  # a network without batch norm has no statistics; the type has no empty tensors
    }
    trainable = [content for name, content in serialized.items() if name in TRAINABLE]
    frozen = [content for name, content in serialized.items() if name not in TRAINABLE]
    try:
        _pybind_state.save_checkpoint(trainable, frozen, str(path), False)
        checkpoint = CheckpointState.load_checkpoint(path)
        for name in sorted(metadata):
            checkpoint.properties[name] = metadata[name]
        CheckpointState.save_checkpoint(checkpoint, path)
    except Exception as error:  # its own kinds, of a full disk, too
        raise EdgeBcsError(f"the checkpoint {path} cannot be written: {error}") from None
