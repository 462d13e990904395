"""A training with a teacher: what it learns, resumed to the bit but with no other teacher; the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from helpers.commands import run
from helpers.onnx_files import File
from helpers.signing import make_key, sign
from helpers.training import cut_off, digits, same, tiny
from helpers.training_commands import SMALL, write_digits
from torch import nn

import edge_bcs
from edge_bcs import Compute, Feed, Hyper, Output, Schedule, Teacher
from edge_bcs.checkpoint import read_checkpoint
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.data import ArrayDataset
from edge_bcs.training.backends import TorchBackend
from edge_bcs.zoo import read_cards


def taught(
    teacher: Teacher | None, output: Output | None = None, data: Any = None, **more: Any
) -> tuple[edge_bcs.SparseModel, dict[str, Any]]:
    sparse = edge_bcs.sparsify(tiny(), 0.8, 5)
    arguments: dict[str, Any] = {
        "objective": "natural",
        "batch_size": 16,
        "schedule": Schedule(steps=8),
        "feed": Feed(validation=0.2),
        "compute": Compute(device="cpu"),
        "output": output,
        "progress": False,
        **more,
    }
    return sparse, edge_bcs.train(sparse, digits(80) if data is None else data, teacher=teacher, **arguments)


def other(seed: int = 3) -> nn.Module:
    network = tiny()
    torch.manual_seed(seed)
    for part in network.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            part.reset_parameters()
    return network


def test_it_learns_from_the_teacher_what_no_label_says() -> None:
    """All labels say 0: what the network then knows of the other digits comes from the teacher."""
    many = digits(600)
    wise = edge_bcs.sparsify(tiny(), 0, dense=[], start="magnitude")
    how: dict[str, Any] = {
        "schedule": Schedule(epochs=6),
        "hyper": Hyper(learning_rate=0.02),
        "feed": Feed(validation=0, augment=False),
    }
    edge_bcs.train(wise, many, objective="natural", method="dense", batch_size=16, progress=False, **how)
    images, labels = many.read(np.arange(600))
    silent = ArrayDataset(images, np.zeros_like(labels), classes=many.classes)

    def right(sparse: edge_bcs.SparseModel) -> float:
        with torch.no_grad():
            return float((sparse(torch.from_numpy(images)).argmax(1).numpy() == labels).mean())

    assert right(wise) > 0.95
    alone, _ = taught(None, data=silent, **how)
    with_teacher, _ = taught(Teacher(wise, weight=10.0, temperature=1.0), data=silent, **how)
    assert right(alone) < 0.15 and right(with_teacher) > 0.85


def test_resumed_is_as_if_never_interrupted_and_with_no_other_teacher(tmp_path: Path) -> None:
    whole, report = taught(Teacher(other()), Output(tmp_path / "whole", save_seconds=0.0))
    plain, without = taught(None)
    assert not same(whole, plain) and report["loss"] > without["loss"]
    with cut_off(TorchBackend, "step", 3):
        taught(Teacher(other()), Output(tmp_path / "cut", save_seconds=0.0))
    again = Output(tmp_path / "cut", save_seconds=0.0, resume=True)
    for wrong, message in (
        (None, "begun with a teacher; resume it as it was begun"),
        (Teacher(other(4)), "begun with another teacher; resume"),
        (Teacher(other(), weight=2.0), r"begun with teacher_weight 1\.0, not 2\.0"),
        (Teacher(other(), temperature=2.0), r"begun with teacher_temperature 4\.0, not 2\.0"),
    ):
        with pytest.raises(EdgeBcsError, match=message):
            taught(wrong, again)
    resumed, _ = taught(Teacher(other()), again)
    assert same(whole, resumed)


@pytest.mark.parametrize("objective", ["at", "trades"])
def test_kappa_is_exact_and_the_teacher_stays_as_it_is(objective: str) -> None:
    wise = other()
    before = {name: value.clone() for name, value in wise.state_dict().items()}
    sparse, _ = taught(Teacher(wise), objective=objective, attack=edge_bcs.Attack(steps=2))
    assert int((sparse.weights != 0).sum()) == sparse.kappa == 1038
    assert all(torch.equal(value, before[name]) for name, value in wise.state_dict().items())
    assert not any(parameter.grad is not None for parameter in wise.parameters())


def test_what_is_refused() -> None:
    with pytest.raises(
        EdgeBcsError, match="the sparse engine does not learn from a teacher; choose the engine"
    ):
        taught(Teacher(other()), compute=Compute("sparse"))
    with pytest.raises(EdgeBcsError, match=r"the teacher does not take images of the shape \[1, 8, 8\]"):
        taught(Teacher(nn.Conv2d(3, 10, 1)))
    with pytest.raises(EdgeBcsError, match=r"a teacher is an edge_bcs.Teacher\(network\), not a Sequential"):
        taught(other())  # type: ignore[arg-type]


def test_the_command(tmp_path: Path) -> None:
    write_digits(data := tmp_path / "digits.npz")
    common = ("train", "--model", "resnet18", *SMALL, "--data", data, "--steps", 2, "--batch-size", 8)
    dense = run(*common, "--method", "dense", "-o", tmp_path / "dense")
    assert dense.exit_code == 0, dense.output
    torch.save(edge_bcs.load(tmp_path / "dense").network.state_dict(), weights := tmp_path / "dense.pt")
    plans = []
    for name, path in ("a", tmp_path / "dense"), ("b", tmp_path / "dense/last.safetensors"), ("c", weights):
        words = ("--teacher", path, "--teacher-weight", 0.5)
        made = run(*common, *words, "--teacher-temperature", 2, "-o", tmp_path / name)
        assert made.exit_code == 0, made.output
        metadata = read_checkpoint(tmp_path / name / "last.safetensors").metadata
        plans.append(json.loads(metadata["plan"]))
        assert (plans[-1]["teacher_weight"], plans[-1]["teacher_temperature"]) == (0.5, 2)
    states = [read_checkpoint(tmp_path / name / "last.safetensors").tensors["coo.value"] for name in "abc"]
    assert all(np.array_equal(states[0], state) for state in states[1:])
    refused = run(*common, "--teacher", tmp_path / "dense", "--engine", "sparse", "-o", tmp_path / "no")
    assert refused.exit_code and "--teacher is for --engine torch." in refused.output
    for more, message in (
        (("--teacher-weight", 2), "--teacher-weight is of a --teacher: give one"),
        (("--teacher-model", "nets.py:make"), "--teacher-model is of a --teacher: give one"),
        (
            ("--teacher", weights, "--teacher-model", "vgg16"),
            "--teacher-model vgg16: give what makes a network",
        ),
        (
            ("--teacher", tmp_path / "dense", "--method", "hydra"),
            "--teacher belongs to bcs, random, fixed, d",
        ),
        (("--teacher", tmp_path / "none"), "there is no such file or folder, nor such a name in the zoo"),
        (("--teacher", ""), "there is no such file or folder"),
        (("--teacher", data), f"--teacher: {data}"),
        (("--teacher", weights, "--teacher-weight", 0), "'--teacher-weight': 0.0 is not in the range x>0"),
    ):
        said = run(*common, *more, "-o", tmp_path / "other")
        assert said.exit_code and message in " ".join(said.output.split()), said.output
        assert "Traceback" not in said.output


def test_the_teacher_is_another_network_of_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights as they are, and what `train` made of it."""
    write_digits(data := tmp_path / "digits.npz")
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(
        "from torch import nn\n"
        "def small(num_classes=7):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, num_classes))\n"
    )
    common = ("train", "--data", data, "--steps", 2, "--batch-size", 8, "--attack-steps", 1)
    own = ("--model", "nets.py:small", "--input-shape", "1,8,8", "--classes", 10, "--method", "dense")
    made = run(*common, *own, "-o", "wise")
    assert made.exit_code == 0, made.output
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))
    torch.save(edge_bcs.load("wise", network).network.state_dict(), "wise.pt")
    made = run(*common, "--model", "resnet18", *SMALL, "-o", "alone")
    assert made.exit_code == 0, made.output
    without = read_checkpoint(Path("alone/last.safetensors")).tensors["coo.value"]
    found = []
    state = torch.load("wise.pt", weights_only=True)
    file = File(1, 8, 8)
    hidden = file.Flatten("x")
    for layer in ("1", "3"):
        weights, bias = (file.constant(state[f"{layer}.{kind}"].numpy()) for kind in ("weight", "bias"))
        hidden = file.Gemm(hidden if layer == "1" else file.Relu(hidden), weights, bias, transB=1)
    onnx.save(file.model(hidden), "wise.onnx")
    for number, path in enumerate(("wise", "wise.pt", "wise.onnx")):
        made_by = () if path.endswith("onnx") else ("--teacher-model", "nets.py:small")
        words = ("--model", "resnet18", *SMALL, "--teacher", path, *made_by)
        made = run(*common, *words, "-o", f"taught-{number}")
        assert made.exit_code == 0, made.output
        stored = read_checkpoint(Path(f"taught-{number}/last.safetensors"))
        found.append(stored.tensors["coo.value"])
    assert np.array_equal(found[0], found[1]) and np.allclose(found[0], found[2], atol=1e-6)
    assert not np.array_equal(found[0], without)
    unnamed = run(*common, "--model", "resnet18", *SMALL, "--teacher", "wise", "-o", "no")
    said = " ".join(unnamed.output.split())
    assert "made by nets.py:small: name what makes it with --teacher-model FILE.py:FACTORY" in said
    unfit = run(*common, "--model", "resnet18", *SMALL, "--teacher", "wise.pt", "-o", "no")
    assert "Is it another network? --teacher-model names what makes it." in " ".join(unfit.output.split())
    needless = ("--teacher", "wise.onnx", "--teacher-model", "nets.py:small")
    refused = run(*common, "--model", "resnet18", *SMALL, *needless, "-o", "no")
    said = " ".join(refused.output.split())
    assert "wise.onnx says by itself what it is: leave --teacher-model out" in said


def plan_of(folder: Path) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads(read_checkpoint(folder / "last.safetensors").metadata["plan"])
    return plan


FACTORY = """
from torch import nn
def small(num_classes=10):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
"""
OWN = ("--model", "nets.py:small", "--input-shape", "1,8,8", "--dense", "none", "--sparsity", 0.5)
QUICK = ("--objective", "natural", "--steps", 2, "--batch-size", 8)


def test_a_teacher_keeps_its_own_normalisation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What --normalize says is the student's; it holds for a teacher only where its file cannot say it."""
    monkeypatch.chdir(tmp_path)
    write_digits(Path("digits.npz"))
    Path("nets.py").write_text(FACTORY)
    common = ("train", "--data", "digits.npz", *OWN, *QUICK)
    made = run(*common, "--method", "dense", "-o", "wise")
    assert made.exit_code == 0, made.output
    wise = edge_bcs.load("wise", nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    plain = Teacher(wise).fingerprint
    torch.save(wise.network.state_dict(), "wise.pt")
    edge_bcs.export(wise, "artifact", input_shape=(1, 8, 8), validate=False)
    wise.normalize = edge_bcs.Normalization((0.5,), (0.2,))
    normalised = Teacher(wise).fingerprint
    teachers = ("wise", plain), ("artifact", plain), ("wise/last.safetensors", plain), ("wise.pt", normalised)
    for number, (path, expected) in enumerate(teachers):
        made = run(*common, "--normalize", "0.5:0.2", "--teacher", path, "-o", f"taught-{number}")
        assert made.exit_code == 0, made.output
        assert plan_of(Path(f"taught-{number}"))["teacher"] == expected, path


def test_a_network_of_the_users_own_learns_from_one_of_edge_bcs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_digits(Path("digits.npz"))
    Path("nets.py").write_text(FACTORY)
    dense = run("train", "--data", "digits.npz", *QUICK, *SMALL, "--model", "resnet18", "-o", "dense")
    assert dense.exit_code == 0, dense.output
    name = next(card.name for card in read_cards() if list(card.input_shape) == [1, 8, 8])
    for path, wise in ("dense", edge_bcs.load("dense")), (name, edge_bcs.pretrained(name)):
        made = run("train", "--data", "digits.npz", *OWN, *QUICK, "--teacher", path, "-o", f"of-{path}")
        assert made.exit_code == 0, made.output
        assert plan_of(Path(f"of-{path}"))["teacher"] == Teacher(wise).fingerprint


def test_classes_are_matched_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher knows one more, in another order; what the factory makes has another number still."""
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(FACTORY)
    images, labels = np.random.default_rng(0).random((40, 1, 8, 8), np.float32), np.arange(40)
    for count in (3, 4):
        np.savez(f"{count}.npz", x_train=images, y_train=labels % count)
    common = ("train", *OWN, *QUICK)
    wise = run(*common, "--data", "4.npz", "--class-names", "d,c,b,a", "--classes", 4, "-o", "wise")
    assert wise.exit_code == 0, wise.output
    named = ("--data", "3.npz", "--classes", 3, "--teacher", "wise", "--class-names")
    made = run(*common, *named, "a,b,c", "-o", "taught")
    assert made.exit_code == 0, made.output
    assert "the teacher does not know the class 'e'" in run(*common, *named, "a,b,e", "-o", "no").output


def test_only_a_signed_artifact_teaches_where_a_key_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    private, public = make_key(tmp_path, "maker")
    write_digits(Path("digits.npz"))
    Path("nets.py").write_text(FACTORY)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    edge_bcs.export(edge_bcs.sparsify(network, 0.5), "artifact", input_shape=(1, 8, 8), validate=False)
    torch.save(network.state_dict(), "wise.pt")
    common = ("train", "--data", "digits.npz", *OWN, *QUICK, "--trust-key", public)
    for path, message in ("artifact", "is not signed"), ("wise.pt", "only artifacts carry a signature"):
        refused = run(*common, "--teacher", path, "-o", "no")
        assert refused.exit_code and message in " ".join(refused.output.split())
    sign(Path("artifact"), private)
    made = run(*common, "--teacher", "artifact", "-o", "taught")
    assert made.exit_code == 0, made.output
