"""DenseStep and BuildLists against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.operators import build_lists, lists_length, run

F = np.float32


def layer(offset: int, out: int, channels: int, kernel: int, stride: int, padding: int) -> dict[str, Any]:
    return {
        "offset": offset,
        "out_channels": out,
        "in_channels": channels,
        "kernel": (kernel, kernel),
        "strides": (stride, stride),
        "pads": (padding,) * 4,
        "dilations": (1, 1),
        "groups": 1,
    }


LAYERS = [
    layer(0, 5, 3, 3, 1, 1),
    layer(135, 4, 5, 3, 2, 1),
    layer(315, 7, 4, 1, 2, 0),
    layer(343, 2, 7, 1, 1, 0),
]
LAYERS.append(layer(357, 3, 2, 5, 3, 2))
SIZE = 357 + 3 * 2 * 25


def flat(layers: list[dict[str, Any]]) -> list[int]:
    return [
        number
        for one in layers
        for number in (
            one["offset"],
            one["out_channels"],
            one["in_channels"],
            *one["kernel"],
            one["strides"][0],
            one["pads"][0],
        )
    ]


GENERAL = [
    *LAYERS[:2],
    LAYERS[2] | {"kernel": (1, 7), "strides": (2, 1), "pads": (0, 1, 2, 3)},
    LAYERS[3] | {"offset": 315 + 196, "out_channels": 6, "in_channels": 4, "groups": 2},
    {
        "offset": 523,
        "out_channels": 6,
        "in_channels": 9,
        "kernel": (2, 3),
        "strides": (3, 2),
        "pads": (1, 0, 0, 2),
        "dilations": (2, 3),
        "groups": 3,
    },
]


def general(layers: list[dict[str, Any]]) -> list[int]:
    names = ("kernel", "strides", "pads", "dilations")
    return [
        number
        for one in layers
        for number in (
            one["offset"],
            one["out_channels"],
            one["in_channels"],
            *(number for name in names for number in one[name]),
            one["groups"],
        )
    ]


@pytest.mark.parametrize("kappa", [0, 1, 40, 300, SIZE])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layers", [LAYERS, GENERAL], ids=["of one stride", "general"])
def test_lists_equal_a_plain_sort(layers: list[dict[str, Any]], kappa: int, threads: int) -> None:
    size = SIZE if layers is LAYERS else 523 + 6 * 3 * 6
    index = np.sort(np.random.default_rng(kappa).choice(size, kappa, replace=False)).astype(np.int32)
    expected, _, _ = build_lists(index, layers)
    assert len(expected) == lists_length(kappa, layers)
    garbage = np.full(len(expected), -7, np.int32)
    inputs = {"index": index, "lists": garbage}
    attributes: dict[str, Any] = {"layers": general(layers), "layer_integers": 14}
    made = run("BuildLists", inputs, {"lists": np.int32}, **attributes, threads=threads)["lists"]
    assert made.tolist() == expected.tolist()
    if layers is LAYERS:  # as artifacts of 0.1 say it
        made = run("BuildLists", inputs, {"lists": np.int32}, layers=flat(layers), threads=threads)["lists"]
        assert made.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("index", "length", "layers", "message"),
    [
        ([0, 3, 3], 0, LAYERS, "index is not strictly ascending"),
        ([0, 3, SIZE], 0, LAYERS, "index is not strictly ascending"),
        ([-2, 3, 4], 0, LAYERS, "index is not strictly ascending"),
        ([0, 3, 4], 1, LAYERS, "lists is "),
        ([0, 3, 4], 0, [layer(1, 5, 3, 3, 1, 1)], "layer 0 begins at 1, not at 0"),
        ([0, 3, 4], 0, [layer(0, 5, 3, 16, 1, 1)], "layer 0 has a size out of range"),
        ([0, 3, 4], 0, [layer(0, 5, 3, 3, 0, 1)], "layer 0 has a size out of range"),
        ([0, 3, 4], 0, [layer(0, 1 << 22, 1 << 22, 3, 1, 1)], "2\\^31 weights"),
    ],
)
def test_lists_refuse(index: list[int], length: int, layers: list[dict[str, Any]], message: str) -> None:
    lists = np.zeros(lists_length(3, LAYERS) + length, np.int32)
    inputs = {"index": np.array(index, np.int32), "lists": lists}
    with pytest.raises(Exception, match="BuildLists: .*" + message):
        run("BuildLists", inputs, {"lists": np.int32}, layers=flat(layers))


@pytest.mark.parametrize("count", [1, 5000])
def test_dense_step_is_momentum_sgd_with_decoupled_decay(count: int) -> None:
    generator = np.random.default_rng(count)
    value, momentum, gradient = generator.normal(size=(3, count)).astype(F)
    rate, decay, factor = F(0.1), F(5e-4), F(0.9)
    v = factor * momentum + gradient
    expected = value * (F(1) - decay) - rate * v
    inputs = {
        "value": value,
        "momentum": momentum,
        "gradient": gradient,
        "hyper": np.array([rate, decay, factor, 1.0]),
    }
    inputs["hyper"] = inputs["hyper"].astype(F)
    made = run("DenseStep", inputs, {"value": F, "momentum": F}, threads=2)
    assert made["value"].tobytes() == expected.tobytes()
    assert made["momentum"].tobytes() == v.tobytes()


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("gradient", np.array([0, np.nan], F), "not finite; nothing was changed"),
        ("value", np.array([0, np.inf], F), "not finite; nothing was changed"),
        ("momentum", np.zeros(3, F), "not vectors of one length"),
        ("hyper", np.array([1, 1, 1, -1], F), "hyper"),
    ],
)
def test_dense_step_refuses(name: str, array: np.ndarray, message: str) -> None:
    inputs = {
        "value": np.ones(2, F),
        "momentum": np.ones(2, F),
        "gradient": np.ones(2, F),
        "hyper": np.zeros(4, F),
    }
    with pytest.raises(Exception, match="DenseStep: .*" + message):
        run("DenseStep", inputs | {name: array}, {"value": F, "momentum": F})


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("having", [[0, 0, 0, 0, 0], [0, 1, 0, 1, 1], [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]])
def test_lists_of_layers_that_no_gradient_goes_through(having: list[int], threads: int) -> None:
    size, kappa = 523 + 6 * 3 * 6, 300
    index = np.sort(np.random.default_rng(1).choice(size, kappa, replace=False)).astype(np.int32)
    whole, forward, transpose = build_lists(index, GENERAL)
    bounds = np.searchsorted(index, [*(one["offset"] for one in GENERAL), size])
    inside = np.concatenate(
        [np.full(last - first, flag) for first, last, flag in zip(bounds, bounds[1:], having, strict=False)]
    )
    row, place = (whole[kappa * n : kappa * (n + 1)][inside == 1] for n in (1, 2))
    pointers = [whole[at : at + one["out_channels"] + 1] for at, one in zip(forward, GENERAL, strict=True)]
    fewer = np.cumsum(
        [0, *(0 if flag else b - a for a, b, flag in zip(bounds, bounds[1:], having, strict=False))]
    )
    for number, (at, one) in enumerate(zip(transpose, GENERAL, strict=True)):
        count = one["in_channels"] * one["strides"][0] * one["strides"][1] + 1
        if having[number]:
            pointers.append(whole[at : at + count] - fewer[number])
    expected = np.concatenate([whole[:kappa], row, place, *pointers])
    attributes: dict[str, Any] = {"layers": general(GENERAL), "layer_integers": 14}
    inputs = {"index": index, "lists": np.full(len(expected), -7, np.int32)}
    made = run("BuildLists", inputs, {"lists": np.int32}, **attributes, transposed=having, threads=threads)
    assert made["lists"].tolist() == expected.tolist()
    made = run("MakeLists", {"index": index}, {"lists": np.int32}, **attributes, threads=threads)
    assert made["lists"].tolist() == whole.tolist()
    with pytest.raises(Exception, match="the attribute transposed has 2 numbers for 5 layers"):
        run("BuildLists", inputs, {"lists": np.int32}, **attributes, transposed=[0, 1])


def test_dense_step_of_a_part_leaves_the_rest_alone() -> None:
    generator = np.random.default_rng(0)
    value = generator.normal(size=9000).astype(F)
    spans = [3, 2, 10, 5000, 8999, 1]
    places = np.r_[3:5, 10:5010, 8999]
    momentum, gradient = generator.normal(size=(2, len(places))).astype(F)
    rate, decay, factor = F(0.1), F(5e-4), F(0.9)
    v = factor * momentum + gradient
    expected = value.copy()
    expected[places] = value[places] * (F(1) - decay) - rate * v
    inputs = {"value": value, "momentum": momentum, "gradient": gradient}
    inputs["hyper"] = np.array([rate, decay, factor, 1.0], F)
    made = run("DenseStep", inputs, {"value": F, "momentum": F}, threads=2, spans=spans)
    assert made["value"].tobytes() == expected.tobytes()
    assert made["momentum"].tobytes() == v.tobytes()


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([0], "not two for each span"),
        ([1, 0], "the spans do not ascend"),
        ([0, 2, 1, 1], "the spans do not ascend"),
        ([0, 1, 4, 2], "value has 5 elements, and those up to 6 are trained"),
        ([0, 4], "the latter of what is trained"),
    ],
)
def test_spans_of_dense_step_that_cannot_be_right(spans: list[int], message: str) -> None:
    inputs = {"value": np.ones(5, F), "momentum": np.ones(3, F), "gradient": np.ones(3, F)}
    inputs["hyper"] = np.zeros(4, F)
    with pytest.raises(Exception, match="DenseStep: .*" + message):
        run("DenseStep", inputs, {"value": F, "momentum": F}, spans=spans)
