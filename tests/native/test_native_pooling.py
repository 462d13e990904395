"""Pooling against torch in float64: windows, strides and paddings of all kinds, halos, 1 to 16 lanes."""

# mypy: disable-error-code="arg-type, dict-item"

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from helpers.native_layers import MASKS, U8, F, close, mask_of
from helpers.operators import images, pack, run, tensor, unpack

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
