"""Training artifacts of ONNX Runtime's own tools, run where no training build exists.

`onnxruntime.training.artifacts.generate_artifacts` writes a folder with training_model.onnx, eval_model.onnx,
optimizer_model.onnx and checkpoint. Stock builds of ONNX Runtime know neither its gradient operators nor its
checkpoint; the operator library supplies the former, and runtime/ort/checkpoint.py reads the latter.

with OrtArtifact("artifacts/") as training:
    loss = training.step(images, labels)
    training.save_checkpoint("trained.checkpoint")   # CheckpointState of a training build reads it

What is supplied: ConvGrad, BatchNormInternal, BatchNormalizationGrad, MaxPoolGrad, AveragePoolGrad, ReluGrad,
LeakyReluGrad, SigmoidGrad, TanhGrad, QuickGeluGrad, Scale, SoftmaxCrossEntropyLossGrad (and its Internal
forms), InPlaceAccumulatorV2, SGDOptimizerV2, AdamWOptimizer; everything else must be an operator of ONNX.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnxruntime
from edge_bcs.runtime import library
from edge_bcs.runtime.onnx_file import (
    BOOL,
    FLOAT,
    INT64,
    FileModel,
    FileNode,
    attribute,
    make_model,
    read_model,
)
from edge_bcs.runtime.ort.checkpoint import CHECKPOINT, OptimizerState, read_ort_checkpoint

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import read_small, write_atomically
from edge_bcs.core.signals import HeldSignals
from edge_bcs.data.classes import Names, parse_names

Array = np.ndarray[Any, Any]
_LARGEST = 2 << 30  # of any ONNX model: protobuf takes no more
_MICROSOFT = "com.microsoft"
_GRADIENT = "_grad.accumulation.buffer"
_RESET = "lazy_reset_grad"
_POOL_GRADIENTS = ("MaxPoolGrad", "AveragePoolGrad")
_MOMENTS = {"SGDOptimizerV2": 0, "AdamWOptimizer": 2}  # that the operator takes
_UNKNOWN = re.compile(r"(\S+?):?(\w+)\(-?\d+\) is not a registered function/op")


class OrtArtifact:
    """One training artifact: parameters in numpy, sessions of the stock runtime over them.

    Args:
        path: the folder. prefix: of its file names, as given to generate_artifacts.
        checkpoint: another checkpoint of the same network to begin with, the optimizer's state included where
            it has one; default: the folder's.
        learning_rate: of the optimizer; default 0.001, as in ONNX Runtime.
        threads: default: all processors of this process.

    Attributes:
        parameters: name → array of every parameter, trainable or not; changed in place by `step`.
        moments: name → arrays of the optimizer's moments of a parameter that is trained; changed likewise.
        steps: optimizer steps done, those of the checkpoint included.
        batch_size: images that the graphs are fixed to, or None.
        outputs: scores that the network gives, or None if the graphs do not say.
        classes: names of the outputs in label order, or None while unknown. A checkpoint keeps them in its
            property "classes"; set them before `save_checkpoint`.

    Raises EdgeBcsError for a missing or damaged file, or an operator that nothing here supplies.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        prefix: str = "",
        checkpoint: str | Path | None = None,
        learning_rate: float = 1e-3,
        threads: int | None = None,
    ) -> None:
        folder = Path(path)
        if not folder.is_dir():
            raise EdgeBcsError(f"there is no folder {folder} with training artifacts of ONNX Runtime.")
        self._checkpoint = read_ort_checkpoint(checkpoint or folder / f"{prefix}{CHECKPOINT}")
        self.parameters = self._checkpoint.parameters
        self.trainable = tuple(self._checkpoint.trainable)
        self.learning_rate = learning_rate
        self._gradients = {name: np.zeros_like(self.parameters[name]) for name in self.trainable}
        self._values = {
            **{name: _value(array) for name, array in self.parameters.items()},
            **{f"{name}{_GRADIENT}": _value(array) for name, array in self._gradients.items()},
        }
        self._options = _session_options(threads)
        training = for_stock(_read(folder / f"{prefix}training_model.onnx"))
        evaluation = for_stock(_read(folder / f"{prefix}eval_model.onnx"))
        self._scores = [_show_scores(model) for model in (training, evaluation)]
        self._training = self._open(training, "training_model.onnx")
        self._evaluation = self._open(evaluation, "eval_model.onnx")
        self._optimizer = _Optimizer(_read(folder / f"{prefix}optimizer_model.onnx"), self._options)
        self.steps = self._checkpoint.optimizer.step if self._checkpoint.optimizer else 0
        self.moments = self._first_moments()
        self._moment_values = {
            name: [_value(moment) for moment in moments[: self._optimizer.moments]]
            for name, moments in self.moments.items()
        }
        self._check_inputs()
        self.outputs = self._count_outputs()
        self.classes = self._stored_classes()

    def __enter__(self) -> OrtArtifact:
        """Return the artifact itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to do: everything is memory of this object."""

    def _open(self, model: FileModel, name: str) -> onnxruntime.InferenceSession:
        try:
            return onnxruntime.InferenceSession(
                model.serialize(), self._options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            missing = _UNKNOWN.search(str(error))
            what = f"the operator {missing[1]}:{missing[2]}, which is not supplied" if missing else str(error)
            raise EdgeBcsError(f"{name} cannot run on this onnxruntime: it needs {what}.") from None

    def _first_moments(self) -> dict[str, list[Array]]:
        """The checkpoint's, or zeros; the training build keeps one for SGD too, which stays 0."""
        count = max(1, self._optimizer.moments)
        state = self._checkpoint.optimizer
        if state is None:
            return {
                name: [np.zeros_like(array) for _ in range(count)]
                for name, array in self._checkpoint.trainable.items()
            }
        if (
            state.step < 0
            or state.moments.keys() != set(self.trainable)
            or any(len(moments) != count for moments in state.moments.values())
            or any(
                moment.shape != self.parameters[name].shape or moment.dtype != np.float32
                for name, moments in state.moments.items()
                for moment in moments
            )
        ):
            raise EdgeBcsError(
                "the checkpoint's optimizer state belongs to another network or another optimizer."
            )
        return state.moments

    def _check_inputs(self) -> None:
        known = {*self._values, _RESET}
        inputs = [item for item in self._training.get_inputs() if item.name not in known]
        self._inputs = [item.name for item in inputs]
        if len(inputs) != 2 or inputs[1].type not in ("tensor(int64)", "tensor(int32)"):
            raise EdgeBcsError(
                f"the training model takes {', '.join(self._inputs) or 'nothing'}; images and labels are "
                "expected."
            )
        shape = inputs[0].shape
        if len(shape) != 4 or not all(isinstance(extent, int) for extent in shape[1:]):
            raise EdgeBcsError(f"the input {inputs[0].name} is {shape}; images [n, C, H, W] are expected.")
        self.input_shape: tuple[int, int, int] = (shape[1], shape[2], shape[3])
        self.batch_size = shape[0] if isinstance(shape[0], int) else None
        self._label_type = np.int64 if inputs[1].type == "tensor(int64)" else np.int32

    def _count_outputs(self) -> int | None:
        found = [item.shape for item in self._training.get_outputs() if item.name == self._scores[0]]
        known = found and len(found[0]) == 2 and isinstance(found[0][1], int)
        return int(found[0][1]) if known else None

    def _stored_classes(self) -> Names | None:
        stored = self._checkpoint.properties.get("classes")
        if stored is None:
            return None
        classes = parse_names(str(stored))
        if self.outputs not in (None, len(classes)):
            raise EdgeBcsError(
                f"the checkpoint names {len(classes)} classes and the network has {self.outputs} outputs."
            )
        return classes

    # One step

    def step(self, x: Array, y: Array) -> dict[str, float]:
        """Train on one batch; returns "loss" and, where the network ends in scores, "accuracy".

        Args:
            x: images f32 [n, C, H, W]. y: labels int [n].

        Raises EdgeBcsError if an operator refuses its input or the loss is not finite; parameters other than
        running statistics are then as before.
        """
        result = self.accumulate(x, y, reset=True)
        self.update()
        return result

    def accumulate(self, x: Array, y: Array, reset: bool = False) -> dict[str, float]:
        """Run the training model: gradients are added to what is there, or begin anew with ``reset``."""
        result = self._run(self._training, x, y, reset, self._scores[0])
        if not math.isfinite(result["loss"]):
            raise EdgeBcsError(f"the loss of step {self.steps} is {result['loss']}; lower the learning rate.")
        return result

    def update(self) -> None:
        """One step of the artifact's optimizer with the gradients that are there; no signal comes between."""
        with HeldSignals() as signals:
            signals.hold()
            self.steps += 1
            for name in self.trainable:
                parameter, gradient = self._values[name], self._values[f"{name}{_GRADIENT}"]
                moments = self._moment_values[name]
                self._optimizer.run(self.learning_rate, self.steps, parameter, gradient, moments)

    def evaluate(self, x: Array, y: Array) -> dict[str, float]:
        """Run the evaluation model on one batch; "loss" and, where there are scores, "accuracy"."""
        return self._run(self._evaluation, x, y, False, self._scores[1])

    def gradient(self, name: str) -> Array:
        """A copy of the gradient of a parameter."""
        return self._gradients[name].copy()

    def save_checkpoint(self, path: str | Path, include_optimizer_state: bool = True) -> None:
        """Write parameters and, if wished, the optimizer's steps and moments as ORT's checkpoint, atomically.

        A training build reads it; so does ``checkpoint`` of another `OrtArtifact`, which then goes on as this
        one would have. Raises EdgeBcsError if the file cannot be written, or a parameter or a moment is not
        finite; an earlier checkpoint is kept.
        """
        for name, array in self.parameters.items():
            for numbers in (array, *self.moments.get(name, ())):
                if numbers.dtype.kind == "f" and not np.isfinite(numbers).all():
                    raise EdgeBcsError(
                        f"the checkpoint {path} was not written: the parameter {name} or its moment is not "
                        "finite; an earlier one is kept."
                    )
        state = OptimizerState(self.steps, self.learning_rate, self.moments)
        # The checkpoint's own arrays are what `step` changes.
        changed = replace(self._checkpoint, optimizer=state if include_optimizer_state else None)
        if self.classes is not None:
            names = {"classes": json.dumps(list(self.classes))}
            changed = replace(changed, properties={**changed.properties, **names})
        write_atomically(Path(path), changed.serialize(), make_folder=True)

    def _run(
        self, session: onnxruntime.InferenceSession, x: Array, y: Array, reset: bool, scores: str
    ) -> dict[str, float]:
        x, y = self._checked(x, y)
        flag = np.array([reset])
        given = {self._inputs[0]: _value(x), self._inputs[1]: _value(y), _RESET: _value(flag)}
        binding = session.io_binding()
        for item in session.get_inputs():
            binding.bind_ortvalue_input(item.name, given.get(item.name) or self._values[item.name])
        loss = session.get_outputs()[0].name
        for item in session.get_outputs():
            binding.bind_output(item.name)
        try:
            session.run_with_iobinding(binding)
        except Exception as error:
            reason = str(error).rsplit("Status Message:", 1)[-1].strip().splitlines()[0]
            raise EdgeBcsError(f"the model refused its input: {reason}") from None
        names = [item.name for item in session.get_outputs()]
        outputs = dict(zip(names, binding.get_outputs(), strict=True))
        result = {"loss": float(outputs[loss].numpy().reshape(-1)[0])}
        if scores:
            found = outputs[scores].numpy()
            result["accuracy"] = float(np.mean(found.argmax(axis=1) == y))
        return result

    def _checked(self, x: Array, y: Array) -> tuple[Array, Array]:
        x, y = np.ascontiguousarray(x, np.float32), np.ascontiguousarray(y, self._label_type)
        if (
            x.ndim != 4
            or x.shape[1:] != self.input_shape
            or len(x) != (self.batch_size or len(x))
            or not len(x)
        ):
            count = "n" if self.batch_size is None else self.batch_size
            raise EdgeBcsError(
                f"images must have the shape [{count}, {', '.join(map(str, self.input_shape))}], "
                f"not {list(x.shape)}."
            )
        if y.shape != (len(x),):
            raise EdgeBcsError(f"labels must have the shape [{len(x)}], not {list(y.shape)}.")
        if not np.isfinite(x).all():
            raise EdgeBcsError("a pixel is not a finite number.")
        return x, y


class _Optimizer:
    """The step of optimizer_model.onnx for one parameter: its operator, on a tensor instead of a sequence."""

    def __init__(self, model: FileModel, options: onnxruntime.SessionOptions) -> None:
        nodes = [node for node in model.nodes if node.domain == _MICROSOFT]
        if len(model.nodes) != 1 or not nodes or nodes[0].operator not in _MOMENTS:
            found = ", ".join(sorted({node.operator for node in model.nodes}))
            raise EdgeBcsError(
                f"optimizer_model.onnx holds {found}; one SGDOptimizerV2 or AdamWOptimizer is expected."
            )
        (node,) = nodes
        self.operator = node.operator
        self.moments = _MOMENTS[node.operator]
        inputs = {
            "lr": FLOAT,
            **({"step": INT64} if self.moments else {}),
            "weights": FLOAT,
            "gradients": FLOAT,
        }
        inputs |= {f"moment_{i}": FLOAT for i in range(self.moments)}
        raw = [attribute(name, value) for name, value in node.attributes.items()]
        made = FileNode(node.operator, _MICROSOFT, list(inputs), ["updated"], "step", raw=raw)
        content = make_model([made], inputs, {"updated": BOOL}, {"": 17, _MICROSOFT: 1})
        self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(self, rate: float, step: int, parameter: Any, gradient: Any, moments: list[Any]) -> None:
        """Change ``parameter`` and ``moments`` in place; ``step`` counts from 1."""
        binding = self._session.io_binding()
        numbers: dict[str, np.ndarray[Any, Any]] = {
            "lr": np.array([rate], np.float32),
            "step": np.array([step], np.int64),
        }
        values = {name: _value(array) for name, array in numbers.items()}
        values |= {"weights": parameter, "gradients": gradient}
        values |= {f"moment_{i}": moment for i, moment in enumerate(moments)}
        for item in self._session.get_inputs():
            binding.bind_ortvalue_input(item.name, values[item.name])
        binding.bind_output("updated")
        self._session.run_with_iobinding(binding)


# The graphs


def for_stock(model: FileModel) -> FileModel:
    """Rewrite in place what a custom operator cannot be like, and return the model.

    Gradients of pooling get the pooled tensor as their last input (a training build reads its shape off the
    graph), and Scale becomes a cast and a division or multiplication.
    """
    forward = {node.name: node for node in model.nodes}
    nodes: list[FileNode] = []
    for node in model.nodes:
        if node.operator in _POOL_GRADIENTS and node.domain in ("", _MICROSOFT):
            source = forward.get(node.name.partition("_Grad/")[0])
            if source is None or source.operator != node.operator.removesuffix("Grad"):
                raise EdgeBcsError(
                    f"the pooling that {node.name or node.operator} differentiates is not found."
                )
            node.domain = _MICROSOFT
            node.inputs.append(source.inputs[0])
        elif node.operator == "BatchNormalization" and not node.attributes.get("training_mode", 0):
            del node.outputs[1:]  # 1.19.2 leaves those of training, with which its eval_model does not load
        elif node.operator == "Scale" and node.domain == _MICROSOFT:
            factor = f"{node.outputs[0]}.factor"
            cast = [attribute("to", FLOAT)]
            nodes.append(FileNode("Cast", "", [node.inputs[1]], [factor], f"{node.name}.Cast", raw=cast))
            down = bool(node.attributes.get("scale_down", 0))
            node = FileNode("Div" if down else "Mul", "", [node.inputs[0], factor], node.outputs, node.name)
        nodes.append(node)
    model.nodes = nodes
    return model


def _show_scores(model: FileModel) -> str:
    """Make the scores that the softmax cross-entropy reads an output; returns their name, or ''."""
    losses = [node for node in model.nodes if node.operator.startswith("SoftmaxCrossEntropyLoss")]
    if not losses or losses[0].inputs[0] in model.inputs:
        return ""
    name = losses[0].inputs[0]
    if name not in model.outputs:
        model.add_output(name, FLOAT)
    return name


def _read(path: Path) -> FileModel:
    try:
        content = read_small(path, _LARGEST)
    except OSError as error:
        raise EdgeBcsError(f"{path} cannot be read: {error.strerror}.") from None
    return read_model(content, str(path))


def _session_options(threads: int | None) -> onnxruntime.SessionOptions:
    from edge_bcs.runtime.engine import available_threads

    if hasattr(onnxruntime.capi._pybind_state, "save_checkpoint"):
        raise EdgeBcsError(
            f"onnxruntime {onnxruntime.__version__} is a training build, which runs its artifacts itself: "
            "use onnxruntime.training.api there, and this with the stock onnxruntime."
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or available_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    # Fusions across the graph could drop tensors that a gradient reads.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    library.register(options, training_operators=True)
    return options


def _value(array: Array) -> onnxruntime.OrtValue:
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)
