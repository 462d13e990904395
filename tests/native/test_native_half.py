"""Operators in half precision against torch in float64 on what is rounded as they round it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from edge_bcs.runtime.library import half_kernels
from helpers import programs
from helpers.convolutions import Case, Problem
from helpers.half import FP16, LEAST, ULP, pack_half, rounded, unpack_half
from helpers.operators import images, pack_bits, run, tensor
from torch.nn import functional

pytestmark = pytest.mark.skipif(
    not programs.EMULATOR and half_kernels() == 0, reason="no half precision here"
)

F, U = np.float32, np.uint8
# What sums of rounded numbers may be off by, relative to the sizes of their terms. bfloat16 is added in
# float32, FP16 in FP16, in runs of 64 terms; `check_half` compares these to the bit.
SUMS = 2.0**-9 if FP16 else 1e-5

LAYERS = [
    Case(3, 5, 6, 8),
    Case(4, 7, 5, 7, affine=False, relu=False, addend=True),
    Case(6, 9, 9, 11, kernel=(5, 3), padding=(2, 1, 2, 1), mask_kind=1, extra_halo=1),
    Case(5, 6, 8, 16, mask_kind=2, addend=True),
    Case(7, 4, 4, 4, kernel=(1, 1), padding=0, mask_kind=2),
    Case(4, 6, 9, 9, stride=2, mask_kind=2, addend=True),
    Case(4, 6, 8, 10, kernel=(1, 1), padding=0, stride=2, mask_kind=1),
    Case(3, 4, 10, 13, stride=3, padding=2, mask_kind=2),
    Case(3, 4, 9, 12, stride=(1, 2), dilations=(2, 1), padding=(2, 1, 2, 1), addend=True),
    Case(30, 17, 1, 1, kernel=(1, 1), padding=0, density=0.7),
    Case(31, 40, 1, 1, kernel=(1, 1), padding=0, density=0.7, mask_kind=1, addend=True),
    Case(5, 6, 1, 1, mask_kind=2, extra_halo=1),
    Case(8, 20, 2, 2, density=0.9, blocks=3),
    Case(6, 4, 3, 1, kernel=(3, 1), padding=(1, 0, 1, 0), mask_kind=2),
    Case(520, 3, 2, 3, density=1.0),
    Case(950, 2, 2, 3, density=1.0),  # rows of more entries than a kernel makes ready at once
    Case(91, 80, 3, 9, mask_kind=2),  # channels in parts, and more rows than may wait for the next part
    Case(5, 6, 1, 1, stride=2, mask_kind=2, addend=True),
    Case(12, 9, 9, 17, stride=2, density=0.4, mask_kind=2, addend=True),
]
DEPTHWISE = [
    Case(5, 5, 12, 20, groups=5, blocks=2, addend=True, mask_kind=2, extra_halo=1),
    Case(6, 12, 17, 23, kernel=(5, 5), padding=2, stride=2, groups=6, mask_kind=1),
    Case(3, 3, 9, 250, kernel=(7, 7), padding=3, groups=3, relu=False),
    Case(5, 10, 14, 14, stride=2, padding=(0, 0, 1, 1), groups=5, blocks=3, mask_kind=2, addend=True),
    Case(8, 8, 9, 8, dilations=(2, 2), padding=2, groups=8, mask_kind=2),
    Case(7, 7, 40, 31, stride=(3, 2), padding=(2, 1, 0, 1), groups=7, mask_kind=2),
    Case(4, 4, 33, 9, kernel=(1, 5), padding=(0, 2, 0, 2), groups=4, affine=False, addend=True),
    Case(3, 9, 7, 7, kernel=(7, 7), padding=0, groups=3, mask_kind=1),
    Case(5, 5, 1, 1, kernel=(1, 1), padding=0, groups=5, mask_kind=2),
    Case(4, 4, 2, 511, groups=4),
    Case(2, 2, 20, 21, kernel=(9, 9), padding=4, groups=2, mask_kind=2),
]


def variants() -> Iterator[Case]:
    for seed, layer in enumerate(LAYERS):
        for algorithm, dense in (("sparse", False), ("dense", False), ("winograd", False), ("dense", True)):
            if (algorithm == "winograd" and seed % 3) or (dense and seed % 2):
                continue
            lanes = 8 if (seed + len(algorithm)) % 3 == 0 else 16
            yield replace(
                layer, algorithm=algorithm, dense=dense, lanes=lanes, seed=seed, half=True, threads=2,
                blocks=max(layer.blocks, 1 + seed % 2),
            )  # fmt: skip
    for seed, layer in enumerate(DEPTHWISE):
        algorithm, lanes = "depthwise", 8 if seed % 3 == 0 else 16
        yield replace(layer, algorithm=algorithm, dense=True, lanes=lanes, seed=seed, half=True, threads=2)


def close(made: np.ndarray, wanted: np.ndarray, terms: np.ndarray) -> None:
    """Whether each number is the wanted one rounded once; ``terms``: the sizes of what was added, summed."""
    allowed = ULP * np.abs(wanted) + SUMS * terms + LEAST
    assert np.all(np.abs(made - wanted) <= allowed), float(np.max(np.abs(made - wanted) / allowed))


def doubles(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float64))


@pytest.mark.parametrize("case", list(variants()), ids=str)
def test_convolution(case: Case) -> None:
    problem = Problem(case)
    top, left, bottom, right = case.pads
    rows = slice(problem.slot, problem.slot + case.out_channels)
    scale, shift = np.ones(case.out_channels, F), np.zeros(case.out_channels, F)
    if case.affine:
        scale, shift = problem.affine.reshape(2, -1)[:, rows]

    def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        padded = functional.pad(x, (left, right, top, bottom))
        return functional.conv2d(
            padded, weight, stride=case.strides, dilation=case.dilations, groups=case.groups
        )

    # The scale of dy is multiplied into the weights before they are rounded; with FP16 that of y, too. Where
    # depthwise layers are computed in float32, their weights are not rounded.
    planes = case.algorithm == "depthwise" and not FP16
    store = (lambda weight: weight.astype(np.float64)) if planes else rounded
    scaled = doubles(store(problem.weight * scale[:, None, None, None]))
    if FP16:
        scale = np.ones_like(scale)
    x, weight = doubles(rounded(problem.x)), scaled if FP16 else doubles(store(problem.weight))
    factor, summand = (doubles(array)[:, None, None] for array in (scale, shift))
    residual = doubles(rounded(problem.residual)) * case.addend
    z = (forward(x, weight) * factor + summand + residual).numpy()
    terms = (forward(x.abs(), weight.abs()) * factor.abs() + summand.abs() + residual.abs()).numpy()
    made = problem.forward()
    close(made["y"], np.maximum(z, 0) if case.relu else z, terms)
    if case.bits:
        sure = pack_bits((np.abs(z) > SUMS * terms).astype(F), case.lanes)
        assert np.array_equal(made["bits"] & sure, pack_bits(z, case.lanes) & sure)

    addend = doubles(rounded(problem.addend)) * case.addend
    passes = rounded(problem.mask) > 0 if case.mask_kind == 1 else problem.mask > 0

    def backward(dy: torch.Tensor, weight: torch.Tensor, addend: torch.Tensor) -> np.ndarray:
        source = torch.zeros_like(x).requires_grad_()
        (dx,) = torch.autograd.grad(forward(source, weight), source, dy)
        return (dx + addend).numpy() * (passes if case.mask_kind else 1)

    dy = doubles(rounded(problem.dy))
    made = problem.backward(weights=False)
    close(made["dx"], backward(dy, scaled, addend), backward(dy.abs(), scaled.abs(), addend.abs()))


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("window", [(4, 6, 2, 2, 0), (7, 9, 3, 2, 1), (5, 5, 3, 1, 1), (6, 7, 2, 2, 0)])
def test_max_pool(window: tuple[int, ...], lanes: int) -> None:
    height, width, kernel, stride, padding = window
    out_height, out_width = ((size + 2 * padding - kernel) // stride + 1 for size in (height, width))
    attributes: dict[str, Any] = {
        "channels": 3, "in_height": height, "in_width": width, "out_height": out_height,
        "out_width": out_width, "lanes": lanes, "in_halo": 1, "out_halo": 2,
        "kernel": [kernel] * 2, "strides": [stride] * 2, "pads": [padding] * 4,
    }  # fmt: skip
    array = images((2, lanes, 3, height, width))
    x = tensor(rounded(array))
    y = functional.max_pool2d(x, kernel, stride, padding)
    given = {"x": pack_half(array, lanes, 1)}
    made = run("MaxPool", given, {"y": F, "choice": U}, half=True, threads=2, **attributes)
    assert np.array_equal(unpack_half(made["y"], 3, out_height, out_width, 2), y.detach().numpy())
    dy = images((2, lanes, 3, out_height, out_width), seed=1)
    # Equal numbers are common here; the first of them is chosen by both.
    y.backward(doubles(rounded(dy)))
    given = {"dy": pack_half(dy, lanes, 2), "choice": made["choice"]}
    dx = run("MaxPoolGrad", given, {"dx": F}, half=True, threads=2, **attributes)["dx"]
    assert x.grad is not None
    close(unpack_half(dx, 3, height, width, 1), x.grad.numpy(), np.abs(x.grad.numpy()))


@pytest.mark.parametrize("function", ["relu", "relu6"])
@pytest.mark.parametrize("lanes", [8, 16])
def test_max_pool_of_pairs_passes_gradients_where_it_does_not_clip(function: str, lanes: int) -> None:
    attributes: dict[str, Any] = {
        "channels": 3, "in_height": 4, "in_width": 10, "out_height": 2, "out_width": 5,
        "lanes": lanes, "in_halo": 1, "out_halo": 0, "kernel": [2] * 2, "strides": [2] * 2, "pads": [0] * 4,
    }  # fmt: skip
    array, dy = 4 * images((2, lanes, 3, 4, 10)) - 2, images((2, lanes, 3, 2, 5), seed=1)
    x = tensor(rounded(array))
    y = getattr(functional, function)(functional.max_pool2d(x, 2))
    y.backward(doubles(rounded(dy)))
    given = {"x": pack_half(array, lanes, 1)}
    made = run("MaxPool", given, {"y": F, "choice": U}, half=True, activation=function, **attributes)
    assert np.array_equal(unpack_half(made["y"], 3, 2, 5, 0), y.detach().numpy())
    given = {"dy": pack_half(dy, lanes, 0), "choice": made["choice"]}
    dx = run("MaxPoolGrad", given, {"dx": F}, half=True, **attributes)["dx"]
    assert x.grad is not None
    assert np.array_equal(unpack_half(dx, 3, 4, 10, 1), x.grad.numpy())


@pytest.mark.parametrize("window", [(4, 6, 2, 2), (8, 9, 8, 8), (5, 7, 3, 2), (4, 4, 1, 1)])
def test_average_pool(window: tuple[int, ...], lanes: int = 16) -> None:
    height, width, kernel, stride = window
    out_height, out_width = ((size - kernel) // stride + 1 for size in (height, width))
    attributes: dict[str, Any] = {
        "channels": 3, "in_height": height, "in_width": width, "out_height": out_height,
        "out_width": out_width, "lanes": lanes, "in_halo": 1, "out_halo": 0,
        "kernel": [kernel] * 2, "strides": [stride] * 2, "pads": [0] * 4,
    }  # fmt: skip
    array, addend = images((2, lanes, 3, height, width)), images((2, lanes, 3, height, width), seed=3)
    x = tensor(rounded(array))
    y = functional.avg_pool2d(x, kernel, stride)
    made = run("AveragePool", {"x": pack_half(array, lanes, 1)}, {"y": F}, half=True, **attributes)["y"]
    wanted = y.detach().numpy()
    close(unpack_half(made, 3, out_height, out_width, 0), wanted, np.ones_like(wanted))
    dy = images((2, lanes, 3, out_height, out_width), seed=1)
    y.backward(doubles(rounded(dy)))
    given = {"dy": pack_half(dy, lanes, 0), "addend": pack_half(addend, lanes, 1), "mask": None}
    dx = run("AveragePoolGrad", given, {"dx": F}, half=True, mask_kind=0, **attributes)["dx"]
    assert x.grad is not None
    wanted = x.grad.numpy() + rounded(addend)
    close(unpack_half(dx, 3, height, width, 1), wanted, np.ones_like(wanted))


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("width", [1, 4, 7])
def test_elementwise(width: int, lanes: int) -> None:
    shape = (2, lanes, 3, 2, width)
    a, b, mask = (images(shape, seed=seed) for seed in range(3))
    affine = np.linspace(-1, 1, 8, dtype=F)
    size = {"channels": 3, "height": 2, "width": width, "lanes": lanes}
    halos = {"in_halo": 1, "out_halo": 2}
    x = rounded(a).astype(np.float64)
    z = x * affine[:3, None, None] + affine[4:7, None, None]
    made = run(
        "Affine", {"x": pack_half(a, lanes, 1), "affine": affine}, {"y": F, "bits": U}, half=True,
        affine=0, relu=1, **size, **halos,
    )  # fmt: skip
    close(unpack_half(made["y"], 3, 2, width, 2), np.maximum(z, 0), np.ones_like(z))
    assert np.array_equal(made["bits"], pack_bits(z, lanes))
    given = {"dy": pack_half(a, lanes, 1), "affine": affine, "addend": pack_half(b, lanes, 2)}
    given["mask"] = pack_bits(mask, lanes)
    made = run(
        "AffineInputGrad", given, {"dx": F}, half=True, affine=0, dy_halo=1, dx_halo=2, mask_kind=2, **size
    )
    wanted = (x * affine[:3, None, None] + rounded(b)) * (mask > 0)
    close(unpack_half(made["dx"], 3, 2, width, 2), wanted, np.ones_like(wanted))
    given = {"a": pack_half(a, lanes, 1), "b": pack_half(b, lanes, 0), "mask": pack_half(mask, lanes, 1)}
    attributes: dict[str, Any] = {"a_halo": 1, "b_halo": 0, "out_halo": 2, "mask_kind": 1, "mask_halo": 1}
    made = run("MaskedAdd", given, {"y": F}, half=True, **size, **attributes)
    wanted = (x + rounded(b)) * (rounded(mask) > 0)
    close(unpack_half(made["y"], 3, 2, width, 2), wanted, np.ones_like(wanted))
    given = {"a": pack_half(a, lanes, 1), "b": pack_half(b, lanes, 0)}
    attributes = {"a_halo": 1, "b_halo": 0, "out_halo": 2, "activation": "silu", "pre_halo": 1}
    made = run("Add", given, {"y": F, "bits": None, "pre": F}, half=True, **size, **attributes)
    total = x + rounded(b)
    close(unpack_half(made["pre"], 3, 2, width, 1), total, np.ones_like(total))
    close(unpack_half(made["y"], 3, 2, width, 2), total / (1 + np.exp(-total)), np.ones_like(total))


def test_the_ends(lanes: int = 16) -> None:
    """Images in, logits to their gradient, and the step along the sign of the images' gradient."""
    x = np.random.default_rng(0).random((2 * lanes, 3, 4, 5)).astype(F)
    stack = run("PackInput", {"x": x}, {"stack": F}, half=True, lanes=lanes, halo=1)["stack"]
    assert np.array_equal(unpack_half(stack, 3, 4, 5, 1), rounded(x))

    logits, target = images((2, lanes, 4, 1, 1)), np.full((2 * lanes, 4), 0.25, F)
    given = {"logits": pack_half(logits, lanes, 0), "target": target}
    made = run("SoftmaxDifference", given, {"dlogits": F}, half=True)["dlogits"]
    wanted = torch.softmax(doubles(rounded(logits)[:, :, 0, 0]), dim=1).numpy() - target
    if FP16:  # each image's is multiplied with a power of two, far from either end of the range
        wanted *= 2.0 ** (6 - np.frexp(np.abs(wanted).max(axis=1, keepdims=True))[1])
    close(unpack_half(made, 4, 1, 1, 0)[:, :, 0, 0], wanted, np.ones_like(wanted))

    dx = images((2, lanes, 3, 4, 5), seed=1)
    given = {"x_adv": x, "x": x, "dx": pack_half(dx, lanes, 1)}
    given |= {"step_size": np.array([0.01], F), "epsilon": np.array([0.02], F)}
    moved = run("PgdStep", given, {"x_adv_out": F}, half=True, lanes=lanes, dx_halo=1)["x_adv_out"]
    assert np.allclose(moved, np.clip(x + 0.01 * np.sign(dx), 0, 1), atol=1e-6)


def test_a_gradient_keeps_its_signs_however_small_it_is(lanes: int = 8) -> None:
    """Images that a network is sure of have gradients far below what FP16 can hold."""
    logits = np.zeros((lanes, 3, 1, 1), F)
    logits[:, 0] = np.linspace(2, 20, lanes, dtype=F)[:, None, None]
    given = {"logits": pack_half(logits, lanes, 0), "target": np.tile(np.array([1, 0, 0], F), (lanes, 1))}
    made = run("SoftmaxDifference", given, {"dlogits": F}, half=True)["dlogits"]
    signs = np.sign(unpack_half(made, 3, 1, 1, 0)[:, :, 0, 0])
    assert np.array_equal(signs, np.tile([-1, 1, 1], (lanes, 1)))


@pytest.mark.skipif(not FP16, reason="bfloat16 is added in float32")
def test_fp16_rounds_where_the_scalar_kernels_round() -> None:
    result = programs.run("check_half", 40)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith(" 0 wrong\n")


def test_depthwise_rows_that_are_too_long_are_refused() -> None:
    case = Case(2, 2, 8, 300, kernel=(9, 9), padding=4, groups=2, dense=True, lanes=16, half=True)
    with pytest.raises(Exception, match="rows of 300 pixels are too long for this layer in half precision"):
        Problem(replace(case, algorithm="depthwise")).forward()


def test_what_has_no_half_precision_says_so() -> None:
    size = {"channels": 3, "height": 2, "width": 4, "lanes": 4, "a_halo": 0, "b_halo": 0, "out_halo": 0}
    a = np.zeros((1, 24, 4), F)
    with pytest.raises(Exception, match="half precision takes 8 or 16 lanes"):
        run("Add", {"a": a, "b": a}, {"y": F}, half=True, **size)
    with pytest.raises(Exception, match="no half-precision form"):
        run("Narrow", {"x": a}, {"y": np.uint16}, half=True)
