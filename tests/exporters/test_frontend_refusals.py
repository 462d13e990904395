"""What the front end refuses is named, with its place; what the logits do not depend on may be anything."""

# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from edge_bcs.exporters.frontends.torch import capture
from helpers.forms import SHAPE, Around, Inside, Modules
from torch import Tensor, nn

from edge_bcs import EdgeBcsError


def view_in_use(net: Any, x: Tensor) -> Tensor:
    y = x.flatten(1)
    x.relu_()
    return y


def with_mask(net: Any, x: Tensor) -> Tensor:
    return x[x > 0]


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "item": (
        lambda net, x: x if x.max().item() > 0 else x + x,
        r"test_frontend_refusals.py:\d+ decides by the values",
    ),
    "equal": (
        lambda net, x: x if torch.equal(x, x) else x + x,
        r"test_frontend_refusals.py:\d+ decides by the val",
    ),
    "mask": (with_mask, r"the function 'gt' \(test_frontend_refusals.py:\d+\) is not supported"),
    "own fault": (lambda net, x: x.nonsense, r"no attribute 'nonsense' \(test_frontend_refusals.py:\d+\)"),
    "computed": (
        lambda net, x: F.conv2d(x, net.kernel.abs()),
        "weight of .* is computed from 'kernel' by 'abs'",
    ),
    "name": (
        lambda net, x: F.conv2d(x, net.kernel),
        "takes 'kernel' as its weight; .* called weight and bias",
    ),
    "constant": (lambda net, x: F.conv2d(x, torch.zeros(4, 4, 1, 1)), "weight of .* is not a parameter"),
    "parameter": (lambda net, x: x + net.alpha, "takes the tensor 'alpha' directly"),
    "counter": (lambda net, x: x + net.steps.add_(1), "'add'.* changes a tensor that the network holds"),
    "view": (view_in_use, "a tensor is changed in place while the network goes on to use a view of it"),
    "half": (lambda net, x: x.half(), "computes in torch.float16; only float32"),
    "batch": (lambda net, x: x + torch.zeros(x.shape[0], 4, 6, 6), "'zeros'.* makes a tensor for each image"),
    "torch": (lambda net, x: x + F.max_pool2d(x, 2).nope, "cannot be traced on an image of 3×8×8"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals_name_the_operator_and_the_place(kind: str) -> None:
    function, message = REFUSED[kind]
    module = Around(function)
    with pytest.raises(EdgeBcsError, match=message) as refused:
        capture(module, SHAPE)
    assert "\n" not in str(refused.value) and "8191" not in str(refused.value)
    assert module.steps.item() == 0  # type: ignore[operator]


def test_a_place_is_a_module_and_a_line() -> None:
    class Swish(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.erf(x)

    with pytest.raises(
        EdgeBcsError, match=r"'erf' in module 'outer.0.1' \(Swish\) \(test_frontend_refusals.py:\d+\)"
    ):
        capture(Inside(Swish()), SHAPE)


def test_what_only_reads_parameters_is_run() -> None:
    def branch(net: Any, x: Tensor) -> Tensor:
        return x.relu() if net.alpha > 0 and (net.alpha * 2).item() == 2 else x.erf()

    assert [type(layer).__name__ for layer in capture(Around(branch), SHAPE).layers] == [
        *("Input", "Convolution", "Activation", "Flatten"),
    ]


def test_what_the_logits_do_not_depend_on_may_be_anything() -> None:
    def measured(net: Any, x: Tensor) -> Tensor:
        net.seen = torch.erf(x).std()
        net.steps.add_(1)
        return x

    module = Around(measured)
    assert len(capture(module, SHAPE).layers) == 3
    assert module.steps.item() == 0  # type: ignore[operator]


def test_a_change_in_place_is_seen_by_what_reads_the_tensor_afterwards() -> None:
    def changed(net: Any, x: Tensor) -> Tensor:
        y = x.relu_()
        return x + y

    graph = capture(Around(changed), SHAPE)
    add = graph[graph[graph.output].inputs[0]]
    assert [type(graph[name]).__name__ for name in add.inputs] == ["Activation", "Activation"]


@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_computed_weight_is_refused_by_its_name(wrap: Callable[[nn.Module], nn.Module]) -> None:
    module = nn.Sequential(wrap(nn.Conv2d(3, 2, 8)), nn.Flatten())
    before = list(vars(module[0]))
    with pytest.raises(
        EdgeBcsError, match=r"weight of module '0' .* is computed from '0\..*remove_weight_norm"
    ):
        capture(module, SHAPE)
    assert list(vars(module[0])) == before


def test_a_second_input_is_refused() -> None:
    class Two(Modules):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x)

    with pytest.raises(EdgeBcsError, match="second input 'mask'"):
        capture(Two(), SHAPE)
