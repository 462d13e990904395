"""Training an artifact with ONNX Runtime's own training API, where a training build (1.19.2) is installed.

with OrtTrainer("out/vgg16") as trainer:
    trainer.fit(data, steps=100)
    trainer.save_checkpoint("trained.checkpoint")
sparse = edge_bcs.load("trained.checkpoint")

`CheckpointState` owns the parameters and `Module` runs `training_model.onnx` and `eval_model.onnx`; the
attack and the rewiring step are graphs that `Module` and `Optimizer` have no place for, so they run in
sessions over the same memory. Everything else (objectives, evaluation, saving, resuming) is the Trainer's.

These versions do not let the operator library own their allocations: the cap is kept by ONNX Runtime's arena.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.buffers import bytes_of
from edge_bcs.runtime.engine import Engine
from edge_bcs.runtime.ort.checkpoint import CHECKPOINT, read_state
from edge_bcs.runtime.sessions import SessionEngine, is_onnxruntimes, session_options
from edge_bcs.runtime.state import layout_of, parts_of
from edge_bcs.runtime.trainer import Trainer

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.state import state_fault

try:
    from onnxruntime.training.api import CheckpointState, Module
except ImportError as error:
    raise EdgeBcsError(
        f"onnxruntime {onnxruntime.__version__} is not a training build: in an environment of its own, "
        "install 'edge-bcs[ort-training]'; edge_bcs.runtime.Trainer needs no training build."
    ) from error

_MODULE_GRAPHS = ("training", "eval")


class OrtEngine(SessionEngine):
    """The Trainer's buffers and graphs, with the parameters in a `CheckpointState` and a `Module` over them.

    ``checkpoint`` is the file; ``own_state`` says whether its numbers count or those of the folder's state.
    """

    name = "onnxruntime-training"

    def __init__(
        self, artifact: Artifact, checkpoint: Path, own_state: bool, cap: int | None, threads: int | None
    ) -> None:
        self._file, self._own_state = checkpoint, own_state
        self._module: Module | None = None
        super().__init__(artifact, cap, threads)

    def allocate(self) -> None:
        """Load the checkpoint; the parameters are its own memory, and the other buffers as in `Engine`."""
        _, self._properties = read_state(self._file)
        self.checkpoint = CheckpointState.load_checkpoint(self._file)
        for name, (dtype, length) in layout_of(self.artifact).items():
            found = (
                self.checkpoint.parameters[name].data if name in self.checkpoint.parameters else np.zeros(0)
            )
            if length and (found.dtype != dtype or found.shape != (length,)):
                raise EdgeBcsError(
                    f"{self._file} belongs to another network: {name} is {found.dtype}{list(found.shape)}, "
                    f"not {dtype}[{length}]."
                )
        self.budget.limit_arena(sum(bytes_of(dtype, shape) for dtype, shape in self.table().values()))
        try:
            self._module = Module(
                str(self.artifact.graph("training")),
                self.checkpoint,
                str(self.artifact.graph("eval")),
                session_options=session_options(self.threads, self.budget),
            )
        except Exception as error:
            raise self.budget.explain(error, "training") from None
        self.allocate_apart()

    def make_buffer(
        self, name: str, dtype: str, shape: tuple[int, ...]
    ) -> tuple[np.ndarray[Any, Any], onnxruntime.OrtValue]:
        """See `Engine`; a parameter or its gradient is the checkpoint's."""
        parameter = name.removesuffix("_grad.accumulation.buffer")
        if parameter not in self.checkpoint.parameters:
            return super().make_buffer(name, dtype, shape)
        held = self.checkpoint.parameters[parameter]._parameter
        value = onnxruntime.OrtValue(held.data if parameter == name else held.grad)
        return _view(value, dtype, shape), value

    def load_state(self) -> dict[str, str]:
        """See `Engine`; or take the checkpoint's numbers as they are."""
        if not self._own_state:
            return super().load_state()
        fault = self.state_fault()
        if fault is not None:
            raise EdgeBcsError(f"{self._file} holds no state of the network: {fault}.")
        return self._properties

    def state_fault(self) -> str | None:
        """Why the present numbers are no state that can be saved, or None."""
        state = {name: self.arrays[name] for name in layout_of(self.artifact)}
        return state_fault(state, parts_of(self.artifact))

    def open_graph(self, graph: str) -> None:
        """See `Engine`; training and evaluation need no session."""
        if graph not in _MODULE_GRAPHS:
            super().open_graph(graph)

    def run_graph(self, graph: str) -> None:
        """Training and evaluation are run by `Module`, the others in sessions over its parameters."""
        if graph not in _MODULE_GRAPHS or self._module is None:
            super().run_graph(graph)
            return
        module = self._module.train(graph == "training")
        inputs = [self.value(graph, name) for name in module.input_names()]
        if graph == "training" and self.arrays["lazy_reset_grad"][0]:
            module.lazy_reset_grad()
        try:
            results = module(*inputs)
        except Exception as error:
            if not is_onnxruntimes(error):
                raise
            raise self.budget.explain(error, graph) from None
        results = results if isinstance(results, tuple) else (results,)
        for name, result in zip(module.output_names(), results, strict=True):
            # Statistics come back as outputs of their own; `Module` does not write them to its parameters.
            self.arrays[self.bound_buffer(graph, name)][...] = result.numpy()

    def close(self) -> None:
        """Free the sessions and the module. Safe to call twice, and from any thread."""
        with self.running:
            self._module = None
            super().close()


class OrtTrainer(Trainer):
    """A `Trainer` whose parameters live in ORT's `CheckpointState`; same steps, same saved runs.

    Args:
        path: an artifact that was exported where a training build is installed, or a run saved from here.
        checkpoint: a file written by `save_checkpoint`, to go on from its numbers; default: the folder's
            state.
        memory, threads, seed, class_names: as for Trainer.

    Raises EdgeBcsError as Trainer does, and for a folder without `checkpoint`.
    """

    def __init__(
        self,
        path: str | Path,
        memory: int | str | None = None,
        threads: int | None = None,
        seed: int | None = None,
        class_names: Sequence[str] | None = None,
        *,
        checkpoint: str | Path | None = None,
    ) -> None:
        self._file = Path(path) / CHECKPOINT if checkpoint is None else Path(checkpoint)
        self._own_state = checkpoint is not None
        super().__init__(path, memory, threads, seed, class_names, attack_precision="f32")

    def open_engine(self, cap: int | None, threads: int | None) -> Engine:
        """See `Trainer`."""
        part = self.artifact.trained.part
        if not part.everything:
            raise EdgeBcsError(
                f"{self.artifact.path} trains a part of its network ({part.text}), which ONNX Runtime's "
                "training API cannot: train it with edge_bcs.runtime.Trainer, or export it with --train all."
            )
        if not self._file.is_file():
            raise EdgeBcsError(
                f"there is no checkpoint of ONNX Runtime at {self._file}: export the artifact where "
                "onnxruntime-training is installed, which then writes it too."
            )
        self._parameters = OrtEngine(self.artifact, self._file, self._own_state, cap, threads)
        return self._parameters

    def save(self, path: str | Path) -> int:
        """Save a run folder as Trainer does, with a `checkpoint` in it."""
        with self.between_steps():
            size, checkpoint = super().save(path), Path(path) / CHECKPOINT
            self.save_checkpoint(checkpoint)
            return size + checkpoint.stat().st_size

    def save_checkpoint(self, path: str | Path) -> None:
        """Write ORT's `checkpoint` with the present numbers, atomically; `edge_bcs.load` reads it.

        Raises EdgeBcsError if the file cannot be written, or a number is not finite; an earlier one is kept.
        """
        with self.between_steps():
            self._write_checkpoint(Path(path))

    def _write_checkpoint(self, path: Path) -> None:
        fault = self._parameters.state_fault()
        if fault is not None:
            raise EdgeBcsError(f"the checkpoint {path} was not written: {fault}; an earlier one is kept.")
        state = self._parameters.checkpoint
        for name, value in self.metadata().items():
            state.properties[name] = value
        partial = path.with_name(path.name + ".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            CheckpointState.save_checkpoint(state, partial)
            partial.replace(path)
        except Exception as error:
            partial.unlink(missing_ok=True)
            raise EdgeBcsError(f"the checkpoint {path} cannot be written: {error}") from None


def _view(value: onnxruntime.OrtValue, dtype: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """The numbers of a tensor as numpy sees them, without a copy; the tensor must outlive the array."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = (ctypes.c_uint8 * size).from_address(value.data_ptr())
    return np.ctypeslib.as_array(memory).view(dtype).reshape(shape)
