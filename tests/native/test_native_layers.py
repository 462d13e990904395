"""Packing, affine, sums and batch norm against torch in float64: halos, odd sizes, 1 to 16 lanes."""

# mypy: disable-error-code="arg-type, dict-item"

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from helpers.native_layers import MASKS, SHAPES, U8, F, close, mask_of
from helpers.operators import images, pack, pack_bits, run, sizes, tensor, unpack


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


@pytest.mark.parametrize("lanes", [1, 3, 4, 8, 16, 32])
def test_batch_norm_far_from_zero(lanes: int) -> None:
    # Of 10^6 ± 0.3, a mean square less the square of the mean has four digits left; sample 0 is not counted.
    shape = (2, lanes, 3, 2, 5)
    array = (1e6 + np.random.default_rng(0).integers(0, 16, (2 * lanes, 3, 2, 5)) / 16).astype(F)
    weight = np.ones(2 * lanes, F)
    weight[0], array[0] = 0, 7
    inputs = {"z": pack(array, lanes, 0), "affine": np.ones(6, F), "sample_weight": weight}
    inputs |= {"mean": np.zeros(3, F), "variance": np.zeros(3, F), "residual": None}
    attributes = sizes(shape) | {"in_halo": 0, "out_halo": 0, "affine": 0, "statistics": 0, "momentum": 1.0}
    outputs = {"y": F, "saved": F, "mean": F, "variance": F, "bits": None}
    made = run("BatchNorm", inputs, outputs, **attributes, epsilon=1e-9)
    counted = array[1:].astype(np.float64)
    np.testing.assert_allclose(made["mean"], counted.mean((0, 2, 3)), rtol=1e-7)
    np.testing.assert_allclose(made["variance"], counted.var((0, 2, 3)), rtol=1e-6)


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
