"""Training through the compiled artifact: the numbers of torch, the same files, resumption to the bit."""

# mypy: disable-error-code="arg-type"

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.training import check_same, cut_off, digits, same, tiny

import edge_bcs
from edge_bcs import Attack, Compute, Feed, Hyper, Method, Output, Schedule
from edge_bcs.checkpoint import read_checkpoint
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.method import connectivity
from edge_bcs.training import loop as training
from edge_bcs.training import updates

SHORT: dict[str, Any] = {"batch_size": 16, "attack": Attack(steps=2), "progress": False}


def trained(
    engine: str, method: str | Method = "bcs", **more: Any
) -> tuple[edge_bcs.SparseModel, dict[str, Any]]:
    distribution = "uniform" if method == "random" else "paper"
    sparse = edge_bcs.sparsify(tiny(), 0 if method == "dense" else 0.8, 5, distribution)
    feed = Feed(validation=0.2, pseudo_labelled=digits(40) if more.get("objective") == "rst" else None)
    compute = Compute(engine, device="cpu", precision=more.pop("precision", None))
    arguments: dict[str, Any] = {"feed": feed, "schedule": Schedule(steps=6), **SHORT, **more}
    return sparse, training.train(sparse, digits(80), method=method, compute=compute, **arguments)


@pytest.mark.parametrize("objective", ["natural", "at", "mixed", "trades", "mart", "rst"])
def test_as_torch_trains(objective: str, tmp_path: Path) -> None:
    runs = {}
    for engine in ("torch", "sparse"):
        sparse, report = trained(engine, objective=objective, output=tmp_path / engine)
        lines = [json.loads(line) for line in (tmp_path / engine / "metrics.jsonl").read_text().splitlines()]
        runs[engine] = (sparse, report, lines)
    torch_lines, sparse_lines = runs["torch"][2], runs["sparse"][2]
    assert [set(line) for line in sparse_lines] == [set(line) for line in torch_lines]
    # The same draws and the same mathematics: steps differ by rounding only (batch statistics included).
    for first, second in zip(torch_lines[:4], sparse_lines[:4], strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=2e-3)
        assert abs(second["deaths"] - first["deaths"]) <= 0.02 * runs["torch"][0].kappa
    files = [json.loads((tmp_path / engine / "epochs.jsonl").read_text().splitlines()[0]) for engine in runs]
    assert set(files[0]) == set(files[1])
    assert sum(files[1]["connections"].values()) == runs["sparse"][0].kappa
    again = edge_bcs.load(tmp_path / "sparse", tiny())
    assert same(again, runs["sparse"][0])


@pytest.mark.parametrize("method", ["random", "dense"])
def test_static_masks(method: str) -> None:
    (first, one), (second, two) = trained("torch", method), trained("sparse", method)
    assert np.array_equal(first.coo()[1], second.coo()[1])
    assert two["loss"] == pytest.approx(one["loss"], rel=2e-3)
    assert first.coo()[0] == pytest.approx(second.coo()[0], abs=2e-3)
    assert one["deaths"] == two["deaths"] == 0


def test_the_mask_is_kept_by_hand() -> None:
    value, momentum = np.float32([0.5, -0.25, 0.1]), np.float32([0.0, 1.0, 0.0])
    updates.keep_mask(value, momentum, np.float32([1.0, 0.5, 1.0]), (0.1, 0.0, 0.5), connections=True)
    assert momentum == pytest.approx([1.0, 1.0, 1.0])  # ½v + g
    assert value[:2] == pytest.approx([0.4, -0.35])
    assert value[2] == np.float32(1e-12)  # 0.1 − 0.1·1 would be 0, and no connection is


@pytest.mark.parametrize("stop", [2, 5])
def test_resumed_is_as_if_never_interrupted(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edge_bcs.training.backends import CompiledBackend

    whole, _ = trained("sparse", output=Output(tmp_path / "whole", save_seconds=0.0))
    cut = Output(tmp_path / "cut", save_seconds=0.0)
    with cut_off(CompiledBackend, "step", stop):
        trained("sparse", output=cut)
    resumed, _ = trained("sparse", output=replace(cut, resume=True))
    assert same(whole, resumed)
    check_same(tmp_path / "whole", tmp_path / "cut")
    with pytest.raises(EdgeBcsError, match="begun with engine 'sparse', not 'torch'"):
        trained("torch", output=replace(cut, resume=True))


def test_refusals() -> None:
    def refused(match: str, **changed: Any) -> None:
        with pytest.raises(EdgeBcsError, match=match):
            trained("sparse", **changed)

    refused("does not do rewiring by layer", method=Method(rewire="by-layer"))
    refused("one process, on a CPU, in f32", precision="bf16")
    refused("the network's own seed", seed=6)
    with pytest.raises(EdgeBcsError, match="engine is torch or sparse"):
        trained("jax")


def test_kappa_holds() -> None:
    sparse, _ = trained("sparse", hyper=Hyper(learning_rate=0.5))
    assert len(sparse.coo()[1]) == connectivity.kappa(sparse.size, 0.8)


def test_a_finished_training_that_is_resumed_says_what_it_said(tmp_path: Path) -> None:
    sparse, said = trained("sparse", output=tmp_path / "run")
    again, says = trained("sparse", output=Output(tmp_path / "run", resume=True))
    assert {**says, "seconds": 0} == {**said, "seconds": 0} and "loss" in says
    assert same(sparse, again)


def test_an_end_that_is_interrupted_leaves_the_best_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal that was held while the best epoch was put into the network comes when it is there."""
    from edge_bcs.training.backends import CompiledBackend
    from edge_bcs.training.run import Run

    worse = iter([0.9, 0.5, 0.1])
    monkeypatch.setattr(CompiledBackend, "evaluate", lambda self, data: (next(worse), None))
    whole = Run.train

    def interrupted(self: Run, *given: Any) -> Any:
        whole(self, *given)
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "train", interrupted)
    sparse = edge_bcs.sparsify(tiny(), 0.8, 5)
    with pytest.raises(KeyboardInterrupt):
        training.train(
            sparse, digits(40), objective="natural", method="fixed", epochs=3,
            compute=Compute("sparse"), output=tmp_path, **{**SHORT, "feed": Feed(validation=0.2)},
        )  # fmt: skip
    best, last = (read_checkpoint(tmp_path / f"{name}.safetensors") for name in ("checkpoint", "last"))
    assert best.metadata["step"] != last.metadata["step"]
    assert all(np.array_equal(array, best.tensors[name]) for name, array in sparse.state().items())


def test_attacks_in_half_precision(tmp_path: Path) -> None:
    """The weights tell that the attacks differ, the plan what was asked for; a resumed training keeps it."""
    from edge_bcs.runtime.library import half_kernels

    if not half_kernels():
        pytest.skip("no half precision here")

    def at(precision: str, output: Output, batch_size: int = 16) -> edge_bcs.SparseModel:
        sparse = edge_bcs.sparsify(tiny(), 0.5, 5)
        compute = Compute("sparse", threads=1, attack_precision=precision)
        more: dict[str, Any] = {**SHORT, "batch_size": batch_size, "output": output, "compute": compute}
        training.train(sparse, digits(64), schedule=Schedule(steps=3), **more)
        return sparse

    folder = Output(tmp_path / "half")
    found = at("half", folder)
    assert not same(found, at("f32", Output(tmp_path / "full")))
    assert same(at("half", replace(folder, resume=True)), found)
    plan = json.loads(read_checkpoint(tmp_path / "half" / "last.safetensors").metadata["plan"])
    assert plan["attack_precision"] == "half"
    with pytest.raises(EdgeBcsError, match="was begun with attack_precision 'half', not 'f32'"):
        at("f32", replace(folder, resume=True))
    with pytest.raises(EdgeBcsError, match="8 images or a multiple of 16 at a time, not 12"):
        at("half", Output(), 12)


def test_half_precision_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_bcs.runtime import precision

    monkeypatch.setattr(precision, "half_kernels", lambda: 0)
    with pytest.raises(EdgeBcsError, match=r"take the attack precision f32\.$"):
        half = Compute("sparse", attack_precision="half")
        training.train(edge_bcs.sparsify(tiny(), 0.5, 5), digits(64), compute=half, **SHORT)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"engine": "torch", "attack_precision": "half"}, "need the sparse engine"),
        ({"engine": "sparse", "attack_precision": "f16"}, "the attack precision is f32 or half, not 'f16'"),
    ],
)
def test_half_precision_that_cannot_be(asked: dict[str, str], said: str) -> None:
    with pytest.raises(EdgeBcsError, match=said):
        Compute(**asked)  # type: ignore[arg-type]


def test_without_an_attack_none_is_in_half_precision() -> None:
    half = Compute("sparse", attack_precision="half")
    with pytest.raises(EdgeBcsError, match="natural attacks nothing"):
        sparse = edge_bcs.sparsify(tiny(), 0.5, 5)
        training.train(sparse, digits(64), objective="natural", compute=half, **SHORT)
