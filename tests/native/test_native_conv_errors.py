"""Small convolutions worked by hand, and what the convolution operators say of bad input."""

# mypy: disable-error-code="assignment"

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.operators import run

# x is 1 2 3 / 4 5 6 / 7 8 9, the kernel has 10 at its centre and 1 at its left neighbour (kpos 4 and 3).
LAYER: dict[str, Any] = {
    "layer_offset": 0,
    "in_channels": 1,
    "in_height": 3,
    "in_width": 3,
    "in_halo": 1,
    "out_channels": 1,
    "out_height": 3,
    "out_width": 3,
    "out_halo": 0,
    "kernel": [3, 3],
    "stride": 1,
    "padding": 1,
    "lanes": 1,
    "forward_pointer": 6,
    "transpose_pointer": 8,
    "affine": -1,
    "relu": 0,
    "algorithm": "sparse",
}
VALUE = np.array([1, 10], np.float32)
# forward_column, transpose_row, transpose_position, forward pointers, transpose pointers
LISTS = np.array([3, 4, 3, 4, 0, 1, 0, 2, 0, 2], np.int32)
HALOED = np.array([0, 0, 0, 0, 0, 1, 2, 3, 0, 4, 5, 6, 0, 7, 8, 9, 0, 0, 0, 0, 0], np.float32).reshape(
    1, 21, 1
)


def conv(
    lists: np.ndarray = LISTS, value: np.ndarray = VALUE, x: np.ndarray = HALOED, **changes: Any
) -> np.ndarray:
    inputs = {"x": x, "value": value, "affine": None, "residual": None, "lists": lists}
    return run("Conv", inputs, {"y": np.float32, "bits": None}, **LAYER | changes)["y"]


def conv_input_grad(
    lists: np.ndarray = LISTS, value: np.ndarray = VALUE, dy: np.ndarray = HALOED, **changes: Any
) -> np.ndarray:
    inputs = {"dy": dy, "value": value, "affine": None, "addend": None, "mask": None, "lists": lists}
    return run("ConvInputGrad", inputs, {"dx": np.float32}, **LAYER | {"dy_halo": 1, "dx_halo": 0} | changes)[
        "dx"
    ]


@pytest.mark.parametrize("algorithm", ["sparse", "dense"])
def test_a_convolution_by_hand(algorithm: str) -> None:
    assert conv(algorithm=algorithm).ravel().tolist() == [10, 21, 32, 40, 54, 65, 70, 87, 98]
    # The transposed kernel looks to the right instead.
    assert conv_input_grad(algorithm=algorithm).ravel().tolist() == [12, 23, 30, 45, 56, 60, 78, 89, 90]


# The same kernel on 16 images of rows of eight pixels, 1 to 8, 11 to 18 and 21 to 28, in each of them.
ROWS: dict[str, Any] = {"in_width": 8, "out_width": 8, "lanes": 16}
WIDE = np.repeat([*[0] * 10, *range(1, 9), 0, *range(11, 19), 0, *range(21, 29), *[0] * 10], 16)
WIDE = WIDE.astype(np.float32).reshape(1, 46, 16)


@pytest.mark.parametrize("algorithm", ["sparse", "dense", "winograd"])
def test_a_convolution_of_many_images_by_hand(algorithm: str) -> None:
    y = conv(x=WIDE, algorithm=algorithm, **ROWS)[0].reshape(3, 8, 16)
    expected = np.array(
        [[10 * x + (x - 1) * (x % 10 != 1) for x in range(d + 1, d + 9)] for d in (0, 10, 20)]
    )
    assert y.tolist() == np.repeat(expected, 16).reshape(3, 8, 16).tolist()
    dx = conv_input_grad(dy=WIDE, algorithm=algorithm, **ROWS)[0].reshape(3, 8, 16)
    expected = np.array(
        [[10 * x + (x + 1) * (x % 10 != 8) for x in range(d + 1, d + 9)] for d in (0, 10, 20)]
    )
    assert dx.tolist() == np.repeat(expected, 16).reshape(3, 8, 16).tolist()


@pytest.mark.parametrize("algorithm", ["sparse", "dense"])
def test_weight_gradients_by_hand(algorithm: str) -> None:
    dy = np.zeros((1, 21, 1), np.float32)
    dy[0, 10, 0] = 2  # only the pixel in the middle (row 1, column 1)
    inputs = {
        "dy": dy,
        "x": HALOED,
        "value": VALUE,
        "affine": np.array([3, 0], np.float32),
        "addend": None,
        "mask": None,
        "coo_grad": np.array([100, 200], np.float32),
        "affine_grad": np.array([1, 1], np.float32),
        "lists": LISTS,
    }
    outputs = {"dx": None, "coo_grad": np.float32, "affine_grad": np.float32}
    attributes = LAYER | {"affine": 0, "dy_halo": 1, "dx_halo": 0, "algorithm": algorithm}
    results = run("ConvGrad", inputs, outputs, **attributes)
    # g' = 2 · (4, 5): the left neighbour and the pixel itself.
    assert results["coo_grad"].tolist() == [100 + 3 * 8, 200 + 3 * 10]
    assert results["affine_grad"].tolist() == [1 + 1 * 8 + 10 * 10, 1 + 2]


@pytest.mark.parametrize("short", ["affine", "affine_grad"])
def test_scales_and_sums_of_too_few_channels_are_refused_before_anything_is_written(short: str) -> None:
    # Slot 1 of two: the tensor of [scale 0, scale 1, shift 0, shift 1] has it, one of [scale, shift] has not.
    inputs = {
        "dy": HALOED,
        "x": HALOED,
        "value": VALUE,
        "affine": np.array([0, 3, 0, 0], np.float32),
        "addend": None,
        "mask": None,
        "coo_grad": np.array([100, 200], np.float32),
        "affine_grad": np.array([1, 2, 3, 4], np.float32),
        "lists": LISTS,
    }
    outputs = {"dx": None, "coo_grad": np.float32, "affine_grad": np.float32}
    attributes = LAYER | {"affine": 1, "dy_halo": 1, "dx_halo": 0}
    assert run("ConvGrad", inputs, outputs, **attributes)["affine_grad"].tolist()[::2] == [1, 3]
    inputs |= {"coo_grad": np.array([100, 200], np.float32), short: np.array([1, 1], np.float32)}
    with pytest.raises(Exception, match=rf"ConvGrad: the {short} tensor is \[2\] and has no slots 1 to 2"):
        run("ConvGrad", inputs, outputs, **attributes)
    assert inputs["coo_grad"].tolist() == [100, 200]


def changed(place: int, number: int) -> np.ndarray:
    lists = LISTS.copy()
    lists[place] = number
    return lists


@pytest.mark.parametrize(
    ("lists", "complaint"),
    [
        (changed(0, 1 << 8), "forward_column is out of range"),  # channel 1 of 1
        (changed(1, 9), "forward_column is out of range"),  # kernel position 9 of 9
        (changed(0, -1), "forward_column is out of range"),
        (changed(7, 3), "forward pointers"),  # beyond κ
        (changed(6, -1), "forward pointers"),
        (changed(6, 3), "forward pointers"),  # descending
        (LISTS[:7], "too few"),
        (LISTS[:0], "too few"),
    ],
)
def test_malformed_lists_are_refused(lists: np.ndarray, complaint: str) -> None:
    with pytest.raises(Exception, match=complaint):
        conv(lists)


# All weights of a kernel from 20 planes to one: so many entries that vectors of them are looked at together.
LONG = 180
LONG_LAYER: dict[str, Any] = {
    "in_channels": 20,
    "forward_pointer": 3 * LONG,
    "transpose_pointer": 3 * LONG + 2,
}
LONG_LISTS = np.concatenate(
    [
        np.arange(LONG) // 9 << 8 | np.arange(LONG) % 9,
        np.arange(LONG) % 9,
        np.arange(LONG),
        [0, LONG],
        np.arange(0, LONG + 1, 9),
    ]
).astype(np.int32)


def long(lists: np.ndarray, part: int) -> np.ndarray:
    """The operator that reads this part of the lists."""
    value = np.ones(LONG, np.float32)
    if part > 0:
        return conv_input_grad(lists, value, **LONG_LAYER)
    return conv(lists, value, np.ones((1, 4 + 1 + 20 * 4 * 4, 1), np.float32), **LONG_LAYER)


@pytest.mark.parametrize("place", [0, 1, 15, 16, 31, 63, 64, 100, 127, 128, LONG - 1])
@pytest.mark.parametrize(
    ("part", "number", "complaint"),
    [
        (0, 20 << 8, "forward_column is out of range"),
        (0, 9, "forward_column is out of range"),
        (0, -1, "forward_column is out of range"),
        (1, 1 << 8, "transpose_row is out of range"),
        (1, 9, "transpose_row is out of range"),
        (2, LONG, "transpose_position"),
        (2, -1, "transpose_position"),
    ],
)
def test_one_wrong_entry_among_many_is_refused(place: int, part: int, number: int, complaint: str) -> None:
    assert np.isfinite(long(LONG_LISTS, part)).all()
    lists = LONG_LISTS.copy()
    lists[part * LONG + place] = number
    with pytest.raises(Exception, match=complaint):
        long(lists, part)


@pytest.mark.parametrize(
    ("lists", "complaint"),
    [
        (changed(2, 1 << 8), "transpose_row is out of range"),
        (changed(3, 9), "transpose_row is out of range"),
        (changed(4, 2), "transpose_position"),
        (changed(5, -1), "transpose_position"),
        (changed(9, 7), "transpose pointers"),
    ],
)
def test_malformed_transposed_lists_are_refused(lists: np.ndarray, complaint: str) -> None:
    with pytest.raises(Exception, match=complaint):
        conv_input_grad(lists)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"in_halo": 0, "x": np.zeros((1, 9, 1), np.float32)}, "halo 0, but the convolution needs 1"),
        ({"x": np.zeros((1, 20, 1), np.float32)}, "not a stack"),
        ({"lanes": 2}, "not a stack"),
        ({"out_height": 4}, "does not follow"),
        ({"kernel": [16, 16]}, "attribute kernel"),
        ({"kernel": [3]}, "attribute kernel"),
        ({"algorithm": "fast"}, "algorithm"),
        ({"algorithm": "winograd"}, "here these are 3, 1, 1, 3 and 1"),
        ({"affine": 0}, "affine is missing"),
        ({"stride": 0}, "attribute stride is 0, not in \\[1, 64\\]"),
        ({"strides": [1, 0]}, "attribute strides is not 2 numbers in \\[1, 64\\]"),
        ({"strides": [1]}, "attribute strides is not 2 numbers"),
        ({"pads": [1, 1, 1, 256]}, "attribute pads is not 4 numbers in \\[0, 255\\]"),
        ({"dilations": [1, 256]}, "attribute dilations is not 2 numbers in \\[1, 255\\]"),
        ({"pads": [1, 1, 1, 0]}, "does not follow .* pads 1, 1, 1 and 0 and dilations 1 and 1"),
        ({"groups": 0}, "attribute groups is 0"),
        ({"groups": 2}, "1 input channels and 1 output channels cannot be cut into 2 groups"),
        ({"in_channels": 2, "out_channels": 2, "groups": 2, "algorithm": "dense"}, "with groups take"),
        ({"in_channels": 2, "algorithm": "depthwise"}, "2 input channels are 1 groups"),
        ({"algorithm": "depthwise"}, "which connections"),
    ],
)
def test_wrong_shapes_are_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(Exception, match=complaint):
        conv(**changes)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (
            {"kernel": [3, 2], "out_width": 9},
            "2, 1, 1, 9 and 16",
        ),  # six pixels and three positions, two pairs at once
        ({"kernel": [1, 5], "out_height": 5, "out_width": 6}, "5, 1, 1, 6 and 16"),
        ({"stride": 2, "out_height": 2, "out_width": 4}, "3, 2, 1, 4 and 16"),
        ({"in_width": 7, "out_width": 7}, "3, 1, 1, 7 and 16"),
        ({"in_width": 10, "out_width": 8, "padding": 0, "in_height": 5, "lanes": 8}, "3, 1, 1, 8 and 8"),
        ({"lanes": 24}, "3, 1, 1, 8 and 24"),
    ],
)
def test_what_winograds_products_cannot_make_is_refused(changes: dict[str, Any], found: str) -> None:
    for operator in (conv, conv_input_grad):
        with pytest.raises(Exception, match=r'algorithm is "winograd", .* here these are'):
            operator(algorithm="winograd", **ROWS | changes)
    with pytest.raises(Exception, match=f"here these are {found}"):
        conv(algorithm="winograd", **ROWS | changes)


def test_each_walk_goes_by_the_width_of_its_own_result() -> None:
    """Without padding rows of ten pixels become rows of eight, and the other way round."""
    sizes: dict[str, Any] = {
        "padding": 0,
        "in_height": 5,
        "in_width": 10,
        "out_width": 8,
        "lanes": 16,
        "in_halo": 0,
    }
    x = np.ones((1, 50, 16), np.float32)
    assert conv(x=x, algorithm="winograd", **sizes).ravel().tolist() == [11] * 24 * 16
    with pytest.raises(Exception, match="here these are 3, 1, 1, 10 and 16"):
        conv_input_grad(algorithm="winograd", **sizes)


def test_too_small_a_halo_of_dy_is_refused() -> None:
    with pytest.raises(Exception, match="gradient of the input needs 1"):
        conv_input_grad(dy_halo=0)


def test_lists_without_transposes_need_no_room_for_their_pointers() -> None:
    """More input channels than there are numbers in the lists."""
    x = np.zeros((1, 5 + 8 * 16, 1), np.float32)
    x[:, :21] = HALOED
    lists = np.array([3, 4, 0, 2], np.int32)
    sizes: dict[str, Any] = {"in_channels": 8, "forward_pointer": 2, "transpose_pointer": -1, "transposed": 0}
    assert conv(lists=lists, x=x, **sizes).ravel().tolist() == [10, 21, 32, 40, 54, 65, 70, 87, 98]


def test_an_entry_in_a_phase_without_kernel_positions_is_refused() -> None:
    # A 1 × 1 kernel of stride 2 has entries in phase 0 only; here one is put into phase 1.
    lists = np.array([0, 0, 0, 0, 1, 0, 0, 1, 1, 1], np.int32)
    inputs = {
        "dy": np.ones((1, 1, 1), np.float32),
        "value": np.ones(1, np.float32),
        "affine": None,
        "addend": None,
        "mask": None,
        "lists": lists,
    }
    attributes = LAYER | {
        "in_height": 2,
        "in_width": 2,
        "out_height": 1,
        "out_width": 1,
        "kernel": [1, 1],
        "stride": 2,
    }
    attributes |= {"padding": 0, "forward_pointer": 3, "transpose_pointer": 5, "dy_halo": 0, "dx_halo": 0}
    with pytest.raises(Exception, match="phase"):
        run("ConvInputGrad", inputs, {"dx": np.float32}, **attributes)


@pytest.mark.parametrize(
    ("channels", "refused"),
    [
        (96, "dy is .*, not a stack"),
        (
            300,
            "a batch block of 300 channels of 512 by 512 pixels with 16 lanes is too large: .* fewer lanes",
        ),
    ],
)
def test_a_block_holds_as_many_numbers_as_distances_reach(channels: int, refused: str) -> None:
    """96 channels of 512 by 512 pixels and 16 images are 1.6 GB, of which this dy is a little."""
    sizes: dict[str, Any] = {
        "in_height": 512,
        "in_width": 512,
        "out_height": 512,
        "out_width": 512,
        "lanes": 16,
    }
    with pytest.raises(Exception, match=refused):
        conv_input_grad(in_channels=channels, out_channels=channels, **sizes)
