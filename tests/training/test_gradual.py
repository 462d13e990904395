"""Gradual pruning: the schedule against its formula, κ to the connection, resumed to the bit."""

# mypy: disable-error-code="arg-type, assignment"

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.commands import run
from helpers.training import SHORT, digits, same, tiny

import edge_bcs
from edge_bcs import Feed, Gradual, Method, Output, Schedule
from edge_bcs.checkpoint import read_checkpoint
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.settings import Coefficients
from edge_bcs.training.gradual import GradualPruning, left_after
from edge_bcs.training.updates import Rewiring

SIZE = 8 * 9 + 10 * 512
KAPPA = SIZE // 10


def dense(**more: Any) -> edge_bcs.SparseModel:
    return edge_bcs.sparsify(tiny(), 0, 5, dense=[], start="magnitude", **more)


def train(sparse: edge_bcs.SparseModel, folder: Path | Output | None = None, **more: Any) -> dict[str, Any]:
    given = {
        "schedule": Schedule(steps=12),
        "feed": Feed(validation=0.25, augment=False),
        "method": Method(gradual=Gradual("0.9", share=0.5)),
        "output": folder,
        **SHORT,
        **more,
    }
    return edge_bcs.train(sparse, digits(64), **given)


def test_the_schedule_is_that_of_the_paper() -> None:
    """s(t) = s_f + (0 − s_f)·(1 − t/n)³, as a share of the weights that are gone."""
    for step in range(101):
        gone = 0.9 * (1 - (1 - min(step, 80) / 80) ** 3)
        assert left_after(step, 80, 10_000, 1000) == pytest.approx(10_000 * (1 - gone), abs=1)
    assert left_after(0, 80, 10_000, 1000) == 10_000 and left_after(80, 80, 10_000, 1000) == 1000


@pytest.mark.parametrize("distribution", ["global", "uniform", "erk"])
def test_kappa_is_exact_from_the_end_of_pruning_on(
    distribution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    call = GradualPruning.__call__

    def noting(self: Any, sparse: edge_bcs.SparseModel, *args: Any, **named: Any) -> Any:
        before = sparse.weights.clone()
        index = sparse.index.clone()
        found = call(self, sparse, *args, **named)
        seen.append((sparse.kappa, int(found[0])))
        if named["step"] < 6:  # connections go, and none comes
            assert np.isin(sparse.index, index).all() and len(index) - sparse.kappa == found[0]
        assert int((sparse.weights != 0).sum()) == sparse.kappa == len(sparse.momentum) and before.any()
        return found

    monkeypatch.setattr(GradualPruning, "__call__", noting)
    sparse = dense()
    gradual = Gradual("0.9", share=0.5, distribution=distribution)
    report = train(sparse, method=Method(gradual=gradual))
    assert [kappa for kappa, _ in seen] == [left_after(t, 6, SIZE, KAPPA) for t in range(1, 7)] + [KAPPA] * 6
    assert sparse.kappa == KAPPA and (sparse.sparsity, sparse.distribution) == ("0.9", distribution)
    assert report["step"] == 12 and report["best_step"] > 6
    if distribution == "uniform":
        assert (
            sum(
                abs(count - size / 10)
                for count, size in zip(sparse.layer_counts().values(), (72, 5120), strict=True)
            )
            < 60
        )


def test_what_is_pruned_is_the_smallest() -> None:
    sparse = dense()
    before = sparse.weights.clone()
    sparse.zero_gradients()
    update = GradualPruning("uniform", Gradual("0.9", share=0.5))
    update.begin(sparse, 4)
    update(sparse, Coefficients(learning_rate=0.0, weight_decay=0.0), step=0, failed=None)
    kept = sparse.weights != 0
    # Of two steps the first leaves κ + (N − κ)/8; a layer keeps at least a tenth of its even part.
    count = KAPPA + (SIZE - KAPPA) // 8
    assert int(kept.sum()) == count
    floor = int(0.1 * count / SIZE * 5120)
    ranked = before.abs().sort(descending=True).values
    assert torch.equal(sparse.weights[kept], before[kept])
    assert (before[kept].abs() >= ranked[count - 1]).sum() >= count - floor


def test_a_layer_that_is_new_keeps_its_even_part() -> None:
    """Its weights are small because they began so: ranked with the others hardly one would be left."""
    sparse = dense(classes=7)
    update = GradualPruning("uniform", Gradual("0.9", share=0.5))
    update.begin(sparse, 2)
    sparse.zero_gradients()
    update(sparse, Coefficients(learning_rate=0.0, weight_decay=0.0), step=0, failed=None)
    size = 72 + 7 * 512
    assert sparse.kappa == size // 10
    assert sparse.layer_counts()["4"] >= int(sparse.kappa * 7 * 512 / size)


def test_no_epoch_before_is_the_best_and_a_stopped_one_goes_on_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = dense()
    report = train(whole, tmp_path / "whole")
    call, calls = GradualPruning.__call__, []

    def stopping(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) in (4, 10):  # while it is pruned, and afterwards
            raise KeyboardInterrupt
        return call(*given, **named)

    monkeypatch.setattr(GradualPruning, "__call__", stopping)
    for resume in (False, True, True):
        cut = dense()
        output = Output(tmp_path / "cut", resume=resume, save_seconds=0)
        if len(calls) < 10:
            with pytest.raises(KeyboardInterrupt):
                train(cut, output)
            stored = read_checkpoint(tmp_path / "cut" / "last.safetensors")
            early = stored.step < 6
            assert len(stored.tensors["coo.index"]) == left_after(stored.step, 6, SIZE, KAPPA)
            assert (tmp_path / "cut" / "checkpoint.safetensors").exists() != early
            assert stored.sparsity == ("0" if early else "0.9")
        else:
            again = train(cut, output)
    assert same(whole, cut) and whole.kappa == KAPPA and cut.sparsity == "0.9"
    assert again["best_step"] == report["best_step"]
    loaded = edge_bcs.load(tmp_path / "cut", tiny())
    assert same(loaded, cut)


def test_rewiring_goes_on_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step after the pruning is one of `Rewiring`, and connections move."""
    steps: list[Any] = []
    call = Rewiring.__call__

    def noting(self: Any, sparse: edge_bcs.SparseModel, *args: Any, **named: Any) -> Any:
        steps.append((named["step"], sparse.index.clone()))
        found = call(self, sparse, *args, **named)
        steps[-1] += (int(found[0]), sparse.index.clone())
        return found

    monkeypatch.setattr(Rewiring, "__call__", noting)
    schedule = Schedule(steps=12, kind="cosine")
    train(dense(), objective="natural", schedule=schedule, hyper=edge_bcs.Hyper(noise=1.0))
    assert [step for step, *_ in steps] == list(range(6, 12))
    assert any(deaths and not torch.equal(before, after) for _, before, deaths, after in steps)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"compute": edge_bcs.Compute("sparse")}, "is for the engine torch, not for sparse"),
        ({"method": Method(gradual=Gradual("0.99999"))}, "leaves none of"),
    ],
)
def test_refusals(given: dict[str, Any], message: str) -> None:
    with pytest.raises(EdgeBcsError, match=message):
        train(dense(), **given)
    with pytest.raises(EdgeBcsError, match="begins with all 5,192 weights, and the network has 2,596"):
        train(edge_bcs.sparsify(tiny(), 0.5, dense=[]))
    with pytest.raises(EdgeBcsError, match="is for the method bcs, not for random"):
        Method("random", gradual=Gradual("0.9"))
    for wrong in ({"share": 0}, {"share": 1.0}, {"share": float("nan")}, {"distribution": "best"}):
        with pytest.raises(EdgeBcsError):
            Gradual("0.9", **wrong)


def test_on_the_command_line(tmp_path: Path, digits: Path) -> None:
    small = ("--model", "resnet18", "--width", 0.0625, "--input-size", 8, "--channels", 1, "--sparsity", 0.8,
             "--attack-steps", 1, "--batch-size", 16, "--validation", 0.25, "--device", "cpu")  # fmt: skip
    for words, share in (("--gradual",), 0.4), (("--gradual", 0.25), 0.25):
        out = tmp_path / str(share)
        done = run("train", "--data", digits, *small, *words, "--steps", 4, "-o", out, "--json")
        assert done.exit_code == 0, done.output
        stored = read_checkpoint(out / "checkpoint.safetensors")
        plan = json.loads(stored.metadata["plan"])
        assert plan["gradual"] == share and plan["gradual_sparsity"] == "0.8" == stored.sparsity
        sparse = edge_bcs.load(out)
        assert sparse.kappa == sparse.size // 5
    for words, message in (
        (("--gradual", "--engine", "sparse"), "--gradual begins with a dense network"),
        (("--gradual", "--method", "lwm"), "--gradual belongs to bcs"),
        (("--gradual", 1.5), "1.5 is not in the range"),
    ):
        done = run("train", "--data", digits, *small, *words, "-o", tmp_path / "no")
        assert done.exit_code != 0 and message in done.stderr, done.output
