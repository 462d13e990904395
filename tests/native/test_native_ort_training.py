"""The operators of domain com.microsoft against torch's autograd: every form that an artifact may use."""

# mypy: disable-error-code="arg-type"

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from edge_bcs.runtime import library
from helpers import programs
from helpers.operators import ELEMENT_TYPE
from onnx import helper

if hasattr(onnxruntime.capi._pybind_state, "save_checkpoint"):
    pytest.skip("a training build has these operators itself", allow_module_level=True)

Array = np.ndarray[Any, Any]


def run(
    operator: str, inputs: Mapping[str, Array | None], outputs: Mapping[str, Any], **attributes: Any
) -> dict[str, Array]:
    """Run one operator; None is an absent input, and inputs that it changes are changed in ``inputs``."""
    if programs.EMULATOR:
        return programs.run_operator(operator, inputs, outputs, domain="com.microsoft", **attributes)
    given = {name: array for name, array in inputs.items() if array is not None}
    node = helper.make_node(
        operator,
        ["" if array is None else name for name, array in inputs.items()],
        list(outputs),
        domain="com.microsoft",
        **attributes,
    )
    values = [
        helper.make_tensor_value_info(name, ELEMENT_TYPE[a.dtype], a.shape) for name, a in given.items()
    ]
    results = [
        helper.make_tensor_value_info(name, ELEMENT_TYPE[np.dtype(t)], None) for name, t in outputs.items()
    ]
    graph = helper.make_graph([node], "test", values, results)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    library.register(options, training_operators=True)
    content = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, array in given.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
    for name in outputs:
        binding.bind_output(name)
    session.run_with_iobinding(binding)
    return dict(zip(outputs, (value.numpy() for value in binding.get_outputs()), strict=True))


def noise(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def double(array: Array) -> torch.Tensor:
    return torch.tensor(array, dtype=torch.float64, requires_grad=True)


def close(actual: Array, expected: torch.Tensor, tolerance: float = 2e-6) -> None:
    wanted = expected.detach().numpy()
    assert actual.shape == wanted.shape
    assert np.abs(actual - wanted).max() <= tolerance * max(1.0, float(np.abs(wanted).max()))


CONVOLUTIONS = [
    # (channels, outputs, groups), image, kernel, stride, padding (top, left, bottom, right), dilation
    ((3, 4, 1), (7, 9), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    ((4, 6, 2), (8, 5), (3, 2), (2, 1), (1, 0, 0, 2), (1, 1)),
    ((4, 8, 4), (6, 6), (3, 3), (2, 2), (1, 1, 1, 1), (1, 1)),
    ((2, 3, 1), (11, 12), (3, 3), (1, 2), (2, 2, 2, 2), (2, 3)),
    ((2, 3, 1), (4, 4), (1, 1), (3, 3), (0, 0, 0, 0), (1, 1)),
    ((2, 2, 1), (3, 3), (5, 5), (1, 1), (3, 3, 3, 3), (1, 1)),
]


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution(case: Any) -> None:
    (channels, outputs, groups), image, kernel, stride, pads, dilation = case
    x, w = noise(3, channels, *image), noise(outputs, channels // groups, *kernel, seed=1)
    tx, tw, tb = double(x), double(w), double(noise(outputs))
    padded = F.pad(tx, (pads[1], pads[3], pads[0], pads[2]))
    y = F.conv2d(padded, tw, tb, stride, 0, dilation, groups)
    dy = noise(*y.shape, seed=2)
    y.backward(torch.tensor(dy, dtype=torch.float64))
    attributes = {"kernel_shape": kernel, "strides": stride, "pads": pads, "dilations": dilation}
    outputs_ = {"dX": np.float32, "dW": np.float32, "dB": np.float32}
    found = run("ConvGrad", {"dY": dy, "X": x, "W": w}, outputs_, group=groups, **attributes)
    for name, tensor in (("dX", tx), ("dW", tw), ("dB", tb)):
        close(found[name], tensor.grad)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 2, 0), (3, 2, 1), (3, 1, 1), (2, 3, 0)])
@pytest.mark.parametrize("counts", [0, 1])
def test_average_pooling(kernel: int, stride: int, padding: int, counts: int) -> None:
    x = noise(2, 3, 9, 7)
    tx = double(x)
    y = F.avg_pool2d(tx, kernel, stride, padding, count_include_pad=bool(counts))
    dy = noise(*y.shape, seed=1)
    y.backward(torch.tensor(dy, dtype=torch.float64))
    attributes = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [padding] * 4}
    found = run(
        "AveragePoolGrad", {"dY": dy, "X": x}, {"dX": np.float32}, count_include_pad=counts, **attributes
    )
    close(found["dX"], tx.grad)


def test_maximum_pooling() -> None:
    x = noise(2, 3, 9, 7)
    tx = double(x)
    y, places = F.max_pool2d(tx, 3, 2, 1, return_indices=True)  # overlapping windows; places within a plane
    dy = noise(*y.shape, seed=1)
    y.backward(torch.tensor(dy, dtype=torch.float64))
    indices = places.numpy() + (np.arange(6) * 63).reshape(2, 3, 1, 1)  # ONNX counts in the whole tensor
    found = run(
        "MaxPoolGrad", {"dY": dy, "Indices": indices, "X": x}, {"dX": np.float32}, kernel_shape=[3, 3]
    )
    close(found["dX"], tx.grad)
    for plane, place in (((0, 0), 63), ((1, 2), np.iinfo(np.int64).min)):
        wrong = indices.copy()
        wrong[(*plane, 0, 0)] = place
        with pytest.raises(Exception, match="an index leads out of its plane"):
            run("MaxPoolGrad", {"dY": dy, "Indices": wrong, "X": x}, {"dX": np.float32}, kernel_shape=[3, 3])


@pytest.mark.parametrize("shape", [(6, 3, 4, 5), (8, 3)])
def test_batch_norm(shape: tuple[int, ...]) -> None:
    x, dy = noise(*shape) * 3 + 1, noise(*shape, seed=1)
    scale, shift, mean = noise(3, seed=2), noise(3, seed=3), noise(3, seed=4)
    variance = np.abs(noise(3, seed=5)) + 0.5
    running = mean.copy(), variance.copy()
    names = ("Y", "running_mean", "running_var", "saved_mean", "saved_inv_std")
    inputs = {"X": x, "scale": scale, "B": shift, "input_mean": running[0], "input_var": running[1]}
    found = run(
        "BatchNormInternal",
        inputs,
        dict.fromkeys(names, np.float32),
        epsilon=1e-3,
        momentum=0.8,
        training_mode=1,
    )
    tx, ts, tb = double(x), double(scale), double(shift)
    y = F.batch_norm(tx, None, None, ts, tb, training=True, eps=1e-3)
    y.backward(torch.tensor(dy, dtype=torch.float64))
    axes = tuple(axis for axis in range(x.ndim) if axis != 1)
    close(found["Y"], y, 1e-5)
    biased = torch.tensor(0.8 * variance.astype(np.float64) + 0.2 * x.astype(np.float64).var(axes))
    close(found["running_var"], biased, 1e-6)
    close(found["running_mean"], torch.tensor(0.8 * mean + 0.2 * x.mean(axes, dtype=np.float64)), 1e-6)
    gradients = run(
        "BatchNormalizationGrad",
        {"dY": dy, "X": x, "scale": scale, "m": found["saved_mean"], "s": found["saved_inv_std"]},
        dict.fromkeys(("dX", "dScale", "dBias"), np.float32),
    )
    for name, tensor in (("dX", tx), ("dScale", ts), ("dBias", tb)):
        close(gradients[name], tensor.grad, 1e-5)


@pytest.mark.parametrize(
    ("operator", "function", "of_output", "attributes"),
    [
        ("ReluGrad", torch.relu, False, {}),
        ("LeakyReluGrad", lambda x: F.leaky_relu(x, 0.2), True, {"alpha": 0.2}),
        ("SigmoidGrad", torch.sigmoid, True, {}),
        ("TanhGrad", torch.tanh, True, {}),
        ("QuickGeluGrad", F.silu, False, {"alpha": 1.0}),
    ],
)
def test_activations(operator: str, function: Any, of_output: bool, attributes: dict[str, float]) -> None:
    x, dy = noise(3, 40000), noise(3, 40000, seed=1)  # several pieces of work
    tx = double(x)
    y = function(tx)
    y.backward(torch.tensor(dy, dtype=torch.float64))
    value = y.detach().numpy().astype(np.float32) if of_output else x
    close(run(operator, {"dY": dy, "value": value}, {"dX": np.float32}, **attributes)["dX"], tx.grad)


@pytest.mark.parametrize("inner", [(), (2, 3)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("internal", ["", "Internal"])
def test_cross_entropy(internal: str, reduction: str, weighted: bool, inner: tuple[int, ...]) -> None:
    scores, labels = noise(6, 5, *inner) * 3, np.random.default_rng(1).integers(0, 5, (6, *inner))
    labels.reshape(-1)[1] = 3
    weights = np.abs(noise(5, seed=2)) + 0.1 if weighted else None
    tx = double(scores)
    tw = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    loss = F.cross_entropy(tx, torch.tensor(labels), tw, ignore_index=3, reduction=reduction)
    dy = np.asarray(noise(*loss.shape, seed=3) + 2, np.float32)
    loss.backward(torch.tensor(dy, dtype=torch.float64))
    attributes = {"reduction": reduction, "ignore_index": 3}
    forward = run(
        "SoftmaxCrossEntropyLossInternal",
        {"scores": scores, "labels": labels, "weights": weights},
        {"loss": np.float32, "log_prob": np.float32},
        **attributes,
    )
    close(forward["loss"], loss)
    close(forward["log_prob"], tx.log_softmax(1))
    inputs = {"dY": dy, "log_prob": forward["log_prob"], "labels": labels, "weights": weights}
    found = run(f"SoftmaxCrossEntropyLoss{internal}Grad", inputs, {"d": np.float32}, **attributes)
    close(found["d"], tx.grad)


def test_labels_out_of_range_are_refused() -> None:
    inputs = {"scores": noise(2, 3), "labels": np.array([0, 3])}
    with pytest.raises(Exception, match=r"a label is 3, not in \[0, 3\)"):
        run("SoftmaxCrossEntropyLossInternal", inputs, {"loss": np.float32})


@pytest.mark.parametrize("overwrite", [False, True])
def test_accumulation(overwrite: bool) -> None:
    buffer, gradient = noise(50000), noise(50000, seed=1)
    expected = gradient if overwrite else buffer + gradient
    inputs = {"buffer": buffer, "gradient": gradient, "overwrite": np.array([overwrite])}
    assert run("InPlaceAccumulatorV2", inputs, {"updated": np.bool_})["updated"].tolist() == [True]
    assert np.array_equal(buffer, expected)


def test_sgd() -> None:
    weights, gradients = noise(7), noise(7, seed=1)
    expected = weights - np.float32(0.1) * gradients
    inputs = {"lr": np.array([0.1], np.float32), "weights": weights, "gradients": gradients}
    run("SGDOptimizerV2", inputs, {"updated": np.bool_})
    assert np.array_equal(weights, expected)


def test_adamw_is_torchs() -> None:
    weights, moments = noise(1000), [np.zeros(1000, np.float32) for _ in range(2)]
    parameter = torch.nn.Parameter(double(weights).detach().clone())
    optimizer = torch.optim.AdamW([parameter], lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    for step in range(1, 6):
        gradients = noise(1000, seed=step)
        parameter.grad = torch.tensor(gradients, dtype=torch.float64)
        optimizer.step()
        inputs = {
            "lr": np.array([0.01], np.float32), "step": np.array([step]), "weights": weights,
            "gradients": gradients, "momentums_1": moments[0], "momentums_2": moments[1],
        }  # fmt: skip
        attributes = {"alpha": 0.8, "beta": 0.95, "epsilon": 1e-6, "weight_decay": 0.1, "adam_mode": 0}
        run("AdamWOptimizer", inputs, {"updated": np.bool_}, correct_bias=1, **attributes)
        close(weights, parameter, 1e-5)


def test_scores_of_no_class_are_refused() -> None:
    """With every label ignored no class is asked for, and there is none to read."""
    inputs = {"scores": np.zeros((2, 0), np.float32), "labels": np.full(2, -1)}
    with pytest.raises(Exception, match=r"\[2, 0\], of no class"):
        run("SoftmaxCrossEntropyLossInternal", inputs, {"loss": np.float32}, ignore_index=-1)


def test_a_flag_of_any_byte_is_a_flag() -> None:
    flag = np.array([255], np.uint8).view(np.bool_)
    inputs = {"buffer": noise(3), "gradient": noise(3, seed=1), "overwrite": flag}
    run("InPlaceAccumulatorV2", inputs, {"updated": np.bool_})
    np.testing.assert_array_equal(inputs["buffer"], inputs["gradient"])
