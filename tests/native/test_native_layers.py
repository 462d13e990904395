"""Packing, pooling, affine, sums and batch norm against torch in float64: halos, odd sizes, 1 to 16 lanes."""

# mypy: disable-error-code="arg-type, dict-item"

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from helpers.operators import images, pack, pack_bits, run, sizes, tensor, unpack

F = np.float32
U8 = np.uint8
# blocks, lanes, channels, height, width
SHAPES = [(1, 1, 1, 1, 1), (2, 3, 5, 7, 4), (3, 4, 2, 5, 9), (1, 16, 3, 6, 6), (2, 8, 4, 3, 5)]


def close(actual: np.ndarray, expected: torch.Tensor | np.ndarray, tolerance: float = 1e-5) -> None:
    if isinstance(expected, torch.Tensor):
        expected = expected.detach().numpy()
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


MASKS = ["none", "stack", "bits"]


def mask_of(kind: str, shape: tuple[int, ...], lanes: int, halo: int) -> tuple[np.ndarray, dict[str, Any]]:
    """A mask f32 of zeros and ones as a reference wants it, and the operator's input and attributes."""
    values = np.random.default_rng(7).normal(size=shape).astype(F)
    if kind == "none":
        return np.ones(shape, F), {"mask": None, "mask_kind": 0}
    if kind == "stack":
        return (values > 0).astype(F), {"mask": pack(values, lanes, halo), "mask_kind": 1, "mask_halo": halo}
    return (values > 0).astype(F), {"mask": pack_bits(values, lanes), "mask_kind": 2}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("halo", [0, 1, 2])
def test_pack_input(shape: tuple[int, ...], halo: int) -> None:
    x = images(shape)
    lanes = shape[1]
    made = run("PackInput", {"x": x}, {"stack": F}, lanes=lanes, halo=halo, threads=2)["stack"]
    assert made.tobytes() == pack(x, lanes, halo).tobytes()


@pytest.mark.parametrize("halo", [0, 2])
def test_pack_input_normalises_pixels_and_no_halo(halo: int) -> None:
    x = images((2, 16, 3, 5, 4))
    scale, shift = [2.0, 0.5, -1.0], [0.25, -3.0, 0.0]
    made = run("PackInput", {"x": x}, {"stack": F}, lanes=16, halo=halo, scale=scale, shift=shift)["stack"]
    factors, summands = (np.array(numbers, F)[:, None, None] for numbers in (scale, shift))
    assert np.allclose(made, pack(x * factors + summands, 16, halo), rtol=0, atol=1e-6)
    with pytest.raises(Exception, match="attribute scale has 3 numbers, shift 2"):
        run("PackInput", {"x": x}, {"stack": F}, lanes=16, halo=halo, scale=scale, shift=shift[:2])
    with pytest.raises(Exception, match="attribute scale has 3 numbers for 2 channels"):
        run("PackInput", {"x": x[:, :2]}, {"stack": F}, lanes=16, halo=halo, scale=scale, shift=shift)


def test_pack_input_refuses() -> None:
    x = images((1, 2, 1, 3, 3))
    for bad in (np.nan, np.inf):
        broken = x.copy()
        broken[1, 0, 2, 2] = bad
        with pytest.raises(Exception, match="PackInput: the input has a pixel that is not finite"):
            run("PackInput", {"x": broken}, {"stack": F}, lanes=2, halo=1)
    with pytest.raises(Exception, match="batch of 2 is not a multiple of 4"):
        run("PackInput", {"x": x}, {"stack": F}, lanes=4, halo=1)
    with pytest.raises(Exception, match="not \\[n, channels, height, width\\]"):
        run("PackInput", {"x": x[0]}, {"stack": F}, lanes=1, halo=1)
    with pytest.raises(Exception, match="attribute lanes is 0"):
        run("PackInput", {"x": x}, {"stack": F}, lanes=0, halo=1)
    with pytest.raises(Exception, match="attribute halo is missing"):
        run("PackInput", {"x": x}, {"stack": F}, lanes=1)


def test_unpack_output() -> None:
    logits = images((2, 3, 5, 1, 1))
    made = run("UnpackOutput", {"stack": pack(logits, 3, 0)}, {"y": F})["y"]
    assert made.tolist() == logits[:, :, 0, 0].tolist()
    with pytest.raises(Exception, match="UnpackOutput: the stack is \\[2, 3\\]"):
        run("UnpackOutput", {"stack": np.zeros((2, 3), F)}, {"y": F})


@pytest.mark.parametrize("shape", SHAPES)
def test_pgd_step(shape: tuple[int, ...]) -> None:
    lanes = shape[1]
    generator = np.random.default_rng(3)
    x = generator.uniform(0, 1, images(shape).shape).astype(F)
    adversarial = np.clip(x + generator.uniform(-0.05, 0.05, x.shape), 0, 1).astype(F)
    gradient = generator.integers(-1, 2, x.shape).astype(F) * generator.uniform(0.1, 2, x.shape).astype(F)
    step, epsilon = F(0.02), F(0.04)
    inputs = {
        "x_adv": adversarial,
        "x": x,
        "dx": pack(gradient, lanes, 1),
        "step_size": np.array([step]),
        "epsilon": np.array([epsilon]),
    }
    made = run("PgdStep", inputs, {"x_adv": F}, lanes=lanes, dx_halo=1, threads=2)["x_adv"]
    moved = torch.from_numpy(adversarial) + step * torch.from_numpy(gradient).sign()
    centre = torch.from_numpy(x)
    expected = torch.minimum(torch.maximum(moved, centre - epsilon), centre + epsilon).clamp(0, 1)
    assert made.tolist() == expected.numpy().tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_adv": np.zeros((2, 1, 3, 2), F)}, "x_adv is \\[2, 1, 3, 2\\]"),
        ({"dx": np.zeros((2, 3, 1), F)}, "dx is \\[2, 3, 1\\]"),
        ({"dx": np.full((1, 9, 2), np.nan, F)}, "the gradient of the input is not finite"),
        ({"step_size": np.array([-1], F)}, "step_size is not one finite number"),
        ({"epsilon": np.array([np.inf], F)}, "epsilon is not one finite number"),
        ({"epsilon": np.array([1, 1], F)}, "epsilon is not one finite number"),
    ],
)
def test_pgd_step_refuses(changes: dict[str, np.ndarray], message: str) -> None:
    inputs = {
        "x_adv": np.zeros((2, 1, 3, 3), F),
        "x": np.zeros((2, 1, 3, 3), F),
        "dx": np.zeros((1, 9, 2), F),
        "step_size": np.ones(1, F),
        "epsilon": np.ones(1, F),
    }
    with pytest.raises(Exception, match="PgdStep: " + message):
        run("PgdStep", inputs | changes, {"x_adv": F}, lanes=2, dx_halo=0)


# height, width, kernel, stride, padding
WINDOWS = [
    (6, 8, 2, 2, 0),
    (7, 5, 2, 2, 0),
    (5, 9, 3, 2, 1),
    (6, 6, 3, 1, 1),
    (4, 4, 4, 4, 0),
    (9, 7, 3, 4, 0),
    (4, 6, 1, 1, 0),
]


def pool_attributes(
    lanes: int, channels: int, window: tuple[int, ...], in_halo: int, out_halo: int
) -> tuple[dict[str, int], int, int]:
    height, width, kernel, stride, padding = window
    out_height, out_width = ((size + 2 * padding - kernel) // stride + 1 for size in (height, width))
    attributes = {
        "channels": channels,
        "in_height": height,
        "in_width": width,
        "in_halo": in_halo,
        "out_height": out_height,
        "out_width": out_width,
        "out_halo": out_halo,
        "kernel": kernel,
        "stride": stride,
        "padding": padding,
        "lanes": lanes,
    }
    return attributes, out_height, out_width


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("blocks", "lanes"), [(1, 16), (2, 3), (3, 1)])
@pytest.mark.parametrize("rectify", [0, 1])
def test_max_pool(window: tuple[int, ...], blocks: int, lanes: int, rectify: int) -> None:
    height, width, kernel, stride, padding = window
    attributes, out_height, out_width = pool_attributes(lanes, 3, window, 1, 2)
    array = images((blocks, lanes, 3, height, width))
    x = tensor(array)
    y = functional.max_pool2d(functional.relu(x) if rectify else x, kernel, stride, padding)
    made = run(
        "MaxPool",
        {"x": pack(array, lanes, 1)},
        {"y": F, "choice": U8},
        **attributes,
        relu=rectify,
        threads=2,
    )
    close(unpack(made["y"], 3, out_height, out_width, 2), y, 0)
    alone = run("MaxPool", {"x": pack(array, lanes, 1)}, {"y": F, "choice": None}, **attributes, relu=rectify)
    assert alone["y"].tobytes() == made["y"].tobytes()

    dy = images((blocks, lanes, 3, out_height, out_width), seed=1)
    y.backward(torch.from_numpy(dy.astype(np.float64)))
    inputs = {"dy": pack(dy, lanes, 2), "choice": made["choice"]}
    dx = run("MaxPoolGrad", inputs, {"dx": F}, **attributes, threads=2)["dx"]
    close(unpack(dx, 3, height, width, 1), x.grad, 1e-6)


def test_max_pool_takes_the_first_of_equals() -> None:
    attributes, _, _ = pool_attributes(1, 1, (2, 2, 2, 2, 0), 0, 0)
    x = np.array([[[[1.0, 2.0], [2.0, 2.0]]]], F)
    made = run("MaxPool", {"x": pack(x, 1, 0)}, {"y": F, "choice": U8}, **attributes)
    assert made["choice"].tolist() == [[[1]]]
    stopped = run("MaxPool", {"x": pack(-x, 1, 0)}, {"y": F, "choice": U8}, **attributes, relu=1)
    assert stopped["choice"].tolist() == [[[255]]] and stopped["y"].tolist() == [[[0]]]


@pytest.mark.parametrize("lanes", [3, 4])
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_max_pool_lets_not_a_number_be_seen(lanes: int, place: int) -> None:
    attributes, _, _ = pool_attributes(lanes, 1, (2, 2, 2, 2, 0), 0, 0)
    x = np.arange(lanes * 4, dtype=F).reshape(lanes, 1, 2, 2)
    x.reshape(lanes, 4)[1, place] = np.nan
    y = run("MaxPool", {"x": pack(x, lanes, 0)}, {"y": F}, **attributes)["y"]
    assert np.isnan(y[0, 0]).tolist() == [lane == 1 for lane in range(lanes)]


@pytest.mark.parametrize("window", [window for window in WINDOWS if window[4] == 0])
@pytest.mark.parametrize(("blocks", "lanes"), [(1, 16), (2, 3), (3, 1)])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("joins", [False, True])
def test_average_pool(window: tuple[int, ...], blocks: int, lanes: int, kind: str, joins: bool) -> None:
    height, width, kernel, stride, _ = window
    attributes, out_height, out_width = pool_attributes(lanes, 3, window, 2, 1)
    array = images((blocks, lanes, 3, height, width))
    x = tensor(array)
    y = functional.avg_pool2d(x, kernel, stride)
    made = run("AveragePool", {"x": pack(array, lanes, 2)}, {"y": F}, **attributes, threads=2)["y"]
    close(unpack(made, 3, out_height, out_width, 1), y, 1e-6)

    dy = images((blocks, lanes, 3, out_height, out_width), seed=1)
    y.backward(torch.from_numpy(dy.astype(np.float64)))
    addend = images((blocks, lanes, 3, height, width), seed=2)
    passes, mask = mask_of(kind, array.shape, lanes, 1)
    inputs = {
        "dy": pack(dy, lanes, 1),
        "addend": pack(addend, lanes, 2) if joins else None,
        "mask": mask.pop("mask"),
    }
    dx = run("AveragePoolGrad", inputs, {"dx": F}, **attributes, **mask, threads=2)["dx"]
    close(unpack(dx, 3, height, width, 2), passes * (x.grad.numpy() + joins * addend), 1e-6)


# height, width, kernel, strides, padding at the top and bottom and at the sides, ceil_mode
ODD_WINDOWS = [
    (5, 9, (3, 1), (2, 3), (1, 0), False),
    (7, 4, (2, 4), (1, 2), (0, 2), True),
    (8, 6, (3, 3), (2, 2), (1, 1), True),
    (6, 7, (2, 2), (2, 2), (0, 0), True),
    (5, 8, (5, 3), (3, 3), (2, 0), True),
    (5, 7, (2, 2), (3, 4), (1, 1), True),
    (4, 70, (1, 64), (1, 5), (0, 32), False),
    (6, 5, (6, 5), (6, 5), (0, 0), False),
]


def odd_attributes(window: tuple[Any, ...], y: torch.Tensor, lanes: int) -> dict[str, Any]:
    height, width, kernel, strides, (down, across), _ = window
    return {
        "channels": 3,
        "in_height": height,
        "in_width": width,
        "in_halo": 1,
        "out_height": y.shape[2],
        "out_width": y.shape[3],
        "out_halo": 2,
        "kernel": kernel,
        "strides": strides,
        "pads": [down, across, down, across],
        "lanes": lanes,
    }


@pytest.mark.parametrize("window", ODD_WINDOWS)
@pytest.mark.parametrize(("blocks", "lanes"), [(1, 16), (2, 3), (3, 1), (1, 8)])
def test_max_pool_of_any_window(window: tuple[Any, ...], blocks: int, lanes: int) -> None:
    height, width, kernel, strides, padding, ceil = window
    array = images((blocks, lanes, 3, height, width))
    x = tensor(array)
    y = functional.max_pool2d(x, kernel, strides, padding, ceil_mode=ceil)
    attributes = odd_attributes(window, y, lanes)
    made = run("MaxPool", {"x": pack(array, lanes, 1)}, {"y": F, "choice": U8}, **attributes, threads=2)
    close(unpack(made["y"], 3, *y.shape[2:], 2), y, 0)
    dy = images((blocks, lanes, *y.shape[1:]), seed=1)
    y.backward(torch.from_numpy(dy.astype(np.float64)))
    inputs = {"dy": pack(dy, lanes, 2), "choice": made["choice"]}
    dx = run("MaxPoolGrad", inputs, {"dx": F}, **attributes, threads=2)["dx"]
    close(unpack(dx, 3, height, width, 1), x.grad, 1e-6)


def checked_average(x: torch.Tensor, y: torch.Tensor, attributes: dict[str, Any]) -> None:
    """AveragePool and its gradient against torch's ``y`` of ``x``."""
    array, lanes = x.detach().numpy().astype(F), attributes["lanes"]
    made = run("AveragePool", {"x": pack(array, lanes, 1)}, {"y": F}, **attributes, threads=2)["y"]
    close(unpack(made, *y.shape[1:], 2), y, 1e-6)
    dy = images((len(array) // lanes, lanes, *y.shape[1:]), seed=1)
    y.backward(torch.from_numpy(dy.astype(np.float64)))
    inputs = {"dy": pack(dy, lanes, 2), "addend": None, "mask": None}
    dx = run("AveragePoolGrad", inputs, {"dx": F}, **attributes, threads=2)["dx"]
    close(unpack(dx, *x.shape[1:], 1), x.grad, 1e-6)


@pytest.mark.parametrize("window", ODD_WINDOWS)
@pytest.mark.parametrize(("blocks", "lanes"), [(1, 16), (2, 3), (3, 1), (1, 8)])
@pytest.mark.parametrize("around", [False, True])
def test_average_pool_of_any_window(window: tuple[Any, ...], blocks: int, lanes: int, around: bool) -> None:
    height, width, kernel, strides, padding, ceil = window
    x = tensor(images((blocks, lanes, 3, height, width)))
    y = functional.avg_pool2d(x, kernel, strides, padding, ceil_mode=ceil, count_include_pad=around)
    checked_average(x, y, {**odd_attributes(window, y, lanes), "count_include_pad": int(around)})


@pytest.mark.parametrize("operator", ["MaxPool", "AveragePool"])
def test_pooling_pads_each_side_by_itself(operator: str) -> None:
    array = images((1, 4, 3, 6, 7))
    outside = functional.pad(tensor(array), (1, 2, 0, 1), value=-np.inf if operator == "MaxPool" else 0)
    pool = functional.max_pool2d if operator == "MaxPool" else functional.avg_pool2d
    y = pool(outside, (2, 3), (2, 2))
    attributes = odd_attributes((6, 7, (2, 3), (2, 2), (0, 0), False), y, 4) | {"pads": [0, 1, 1, 2]}
    made = run(operator, {"x": pack(array, 4, 1)}, {"y": F}, **attributes)["y"]
    close(unpack(made, *y.shape[1:], 2), y, 1e-6)


@pytest.mark.parametrize(
    ("size", "out"), [((7, 5), (3, 2)), ((6, 4), (2, 4)), ((3, 2), (5, 7)), ((9, 8), (1, 1))]
)
@pytest.mark.parametrize("lanes", [1, 3, 16])
def test_average_pool_with_windows_that_differ(
    size: tuple[int, int], out: tuple[int, int], lanes: int
) -> None:
    x = tensor(images((2, lanes, 3, *size)))
    y = functional.adaptive_avg_pool2d(x, out)
    attributes = odd_attributes((*size, (1, 1), (1, 1), (0, 0), False), y, lanes)
    checked_average(x, y, {**attributes, "adaptive": 1, "count_include_pad": 0})


@pytest.mark.parametrize(
    ("operator", "changes", "message"),
    [
        ("MaxPool", {"out_height": 5}, "does not give an output height of 5"),
        ("MaxPool", {"kernel": 16}, "a maximum over 16 by 16 pixels is over more than 255"),
        ("MaxPool", {"padding": 2}, "the padding 2 and 2 of a window of 2 pixels is no smaller than it"),
        ("MaxPool", {"padding": -1}, "attribute padding is -1, not in \\[0, 16384\\]"),
        ("MaxPool", {"kernel": [2, 2, 2]}, "the attribute kernel has 3 numbers, not 2"),
        ("MaxPool", {"pads": [0, 0, 0, 2]}, "the padding 0 and 2 of a window of 2"),
        ("MaxPool", {"adaptive": 1}, "a maximum has no windows that differ"),
        ("MaxPool", {"stride": 0}, "attribute stride is 0"),
        ("MaxPool", {"in_halo": 1}, "x is \\[2, 48, 3\\], not a stack"),
        ("MaxPool", {"channels": 0}, "0 channels"),
        ("MaxPool", {"lanes": 65}, "65 lanes"),
        ("AveragePool", {"out_width": 4}, "pooling 6 by 2 every 2 .*does not give an output width of 4"),
    ],
)
def test_pooling_refuses(operator: str, changes: dict[str, Any], message: str) -> None:
    attributes, _, _ = pool_attributes(3, 1, (8, 6, 2, 2, 0), 0, 0)
    if changes.get("kernel") == 16:
        attributes |= {"in_height": 16, "in_width": 16, "out_height": 1, "out_width": 1}
    x = pack(images((2, 3, 1, 8, 6)), 3, 0)
    with pytest.raises(Exception, match=f"{operator}: .*{message}"):
        run(operator, {"x": x}, {"y": F}, **(attributes | changes))


def test_pooling_gradient_refuses_wrong_shapes_and_survives_wrong_choices() -> None:
    attributes, out_height, out_width = pool_attributes(2, 1, (5, 5, 3, 2, 1), 0, 0)
    dy = pack(images((1, 2, 1, out_height, out_width)), 2, 0)
    with pytest.raises(Exception, match="MaxPoolGrad: choice is \\[1, 8, 2\\]"):
        run("MaxPoolGrad", {"dy": dy, "choice": np.zeros((1, 8, 2), U8)}, {"dx": F}, **attributes)
    outside = run("MaxPoolGrad", {"dy": dy, "choice": np.full((1, 9, 2), 99, U8)}, {"dx": F}, **attributes)
    assert not outside["dx"].any()
    with pytest.raises(Exception, match="mask_kind is 1 but there is no mask"):
        attributes, _, _ = pool_attributes(2, 1, (6, 6, 2, 2, 0), 0, 0)
        inputs = {"dy": pack(images((1, 2, 1, 3, 3)), 2, 0), "addend": None, "mask": None}
        run("AveragePoolGrad", inputs, {"dx": F}, **attributes, mask_kind=1)


A = 40  # slots of the affine tensor in the tests below
SLOT = 11


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rectify", [0, 1])
def test_affine(shape: tuple[int, ...], rectify: int) -> None:
    _, lanes, channels, height, width = shape
    array = images(shape)
    affine = np.random.default_rng(1).normal(size=2 * A).astype(F)
    scale, shift = (affine[start : start + channels].reshape(-1, 1, 1) for start in (SLOT, A + SLOT))
    expected = array.astype(np.float64) * scale + shift
    expected = np.maximum(expected, 0) if rectify else expected
    made = run(
        "Affine",
        {"x": pack(array, lanes, 2), "affine": affine},
        {"y": F, "bits": U8},
        **sizes(shape),
        in_halo=2,
        out_halo=1,
        affine=SLOT,
        relu=rectify,
        threads=2,
    )
    y = unpack(made["y"], channels, height, width, 1)
    close(y, expected, 1e-6)
    assert made["bits"].tolist() == pack_bits(y, lanes).tolist()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("joins", [False, True])
@pytest.mark.parametrize("operator", ["AffineGrad", "AffineInputGrad"])
def test_affine_gradients(shape: tuple[int, ...], kind: str, joins: bool, operator: str) -> None:
    _, lanes, channels, height, width = shape
    array, dy, addend = images(shape), images(shape, 1), images(shape, 2)
    affine, affine_grad = np.random.default_rng(1).normal(size=(2, 2 * A)).astype(F)
    x, parameters = tensor(array), tensor(affine)
    scale, shift = (parameters[start : start + channels].reshape(-1, 1, 1) for start in (SLOT, A + SLOT))
    (x * scale + shift).backward(torch.from_numpy(dy.astype(np.float64)))
    passes, mask = mask_of(kind, array.shape, lanes, 3)
    full = operator == "AffineGrad"
    inputs = {"dy": pack(dy, lanes, 1)} | ({"x": pack(array, lanes, 2)} if full else {})
    inputs |= {
        "affine": affine,
        "addend": pack(addend, lanes, 0) if joins else None,
        "mask": mask.pop("mask"),
    }
    inputs |= {"affine_grad": affine_grad} if full else {}
    halos = {"dy_halo": 1, "dx_halo": 0} | ({"in_halo": 2} if full else {})
    outputs = {"dx": F} | ({"affine_grad": F} if full else {})
    made = run(operator, inputs, outputs, **sizes(shape), **halos, **mask, affine=SLOT, threads=2)
    close(unpack(made["dx"], channels, height, width, 0), passes * (x.grad.numpy() + joins * addend), 1e-6)
    if full:
        close(made["affine_grad"], affine_grad + parameters.grad.numpy(), 1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_of_a_shift_alone(shape: tuple[int, ...]) -> None:
    _, lanes, channels, _, _ = shape
    dy, affine_grad = images(shape), np.random.default_rng(1).normal(size=2 * A).astype(F)
    expected = affine_grad.copy()
    expected[A + SLOT : A + SLOT + channels] += dy.astype(np.float64).sum((0, 2, 3)).astype(F)
    inputs = {"dy": pack(dy, lanes, 2), "affine_grad": affine_grad}
    one, two = (
        run("ShiftGrad", inputs, {"affine_grad": F}, **sizes(shape), dy_halo=2, affine=SLOT, threads=threads)
        for threads in (1, 2)
    )
    close(one["affine_grad"], expected, 1e-5)
    assert one["affine_grad"].tobytes() == two["affine_grad"].tobytes()
    with pytest.raises(Exception, match="ShiftGrad: the affine_grad tensor is"):
        run("ShiftGrad", inputs, {"affine_grad": F}, **sizes(shape), dy_halo=2, affine=A)
    with pytest.raises(Exception, match="ShiftGrad: dy is"):
        run("ShiftGrad", inputs, {"affine_grad": F}, **sizes(shape), dy_halo=1, affine=SLOT)


def test_affine_refuses() -> None:
    shape = (1, 2, 3, 2, 2)
    x = pack(images(shape), 2, 0)
    attributes = sizes(shape) | {"in_halo": 0, "out_halo": 0}
    for affine, slot in ((np.zeros(10, F), 3), (np.zeros(11, F), 0), (np.zeros((2, 5), F), 0)):
        with pytest.raises(Exception, match="Affine: the affine tensor is"):
            run("Affine", {"x": x, "affine": affine}, {"y": F}, **attributes, affine=slot)
    with pytest.raises(Exception, match="attribute affine is -1"):
        run("Affine", {"x": x, "affine": np.zeros(10, F)}, {"y": F}, **attributes, affine=-1)
    inputs = {"dy": x, "affine": np.ones(6, F), "addend": x[:, :5], "mask": None}
    with pytest.raises(Exception, match="AffineInputGrad: addend is"):
        run("AffineInputGrad", inputs, {"dx": F}, **sizes(shape), dy_halo=0, dx_halo=0, affine=0)
    sums = {"x": x, "affine": np.ones(6, F), "addend": None, "mask": None, "affine_grad": np.ones(4, F)}
    with pytest.raises(Exception, match="the affine_grad tensor is \\[4\\] and has no slots 0 to 3"):
        halos = {"dy_halo": 0, "dx_halo": 0, "in_halo": 0}
        run("AffineGrad", {"dy": x, **sums}, {"dx": F, "affine_grad": F}, **sizes(shape), **halos, affine=0)
    bits = np.zeros((1, 6, 2), U8)
    inputs |= {"addend": None, "mask": bits}
    with pytest.raises(Exception, match="AffineInputGrad: mask is \\[1, 6, 2\\], not \\[1, 6, 1\\]"):
        run("AffineInputGrad", inputs, {"dx": F}, **sizes(shape), dy_halo=0, dx_halo=0, affine=0, mask_kind=2)
    with pytest.raises(Exception, match="the input mask is uint8, not float32"):
        run("AffineInputGrad", inputs, {"dx": F}, **sizes(shape), dy_halo=0, dx_halo=0, affine=0, mask_kind=1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rectify", [0, 1])
def test_add(shape: tuple[int, ...], rectify: int) -> None:
    _, lanes, channels, height, width = shape
    a, b = images(shape), images(shape, 1)
    made = run(
        "Add",
        {"a": pack(a, lanes, 1), "b": pack(b, lanes, 0)},
        {"y": F, "bits": U8},
        **sizes(shape),
        a_halo=1,
        b_halo=0,
        out_halo=2,
        relu=rectify,
        threads=2,
    )
    y = unpack(made["y"], channels, height, width, 2)
    assert y.tolist() == (np.maximum(a + b, 0) if rectify else a + b).tolist()
    assert made["bits"].tolist() == pack_bits(y, lanes).tolist()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("joins", [False, True])
def test_masked_add(shape: tuple[int, ...], kind: str, joins: bool) -> None:
    _, lanes, channels, height, width = shape
    a, b = images(shape), images(shape, 1)
    passes, mask = mask_of(kind, a.shape, lanes, 2)
    inputs = {"a": pack(a, lanes, 1), "b": pack(b, lanes, 0) if joins else None, "mask": mask.pop("mask")}
    halos = {"a_halo": 1, "b_halo": 0, "out_halo": 1}
    made = run("MaskedAdd", inputs, {"y": F}, **sizes(shape), **halos, **mask, threads=2)["y"]
    close(unpack(made, channels, height, width, 1), passes * (a + b if joins else a), 0)


def test_sums_refuse_wrong_shapes() -> None:
    shape = (1, 2, 3, 2, 2)
    a = pack(images(shape), 2, 0)
    halos = {"a_halo": 0, "b_halo": 0, "out_halo": 0}
    with pytest.raises(Exception, match="Add: b is \\[1, 11, 2\\], not \\[1, 12, 2\\]"):
        run("Add", {"a": a, "b": a[:, 1:]}, {"y": F}, **sizes(shape), **halos)
    with pytest.raises(Exception, match="MaskedAdd: a is"):
        run("MaskedAdd", {"a": a[:, :, :1], "b": None, "mask": None}, {"y": F}, **sizes(shape), **halos)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] * shape[1] > 1])
@pytest.mark.parametrize(
    ("rectify", "joins", "padded", "kind"),
    [(0, False, 0, "none"), (1, True, 1, "bits"), (1, False, 1, "stack"), (0, True, 0, "stack")],
)
def test_batch_norm(shape: tuple[int, ...], rectify: int, joins: bool, padded: int, kind: str) -> None:
    blocks, lanes, channels, height, width = shape
    generator = np.random.default_rng(4)
    array, residual, dy, addend = images(shape) * 3 + 1, images(shape, 1), images(shape, 2), images(shape, 3)
    affine, affine_grad = generator.normal(size=(2, 2 * A)).astype(F)
    mean, variance = generator.uniform(0.5, 2, size=(2, 9)).astype(F)
    weight = np.ones(blocks * lanes, F)
    weight[len(weight) - padded :] = 0
    real = len(weight) - padded
    attributes = sizes(shape) | {"in_halo": 2, "affine": SLOT}
    inputs = {
        "z": pack(array, lanes, 2),
        "affine": affine,
        "sample_weight": weight,
        "mean": mean,
        "variance": variance,
        "residual": pack(residual, lanes, 1) if joins else None,
    }
    made = run(
        "BatchNorm",
        inputs,
        {"y": F, "saved": F, "mean": F, "variance": F, "bits": U8},
        **attributes,
        out_halo=1,
        residual_halo=1,
        statistics=3,
        relu=rectify,
        momentum=0.1,
        epsilon=1e-5,
        update=1,
        threads=2,
    )

    z, parameters = tensor(array[:real]), tensor(affine)
    running_mean, running_variance = (
        torch.from_numpy(s[3 : 3 + channels].astype(np.float64)) for s in (mean, variance)
    )
    y = functional.batch_norm(
        z,
        running_mean,
        running_variance,
        parameters[SLOT : SLOT + channels],
        parameters[A + SLOT : A + SLOT + channels],
        training=True,
        momentum=0.1,
        eps=1e-5,
    )
    output = y + torch.from_numpy(residual[:real]) if joins else y
    output = functional.relu(output) if rectify else output
    close(unpack(made["y"], channels, height, width, 1)[:real], output)
    assert made["bits"].tolist() == pack_bits(unpack(made["y"], channels, height, width, 1), lanes).tolist()
    expected_mean, expected_variance = mean.copy(), variance.copy()
    expected_mean[3 : 3 + channels] = running_mean
    # torch keeps the unbiased variance; the running average here is of the biased one.
    biased = z.detach().var(dim=(0, 2, 3), unbiased=False).numpy()
    expected_variance[3 : 3 + channels] = 0.9 * variance[3 : 3 + channels] + 0.1 * biased
    close(made["mean"], expected_mean)
    close(made["variance"], expected_variance)
    close(made["saved"][:channels], z.detach().mean(dim=(0, 2, 3)))
    close(made["saved"][channels:], 1 / np.sqrt(biased + 1e-5))

    y.backward(torch.from_numpy(dy[:real].astype(np.float64)))
    passes, mask = mask_of(kind, array.shape, lanes, 0)
    inputs = {
        "dy": pack(dy, lanes, 1),
        "z": pack(array, lanes, 2),
        "affine": affine,
        "saved": made["saved"],
        "sample_weight": weight,
        "addend": pack(addend, lanes, 2) if joins else None,
        "mask": mask.pop("mask"),
        "affine_grad": affine_grad,
    }
    halos = {"dy_halo": 1, "dx_halo": 2}
    outputs = {"dz": F, "affine_grad": F}
    grown = run("BatchNormGrad", inputs, outputs, **attributes, **halos, **mask, threads=2)
    gradient = np.zeros_like(array)
    gradient[:real] = z.grad.numpy()
    dz = unpack(grown["dz"], channels, height, width, 2)
    close(dz, passes * (gradient + joins * addend), 2e-5)
    close(grown["affine_grad"], affine_grad + parameters.grad.numpy(), 2e-5)


def test_batch_norm_without_update_keeps_the_running_averages() -> None:
    shape = (1, 2, 3, 2, 2)
    statistics = np.arange(1, 4, dtype=F)
    inputs = {
        "z": pack(images(shape), 2, 0),
        "affine": np.ones(6, F),
        "sample_weight": np.ones(2, F),
        "mean": statistics,
        "variance": statistics,
        "residual": None,
    }
    attributes = sizes(shape) | {"in_halo": 0, "out_halo": 0, "affine": 0, "statistics": 0}
    outputs = {"y": F, "saved": F, "mean": F, "variance": F, "bits": None}
    kept = run("BatchNorm", inputs, outputs, **attributes, update=0)
    assert kept["mean"].tolist() == kept["variance"].tolist() == [1, 2, 3]
    absent = run("BatchNorm", inputs, outputs | {"mean": None, "variance": None}, **attributes, update=0)
    assert absent["y"].tobytes() == kept["y"].tobytes()
    with pytest.raises(Exception, match="update is 1 but the running averages are no outputs"):
        run("BatchNorm", inputs, outputs | {"mean": None, "variance": None}, **attributes)


@pytest.mark.parametrize(
    ("changes", "attributes", "message"),
    [
        ({"sample_weight": np.zeros(2, F)}, {}, "no sample has a weight above 0"),
        ({"sample_weight": np.array([1, np.nan], F)}, {}, "a sample has the weight nan"),
        ({"sample_weight": np.ones(3, F)}, {}, "sample_weight is \\[3\\]"),
        ({"mean": np.ones(2, F)}, {}, "mean is \\[2\\] and has no elements 0 to 3"),
        ({}, {"statistics": 1}, "has no elements 1 to 4"),
        ({}, {"epsilon": 0.0}, "epsilon is 0"),
        ({}, {"affine": 1}, "has no slots 1 to 4"),
        ({"z": np.full((1, 12, 2), np.inf, F)}, {}, "the activations of channel . are not finite"),
        ({"z": np.zeros((0, 12, 2), F)}, {}, "z is \\[0, 12, 2\\]"),
    ],
)
def test_batch_norm_refuses(changes: dict[str, np.ndarray], attributes: dict[str, Any], message: str) -> None:
    shape = (1, 2, 3, 2, 2)
    inputs = {
        "z": pack(images(shape), 2, 0),
        "affine": np.ones(6, F),
        "sample_weight": np.ones(2, F),
        "mean": np.ones(3, F),
        "variance": np.ones(3, F),
        "residual": None,
    }
    plain = sizes(shape) | {"in_halo": 0, "out_halo": 0, "affine": 0, "statistics": 0}
    outputs = {"y": F, "saved": F, "mean": F, "variance": F, "bits": None}
    with pytest.raises(Exception, match="BatchNorm: .*" + message):
        run("BatchNorm", inputs | changes, outputs, **(plain | attributes))


# kind, channels, bias, gamma, beta, statistics: a biased layer, one without anything, frozen batch norms with
# and without a bias before them and without parameters, a batch norm with batch statistics, and scales of
# their own, with and without a bias before them.
ENTRIES = [
    (0, 4, 10, -1, -1, -1),
    (0, 2, -1, -1, -1, -1),
    (1, 3, 0, 3, 6, 2),
    (1, 5, -1, 14, 19, 5),
    (1, 2, -1, -1, -1, 0),
    (2, 3, -1, 24, 27, 7),
    (3, 3, 20, 1, -1, -1),
    (3, 2, -1, 28, -1, -1),
]


def folded(dense: torch.Tensor, mean: np.ndarray, variance: np.ndarray, epsilon: float) -> torch.Tensor:
    scales, shifts = [], []
    for kind, channels, bias, gamma, beta, statistics in ENTRIES:

        def part(offset: int, otherwise: float, count: int = channels) -> torch.Tensor:
            constant = torch.full((count,), otherwise, dtype=torch.float64)
            return constant if offset < 0 else dense[offset : offset + count]

        if kind == 0:
            scales.append(torch.ones(channels, dtype=torch.float64))
            shifts.append(part(bias, 0))
            continue
        scale = part(gamma, 1)
        shift = part(beta, 0) + (part(bias, 0) * scale if kind == 3 else 0)
        if kind == 1:
            scale = scale / torch.from_numpy(np.sqrt(variance[statistics : statistics + channels] + epsilon))
            shift = (
                shift + (part(bias, 0) - torch.from_numpy(mean[statistics : statistics + channels])) * scale
            )
        scales.append(scale)
        shifts.append(shift)
    return torch.cat(scales + shifts)


def test_fold_affine_without_any_parameter_or_statistic() -> None:
    inputs = {name: np.zeros(0, F) for name in ("dense", "mean", "variance")}
    made = run("FoldAffine", inputs, {"affine": F}, entries=[0, 64, -1, -1, -1, -1])["affine"]
    assert made.tolist() == [1.0] * 64 + [0.0] * 64


def test_fold_affine_and_its_gradient() -> None:
    generator = np.random.default_rng(5)
    dense = generator.normal(size=30).astype(F)
    mean, variance = generator.uniform(0.5, 2, size=(2, 10)).astype(F)
    entries = [number for entry in ENTRIES for number in entry]
    inputs = {"dense": dense, "mean": mean, "variance": variance}
    made = run("FoldAffine", inputs, {"affine": F}, entries=entries, epsilon=1e-3)["affine"]
    parameters = tensor(dense)
    expected = folded(parameters, mean.astype(np.float64), variance.astype(np.float64), 1e-3)
    close(made, expected)

    affine_grad = generator.normal(size=len(made)).astype(F)
    expected.backward(torch.from_numpy(affine_grad.astype(np.float64)))
    dense_grad = generator.normal(size=30).astype(F)
    inputs = {"affine_grad": affine_grad} | inputs | {"dense_grad": dense_grad}
    grown = run("FoldAffineGrad", inputs, {"dense_grad": F}, entries=entries, epsilon=1e-3)["dense_grad"]
    close(grown, dense_grad + parameters.grad.numpy())

    zeros = run("ZeroAffine", {"affine": made}, {"affine_grad": F})["affine_grad"]
    assert zeros.shape == made.shape and not zeros.any()


def test_the_gradient_of_a_part_lies_where_it_is_wanted() -> None:
    """A frozen batch norm behind a bias, and a bias: of the former the shift, of the latter all."""
    entries = [1, 3, 0, 3, 6, 0, 0, 2, 9, -1, -1, -1]
    generator = np.random.default_rng(6)
    affine_grad, dense = generator.normal(size=10).astype(F), generator.normal(size=11).astype(F)
    inputs = {"affine_grad": affine_grad, "dense": dense, "mean": np.ones(3, F), "variance": np.full(3, 2, F)}
    inputs["dense_grad"] = np.zeros(11, F)
    every = run("FoldAffineGrad", inputs, {"grad": F}, entries=entries)["grad"]
    inputs["dense_grad"], places = np.ones(6, F), [-1, -1, 0, 4, -1, -1]
    part = run("FoldAffineGrad", inputs, {"grad": F}, entries=entries, gradients=places)["grad"]
    assert part.tolist() == [*(1 + every[6:9]), 1, *(1 + every[9:11])]
    for gradients, message in (
        ([0], "the attribute gradients has 1 numbers, not three for each entry"),
        ([-1, -1, 0, 5, -1, -1], "an entry has its gradient from 5 to 7 of 6"),
        ([-2, -1, 0, 4, -1, -1], "the attribute gradients has an offset of -2"),
    ):
        with pytest.raises(Exception, match="FoldAffineGrad: " + message):
            run("FoldAffineGrad", inputs, {"grad": F}, entries=entries, gradients=gradients)


@pytest.mark.parametrize(
    ("entries", "changes", "message"),
    [
        ([0, 4, 10, -1, -1], {}, "5 numbers, not six"),
        ([4, 4, -1, -1, -1, -1], {}, "entry 0 is out of range"),
        ([1, 4, -1, -1, -1, -1], {}, "entry 0 has no statistics"),
        ([0, 4, 3, -1, -1, -1], {}, "an entry reads parameters 3 to 7 of 6"),
        ([0, 4, -2, -1, -1, -1], {}, "entry 0 has an offset of -2"),
        ([0, 4, (1 << 63) - 1, -1, -1, -1], {}, "entry 0 has an offset of 9223372036854775807"),
        ([1, 4, -1, -1, -1, 1], {}, "an entry reads statistics 1 to 5 of 4"),
        ([1, 4, -1, -1, -1, 0], {"variance": np.array([1, 1, -1, 1], F)}, "a running variance is -1"),
        ([1, 4, -1, -1, -1, 0], {"variance": np.ones(3, F)}, "not vectors of one length"),
    ],
)
def test_fold_affine_refuses(entries: list[int], changes: dict[str, np.ndarray], message: str) -> None:
    inputs = {"dense": np.ones(6, F), "mean": np.ones(4, F), "variance": np.ones(4, F)}
    with pytest.raises(Exception, match="FoldAffine: .*" + message):
        run("FoldAffine", inputs | changes, {"affine": F}, entries=entries)


def test_threads_change_no_bit() -> None:
    shape = (2, 8, 24, 9, 7)
    dy, x = pack(images(shape), 8, 1), pack(images(shape, 1), 8, 1)
    attributes = sizes(shape) | {"dy_halo": 1, "in_halo": 1, "dx_halo": 1, "affine": 0}
    affine = np.random.default_rng(0).normal(size=48).astype(F)
    inputs = {"dy": dy, "x": x, "affine": affine, "addend": None, "mask": None, "affine_grad": affine}
    outputs = {"dx": F, "affine_grad": F}
    one, *others = (
        run("AffineGrad", inputs, outputs, **attributes, threads=threads) for threads in (1, 2, 4)
    )
    for other in others:
        assert all(one[name].tobytes() == other[name].tobytes() for name in outputs)
