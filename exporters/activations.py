"""The table of activations: functions of one number, which operators apply to what they compute.

A row says everything that the compiler knows of one. `runtime/native/kernels/activate.h` and `activate.cpp`
compute it and its derivative, under the same name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import pi, sqrt
from typing import Any, Literal

from .plain import Plain, X

Attributes = Mapping[str, Any]


@dataclass(frozen=True)
class Function:
    """A function of one number.

    Attributes:
        name: in attributes of operators. title: of torch's module, for a sentence.
        kept: what its derivative is made from: bits (it has two slopes), its output, or what it was applied
            to ("pre").
        aten: operator of ATen that it is → the arguments that it then has.
        attributes: ours → the argument's name in ATen.
        plain: its form in ONNX's own operators (opset 17), from its attributes.
        flops: floating-point operations beyond a comparison.
        clips: whether it is constant outside an interval and x inside, so that the maximum of a window goes
            through it whole or not at all.
    """

    name: str
    title: str
    kept: Literal["bits", "output", "pre"]
    aten: Mapping[str, Mapping[str, Any]]
    plain: Callable[[Attributes], Plain]
    attributes: Mapping[str, str] = field(default_factory=dict)
    flops: int = 0
    clips: bool = False


def _gelu(_: Attributes) -> Plain:
    """x/2 · (1 + erf(x/√2)); opset 17 has no Gelu."""
    erf = Plain("Erf", operands=(Plain("Mul", operands=(X, sqrt(0.5))),))
    return Plain("Mul", operands=(Plain("Mul", operands=(X, 0.5)), Plain("Add", operands=(erf, 1.0))))


def _gelu_tanh(_: Attributes) -> Plain:
    """x · sigmoid(2u), which is x/2 · (1 + tanh(u)), with u = √(2/π) · (x + 0.044715 x³)."""
    twice = 2 * sqrt(2 / pi)
    square = Plain("Mul", operands=(X, X))
    slope = Plain("Add", operands=(Plain("Mul", operands=(square, 0.044715 * twice)), twice))
    inner = Plain("Mul", operands=(X, slope))
    return Plain("Mul", operands=(X, Plain("Sigmoid", operands=(inner,))))


FUNCTIONS = {
    function.name: function
    for function in (
        Function(
            "relu",
            "ReLU",
            "bits",
            {"relu": {}, "clamp": {"min": 0, "max": None}, "clamp_min": {"min": 0}},
            lambda _: Plain("Relu"),
            clips=True,
        ),
        Function(
            "relu6",
            "ReLU6",
            "bits",
            {
                "relu6": {},
                "hardtanh": {"min_val": 0, "max_val": 6},
                "clamp": {"min": 0, "max": 6},
            },
            lambda _: Plain("Clip", operands=(X, 0.0, 6.0)),
            clips=True,
        ),
        Function(
            "leaky_relu",
            "LeakyReLU",
            "bits",
            {"leaky_relu": {}},
            lambda a: Plain("LeakyRelu", attributes={"alpha": a["slope"]}),
            {"slope": "negative_slope"},
            flops=1,
        ),
        Function(
            "hardsigmoid",
            "Hardsigmoid",
            "bits",
            {"hardsigmoid": {}},
            lambda _: Plain("HardSigmoid", attributes={"alpha": 1 / 6, "beta": 0.5}),
            flops=2,
        ),
        Function("sigmoid", "Sigmoid", "output", {"sigmoid": {}}, lambda _: Plain("Sigmoid"), flops=20),
        Function("tanh", "Tanh", "output", {"tanh": {}}, lambda _: Plain("Tanh"), flops=30),
        Function("hardswish", "Hardswish", "pre", {"hardswish": {}}, lambda _: Plain("HardSwish"), flops=3),
        Function(
            "silu",
            "SiLU",
            "pre",
            {"silu": {}},
            lambda _: Plain("Mul", operands=(X, Plain("Sigmoid", operands=(X,)))),
            flops=21,
        ),
        Function("gelu", "GELU", "pre", {"gelu": {"approximate": "none"}}, _gelu, flops=45),
        Function("gelu_tanh", "GELU", "pre", {"gelu": {"approximate": "tanh"}}, _gelu_tanh, flops=26),
    )
}
"""Name → function."""


# Attributes of operators


def applied(attributes: Attributes) -> Function | None:
    """The function that an operator with these attributes applies, or None."""
    name = attributes.get("activation")
    return None if name is None else FUNCTIONS[name]


def activation(kind: str, attributes: Attributes) -> dict[str, Any]:
    """Attributes of an operator that applies the function ``kind``, which has ``attributes``."""
    return {"activation": kind, **attributes}


def unactivated(attributes: Attributes) -> dict[str, Any]:
    """Attributes without those of a function."""
    names = {"activation", "pre_halo", *(name for row in FUNCTIONS.values() for name in row.attributes)}
    return {name: value for name, value in attributes.items() if name not in names}


def of_activation(attributes: Attributes) -> dict[str, Any]:
    """Those of an operator's attributes that say what function it applies."""
    function = applied(attributes)
    if function is None:
        return {}
    return activation(function.name, {name: attributes[name] for name in function.attributes})


def masked(attributes: Attributes) -> dict[str, Any]:
    """The same as attributes of an operator that multiplies a gradient with the derivative."""
    return {f"mask_{name}": value for name, value in of_activation(attributes).items()}


def told_by_output(attributes: Attributes) -> bool:
    """Whether the derivative can be made from the output of an operator that applies a function."""
    function = applied(attributes)
    return function is not None and function.kept != "pre" and attributes.get("slope", 0.0) >= 0
