"""Networks of the user's own on the command line: from the factory's name to the board and back."""

# mypy: disable-error-code="assignment"

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.commands import run

pytest.importorskip("torch")
import torch

import edge_bcs
from edge_bcs.checkpoint import read_checkpoint, save_checkpoint
from edge_bcs.core.errors import EdgeBcsError

NETS = """
import torch
from torch import nn
from {helper} import HIDDEN

print("printed while it is imported")

class Own(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.network = nn.Sequential(nn.Conv2d(1, HIDDEN, 3, bias=False), nn.BatchNorm2d(HIDDEN), nn.ReLU())
        self.head = nn.Linear(HIDDEN, classes)

    def forward(self, x):
        return self.head(self.network(x).mean((2, 3)))

def make():
    print("printed while it is made")
    return Own()

class factories:
    @staticmethod
    def three():
        return Own(3)

def trained():
    network = Own()
    network.network[1].num_batches_tracked.fill_(1000)
    return network

def unsupported():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(144, 10))

def wrong():
    raise RuntimeError("no such file: weights.bin\\nand more")

def leaves():
    raise SystemExit(3)

def needs(size):
    return Own()

number, network = 7, Own()
def seven():
    return number
"""
SHORT = ("--batch-size", 16, "--attack-steps", 1, "--device", "cpu")


IMAGES = ("--input-shape", "1,8,8")


def succeed(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    content: dict[str, Any] = json.loads(result.stdout)
    return content


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package in the current folder, as a user has it; returns its module's name."""
    name = f"own_{abs(hash(tmp_path)):x}"  # imported once in a process, so each test has its own
    package = tmp_path / name
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "nets.py").write_text(NETS.format(helper=f"{name}.sizes"))
    (package / "sizes.py").write_text("HIDDEN = 6\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return f"{name}.nets"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same as a file, elsewhere, with what it imports beside it."""
    helper = f"beside_{abs(hash(tmp_path)):x}"
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / f"{helper}.py").write_text("HIDDEN = 6\n")
    (tmp_path / "there" / "nets.py").write_text(NETS.format(helper=helper))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path / "there" / "nets.py"


def test_the_whole_chain(nets: str, tmp_path: Path) -> None:
    """Train, evaluate, export, fine-tune, evaluate, and export what the board saved."""
    model, digits = ("--model", f"{nets}:make"), ("--data", "digits")
    training = ("train", *model, *digits, *IMAGES, "--sparsity", "0.5", "--steps", 20, *SHORT)
    trained = run(*training)
    assert trained.exit_code == 0, trained.output
    assert f"edge-bcs evaluate runs/make --model {nets}:make --data digits" in trained.stdout
    assert f"edge-bcs export --model {nets}:make --checkpoint runs/make" in trained.stdout
    assert "printed while" not in trained.stdout and "printed while it is made" in trained.stderr
    stored = read_checkpoint("runs/make/checkpoint.safetensors")
    assert stored.network() == {
        "name": "Own", "arguments": {}, "factory": f"{nets}:make", "input_shape": [1, 8, 8],
    }  # fmt: skip
    here = ("--limit", 100, "--attack-steps", 2)
    measured = succeed("evaluate", "runs/make", *model, *digits, *here)
    assert measured["engine"] == "torch" and measured["samples"] == 100
    exported = succeed("export", "--checkpoint", "runs/make", *model, "--micro-batch", 4, "-o", "out")
    assert exported["network"] == "Own" and exported["kappa"] == measured["kappa"]
    inspected = succeed("inspect", "out")
    assert inspected["network"]["factory"] == f"{nets}:make"
    assert inspected["network"]["input_shape"] == [1, 8, 8]
    assert f"Own (made by {nets}:make), 1×8×8 images, 10 classes" in run("inspect", "out").output
    # The board needs no module, and measures what torch measured.
    on_board = succeed("evaluate", "out", *digits, *here)
    assert on_board["engine"] == "board" and on_board["clean_acc"] == measured["clean_acc"]
    finetuned = succeed(
        "finetune", "out", *digits, "--steps", 3, "--batch-size", 16, "--eval-samples", 20, "--eval-steps", 1,
        "-o", "run",
    )  # fmt: skip
    assert finetuned["training"]["steps"] == 3
    for more in ((), model):  # by the board, and back in torch
        again = succeed("evaluate", "run", *digits, *more, *here)
        assert again["step"] == measured["step"] + 3 and again["engine"] == ("torch" if more else "board")
    assert succeed("export", "--checkpoint", "run", *model, "--no-validate", "-o", "out2")["network"] == "Own"
    assert succeed(*training, "--resume")["step"] == 20


def test_a_file_and_a_new_network(file: Path, tmp_path: Path) -> None:
    three = ("--model", f"{file}:factories.three", "--sparsity", "0.5")
    new = ("export", *three, "--no-validate")
    exported = succeed(*new, "--input-shape", "1,8,8", "--classes", 3, "-o", tmp_path / "new")
    described = {
        "name": "Own", "arguments": {}, "factory": "nets.py:factories.three", "input_shape": [1, 8, 8],
        "num_classes": 3, "head": {"layer": "head", "classes": 3},
    }  # fmt: skip
    assert succeed("inspect", tmp_path / "new")["network"] == described
    assert exported["kappa"] == (9 * 6 + 6 * 3) // 2
    # The size may be said as for the networks of edge-bcs, too.
    succeed(*new, "--channels", 1, "--input-size", 9, "-o", tmp_path / "other")
    described["input_shape"] = [1, 9, 9]
    del described["head"]  # of which nobody said anything
    assert succeed("inspect", tmp_path / "other")["network"] == described
    result = run(*new, "--input-shape", "1,8,8", "--classes", 10, "-o", tmp_path / "ten")
    assert result.exit_code == 0 and "The last layer, head (3 → 10 outputs), is new." in result.stderr
    assert succeed("inspect", tmp_path / "ten")["network"]["head"] == {"layer": "head", "classes": 10}
    few = tmp_path / "few.npz"
    np.savez(few, x=np.zeros((20, 1, 8, 8), np.uint8), y=np.arange(20) % 4)
    result = run("train", *three, "--data", few, "--input-shape", "1,8,8", *SHORT, "-o", tmp_path / "four")
    assert result.exit_code == 1 and re.search("4 classes.* 3", result.stderr), result.stderr
    # Training says what export would refuse; export says it once.
    bad = ("--model", f"{file}:unsupported", "--input-shape", "1,8,8", "--sparsity", "0.5")
    result = run("export", *bad, "-o", tmp_path / "bad")
    assert result.exit_code == 1 and result.stderr.count("module '1' (Softplus) is not supported") == 1
    result = run("train", *bad, "--data", "digits", "--steps", 1, *SHORT, "-o", tmp_path / "bad")
    assert result.exit_code == 0 and result.stderr.count("module '1' (Softplus) is not supported") == 1


FAULTS = {
    "no module": ("nowhere.nets:make", "importing nowhere.nets failed: ModuleNotFoundError: .* 'nowhere'"),
    "no file": ("nowhere.py:make", "there is no file nowhere.py"),
    "no attribute": ("{file}:build", "has no build"),
    "no callable": ("{file}:number", "number is a int, and a callable without arguments"),
    "a network": ("{file}:network", "network is a Own, and a callable without arguments"),
    "raises": ("{file}:wrong", "failed in line [0-9]+ of nets.py: RuntimeError: no such file: weights.bin"),
    "leaves": ("{file}:leaves", "leaves\\(\\) failed in line [0-9]+ of nets.py: SystemExit: 3"),
    "needs arguments": ("{file}:needs", "needs\\(\\) failed: TypeError: .*missing 1 required positional"),
    "no module of torch": ("{file}:seven", "seven\\(\\) returned a int, and a torch.nn.Module was expected"),
    "no factory": ("nets:", "neither a network of edge-bcs nor PACKAGE.MODULE:FACTORY, FILE.py:FACTORY or"),
    "trained": ("{file}:trained", "trained .the batch norm network.1 has seen 1,000 batches.*--start new"),
    "no such name": ("vgg17", "no network named 'vgg17'; choose one of vgg16, .*PACKAGE.MODULE:FACTORY"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAULTS)
def test_faults_of_the_factory_are_one_sentence(kind: str, file: Path, tmp_path: Path) -> None:
    model, message = FAULTS[kind]
    result = run(
        "export", "--model", model.format(file=file), "--input-shape", "1,8,8", "-o", tmp_path / "out"
    )
    assert result.exit_code == 1 and not (tmp_path / "out").exists()
    (told,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert re.search(message, told), told
    assert "Traceback" not in result.output


def test_faults_inside_the_file(tmp_path: Path) -> None:
    for content, message in (
        ("def make(:", "SyntaxError: invalid syntax"),
        ("if 1:\nmake()", "IndentationError: "),
        ("import not_there_at_all", "ModuleNotFoundError: No module named 'not_there_at_all'"),
        ("import torch.no_such_part", "ModuleNotFoundError: No module named 'torch.no_such_part'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import json; json.loads('?')", "JSONDecodeError: Expecting value"),
        ("import sys; sys.exit('usage: nets.py FILE')", "SystemExit: usage: nets.py FILE"),
    ):
        message = f" failed in line {2 + content.count(chr(10))} of broken.py: {message}"
        message = message.replace(": JSON", ": json.decoder.JSON")
        (tmp_path / "broken.py").write_text("\n" + content)
        result = run("train", "--model", f"{tmp_path / 'broken.py'}:make", "--data", "digits")
        assert result.exit_code == 1 and "importing" in result.stderr and message in result.stderr, content


REFUSED = {
    "no shape": (("export",), "which images it takes: add --input-size N or --input-shape C,H,W"),
    "no shape to train": (("train", "--data", "digits"), "Own does not say which images it takes"),
    "half a shape": (("export", "--channels", 1), "Own does not say which images it takes"),
    "not a shape": (("export", "--input-shape", "8,8"), "channels, height and width, such as 3,32,32"),
    "two shapes": (("export", *IMAGES, "--input-size", 8), "leave --input-size and --channels out"),
    "another shape": (("export", "--input-shape", "3,8,8"), "expects 1 channels but gets 3"),
    "width": (("export", "--width", 2), "--width belongs to the networks of edge-bcs"),
    "width to train": (("train", "--data", "digits", "--width", 2), "--width belongs to the networks"),
    "sparsity of a checkpoint": (("export", "--checkpoint", "x", "--sparsity", 0.5), "belongs to a new"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_go_together(kind: str, file: Path, tmp_path: Path) -> None:
    arguments, message = REFUSED[kind]
    result = run(*arguments, "--model", f"{file}:make", "-o", tmp_path / "out")
    assert result.exit_code == 1 and message in result.stderr, result.output


def test_a_module_that_does_not_fit_is_told_what_made_the_network(file: Path, tmp_path: Path) -> None:
    new = ("export", "--input-shape", "1,8,8", "--sparsity", "0.5", "--no-validate", "--micro-batch", 2)
    succeed(*new, "--model", f"{file}:make", "-o", tmp_path / "a")
    other = ("--checkpoint", tmp_path / "a", "--model", f"{file}:factories.three", "-o", tmp_path / "b")
    result = run("export", *other)
    assert result.exit_code == 1 and "belongs to another network (made by nets.py:make): " in result.stderr


def test_a_training_of_another_network_is_told_what_made_it(file: Path, tmp_path: Path) -> None:
    training = (
        "train",
        "--data",
        "digits",
        "--input-shape",
        "1,8,8",
        "--sparsity",
        "0.5",
        "--steps",
        1,
        *SHORT,
    )
    succeed(*training, "--model", f"{file}:make", "-o", tmp_path / "run")
    other = ("--model", f"{file}:unsupported", "--resume", "-o", tmp_path / "run")
    result = run(*training, *other)
    assert result.exit_code == 1
    assert (
        "begun with the network Own (made by nets.py:make) and the seed 0, not with Sequential"
        in result.stderr
    )


def test_a_trained_network_starts_new_if_that_is_said(file: Path, tmp_path: Path) -> None:
    new = ("--model", f"{file}:trained", "--input-shape", "1,8,8", "--start", "new", "--sparsity", "0.5")
    succeed("export", *new, "--no-validate", "-o", tmp_path / "out")
    succeed("train", *new, "--data", "digits", "--steps", 1, *SHORT, "-o", tmp_path / "run")


@pytest.mark.parametrize("name", ["Own", "vgg16"])
def test_a_stored_factory_is_never_imported(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint is data: what it says of its factory is shown, and not followed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("open('it ran', 'w')\n")
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    network.network = {"name": name, "arguments": {}, "factory": "evil:make", "input_shape": [1, 8, 8]}
    save_checkpoint("net.safetensors", edge_bcs.sparsify(network, 0.5))
    with pytest.raises(
        EdgeBcsError, match=rf"'{name}' \(made by evil:make\), which is not .*--model FILE\.py:FACTORY"
    ):
        edge_bcs.load("net.safetensors")
    for command in (("export", "--checkpoint", "net.safetensors", "-o", "out"),
                    ("evaluate", "net.safetensors", "--data", "digits")):  # fmt: skip
        result = run(*command)
        assert result.exit_code == 1 and "(made by evil:make)" in result.stderr
    assert not (tmp_path / "it ran").exists()


def test_in_python_a_checkpoint_keeps_what_it_was_trained_on(tmp_path: Path) -> None:
    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))

    sparse = edge_bcs.sparsify(make(), 0.5)
    assert sparse.input_shape is None
    short: dict[str, Any] = {
        "schedule": edge_bcs.Schedule(steps=1),
        "batch_size": 8,
        "attack": edge_bcs.Attack(steps=1),
        "progress": False,
        "compute": edge_bcs.Compute(device="cpu"),
    }
    edge_bcs.train(sparse, "digits", input_shape=(1, 8, 8), output=tmp_path / "run", **short)
    loaded = edge_bcs.load(tmp_path / "run", make())
    assert loaded.input_shape == sparse.input_shape == (1, 8, 8) and loaded.factory is None
    edge_bcs.train(loaded, "digits", **short)  # which it now knows
    stored = json.dumps({"name": "Sequential", "arguments": {}, "input_shape": [1, "8", 8]})
    sparse.network.network = json.loads(stored)
    save_checkpoint(tmp_path / "odd.safetensors", sparse)
    with pytest.raises(EdgeBcsError, match="the images of its network in a way that cannot be read"):
        edge_bcs.load(tmp_path / "odd.safetensors", make())
