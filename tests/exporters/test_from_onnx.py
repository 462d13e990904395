"""ONNX files as networks: every operator against ONNX Runtime, and files that are wrong in every way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from edge_bcs.exporters.frontends.onnx import from_onnx
from helpers.commands import run
from helpers.onnx_files import File, same_as_onnxruntime, small
from onnx import numpy_helper

from edge_bcs.core.errors import EdgeBcsError

# A graph for each operator and form

CASES: dict[str, Callable[[], tuple[File, str]]] = {}


def case(make: Callable[[], tuple[File, str]]) -> Callable[[], tuple[File, str]]:
    CASES[make.__name__] = make
    return make


@case
def convolutions() -> tuple[File, str]:
    f = File(4, 11, 9)
    y = f.conv("x", 8, 4, 3, 3, strides=[2, 1], pads=[1, 1, 1, 1])
    y = f.conv(y, 8, 1, 3, 3, group=8, pads=[1, 1, 1, 1], dilations=[1, 1])
    y = f.conv(y, 6, 4, 1, 3, group=2, pads=[0, 2, 0, 2], dilations=[1, 2])
    return f, f.Conv(y, f.numbers(5, 6, 1, 1))


@case
def unequal_pads() -> tuple[File, str]:
    f = File(3, 10, 7)
    y = f.conv("x", 4, 3, 3, 2, strides=[2, 2], pads=[0, 1, 2, 0])
    return f, f.AveragePool(y, kernel_shape=[2, 2], pads=[1, 0, 0, 1], count_include_pad=1)


def automatic(way: str) -> Callable[[], tuple[File, str]]:
    def make() -> tuple[File, str]:
        f = File(3, 10, 11)
        y = f.conv("x", 4, 3, 3, 4, strides=[2, 2], auto_pad=way)
        return f, f.MaxPool(y, kernel_shape=[2, 3], strides=[1, 2], auto_pad=way)

    return make


CASES |= {way.lower(): automatic(way) for way in ("SAME_UPPER", "SAME_LOWER", "VALID")}


@case
def linear_layers() -> tuple[File, str]:
    f = File(2, 3, 3)
    y = f.Flatten("x")
    y = f.Gemm(y, f.numbers(6, 18), f.numbers(6), transB=1, alpha=0.5, beta=2.0)
    y = f.Gemm(y, f.numbers(6, 5), f.numbers(1))
    y = f.Add(f.MatMul(y, f.numbers(5, 4)), f.numbers(4))
    return f, f.MatMul(y, f.numbers(4, 3))


@case
def norms() -> tuple[File, str]:
    f = File(4, 5, 6)
    y = f.BatchNormalization(
        "x", f.numbers(4), f.numbers(4), f.numbers(4), f.numbers(4, low=0.5), epsilon=1e-3, momentum=0.99
    )
    y = f.Transpose(y, perm=[0, 2, 3, 1])
    y = f.LayerNormalization(y, f.numbers(4), f.numbers(4), epsilon=1e-6)
    return f, f.Transpose(y, perm=[0, 3, 1, 2])


@case
def group_norm_of_opset_21() -> tuple[File, str]:
    f = File(6, 5, 4, opset=21)
    return f, f.GroupNormalization("x", f.numbers(6), f.numbers(6), num_groups=2, epsilon=1e-3)


@case
def group_norm_written_out() -> tuple[File, str]:
    f = File(6, 5, 4, opset=13)
    y = f.Reshape("x", f.whole(0, 3, -1))
    y = f.InstanceNormalization(y, f.constant(np.ones(3, np.float32)), f.constant(np.zeros(3, np.float32)))
    y = f.Reshape(y, f.Shape("x"))
    return f, f.Add(f.Mul(y, f.numbers(6, 1, 1)), f.numbers(6, 1, 1))


@case
def layer_norm_written_out() -> tuple[File, str]:
    f = File(4, 5, 6, opset=13)
    x = f.Transpose("x", perm=[0, 2, 3, 1])
    d = f.Sub(x, f.ReduceMean(x, axes=[-1]))
    v = f.ReduceMean(f.Pow(d, f.constant(np.float32(2))), axes=[-1])
    y = f.Div(d, f.Sqrt(f.Add(v, f.constant(np.float32(1e-6)))))
    y = f.Add(f.Mul(y, f.numbers(4)), f.numbers(4))
    return f, f.Transpose(y, perm=[0, 3, 1, 2])


@case
def activations() -> tuple[File, str]:
    f = File(2, 8, 8, opset=20)
    x = f.Mul(f.Sub("x", f.constant(np.float32(0.5))), f.constant(np.float32(20)))
    f.constant(np.float32(0), "zero"), f.constant(np.float32(6), "six")
    parts = [
        f.Relu(x), f.Clip(x, "zero", "six"), f.Clip(x, "zero"), f.LeakyRelu(x, alpha=0.2), f.HardSwish(x),
        f.HardSigmoid(x, alpha=1 / 6), f.Sigmoid(x), f.Tanh(x), f.Gelu(x), f.Gelu(x, approximate="tanh"),
        f.Mul(x, f.Sigmoid(x)), f.Mul(x, f.HardSigmoid(x, alpha=1 / 6)),
    ]  # fmt: skip
    return f, f.Concat(*parts, axis=1)


def gelu(half_first: bool, multiplied: bool) -> Callable[[], tuple[File, str]]:
    def make() -> tuple[File, str]:
        f = File(2, 4, 4)
        x = f.Mul("x", f.constant(np.float32(4)))
        root, half = np.float32(2**0.5), f.constant(np.float32(0.5))
        y = f.Mul(x, f.constant(np.float32(1 / root))) if multiplied else f.Div(x, f.constant(root))
        y = f.Add(f.Erf(y), f.constant(np.float32(1)))
        return f, f.Mul(f.Mul(x, half), y) if half_first else f.Mul(f.Mul(x, y), half)

    return make


CASES |= {f"gelu_{a}_{b}": gelu(a, b) for a in (False, True) for b in (False, True)}


@case
def squeeze_and_excite() -> tuple[File, str]:
    f = File(6, 5, 7)
    y = f.conv(f.GlobalAveragePool("x"), 2, 6, 1, 1)
    return f, f.Mul("x", f.Sigmoid(f.conv(f.Relu(y), 6, 2, 1, 1)))


@case
def channel_shuffle() -> tuple[File, str]:
    f = File(8, 3, 5)
    left, right = f.Split("x", f.whole(3, 5), axis=1, outputs=2)
    y = f.Concat(right, left, axis=1)
    n = f.Gather(f.Shape(y), f.constant(np.int64(0)))
    y = f.Reshape(y, f.Concat(f.Unsqueeze(n, f.whole(0)), f.whole(2, 4, 3, 5), axis=0))
    y = f.Transpose(y, perm=[0, 2, 1, 3, 4])
    y = f.Reshape(y, f.whole(-1, 8, 3, 5))
    return f, f.Slice(y, f.whole(1), f.whole(7), f.whole(1), f.whole(2))


@case
def flattened_by_shapes() -> tuple[File, str]:
    f = File(3, 4, 4)
    n = f.Unsqueeze(f.Gather(f.Shape("x"), f.constant(np.int64(0))), f.whole(0))
    y = f.Reshape("x", f.Concat(n, f.whole(-1), axis=0))
    return f, f.Gemm(y, f.numbers(48, 5), f.numbers(5))


@case
def a_fixed_batch() -> tuple[File, str]:
    f = File(3, 4, 4, batch=3)
    y = f.Reshape(f.Relu("x"), f.whole(3, 48))
    return f, f.Softmax(f.Gemm(y, f.numbers(48, 5), f.numbers(5)), axis=1)


@case
def pooling() -> tuple[File, str]:
    f = File(3, 9, 12)
    y = f.MaxPool("x", kernel_shape=[3, 2], strides=[2, 3], pads=[1, 0, 1, 0], ceil_mode=1)
    y = f.AveragePool(y, kernel_shape=[3, 3], strides=[1, 1], pads=[1, 1, 1, 1])
    y = f.AveragePool(y, kernel_shape=[2, 2], pads=[1, 1, 1, 1], count_include_pad=1)
    mean, most = f.ReduceMean(y, axes=[2, 3]), f.GlobalMaxPool(y)
    y = f.Concat(mean, most, axis=1)
    return f, f.Squeeze(y, f.whole(2, 3))


@case
def resized() -> tuple[File, str]:
    f = File(2, 4, 5)
    y = f.Resize(
        "x", "", f.constant(np.array([1, 1, 2, 3], np.float32)), mode="nearest",
        coordinate_transformation_mode="asymmetric", nearest_mode="floor",
    )  # fmt: skip
    y = f.Resize(y, "", "", f.whole(0, 2, 11, 7), mode="linear", coordinate_transformation_mode="half_pixel")
    return f, f.Resize(
        y, "", "", f.whole(0, 2, 5, 9), mode="linear", coordinate_transformation_mode="align_corners"
    )


@case
def padded() -> tuple[File, str]:
    f = File(2, 4, 5)
    y = f.Pad("x", f.whole(0, 0, 1, 2, 0, 0, 3, 0))
    return f, f.Pad(y, f.whole(0, 0, 0, 1, 0, 0, 0, -1), f.constant(np.float32(1.5)))


@case
def arithmetic() -> tuple[File, str]:
    f = File(3, 4, 5)
    y = f.Add("x", f.Relu(f.Sub("x", f.constant(np.array([0.5], np.float32)))))
    y = f.Mul(f.numbers(3, 1, 1), y)
    y = f.Div(y, f.constant(np.float32(4)))
    y = f.Sub(f.constant(np.float32(1)), y)
    return f, f.Add(f.Identity(y), f.numbers(1, 3, 1, 1))


@case
def clip_by_attributes_of_opset_11() -> tuple[File, str]:
    f = File(2, 3, 3, opset=11)
    return f, f.Squeeze(
        f.GlobalAveragePool(f.Clip("x", f.constant(np.float32(0)), f.constant(np.float32(6))))
    )


@pytest.mark.parametrize("name", CASES)
def test_every_form_is_onnxruntimes(name: str, tmp_path: Path) -> None:
    f, output = CASES[name]()
    model = f.model(output)
    if name == "resized":  # a batch of sizes must be what it is for ONNX Runtime
        for initializer in model.graph.initializer:
            array = numpy_helper.to_array(initializer)
            if array.shape == (4,) and array.dtype == np.int64:
                initializer.CopyFrom(numpy_helper.from_array(np.array([3, *array[1:]]), initializer.name))
    same_as_onnxruntime(model, tmp_path)


def test_modules_have_the_names_of_their_weights(tmp_path: Path) -> None:
    f = File(3, 8, 8)
    y = f.Conv("x", f.numbers(4, 3, 3, 3, name="features.0.conv.weight"))
    y = f.BatchNormalization(
        y, f.numbers(4, name="features.0.bn.weight"), f.numbers(4), f.numbers(4), f.numbers(4, low=0.1)
    )
    y = f.Gemm(f.Flatten(f.GlobalAveragePool(y)), f.numbers(5, 4, name="classifier.weight"), transB=1)
    network = same_as_onnxruntime(f.model(y), tmp_path)
    assert type(network.get_submodule("features.0.conv")) is torch.nn.Conv2d
    assert type(network.get_submodule("features.0.bn")) is torch.nn.BatchNorm2d
    assert type(network.get_submodule("classifier")) is torch.nn.Linear
    assert network.get_submodule("features.0.bn").momentum == pytest.approx(0.1)


def test_the_size_of_the_images_may_be_open(tmp_path: Path) -> None:
    f, output = small()
    model = f.model(output)
    for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_param = "side"
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(EdgeBcsError, match="does not say the size of its images"):
        from_onnx(tmp_path / "net.onnx")
    network = from_onnx(tmp_path / "net.onnx", (3, 12, 10))
    assert network(torch.rand(2, 3, 12, 10)).shape == (2, 10)
    onnx.save(f.model(output), tmp_path / "fixed.onnx")
    with pytest.raises(EdgeBcsError, match=r"is for images of the shape \[3, 8, 8\], not \[3, 12, 10\]"):
        from_onnx(tmp_path / "fixed.onnx", (3, 12, 10))


def test_the_whole_way_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    f = File(1, 8, 8)
    y = f.Relu(f.Conv("x", f.numbers(6, 1, 3, 3, name="stem.weight"), f.numbers(6)))
    y = f.Gemm(
        f.Flatten(f.GlobalAveragePool(y)), f.numbers(10, 6, name="head.weight"), f.numbers(10), transB=1
    )
    onnx.save(f.model(y), "net.onnx")
    exported = run("export", "--model", "net.onnx", "--sparsity", 0, "-o", "a", "--plain-eval", "--json")
    assert exported.exit_code == 0, exported.output
    x = np.random.default_rng(0).random((4, 1, 8, 8), np.float32)
    (theirs,) = onnxruntime.InferenceSession("net.onnx").run(None, {"x": x})
    (ours,) = onnxruntime.InferenceSession("a/eval_model.plain.onnx").run(None, {"input": x})
    assert np.abs(theirs - ours).max() < 1e-5
    short = ("--data", "digits", "--steps", 1)
    trained = run("train", "--model", "net.onnx", *short, "--sparsity", 0.5, "--device", "cpu", "-o", "t")
    assert trained.exit_code == 0, trained.output
    again = run("evaluate", "t", "--model", "net.onnx", "--data", "digits", "--attack", "fgsm")
    assert again.exit_code == 0, again.output
    refused = run("export", "--model", "none.onnx")
    assert refused.exit_code == 1 and "there is no file none.onnx" in refused.output
