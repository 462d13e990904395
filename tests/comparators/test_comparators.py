"""LWM, HYDRA and Adv-ADMM: their rules by hand on a few weights, and whole trainings in miniature."""

# mypy: disable-error-code="arg-type"

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.training import digits, same, tiny
from torch import Tensor, nn

import edge_bcs
from edge_bcs import Attack, Compute, Output, Schedule
from edge_bcs.checkpoint import read_checkpoint
from edge_bcs.comparators import METHODS, Phases, PhaseSettings, admm, hydra, pruning
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.segments import Segment
from edge_bcs.core.settings import Coefficients
from edge_bcs.method import connectivity
from edge_bcs.training.updates import Sgd

# Two layers of four weights: a 1×4 and a 2×2 matrix.
LAYERS = (Segment("a", (1, 4), 0), Segment("b", (2, 2), 4))
WEIGHTS = torch.tensor([0.5, -2.0, 0.25, 1.0, -0.1, 0.2, -0.4, 0.3])
PLAIN = Coefficients(learning_rate=0.1, weight_decay=0.0, momentum=0.0, noise=0.0)


def network() -> edge_bcs.SparseModel:
    """Two dense layers, 4 → 1 and 2 → 2, with the weights above and no biases."""
    model = nn.ModuleDict({"a": nn.Linear(4, 1, bias=False), "b": nn.Linear(2, 2, bias=False)})
    sparse = edge_bcs.sparsify(model, 0)
    sparse.load_coo(WEIGHTS.numpy(), np.arange(8))
    return sparse


def with_gradient(sparse: edge_bcs.SparseModel, gradient: Tensor) -> edge_bcs.SparseModel:
    sparse.zero_gradients()
    sparse.all_gradients().copy_(gradient)
    return sparse


def test_projection_keeps_the_largest_of_each_layer() -> None:
    projected = admm.project(WEIGHTS, LAYERS, [2, 1])
    assert projected.tolist() == pytest.approx([0, -2.0, 0, 1.0, 0, 0, -0.4, 0])
    assert pruning.largest(WEIGHTS, LAYERS, [3, 2]).tolist() == [0, 1, 3, 6, 7]


def test_every_layer_keeps_the_same_share_and_all_keep_kappa() -> None:
    layers = edge_bcs.sparsify(tiny(), 0).layers
    counts = pruning.equal_densities(layers, "0.9")
    # 72 and 5120 weights: 7.2 and 512, and κ = floor(519.2).
    assert counts == [7, 512] and sum(counts) == connectivity.kappa(5192, "0.9")


def test_admm_by_hand() -> None:
    sparse = network()
    update = admm.Admm(sparse.weights.detach(), LAYERS, [2, 1], interval=2)
    # Z = projection of W, U = 0: the penalty pulls at the small weights alone, ρ = 0.001.
    pull = update.extra_gradient(sparse, sparse.value())
    assert pull.tolist() == pytest.approx([5e-4, 0, 2.5e-4, 0, -1e-4, 2e-4, 0, 3e-4])
    with_gradient(sparse, torch.ones(8))
    update(sparse, PLAIN, step=0, failed=None)
    moved = WEIGHTS - 0.1 * (1 + pull)
    assert sparse.value().tolist() == pytest.approx(moved.tolist())
    update.end_of_epoch(sparse, 0)
    assert not update.dual.any() and update.penalty == 1e-3  # the interval is two epochs
    update.end_of_epoch(sparse, 1)
    # W = [.39995, −2.1, .149975, .9, −.19999, .09998, −.5, .19997]: Z keeps 2 and 1, U is what they leave.
    assert update.target.nonzero().flatten().tolist() == [1, 3, 6]
    left = moved.clone()
    left[[1, 3, 6]] = 0
    assert update.dual.tolist() == pytest.approx(left.tolist())
    assert update.penalty == pytest.approx(1.3e-3)
    # The next projection is of W + U: position 0 has 0.8, below the 0.9 of position 3.
    update.end_of_epoch(sparse, 3)
    assert update.dual[0] == pytest.approx(2 * moved[0].item()) and update.dual[3] == 0


def test_hydra_by_hand() -> None:
    scores = hydra.initial_scores(WEIGHTS, LAYERS)
    first, second = math.sqrt(6 / 4), math.sqrt(6 / 2)
    assert scores.tolist() == pytest.approx(
        [first * w / 2.0 for w in (0.5, -2, 0.25, 1)] + [second * w / 0.4 for w in (-0.1, 0.2, -0.4, 0.3)]
    )
    sparse = pruning.pruned(network(), torch.tensor([1, 3, 6]), "0.6")
    update = hydra.Scores(WEIGHTS, LAYERS, [2, 1])
    # ∂L/∂s = ∂L/∂w·w·sign(s): dormant position 0 rises by 0.1·20·0.5 = 1, active position 3 falls by 0.1.
    with_gradient(sparse, torch.tensor([-20.0, 0, 0, 1.0, 0, 0, 0, 0]))
    result = update(sparse, PLAIN, step=0, failed=None)
    assert update.scores[0].item() == pytest.approx(first / 4 + 1.0)
    assert update.scores[3].item() == pytest.approx(first / 2 - 0.1)
    assert sparse.index.tolist() == [0, 1, 6] and result.tolist() == [1, 1]
    assert sparse.value().tolist() == pytest.approx([0.5, -2.0, -0.4])  # kernels are frozen


def test_straight_through_gradient_is_that_of_autograd() -> None:
    """Against a module that computes w·mask(|s|) with the mask passed straight through, as in the paper."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(8, generator=generator, requires_grad=True)
    toward = torch.randn(8, generator=generator)
    magnitude = scores.abs()
    mask = torch.zeros(8)
    mask[pruning.largest(scores.detach(), LAYERS, [2, 1])] = 1
    used = WEIGHTS * (mask + magnitude - magnitude.detach())
    ((used - toward) ** 2).sum().backward()  # type: ignore[no-untyped-call]
    update = hydra.Scores(WEIGHTS, LAYERS, [2, 1])
    update.scores = scores.detach().clone()
    index = pruning.largest(update.scores, LAYERS, [2, 1])
    sparse = with_gradient(pruning.pruned(network(), index, "0.6"), 2 * (WEIGHTS * mask - toward))
    update(sparse, PLAIN, step=0, failed=None)
    assert scores.grad is not None
    assert update.scores.tolist() == pytest.approx((scores.detach() - 0.1 * scores.grad).tolist(), rel=1e-5)


def test_sgd_is_torchs() -> None:
    ours, theirs = network(), network()
    optimizer = torch.optim.SGD(theirs.network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    hyper = Coefficients(learning_rate=0.1, momentum=0.9, weight_decay=1e-2)
    for step in range(3):
        gradient = torch.randn(8, generator=torch.Generator().manual_seed(step))
        Sgd()(with_gradient(ours, gradient), hyper, step=step, failed=None)
        with_gradient(theirs, gradient)
        optimizer.step()
    assert ours.value().tolist() == pytest.approx(theirs.value().tolist(), rel=1e-5)


SHORT: dict[str, Any] = {"batch_size": 16, "attack": Attack(steps=1), "validation": 0.2, "augment": False}


CPU = Compute(device="cpu")
ENGINES = {"torch": CPU, "sparse": Compute("sparse", threads=1)}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", METHODS)
def test_from_pretraining_to_kappa_connections(method: str, engine: str, tmp_path: Path) -> None:
    settings = PhaseSettings(sparsity="0.9", seed=2, pretrain_epochs=2, search_epochs=2, epochs=2, **SHORT)

    def run(folder: str, resume: bool = False, **more: Any) -> edge_bcs.SparseModel:
        phases = Phases(
            method,
            settings,
            digits(60),
            output=Output(tmp_path / folder, resume=resume),
            compute=ENGINES[engine],
            progress=False,
        )
        sparse, report = METHODS[method](tiny(), phases, **more)
        assert report["step"] == 6
        return sparse

    sparse = run("run")
    assert sparse.kappa == connectivity.kappa(sparse.size, "0.9")
    assert list(sparse.layer_counts().values()) == [7, 512]
    assert same(sparse, edge_bcs.load(tmp_path / "run", tiny()))
    # Finished phases are read back, and the result is the same; so it is from the pretrained network.
    for file in ("last.safetensors", "checkpoint.safetensors", "metrics.jsonl", "epochs.jsonl"):
        (tmp_path / "run" / file).unlink()  # killed before the last phase
    assert same(sparse, run("run", resume=True))
    dense = edge_bcs.load(tmp_path / "run" / "pretraining", tiny())
    assert same(sparse, run("again", pretrained=dense))
    # What is left of the second layer are its largest weights.
    if method == "lwm":
        kept = np.abs(dense.coo()[0][sparse.coo()[1][7:]]).min()
        others = np.setdiff1d(np.arange(72, 5192), sparse.coo()[1])
        assert np.abs(dense.coo()[0][others]).max() <= kept
    with pytest.raises(EdgeBcsError, match="holds a training already"):
        run("run")


@pytest.mark.parametrize("method", METHODS)
def test_the_sparse_engine_trains_as_torch_does(method: str, tmp_path: Path) -> None:
    """Losses, rates, moved connections and weights of every phase, but for rounding. No images are held out:
    two measures of a few might choose another epoch."""
    short = {**SHORT, "validation": 0.0, "learning_rate": 0.05}
    settings = PhaseSettings(sparsity="0.8", seed=2, pretrain_epochs=2, search_epochs=2, epochs=2, **short)
    for engine, compute in ENGINES.items():
        output = tmp_path / engine
        phases = Phases(method, settings, digits(60), output=output, compute=compute, progress=False)
        METHODS[method](tiny(), phases, **({"interval": 1} if method == "admm" else {}))
    files = sorted(path.relative_to(tmp_path / "torch") for path in tmp_path.glob("torch/**/metrics.jsonl"))
    assert len(files) == (2 if method == "lwm" else 3)
    for file in files:
        lines = [
            [json.loads(line) for line in (tmp_path / engine / file).read_text().splitlines()]
            for engine in ENGINES
        ]
        assert len(lines[0]) == len(lines[1]) >= 6
        for first, second in zip(*lines, strict=True):
            assert second["loss"] == pytest.approx(first["loss"], rel=1e-3)
            assert second["learning_rate"] == first["learning_rate"]
            assert abs(second["deaths"] - first["deaths"]) <= 2
        if file.parts[0] == "scores":
            assert sum(line["deaths"] for line in lines[1]) > 10  # other connections are kept
    both = [edge_bcs.load(tmp_path / engine, tiny()) for engine in ENGINES]
    weights = [sparse.weights.detach().double() for sparse in both]
    assert torch.linalg.norm(weights[1] - weights[0]) <= 1e-3 * torch.linalg.norm(weights[0])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["hydra", "admm"])
def test_an_interrupted_search_goes_on_to_the_bit(
    method: str, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = PhaseSettings(sparsity="0.9", seed=2, pretrain_epochs=1, search_epochs=3, epochs=1, **SHORT)
    rule = hydra.Scores if method == "hydra" else admm.Admm
    more = {"interval": 1} if method == "admm" else {}

    def run(folder: str, resume: bool = False) -> edge_bcs.SparseModel:
        phases = Phases(
            method,
            settings,
            digits(60),
            output=Output(tmp_path / folder, resume=resume, save_seconds=0.0),
            compute=ENGINES[engine],
            progress=False,
        )
        return METHODS[method](tiny(), phases, **more)[0]

    whole = run("whole")
    call, calls = rule.__call__, []

    def stopping(*given: Any, **named: Any) -> Tensor:
        calls.append(1)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return call(*given, **named)

    monkeypatch.setattr(rule, "__call__", stopping)
    with pytest.raises(KeyboardInterrupt):
        run("cut")
    monkeypatch.undo()
    assert same(whole, run("cut", resume=True))
    phase = "scores" if method == "hydra" else "alternating"
    first, second = (
        read_checkpoint(tmp_path / name / phase / "last.safetensors") for name in ("whole", "cut")
    )
    assert any(name.startswith(method) for name in first.tensors)
    assert all(np.array_equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items())


def test_refusals() -> None:
    phases = Phases("lwm", PhaseSettings(sparsity="0.9"), digits(20), compute=CPU, progress=False)
    with pytest.raises(EdgeBcsError, match="not a dense one with the kernels of the model"):
        METHODS["lwm"](tiny(), phases, edge_bcs.sparsify(tiny(), 0.5))
    with pytest.raises(EdgeBcsError, match="rst, and no other"):
        Phases("lwm", PhaseSettings(sparsity="0.9", objective="rst"), digits(20))


@pytest.mark.parametrize("method", METHODS)
def test_schedule_and_patience_are_of_every_phase(method: str, tmp_path: Path) -> None:
    """Rates against the schedule's own, in every phase; patience where images are held out."""
    settings = PhaseSettings(
        sparsity="0.9", pretrain_epochs=2, search_epochs=2, epochs=2, schedule="one-cycle", warmup=0.4,
        patience=1, learning_rate=0.04, fine_tuning_rate=0.02, **SHORT,
    )  # fmt: skip
    phases = Phases(method, settings, digits(60), output=tmp_path / "run", compute=CPU, progress=False)
    METHODS[method](tiny(), phases)
    folders = {path.parent for path in (tmp_path / "run").rglob("metrics.jsonl")}
    assert len(folders) == (2 if method == "lwm" else 3)
    for folder in folders:
        plan = json.loads(read_checkpoint(folder / "last.safetensors").metadata["plan"])
        assert (plan["schedule"], plan["warmup"]) == ("one-cycle", 0.4)
        assert (plan.get("patience"), plan["validation"]) == (1, 0.2)
        rate = 0.02 if folder.name == "run" else 0.04
        rates = [json.loads(line)["learning_rate"] for line in (folder / "metrics.jsonl").open()]
        schedule = Schedule(kind="one-cycle", warmup=0.4, decay="stays")
        assert rates == [schedule.rates(rate, 0, step, 6)[0] for step in range(len(rates))]
        if folder.name == "alternating":  # goes to its end
            assert len(rates) == 6
            assert json.loads(read_checkpoint(folder / "last.safetensors").metadata["best"])["best_step"] == 6


@pytest.mark.parametrize("method", METHODS)
def test_dense_kernels_are_neither_pruned_nor_counted(method: str) -> None:
    """By default those of `sparsify`: the first layer of this network has less than a hundredth."""
    wide = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 40), nn.Linear(40, 10)
    )
    for given, dense in ((None, ("0",)), (["0", "4"], ("0", "4")), ([], ())):
        settings = PhaseSettings(
            sparsity="0.9", pretrain_epochs=1, search_epochs=1, epochs=1, dense=given, **SHORT
        )
        phases = Phases(method, settings, digits(60), compute=CPU, progress=False)
        sparse = METHODS[method](wide, phases)[0]
        assert sparse.dense_kernels == dense and sparse.kappa == connectivity.kappa(sparse.size, "0.9")
        assert all(sparse.network.get_parameter(f"{name}.weight").all() for name in dense)
