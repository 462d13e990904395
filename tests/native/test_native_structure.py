"""Products, channels, padding, resampling, norms of an image: against torch in float64, 1 to 16 lanes."""

# mypy: disable-error-code="arg-type, dict-item"

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.operators import images, pack, pack_bits, run, sizes, tensor, unpack

F = np.float32
# blocks, lanes, channels, height, width
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 5, 7, 4),
    (3, 4, 2, 5, 9),
    (1, 16, 3, 6, 6),
    (2, 8, 4, 3, 5),
    (4, 1, 2, 5, 7),
]
MASKS = ["none", "stack", "bits"]


def close(actual: np.ndarray, expected: torch.Tensor | np.ndarray, tolerance: float = 1e-6) -> None:
    if isinstance(expected, torch.Tensor):
        expected = expected.detach().numpy()
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


class Joins:
    """What a gradient operator adds and masks: its inputs, its attributes, and what then becomes of dx."""

    def __init__(self, kind: str, shape: tuple[int, ...], halo: int) -> None:
        lanes = shape[1]
        values, self.addend = images(shape, 7), images(shape, 8)
        self.passes = np.ones_like(values) if kind == "none" else (values > 0).astype(F)
        mask = {"none": None, "stack": pack(values, lanes, 2), "bits": pack_bits(values, lanes)}[kind]
        self.added = kind != "none"
        self.inputs = {"addend": pack(self.addend, lanes, halo) if self.added else None, "mask": mask}
        self.attributes = {"mask_kind": MASKS.index(kind), "mask_halo": 2 if kind == "stack" else 0}

    def __call__(self, gradient: torch.Tensor) -> np.ndarray:
        return self.passes * (gradient.numpy() + self.added * self.addend)


def gradient_of(output: torch.Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """A random dy of ``shape``, sent back through ``output``."""
    dy = images(shape, 1)
    output.backward(torch.from_numpy(dy.astype(np.float64)))
    return dy


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("each_channel", [False, True])
def test_products(shape: tuple[int, ...], kind: str, each_channel: bool) -> None:
    blocks, lanes, channels, height, width = shape
    small = (blocks, lanes, channels, 1, 1) if each_channel else shape
    a, b = images(shape), images(small, 3)
    halos = {"a_halo": 1, "b_halo": 2, "out_halo": 1}
    inputs = {"a": pack(a, lanes, 1), "b": pack(b, lanes, 2)}
    forward = "Gate" if each_channel else "Multiply"
    y = run(forward, inputs, {"y": F}, **sizes(shape), **halos, threads=2)["y"]
    left, right = tensor(a), tensor(b)
    close(unpack(y, channels, height, width, 1), left * right)

    dy = gradient_of(left * right, shape)
    joins = Joins(kind, shape, 1)
    given = {"dy": pack(dy, lanes, 0), "other": pack(b, lanes, 2), **joins.inputs}
    attributes = {**sizes(shape), "dy_halo": 0, "other_halo": 2, "dx_halo": 1, **joins.attributes}
    rule = "GateInputGrad" if each_channel else "MultiplyGrad"
    dx = run(rule, given, {"dx": F}, **attributes, threads=2)["dx"]
    close(unpack(dx, channels, height, width, 1), joins(left.grad))

    if each_channel:
        joins = Joins(kind, small, 1)
        given = {"dy": pack(dy, lanes, 0), "a": pack(a, lanes, 2), **joins.inputs}
        attributes = {**sizes(shape), "dy_halo": 0, "a_halo": 2, "dx_halo": 1, **joins.attributes}
        made = [run("GateFactorGrad", given, {"dx": F}, **attributes, threads=n)["dx"] for n in (1, 2)]
        assert made[0].tobytes() == made[1].tobytes()
        close(unpack(made[0], channels, 1, 1, 1), joins(right.grad))


def test_products_refuse_wrong_shapes() -> None:
    shape = (1, 2, 3, 2, 2)
    a = pack(images(shape), 2, 0)
    halos = {"a_halo": 0, "b_halo": 0, "out_halo": 0}
    with pytest.raises(Exception, match="Multiply: b is \\[1, 3, 2\\], not \\[1, 12, 2\\]"):
        run("Multiply", {"a": a, "b": a[:, :3]}, {"y": F}, **sizes(shape), **halos)
    with pytest.raises(Exception, match="Gate: b is \\[1, 12, 2\\], not \\[1, 3, 2\\]"):
        run("Gate", {"a": a, "b": a}, {"y": F}, **sizes(shape), **halos)
    inputs = {"dy": a, "a": a[:, 1:], "addend": None, "mask": None}
    with pytest.raises(Exception, match="GateFactorGrad: a is \\[1, 11, 2\\]"):
        run("GateFactorGrad", inputs, {"dx": F}, **sizes(shape), dy_halo=0, a_halo=0, dx_halo=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", MASKS)
def test_rescale(shape: tuple[int, ...], kind: str) -> None:
    _, lanes, channels, height, width = shape
    array = images(shape)
    constants = {"factor": -1.5, "offset": 3.0}
    attributes = {**sizes(shape), "in_halo": 1, "out_halo": 2, **constants}
    y = run("Rescale", {"x": pack(array, lanes, 1)}, {"y": F}, **attributes, threads=2)["y"]
    x = tensor(array)
    close(unpack(y, channels, height, width, 2), -1.5 * x + 3)
    dy = gradient_of(-1.5 * x + 3, shape)
    joins = Joins(kind, shape, 1)
    attributes = {**sizes(shape), "dy_halo": 2, "dx_halo": 1, **constants, **joins.attributes}
    dx = run("RescaleGrad", {"dy": pack(dy, lanes, 2), **joins.inputs}, {"dx": F}, **attributes)["dx"]
    close(unpack(dx, channels, height, width, 1), joins(x.grad))


# channels of each input, and what the output's channels are
SOURCES = [
    ([3], [2, 0]),
    ([2, 3], [0, 1, 2, 3, 4]),
    ([2, 1, 3], [5, 5, -1, 0, 2, 5, -1, 4]),
    ([1], [-1]),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("counts", "source"), SOURCES)
def test_channels(shape: tuple[int, ...], counts: list[int], source: list[int]) -> None:
    blocks, lanes, _, height, width = shape
    arrays = [images((blocks, lanes, count, height, width), seed) for seed, count in enumerate(counts)]
    halos = [seed % 3 for seed in range(len(counts))]
    attributes = {"height": height, "width": width, "lanes": lanes, "source": source}
    inputs = {
        f"part {i}": pack(part, lanes, halo) for i, (part, halo) in enumerate(zip(arrays, halos, strict=True))
    }
    made = run(
        "Channels", inputs, {"y": F}, **attributes, channels=counts, in_halos=halos, out_halo=1, threads=2
    )
    parts = [tensor(part) for part in arrays]
    behind = torch.cat([*parts, torch.zeros_like(parts[0][:, :1])], 1)
    y = behind[:, source]  # −1 is the last, zeros
    assert unpack(made["y"], len(source), height, width, 1).tolist() == y.tolist()

    dy = gradient_of(y, (blocks, lanes, len(source), height, width))
    first = 0
    for number, (part, count) in enumerate(zip(parts, counts, strict=True)):
        joins = Joins(MASKS[number % 3], (blocks, lanes, count, height, width), 1)
        own = {
            **attributes,
            "channels": count,
            "source": [i - first if first <= i < first + count else -1 for i in source],
            "dy_halo": 2,
            "dx_halo": 1,
            **joins.attributes,
        }
        dx = run("ChannelsGrad", {"dy": pack(dy, lanes, 2), **joins.inputs}, {"dx": F}, **own, threads=2)
        close(unpack(dx["dx"], count, height, width, 1), joins(part.grad))
        first += count


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": [0, 5]}, "the attribute source has 5, not in \\[-1, 5\\)"),
        ({"source": [-2]}, "the attribute source has -2"),
        ({"channels": [2]}, "the attributes channels and in_halos have 1 and 2 numbers"),
        ({"channels": [2, 3, 1], "in_halos": [0, 0, 0]}, "there are 2 inputs, not 3"),
        ({"channels": [3, 2]}, "parts is \\[1, 4, 2\\], not a stack \\[blocks, 6, 2\\]"),
        ({"channels": [2, 2]}, "parts is \\[1, 6, 2\\], not \\[1, 4, 2\\]"),
    ],
)
def test_channels_refuses(changes: dict[str, Any], message: str) -> None:
    inputs = {"first": np.zeros((1, 4, 2), F), "second": np.zeros((1, 6, 2), F)}
    attributes = {"height": 1, "width": 2, "lanes": 2, "out_halo": 0, "source": [0, 1]}
    attributes |= {"channels": [2, 3], "in_halos": [0, 0], **changes}
    with pytest.raises(Exception, match="Channels: " + message):
        run("Channels", inputs, {"y": F}, **attributes)


def test_channels_of_more_inputs_than_it_takes() -> None:
    inputs = {f"part {i}": np.zeros((1, 2, 2), F) for i in range(513)}
    attributes = {"height": 1, "width": 2, "lanes": 2, "out_halo": 0, "source": [0]}
    many = {"channels": [1] * 513, "in_halos": [0] * 513}
    with pytest.raises(Exception, match="Channels: there are more than 512 inputs"):
        run("Channels", inputs, {"y": F}, **attributes, **many)


def resampled(shape: tuple[int, ...], out: tuple[int, ...]) -> dict[str, int]:
    """Attributes of an operator that changes height and width."""
    _, lanes, channels, height, width = shape
    sizes_in = {"in_height": height, "in_width": width, "in_halo": 1}
    sizes_out = {"out_height": out[-2], "out_width": out[-1], "out_halo": 2}
    return {"channels": channels, "lanes": lanes, **sizes_in, **sizes_out}


def check_resampling(
    operator: str, array: np.ndarray, x: torch.Tensor, y: torch.Tensor, attributes: dict[str, Any], kind: str
) -> None:
    """The operator and its gradient against torch's ``y`` of ``x``."""
    lanes = attributes["lanes"]
    made = run(operator, {"x": pack(array, lanes, 1)}, {"y": F}, **attributes, threads=2)["y"]
    close(unpack(made, *y.shape[1:], 2), y, 3e-6)
    dy = gradient_of(y, (len(array) // lanes, lanes, *y.shape[1:]))
    joins = Joins(kind, (len(array) // lanes, lanes, *array.shape[1:]), 1)
    inputs = {"dy": pack(dy, lanes, 2), **joins.inputs}
    made = run(f"{operator}Grad", inputs, {"dx": F}, **attributes, **joins.attributes, threads=2)["dx"]
    close(unpack(made, *array.shape[1:], 1), joins(x.grad), 5e-6)


# top, left, bottom, right
PADS = [(0, 1, 2, 0), (1, 1, 1, 1), (-1, 0, 0, -2), (-2, 3, 1, -1), (5, -4, -4, 2), (-4, 0, 6, 0)]


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if min(shape[3:]) >= 4])
@pytest.mark.parametrize("pads", PADS)
@pytest.mark.parametrize("kind", MASKS)
def test_pad(shape: tuple[int, ...], pads: tuple[int, ...], kind: str) -> None:
    array = images(shape)
    top, left, bottom, right = pads
    x = tensor(array)
    if min(shape[3] + top + bottom, shape[4] + left + right) < 1:
        return
    # torch's own pad refuses to cut off more than there is on one side.
    y = torch.full((len(array), shape[2], shape[3] + top + bottom, shape[4] + left + right), 0.5).double()
    rows, columns = (
        slice(max(0, -top), shape[3] + min(0, bottom)),
        slice(max(0, -left), shape[4] + min(0, right)),
    )
    part = x[:, :, rows, columns]
    first, second = max(0, top), max(0, left)
    y[:, :, first : first + part.shape[2], second : second + part.shape[3]] = part
    attributes = {**resampled(shape, tuple(y.shape)), "pads": pads, "value": 0.5}
    check_resampling("Pad", array, x, y, attributes, kind)


def test_pad_refuses() -> None:
    x = np.zeros((1, 4, 1), F)
    attributes = {"channels": 1, "lanes": 1, "in_height": 2, "in_width": 2, "in_halo": 0, "out_halo": 0}
    attributes |= {"out_height": 3, "out_width": 2}
    for pads, message in (
        ([1, 0, 0], "the attribute pads has 3 numbers"),
        ([1, 0, 1, 0], "with 1, 0, 1 and 0 does not give 3 by 2"),
        ([1 << 40, 0, 0, 0], "attribute pads is 1099511627776, not in"),
    ):
        with pytest.raises(Exception, match=f"Pad: .*{message}"):
            run("Pad", {"x": x}, {"y": F}, **attributes, pads=pads)


UPSAMPLINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    # for torch, for the operator
    ({"scale_factor": 2}, {}),
    ({"size": (9, 5)}, {}),
    ({"size": (2, 3)}, {}),
    ({"scale_factor": (1.7, 2.5)}, {"scale_height": 1 / 1.7, "scale_width": 1 / 2.5}),
    ({"scale_factor": (2, 3), "mode": "bilinear"}, {"linear": 1}),
    ({"size": (8, 11), "mode": "bilinear"}, {"linear": 1}),
    ({"size": (3, 2), "mode": "bilinear"}, {"linear": 1}),
    (
        {"scale_factor": 1.7, "mode": "bilinear"},
        {"linear": 1, "scale_height": 1 / 1.7, "scale_width": 1 / 1.7},
    ),
    ({"size": (8, 11), "mode": "bilinear", "align_corners": True}, {"linear": 1, "align_corners": 1}),
    ({"size": (1, 1), "mode": "bilinear", "align_corners": True}, {"linear": 1, "align_corners": 1}),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("torchs", "ours"), UPSAMPLINGS)
def test_upsample(shape: tuple[int, ...], torchs: dict[str, Any], ours: dict[str, Any]) -> None:
    array = images(shape)
    x = tensor(array)
    y = torch.nn.functional.interpolate(x, **torchs)
    attributes = {**resampled(shape, tuple(y.shape)), **ours}
    check_resampling("Upsample", array, x, y, attributes, MASKS[shape[1] % 3])


def test_upsample_refuses_scales_that_are_none() -> None:
    attributes = resampled((1, 1, 1, 2, 2), (4, 4)) | {"in_halo": 0, "out_halo": 0}
    for scale in (-1.0, float("inf"), float("nan")):
        with pytest.raises(Exception, match="Upsample: a scale is"):
            run("Upsample", {"x": np.zeros((1, 4, 1), F)}, {"y": F}, **attributes, scale_width=scale)


A, SLOT = 40, 11  # slots of the affine tensor, and where those of a norm begin

# groups of channels, or 0 for the channels of each pixel
NORMS = [(shape, groups) for shape in SHAPES for groups in (0, 1, shape[2]) if np.prod(shape[2:]) > 1]
NORMS += [((2, 4, 6, 3, 2), 3), ((1, 16, 3, 20, 20), 0), ((1, 8, 4, 1, 1), 2)]


@pytest.mark.parametrize(("shape", "groups"), NORMS)
@pytest.mark.parametrize("kind", MASKS)
def test_norms_of_each_image(shape: tuple[int, ...], groups: int, kind: str) -> None:
    _, lanes, channels, height, width = shape
    operator, own = ("GroupNorm", {"groups": groups}) if groups else ("LayerNorm", {})
    array = images(shape) * 3 + 2
    affine, affine_grad = np.random.default_rng(1).normal(size=(2, 2 * A)).astype(F)
    attributes = {**sizes(shape), **own, "in_halo": 1, "affine": SLOT, "epsilon": 1e-3}
    inputs = {"x": pack(array, lanes, 1), "affine": affine}
    made = run(operator, inputs, {"y": F, "saved": F}, **attributes, out_halo=2, threads=2)
    x, parameters = tensor(array), tensor(affine)
    scale, shift = (parameters[start : start + channels] for start in (SLOT, A + SLOT))
    if groups:
        y = torch.nn.functional.group_norm(x, groups, scale, shift, 1e-3)
    else:
        last = x.permute(0, 2, 3, 1)
        y = torch.nn.functional.layer_norm(last, (channels,), scale, shift, 1e-3).permute(0, 3, 1, 2)
    close(unpack(made["y"], channels, height, width, 2), y, 2e-5)

    dy = gradient_of(y, shape)
    joins = Joins(kind, shape, 0)
    inputs = {"dy": pack(dy, lanes, 1), **inputs, "saved": made["saved"], **joins.inputs}
    halos = {"dy_halo": 1, "dx_halo": 0, **joins.attributes}
    outputs = {"dx": F, "affine_grad": F}
    full = {**inputs, "affine_grad": affine_grad}
    found = [run(f"{operator}Grad", full, outputs, **attributes, **halos, threads=n) for n in (1, 2)]
    assert all(found[0][name].tobytes() == found[1][name].tobytes() for name in outputs)
    close(unpack(found[0]["dx"], channels, height, width, 0), joins(x.grad), 1e-4)
    close(found[0]["affine_grad"], affine_grad + parameters.grad.numpy(), 1e-4)
    # An attack wants the gradient of the input alone.
    outputs = {"dx": F, "affine_grad": None}
    alone = run(f"{operator}Grad", {**inputs, "affine_grad": None}, outputs, **attributes, **halos)
    assert alone["dx"].tobytes() == found[0]["dx"].tobytes()


@pytest.mark.parametrize("rectify", [0, 1])
def test_group_norm_rectifies(rectify: int) -> None:
    shape = (2, 4, 6, 3, 5)
    x = pack(images(shape), 4, 0)
    attributes = {**sizes(shape), "groups": 2, "in_halo": 0, "out_halo": 1, "affine": 0, "relu": rectify}
    outputs = {"y": F, "saved": None, "bits": np.uint8}
    made = run("GroupNorm", {"x": x, "affine": np.ones(12, F)}, outputs, **attributes)
    y = unpack(made["y"], 6, 3, 5, 1)
    assert (y >= 0).all() == bool(rectify) and made["bits"].tolist() == pack_bits(y, 4).tolist()


@pytest.mark.parametrize(
    ("operator", "changes", "attributes", "message"),
    [
        ("GroupNorm", {}, {"groups": 4}, "6 channels are not in 4 groups of one size"),
        ("GroupNorm", {}, {"groups": 7}, "attribute groups is 7, not in \\[1, 6\\]"),
        ("GroupNorm", {"affine": np.ones(10, F)}, {}, "has no slots 0 to 6"),
        ("GroupNorm", {"x": np.full((1, 36, 2), np.inf, F)}, {}, "activations of channel . are not finite"),
        ("LayerNorm", {"x": np.full((1, 36, 2), np.nan, F)}, {}, "the activations are not finite"),
        ("LayerNorm", {}, {"epsilon": 0.0}, "epsilon is 0"),
        ("GroupNormGrad", {"saved": np.ones((1, 2, 2, 1), F)}, {}, "saved is .*, not \\[1, 2, 2, 2\\]"),
        ("LayerNormGrad", {"saved": np.ones((1, 2, 2, 2), F)}, {}, "saved is .*, not \\[1, 3, 2, 4\\]"),
    ],
)
def test_norms_refuse(
    operator: str, changes: dict[str, np.ndarray], attributes: dict[str, Any], message: str
) -> None:
    x = pack(images((1, 2, 6, 3, 2)), 2, 0)
    halos = {"in_halo": 0, "out_halo": 0, "dy_halo": 0, "dx_halo": 0, "mask_kind": 0, "mask_halo": 0}
    own = {**sizes((1, 2, 6, 3, 2)), **halos, "groups": 2, "affine": 0, **attributes}
    inputs: dict[str, Any] = {"x": x, "affine": np.ones(12, F), **changes}
    if operator.endswith("Grad"):
        inputs = {"dy": x, **inputs, "addend": None, "mask": None}
    with pytest.raises(Exception, match=f"{operator}: .*{message}"):
        run(operator, inputs, {"y": F}, **own)


@pytest.mark.parametrize("operator", ["Channels", "ChannelsGrad"])
def test_a_hostile_list_of_channels_is_refused(operator: str) -> None:
    attributes = {"height": 1, "width": 1, "lanes": 1, "source": [0], "mask_kind": 0, "mask_halo": 0}
    if operator == "Channels":
        attributes |= {"channels": [1 << 62], "in_halos": [0], "out_halo": 0}
        inputs: dict[str, Any] = {"parts": np.zeros((1, 1, 1), F)}
    else:
        attributes |= {"channels": 1 << 62, "dy_halo": 0, "dx_halo": 0}
        inputs = {"dy": np.zeros((1, 1, 1), F), "addend": None, "mask": None}
    with pytest.raises(Exception, match="channels, not in"):
        run(operator, inputs, {"y": F}, **attributes)
