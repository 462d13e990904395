"""Weights of the user's own: what training scripts save is read, what does not fit is told in a sentence."""

# mypy: disable-error-code="index, arg-type, union-attr"

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import run
from safetensors.torch import save_file
from torch import Tensor, nn

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.weights import load_weights


def network(classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, classes))


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(3)
    module = network()
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape).abs())
    return module


FORMS: dict[str, Callable[[nn.Module], Any]] = {
    "state dict": lambda m: m.state_dict(),
    "nested": lambda m: {
        "state_dict": m.state_dict(),
        "epoch": 7,
        "optimizer": {"state": {}, "param_groups": []},
    },
    "model": lambda m: {"model": m.state_dict(), "args": argparse.Namespace(lr=0.1)},
    "average": lambda m: {"model": network().state_dict(), "model_ema": m.state_dict()},
    "data parallel": lambda m: nn.DataParallel(m).state_dict(),
    "swa": lambda m: {"model_ema": torch.optim.swa_utils.AveragedModel(m).state_dict()},
    "compiled": lambda m: {f"_orig_mod.{name}": tensor for name, tensor in m.state_dict().items()},
    "lightning": lambda m: {
        "state_dict": {f"model.{name}": tensor for name, tensor in m.state_dict().items()}
    },
    "without counters": lambda m: {k: v for k, v in m.state_dict().items() if "num_batches" not in k},
    "parameters": lambda m: {
        name: nn.Parameter(t) if t.is_floating_point() else t for name, t in m.state_dict().items()
    },
}


if not hasattr(torch.serialization, "safe_globals"):  # before torch 2.5
    del FORMS["model"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(form: str, trained: nn.Module, tmp_path: Path) -> None:
    torch.save(FORMS[form](trained), tmp_path / "weights.pt")
    module = network()
    load_weights(module, tmp_path / "weights.pt")
    expected = trained.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in module.state_dict().items())


def test_safetensors_and_half_precision(trained: nn.Module, tmp_path: Path) -> None:
    save_file({name: t.half() if t.is_floating_point() else t for name, t in trained.state_dict().items()},
              tmp_path / "w.safetensors")  # fmt: skip
    module = nn.DataParallel(network())
    load_weights(module, tmp_path / "w.safetensors")
    weight = module.module[3].weight
    assert weight.dtype == torch.float32 and torch.allclose(weight, trained[3].weight, atol=1e-2)


def without(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


class Pickled:
    def __reduce__(self) -> Any:
        return print, ("this must not be run",)


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (without("3.bias"), "it lacks the tensor '3.bias'"),
    "unexpected": (
        lambda s: {**s, "x.y": s["3.bias"], "z": s["3.bias"]},
        "has 2 tensors.*first of them 'x.y'",
    ),
    "shape": (
        lambda s: {**s, "3.bias": torch.zeros(5)},
        r"3.bias is \[5\] in the file and \[3\] in the network",
    ),
    "another": (lambda s: network(7)[:1].state_dict(), "it lacks .* tensors"),
    "not finite": (
        lambda s: {**s, "3.bias": torch.full((3,), torch.nan)},
        "3.bias holds a number that is not finite",
    ),
    "integers": (lambda s: {**s, "3.bias": torch.zeros(3, dtype=torch.int64)}, "3.bias is torch.int64"),
    "no tensors": (lambda s: {"epoch": 3}, "holds no state dict but 'epoch'"),
    "a list": (lambda s: [1, 2], "holds no state dict but a list"),
    "a module": (lambda s: network(), "holds more than tensors.*state_dict"),
    "code": (lambda s: {"state_dict": s, "x": Pickled()}, "holds more than tensors"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_does_not_fit_is_told_and_changes_nothing(
    kind: str, trained: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = WRONG[kind]
    torch.save(make(trained.state_dict()), tmp_path / "weights.pth")
    module = network()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(EdgeBcsError, match=message) as told:
        load_weights(module, tmp_path / "weights.pth")
    assert "\n" not in str(told.value) and "must not be run" not in capsys.readouterr().out
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_files_that_are_none(trained: nn.Module, tmp_path: Path) -> None:
    torch.save(trained.state_dict(), tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.pt").write_text("weights")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    torch.jit.trace(trained.eval(), torch.zeros(1, 1, 8, 8)).save(tmp_path / "script.pt")
    for name, message in {
        "nothing.pt": "there is no file",
        ".": "there is no file",
        "cut.pt": "truncated",
        "text.pt": "not a file of torch.save",
        "empty.pt": "not a file of torch.save",
        "cut.safetensors": "truncated or not a safetensors file",
        "script.pt": "is TorchScript",
    }.items():
        with pytest.raises(EdgeBcsError, match=message):
            load_weights(network(), tmp_path / name)


# Another number of classes


def kept(module: nn.Module, trained: nn.Module) -> bool:
    """Whether everything but the last layer is that of `trained`."""
    theirs = trained.state_dict()
    ours = {name: tensor for name, tensor in module.state_dict().items() if not name.startswith("3.")}
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize(
    ("stored", "made", "classes", "new"),
    [
        (3, 3, 7, "3 → 7 outputs"),  # the factory makes what the file has
        (3, 7, 7, "3 → 7 outputs"),  # it makes what is wanted
        (3, 5, 7, "3 → 7 outputs"),
        (3, 5, 3, None),  # the file has what is wanted
        (3, 3, 3, None),
        (0, 5, 7, "5 → 7 outputs"),  # a file without a last layer
        (0, 7, 7, "7 outputs"),
    ],
)
def test_with_other_classes_only_the_last_layer_is_new(
    stored: int, made: int, classes: int, new: str | None, trained: nn.Module, tmp_path: Path
) -> None:
    state = trained.state_dict()
    if not stored:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("3.")}
    torch.save(state, tmp_path / "weights.pt")
    module = network(made)
    before = module[3].weight.clone()
    told = load_weights(module, tmp_path / "weights.pt", classes, input_shape=(1, 8, 8), seed=1)
    assert str(told) == (f"the last layer, 3 ({new}), is new" if new else "None")
    assert kept(module, trained) and module[3].out_features == classes
    if new is None:
        assert torch.equal(module[3].weight, trained[3].weight)
    else:
        assert module[3].weight.std() < 0.2 / 12 and not module[3].bias.any()
        assert made != classes or not torch.equal(module[3].weight, before)


def test_a_file_of_another_network_is_refused_with_other_classes_too(
    trained: nn.Module, tmp_path: Path
) -> None:
    for kind, message in (
        (without("0.weight"), "it lacks the tensor '0.weight'"),
        (lambda s: {**s, "0.bias": torch.full((4,), torch.inf)}, "0.bias holds a number that is not finite"),
    ):
        torch.save(kind(trained.state_dict()), tmp_path / "weights.pt")
        module = network()
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        with pytest.raises(EdgeBcsError, match=message):
            load_weights(module, tmp_path / "weights.pt", 7, input_shape=(1, 8, 8))
        assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


# On the command line


@pytest.fixture
def nets(trained: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))\n"
    )
    torch.manual_seed(1)
    torch.save(network(10).state_dict(), tmp_path / "dense.pt")
    torch.save(trained.state_dict(), tmp_path / "three.pt")
    monkeypatch.chdir(tmp_path)


OWN = ("--model", "nets.py:make", "--weights", "dense.pt", "--input-shape", "1,8,8")


def test_export_train_and_evaluate_take_weights(nets: None) -> None:
    import edge_bcs

    dense = torch.load("dense.pt")
    for command in (
        ("export", *OWN, "--sparsity", 0, "-o", "artifact"),
        ("train", *OWN, "--data", "digits", "--sparsity", 0, "--steps", 1, "--learning-rate", 1e-9,
         "--attack-steps", 1, "--device", "cpu", "-o", "run"),
    ):  # fmt: skip
        done = run(*command)
        assert done.exit_code == 0, done.output
    module = network(10)
    for source in ("artifact", "run"):
        loaded = edge_bcs.load(source, module).network
        assert torch.allclose(loaded[3].weight, dense["3.weight"], atol=1e-3)
    done = run("evaluate", *OWN, "--data", "digits", "--attack", "none", "--limit", 64, "--json", "-")
    assert done.exit_code == 0, done.output
    module.load_state_dict(dense)
    report = json.loads(done.stdout)
    assert report["path"] == "dense.pt" and report["kappa"] == report["size"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("export", "--model", "nets.py:make", "--weights", "three.pt"),
            r"3.weight is \[3, 144\] in the file.*say how many there shall be \(--classes\)",
        ),
        (("export", *OWN, "--start", "new"), "--start new replaces the weights"),
        (("export", *OWN, "--checkpoint", "run"), "--weights belongs to a new network"),
        (("export", "--model", "net.onnx", "--weights", "dense.pt"), "leave --weights out|net.onnx"),
        (("evaluate", "run", *OWN, "--data", "digits"), "and only one of them"),
        (("evaluate", "--data", "digits"), "name what is measured"),
        (("evaluate", "--weights", "dense.pt", "--data", "digits"), "--weights needs --model"),
        (("train", *OWN, "--data", "digits", "--method", "random"), "--weights .*random"),
    ],
)
def test_weights_that_have_no_use_are_refused(
    nets: None, arguments: tuple[object, ...], message: str
) -> None:
    done = run(*arguments)
    assert done.exit_code == 1 and re.search(message, done.output.replace("\n", " ")), done.output
