"""Every activation and its derivative, in every instruction set, against float64; what applies them."""

# mypy: disable-error-code="arg-type, dict-item"

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import programs
from helpers.operators import pack, pack_bits, run, unpack
from torch.nn import functional

F = np.float32
U8 = np.uint8
SLOPE = 0.1
FUNCTIONS = [
    "relu", "relu6", "leaky_relu", "hardsigmoid", "sigmoid", "tanh", "hardswish", "silu", "gelu", "gelu_tanh",
]  # fmt: skip
WITH_BITS = FUNCTIONS[:4]
FROM_OUTPUT = FUNCTIONS[:6]
"""Those whose derivative is made from the result; the others' from what they are applied to."""
VARIANTS = ["scalar", "avx2", "avx512", "neon"]
TINY = 2e-38  # an exponential below the smallest normal number may be 0

WIDE = np.concatenate(
    [
        np.linspace(-100, 100, 4001), np.linspace(-15, 15, 4001), np.linspace(-1, 1, 401),
        [-3, 3, 0.0, -0.0, 6, 1e-45, -1e-45, 1e-40, -1e-40, 1e-20, -1e-20, 1e20, -1e20, 3e38, -3e38],
    ]
).astype(F)  # fmt: skip
"""An odd number of them, so that the last are computed one by one."""
LIMITS = {  # at −∞ and ∞; then of the derivative
    "relu": (0, np.inf, 0, 1), "relu6": (0, 6, 0, 0), "leaky_relu": (-np.inf, np.inf, SLOPE, 1),
    "hardsigmoid": (0, 1, 0, 0), "sigmoid": (0, 1, 0, 0), "tanh": (-1, 1, 0, 0),
    "hardswish": (0, np.inf, 0, 1), "silu": (0, np.inf, 0, 1), "gelu": (0, np.inf, 0, 1),
    "gelu_tanh": (0, np.inf, 0, 1),
}  # fmt: skip


def inner(x: torch.Tensor) -> torch.Tensor:
    """GELU's tanh form is x · sigmoid of this."""
    return 2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)


def exact(function: str, x: torch.Tensor) -> torch.Tensor:
    """The function in float64, with the relative accuracy of float64 wherever it is small, too."""
    match function:
        case "leaky_relu":
            return functional.leaky_relu(x, F(SLOPE).astype(float))
        case "hardswish":  # torch 2.4 has other derivatives where its own bends: −½ and 1½
            return x * functional.relu6(x + 3) / 6
        case "silu":
            return x * torch.sigmoid(x)
        case "gelu":
            return x * torch.special.erfc(-x / 2**0.5) / 2
        case "gelu_tanh":
            return x * torch.sigmoid(inner(x))
        case _:
            return getattr(functional, function)(x)  # type: ignore[no-any-return]


def tolerance(function: str, x: np.ndarray) -> np.ndarray:
    """Relative error that is allowed. An exponent's own rounding is that of the exponent times its size."""
    if function == "gelu_tanh":
        return 4e-7 * (1 + np.abs(inner(torch.tensor(x)).numpy()))
    return np.full(x.shape, {"gelu": 6e-7, "silu": 4e-7}.get(function, 3e-7))


def derivative(function: str, x: torch.Tensor) -> np.ndarray:
    x = x.clone().requires_grad_()
    exact(function, x).sum().backward()
    assert x.grad is not None
    return x.grad.numpy()


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if programs.instruction_set(request.param) != request.param:
        pytest.skip(f"this machine has no {request.param}")
    monkeypatch.setenv("EDGE_BCS_ISA", request.param)
    return str(request.param)


def row(values: np.ndarray) -> dict[str, Any]:
    return {"channels": 1, "height": 1, "width": values.size, "lanes": 1}


def activated(function: str, x: np.ndarray) -> np.ndarray:
    given = {"x": x.reshape(1, -1, 1)}
    slope = {"slope": SLOPE} if function == "leaky_relu" else {}
    attributes = {**row(x), "in_halo": 0, "out_halo": 0, "activation": function, **slope}
    return programs.run_operator("Activate", given, {"y": F, "bits": None}, **attributes)["y"].reshape(-1)


def passed_back(function: str, kept: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    given = {"a": gradient.reshape(1, -1, 1), "b": None, "mask": kept.reshape(1, -1, 1)}
    attributes = {**row(kept), "a_halo": 0, "out_halo": 0, "mask_kind": 1, "mask_activation": function}
    attributes |= {"mask_slope": SLOPE} if function == "leaky_relu" else {}
    return programs.run_operator("MaskedAdd", given, {"y": F}, **attributes)["y"].reshape(-1)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_function_is_that_of_float64(variant: str, function: str) -> None:
    y = activated(function, WIDE)
    x = torch.tensor(WIDE, dtype=torch.float64)
    expected = np.clip(exact(function, x).numpy(), -np.finfo(F).max, np.finfo(F).max)
    allowed = tolerance(function, x.numpy()) * np.abs(expected) + TINY * (1 + np.abs(x.numpy()))
    off = np.abs(y - expected) > allowed
    assert not off.any(), (WIDE[off], y[off], expected[off])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_derivative_is_that_of_float64(variant: str, function: str) -> None:
    x = torch.tensor(WIDE[np.abs(WIDE) < 1e15], dtype=torch.float64)
    # Each function's derivative has a value where it bends; torch's own is the one that is taken.
    own = getattr(functional, function, None)
    own = {"leaky_relu": lambda x: functional.leaky_relu(x, F(SLOPE).astype(float))}.get(function, own)
    kept, expected = x, derivative(function, x)
    if function in WITH_BITS:
        at = x.clone().requires_grad_()
        own(at).sum().backward()
        expected = at.grad.numpy()
    if function in FROM_OUTPUT:
        kept = exact(function, x).to(torch.float32).to(torch.float64)
        if function == "sigmoid":
            expected = (kept * (1 - kept)).numpy()
        if function == "tanh":
            expected = (1 - kept**2).numpy()
        if function == "hardsigmoid":  # a result that rounds to a limit is one
            expected = np.where((kept > 0) & (kept < 1), 1 / 6, 0)
    gradient = np.random.default_rng(5).normal(size=x.numel()).astype(F)
    made = passed_back(function, kept.numpy().astype(F), gradient)
    # A sum of two terms is as exact as they are large.
    terms = np.maximum(np.abs(expected), 1 * (function in FUNCTIONS[6:]))
    off = np.abs(made - gradient * expected) > 1e-6 * np.abs(gradient) * terms + TINY
    assert not off.any(), (kept[off], made[off], (gradient * expected)[off])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_no_number_stays_so_and_infinity_gives_the_limit(variant: str, function: str) -> None:
    x = np.array([-np.inf, np.inf, np.nan] * 11, F)
    low, high, slope_low, slope_high = LIMITS[function]
    assert activated(function, x).tolist()[:2] == [low, high]
    assert activated(function, x).tolist()[-3:-1] == [low, high]  # one by one
    assert np.isnan(activated(function, x)[2::3]).all()
    kept = x if function not in FROM_OUTPUT else np.array([low, high, np.nan] * 11, F)
    made = passed_back(function, kept, np.ones_like(x))
    assert np.allclose(made[:2], [slope_low, slope_high], rtol=1e-6)
    assert np.allclose(made[-3:-1], [slope_low, slope_high], rtol=1e-6)
    if function not in WITH_BITS:
        assert np.isnan(made[2::3]).all()


@pytest.mark.parametrize("slope", [0.2, 0.0, -0.5])
@pytest.mark.parametrize("function", WITH_BITS)
def test_bits_tell_the_derivative(function: str, slope: float) -> None:
    slopes = {"slope": slope} if function == "leaky_relu" else {}
    shape = {"channels": 3, "height": 5, "width": 7, "lanes": 3}
    x = np.random.default_rng(1).normal(0, 4, (6, 3, 5, 7)).astype(F)
    made = run(
        "Activate", {"x": pack(x, 3, 1)}, {"y": F, "bits": U8},
        **shape, in_halo=1, out_halo=2, activation=function, **slopes, threads=2,
    )  # fmt: skip
    at = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    y = functional.leaky_relu(at, slope) if slopes else getattr(functional, function)(at)
    assert np.allclose(unpack(made["y"], 3, 5, 7, 2), y.detach().numpy(), rtol=1e-6)
    gradient = np.random.default_rng(2).normal(size=x.shape).astype(F)
    y.backward(torch.tensor(gradient, dtype=torch.float64))
    slopes = {f"mask_{name}": value for name, value in slopes.items()}
    dx = run(
        "MaskedAdd", {"a": pack(gradient, 3, 0), "b": None, "mask": made["bits"]}, {"y": F},
        **shape, a_halo=0, out_halo=1, mask_kind=2, mask_activation=function, **slopes,
    )  # fmt: skip
    assert np.allclose(unpack(dx["y"], 3, 5, 7, 1), at.grad.numpy(), rtol=1e-6)


CALLS: dict[str, dict[str, Any]] = {
    "Affine": {"x": None, "affine": None},
    "Add": {"a": None, "b": None},
    "BatchNorm": {
        "z": None, "affine": None, "sample_weight": None, "mean": None, "variance": None, "residual": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("function", ["silu", "relu6", "hardsigmoid"])
@pytest.mark.parametrize("operator", CALLS)
def test_operators_apply_it_and_give_what_it_was_applied_to(operator: str, function: str) -> None:
    random = np.random.default_rng(3)
    first, second = (random.normal(0, 3, (4, 2, 3, 5)).astype(F) for _ in range(2))
    stacks = {"x": first, "a": first, "b": second, "z": first, "residual": second}
    others = {
        "affine": random.normal(1, 1, 4).astype(F), "sample_weight": np.ones(4, F),
        "mean": np.zeros(2, F), "variance": np.ones(2, F),
    }  # fmt: skip
    inputs = {name: pack(stacks[name], 2, 1) if name in stacks else others[name] for name in CALLS[operator]}
    attributes = {"channels": 2, "height": 3, "width": 5, "lanes": 2, "affine": 0, "statistics": 0}
    attributes |= {"in_halo": 1, "a_halo": 1, "b_halo": 1, "residual_halo": 1, "out_halo": 2, "update": 0}
    names = {"y": F, "bits": U8, "pre": F}
    if operator == "BatchNorm":
        names = {"y": F, "saved": None, "mean_out": None, "variance_out": None, "bits": U8, "pre": F}
    plain = run(operator, inputs, {**names, "bits": None, "pre": None}, **attributes)
    made = run(operator, inputs, names, **attributes, activation=function, pre_halo=1, threads=2)
    before = unpack(plain["y"], 2, 3, 5, 2)
    # The same numbers, whatever stands behind them; zeros around them.
    assert unpack(made["pre"], 2, 3, 5, 1).tobytes() == before.tobytes()
    y = exact(function, torch.tensor(before, dtype=torch.float64)).numpy()
    assert np.allclose(unpack(made["y"], 2, 3, 5, 2), y, rtol=1e-6, atol=1e-7)
    low, high = {"silu": (0, np.inf), "relu6": (0, 6), "hardsigmoid": (-3, 3)}[function]
    assert made["bits"].tobytes() == pack_bits(F((before > low) & (before < high)), 2).tobytes()


def test_refusals_name_the_attribute() -> None:
    x = {"x": np.zeros((1, 4, 1), F)}
    shape = {"channels": 1, "height": 1, "width": 4, "lanes": 1, "in_halo": 0, "out_halo": 0}
    with pytest.raises(Exception, match='Activate: attribute activation is "swish", which is no activation'):
        run("Activate", x, {"y": F, "bits": None}, **shape, activation="swish")
    with pytest.raises(Exception, match="Activate: attribute slope is not finite"):
        run("Activate", x, {"y": F, "bits": None}, **shape, activation="leaky_relu", slope=np.inf)
    masked = {"a": x["x"], "b": None, "mask": np.zeros((1, 1, 1), U8)}
    with pytest.raises(Exception, match="bits do not tell the derivative of silu"):
        run("MaskedAdd", masked, {"y": F}, **shape, a_halo=0, mask_kind=2, mask_activation="silu")
    pool = {"channels": 1, "in_height": 2, "in_width": 2, "out_height": 1, "out_width": 1, "kernel": 2}
    pool |= {"in_halo": 0, "out_halo": 0, "stride": 2, "padding": 0, "lanes": 1}
    with pytest.raises(Exception, match="MaxPool: attribute activation of a maximum"):
        run("MaxPool", x, {"y": F, "choice": None}, **pool, activation="tanh")


def test_the_spelling_of_0_1_is_read() -> None:
    x = np.array([-1, 2, -3, 4], F).reshape(1, 4, 1)
    shape = {"channels": 1, "height": 1, "width": 4, "lanes": 1, "in_halo": 0, "out_halo": 0}
    made = run("Activate", {"x": x}, {"y": F, "bits": None}, **shape, relu=1)["y"]
    assert made.reshape(-1).tolist() == [0, 2, 0, 4]
    dx = run("MaskedAdd", {"a": -x, "b": None, "mask": x}, {"y": F}, **shape, a_halo=0, mask_kind=1)["y"]
    assert dx.reshape(-1).tolist() == [0, -2, 0, -4]


@pytest.mark.parametrize("rectify", ["relu", "relu6"])
def test_a_maximum_of_activations_is_the_activation_of_the_maximum(rectify: str) -> None:
    x = np.random.default_rng(4).normal(3, 4, (2, 2, 6, 4)).astype(F)
    attributes = {"channels": 2, "in_height": 6, "in_width": 4, "out_height": 3, "out_width": 2, "kernel": 2}
    attributes |= {"in_halo": 0, "out_halo": 0, "stride": 2, "padding": 0, "lanes": 2}
    made = run("MaxPool", {"x": pack(x, 2, 0)}, {"y": F, "choice": U8}, **attributes, activation=rectify)
    at = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    y = functional.max_pool2d(getattr(functional, rectify)(at), 2)
    assert np.array_equal(unpack(made["y"], 2, 3, 2, 0), y.detach().numpy().astype(F))
    gradient = np.random.default_rng(5).normal(size=y.shape).astype(F)
    y.backward(torch.tensor(gradient, dtype=torch.float64))
    inputs = {"dy": pack(gradient, 2, 0), "choice": made["choice"]}
    dx = run("MaxPoolGrad", inputs, {"dx": F}, **attributes)["dx"]
    assert np.array_equal(unpack(dx, 2, 6, 4, 0), at.grad.numpy().astype(F))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_two_threads_give_the_bits_of_one(function: str) -> None:
    x = np.random.default_rng(6).normal(0, 3, (8, 5, 9, 7)).astype(F)
    shape = {"channels": 5, "height": 9, "width": 7, "lanes": 4, "in_halo": 1, "out_halo": 1}
    slopes = {"slope": SLOPE} if function == "leaky_relu" else {}
    made = [
        run(
            "Activate",
            {"x": pack(x, 4, 1)},
            {"y": F, "bits": U8},
            threads=threads,
            activation=function,
            **shape,
            **slopes,
        )
        for threads in (1, 2)
    ]
    assert made[0]["y"].tobytes() == made[1]["y"].tobytes()
    assert made[0]["bits"].tobytes() == made[1]["bits"].tobytes()
