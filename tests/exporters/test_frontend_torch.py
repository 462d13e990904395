"""How a torch module is written does not matter: it becomes the same layers, or is refused by name."""

# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload"

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from edge_bcs.exporters.frontends.torch import capture, captured_somehow
from edge_bcs.exporters.layers import Activation, BatchNorm, Convolution, Input
from edge_bcs.exporters.network import captured
from helpers.forms import SHAPE, Around, Functions, Inside, Mean, Methods, Modules, summary
from torch import Tensor, nn

import edge_bcs
from edge_bcs import EdgeBcsError
from edge_bcs.core.errors import EdgeBcsWarning
from edge_bcs.core.normalization import Normalization
from edge_bcs.method.wrappers import unwrapped


@pytest.mark.parametrize("kind", [Functions, Methods, Mean])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_forms_of_one_network_become_the_same_layers(kind: type[Modules], training: bool) -> None:
    expected = summary(capture(Modules().eval(), SHAPE))
    assert [type(layer).__name__ for layer in expected] == [
        *("Input", "Convolution", "BatchNorm", "Activation", "MaxPool", "Add", "Activation", "AveragePool"),
        *("AveragePool", "Flatten", "Convolution"),
    ]
    assert summary(capture(kind().train(training), SHAPE)) == expected


def test_nesting_shows_only_in_the_names_of_modules() -> None:
    inner, outer = summary(capture(Modules(), SHAPE)), summary(capture(Inside(Modules()), SHAPE))
    named = [
        replace(layer, module=f"outer.0.1.{layer.module}")
        if isinstance(layer, Convolution | BatchNorm)
        else layer
        for layer in inner
    ]
    assert outer == named


def test_a_sequence_is_a_network() -> None:
    parts = [nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 2)]
    graph = capture(nn.Sequential(*parts), SHAPE)
    assert [layer.name for layer in graph.layers] == ["input_1", "_0", "_1", "_2", "_3"]
    assert [layer.module for layer in graph.layers if isinstance(layer, Convolution)] == ["0", "3"]


# The module is as it was


class Busy(nn.Module):
    """Counts, keeps and draws while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(1))
        self.seen: Tensor | None = None
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count += 1
        self.noise = torch.rand(3)
        self.seen = self.norm(self.conv(x))
        return self.head(self.seen.mean((2, 3)))  # type: ignore[no-any-return]


def test_the_module_is_neither_run_nor_changed() -> None:
    module = Busy()
    module.norm.eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    drawn = torch.random.get_rng_state()
    capture(module, SHAPE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert module.count == 0 and module.seen is None and not hasattr(module, "noise")
    assert module.training and module.conv.training and not module.norm.training
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert all(parameter.requires_grad and not parameter.is_inference() for parameter in module.parameters())
    module(torch.zeros(2, *SHAPE)).sum().backward()
    assert module.conv.weight.grad is not None


def test_a_refused_module_is_as_it_was_too() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Flatten())
    with pytest.raises(EdgeBcsError, match=r"module '1' \(Softplus\) is not supported"):
        capture(module, SHAPE)
    assert all(part.training for part in module.modules())


# Wrappers


def test_what_torch_compile_made_is_the_network_itself() -> None:
    module = Modules()
    expected = capture(module, SHAPE).layers
    compiled = torch.compile(module)
    assert unwrapped(compiled) is module
    assert capture(compiled, SHAPE).layers == expected
    assert capture(nn.DataParallel(module), SHAPE).layers == expected
    module.compile()
    assert capture(module, SHAPE).layers == expected
    assert module._compiled_call_impl is not None


def test_a_compiled_part_is_captured_as_it_stands() -> None:
    inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    module = nn.Sequential(torch.compile(inner), nn.Flatten(), nn.Linear(144, 2))
    graph = capture(module, SHAPE)
    assert [layer.module for layer in graph.layers if isinstance(layer, Convolution)] == [
        "0._orig_mod.0",
        "2",
    ]
    assert "forward" in vars(module[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused_by_name() -> None:
    scripted = torch.jit.trace(nn.Conv2d(3, 4, 3), torch.zeros(1, *SHAPE))
    for module, name in (
        (scripted, "the network is TorchScript"),
        (Inside(scripted), "module 'outer.0.1' is Torch"),
    ):
        with pytest.raises(EdgeBcsError, match=f"{name}.*give the torch.nn.Module"):
            capture(module, SHAPE)


# Outputs


class Outputs(nn.Module):
    """Returns its logits in one of the ways that networks with more than one output have."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head, self.auxiliary = nn.Linear(4, 2), nn.Linear(4, 3)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x).mean((2, 3))
        return self.wrap(self.head(x), self.auxiliary(x))


class Named(NamedTuple):
    aux: Tensor
    logits: Tensor


@pytest.mark.parametrize(
    ("wrap", "called"),
    [
        (lambda out, aux: (out, aux), "the first"),
        (lambda out, aux: [out, aux, None], "the first"),
        (lambda out, aux: Named(aux, out), "'logits'"),
        (lambda out, aux: {"aux": aux, "out": out}, "'out'"),
    ],
    ids=["tuple", "list", "namedtuple", "dict"],
)
def test_of_several_outputs_the_logits_are_taken_and_it_is_said(
    wrap: Callable[[Tensor, Tensor], Any], called: str
) -> None:
    graph = capture(Outputs(wrap), SHAPE)
    assert graph.num_classes == 2
    assert [layer.module for layer in graph.layers if isinstance(layer, Convolution)] == ["conv", "head"]
    assert len(graph.left_out) == 1 and called in graph.left_out[0]


def test_one_output_in_a_tuple_is_not_talked_about() -> None:
    assert capture(Outputs(lambda out, aux: (out,)), SHAPE).left_out == []


class Auxiliary(nn.Module):
    """As googlenet: a second head that only training has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head, self.aux = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x).mean((2, 3))
        return Named(self.aux(x), self.head(x)) if self.training else self.head(x)


def test_a_head_that_only_training_has_is_left_out_with_a_word() -> None:
    graph = capture(Auxiliary().train(), SHAPE)
    assert [layer.module for layer in graph.layers if isinstance(layer, Convolution)] == ["conv", "head"]
    assert graph.left_out == ["2 of its parameters, 'aux.weight' the first, do not reach the logits"]
    with pytest.warns(EdgeBcsWarning, match="'aux.weight' the first"):
        sparse = edge_bcs.sparsify(Auxiliary(), 0.5)
    x = torch.rand(2, *SHAPE)
    assert torch.equal(sparse.train()(x), sparse.eval()(x))  # in training, too, logits are taken


# Blocks as torchvision and timm write them


class StochasticDepth(nn.Module):
    """As torchvision.ops writes it: noise in training, nothing in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        noise = torch.empty([x.shape[0]] + [1] * (x.ndim - 1), dtype=x.dtype, device=x.device)
        return x * noise.bernoulli_(0.5).div_(0.5)


class RepVGG(nn.Module):
    """As timm writes it: a sum that may begin with the number 0."""

    def __init__(self, identity: bool) -> None:
        super().__init__()
        self.identity = nn.BatchNorm2d(4) if identity else None
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + (0 if self.identity is None else self.identity(x))  # type: ignore[no-any-return]


def test_stochastic_depth_and_inplace_dropout_are_the_identity() -> None:
    parts = [nn.Conv2d(3, 4, 1), StochasticDepth(), nn.Flatten(), nn.Dropout(0.2, inplace=True)]
    graph = capture(nn.Sequential(*parts, nn.Linear(256, 2)).train(), SHAPE)
    assert [type(layer).__name__ for layer in graph.layers] == [
        "Input",
        "Convolution",
        "Flatten",
        "Convolution",
    ]


def test_a_sum_with_the_number_0_is_the_tensor() -> None:
    graph = capture(nn.Sequential(nn.Conv2d(3, 4, 1), RepVGG(False), RepVGG(True), nn.Flatten()), SHAPE)
    assert [type(layer).__name__ for layer in graph.layers] == [
        *("Input", "Convolution", "Convolution", "Convolution", "BatchNorm", "Add", "Flatten"),
    ]


def test_a_linear_layer_written_as_a_product() -> None:
    class Product(nn.Module):
        def __init__(self, bias: bool) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, 192))
            self.bias = nn.Parameter(torch.zeros(2)) if bias else None

        def forward(self, x: Tensor) -> Tensor:
            if self.bias is None:
                return x @ self.weight.t()
            return torch.addmm(self.bias, x, self.weight.transpose(0, 1))

    for bias in (False, True):
        parts = nn.Sequential(nn.Flatten(), Product(bias))
        assert summary(capture(parts, SHAPE)) == summary(
            capture(nn.Sequential(nn.Flatten(), nn.Linear(192, 2, bias)), SHAPE)
        )


# Pixels that the network normalises itself


class Normalised(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 8)
        self.register_buffer("mean", torch.tensor([0.25, 0.5, 0.75]).reshape(1, 3, 1, 1))
        self.std, self.way = [0.5, 0.25, 2.0], way
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "buffer":
            y = (x - self.mean) / torch.tensor(self.std, device=x.device)[:, None, None]
        elif self.way == "method":
            y = x.sub(self.mean).mul_(1 / x.new_tensor(self.std).view(-1, 1, 1))
        elif self.way == "affine":
            y = 2 * x - 1
        elif self.way == "reversed":
            y = 1 - x / 4
        elif self.way == "twice":
            y = x - 0.5 + x
        else:
            y = x * self.gain
        return self.conv(y).flatten(1)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("way", "scale", "shift"),
    [
        ("buffer", (2.0, 4.0, 0.5), (-0.5, -2.0, -0.375)),
        ("method", (2.0, 4.0, 0.5), (-0.5, -2.0, -0.375)),
        ("affine", (2.0,) * 3, (-1.0,) * 3),
        ("reversed", (-0.25,) * 3, (1.0,) * 3),
    ],
)
def test_a_normalisation_of_pixels_is_the_first_layers(
    way: str, scale: tuple[float, ...], shift: tuple[float, ...]
) -> None:
    graph = capture(Normalised(way), SHAPE)
    image = graph.layers[0]
    assert isinstance(image, Input) and image.scale == scale and image.shift == shift
    assert [type(layer).__name__ for layer in graph.layers] == ["Input", "Convolution", "Flatten"]


@pytest.mark.parametrize(
    ("way", "message"), [("twice", "'add'.*not supported|normalised"), ("gain", "'mul'")]
)
def test_other_arithmetic_with_pixels_is_refused(way: str, message: str) -> None:
    with pytest.raises(EdgeBcsError, match=message):
        capture(Normalised(way), SHAPE)


def test_a_normalisation_of_its_own_comes_after_ours() -> None:
    sparse = edge_bcs.sparsify(Normalised("affine"), 0.5, start="new")
    sparse.normalize = Normalization((0.5,), (0.25,))
    image = captured(sparse, SHAPE).layers[0]
    assert isinstance(image, Input) and image.scale == (8.0,) * 3 and image.shift == (-5.0,) * 3


# What a network does to its logits


class Ends(nn.Module):
    def __init__(self, end: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.head, self.end = nn.Conv2d(3, 4, 3), nn.Linear(4, 3), end

    def forward(self, x: Tensor) -> Any:
        return self.end(self.head(self.conv(x).mean((2, 3))))


ENDS: dict[str, tuple[Callable[[Tensor], Any], str, str]] = {
    "softmax": (lambda y: F.softmax(y, 1), "softmax", "the softmax at its end is left out"),
    "log_softmax": (lambda y: y.log_softmax(-1), "log_softmax", "the log_softmax at its end is left out"),
    "tuple": (lambda y: (y, y[:, :1]), "", "of its 2 outputs only the first is taken"),
    "both": (
        lambda y: {"aux": y, "out": torch.softmax(y, dim=1)},
        "softmax",
        "only 'out' is taken; the softmax",
    ),
}


@pytest.mark.parametrize("kind", ENDS)
def test_what_is_left_out_is_said_and_the_rest_trained(kind: str, tmp_path: Path) -> None:
    """The artifact validates itself against torch; on the host, too, losses take logits."""
    end, ending, said = ENDS[kind]
    torch.manual_seed(1)
    module = Ends(end)
    with pytest.warns(EdgeBcsWarning, match=said):
        sparse = edge_bcs.sparsify(module, 0.25, start="new")
    assert sparse.ending == ending
    x = torch.rand(4, *SHAPE)
    plain = copy.deepcopy(sparse)
    plain.network.end = nn.Identity()
    plain.ending = ""
    logits, expected = sparse(x), plain(x)
    assert torch.allclose(logits.log_softmax(1), expected.log_softmax(1), atol=1e-6)
    with pytest.warns(EdgeBcsWarning, match=said):
        edge_bcs.export(sparse, tmp_path / "artifact", "trades", SHAPE, memory=edge_bcs.Memory(micro_batch=4))


# Images of unknown size


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32), (2, 13), (3, 224)])
def test_the_size_of_images_is_found(channels: int, size: int) -> None:
    module = nn.Sequential(
        nn.Conv2d(channels, 4, 3, 2), nn.Flatten(), nn.Linear(4 * ((size - 3) // 2 + 1) ** 2, 2)
    )
    graph = captured_somehow(module)
    assert graph is not None and graph.layers[0].shape == (channels, size, size)


def test_what_no_size_explains_is_told_and_what_one_may_is_not() -> None:
    assert captured_somehow(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4321, 2))) is None
    with pytest.raises(EdgeBcsError, match="Softplus"):
        captured_somehow(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(4321, 2)))


def test_a_capture_does_not_load_torchs_compiler() -> None:
    """Which takes seconds, in every process that exports or makes a sparse network."""
    code = (
        "import sys, edge_bcs\n"
        "edge_bcs.sparsify(edge_bcs.models.vgg16(width=0.1), 0.9)\n"
        "print([name for name in ('torch._dynamo', 'sympy', 'torch._inductor') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.6", reason="torch.export took operators apart")
def test_operators_are_those_that_torch_export_records() -> None:
    """Of the releases of torch whose graphs for training keep operators whole."""
    from edge_bcs.exporters.frontends import trace
    from edge_bcs.exporters.frontends.rows import ROWS, SUPPORTED

    seen = []
    rows = {
        name: lambda call, row=row: (seen.append(call.operator), row(call))[1]  # type: ignore[misc]
        for name, row in ROWS.items()
    }
    for kind in (Modules, Functions, Mean):
        seen.clear()
        watched = trace.Trace(kind().eval(), rows, SUPPORTED)
        watched.outputs(Input("x", (), SHAPE))
        exported = torch.export.export(kind().eval(), (torch.zeros(2, *SHAPE),), strict=False)
        called = [node.target for node in exported.graph.nodes if node.op == "call_function"]
        assert seen == [target._schema.name.partition("::")[2] for target in called]


ACTIVATIONS: dict[str, list[Any]] = {
    "relu": [nn.ReLU(), F.relu, torch.relu, lambda x: x.relu_(), lambda x: x.clamp(min=0)],
    "relu6": [
        nn.ReLU6(),
        F.relu6,
        nn.Hardtanh(0, 6),
        lambda x: torch.clamp(x, 0, 6),
        lambda x: x.clamp_(0, 6),
    ],
    "leaky_relu": [nn.LeakyReLU(0.25), lambda x: F.leaky_relu(x, 0.25)],
    "hardsigmoid": [nn.Hardsigmoid(), F.hardsigmoid],
    "sigmoid": [nn.Sigmoid(), torch.sigmoid, lambda x: x.sigmoid_()],
    "tanh": [nn.Tanh(), torch.tanh, lambda x: x.tanh()],
    "hardswish": [nn.Hardswish(inplace=True), F.hardswish],
    "silu": [nn.SiLU(), lambda x: F.silu(x, inplace=True)],
    "gelu": [nn.GELU(), F.gelu],
    "gelu_tanh": [nn.GELU(approximate="tanh"), lambda x: F.gelu(x, approximate="tanh")],
}


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_an_activation_is_the_same_in_every_form(kind: str) -> None:
    for form in ACTIVATIONS[kind]:
        layers = capture(Around(lambda _, x, form=form: form(x)), SHAPE).layers
        (found,) = [layer for layer in layers if isinstance(layer, Activation)]
        assert found.kind == kind
        assert dict(found.attributes) == ({"slope": 0.25} if kind == "leaky_relu" else {})
