"""Growth by gradient in a training: κ at every step, both engines, cut off and resumed, and what it needs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.training import cut_off, digits, same, tiny

import edge_bcs
from edge_bcs import Attack, Compute, Feed, Method, Output, Schedule
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.training.backends import CompiledBackend, TorchBackend
from edge_bcs.training.settings import Gradual, Growth

BACKENDS: dict[str, Any] = {"torch": TorchBackend, "sparse": CompiledBackend}
GROWTH = Growth(share=0.2, every=2, until=0.8, candidates=2)
MOVED = {2: 177, 4: 103, 6: 30}
"""Of 1,038 connections before these steps of ten: 0.2·(1 + cos(π·t/8))/2 of them."""


def trained(
    engine: str, output: Output | None = None, growth: Growth | None = GROWTH, **more: Any
) -> tuple[edge_bcs.SparseModel, dict[str, Any]]:
    sparse = edge_bcs.sparsify(tiny(), 0.8, 5)
    arguments: dict[str, Any] = {
        "method": Method(growth=growth),
        "batch_size": 16,
        "schedule": Schedule(steps=10),
        "attack": Attack(steps=2),
        "feed": Feed(validation=0.2),
        "compute": Compute(engine, device="cpu"),
        "output": output,
        "progress": False,
        **more,
    }
    return sparse, edge_bcs.train(sparse, digits(80), **arguments)


@pytest.mark.parametrize("engine", BACKENDS)
@pytest.mark.parametrize("attack", ["pgd", "n-fgsm"])
def test_kappa_is_exact_at_every_step(engine: str, attack: str, tmp_path: Path) -> None:
    backend, step, grow = BACKENDS[engine], BACKENDS[engine].step, BACKENDS[engine].grow
    seen: list[tuple[str, np.ndarray[Any, Any], dict[str, np.ndarray[Any, Any]]]] = []

    def note(self: Any, what: str) -> None:
        self.store()
        state = self.sparse.state()
        value, index = state["coo.value"], state["coo.index"]
        assert len(value) == len(index) == self.sparse.kappa and (value != 0).all()
        assert (np.diff(index) > 0).all() and index[0] >= 0 and index[-1] < self.sparse.size
        seen.append((what, index.copy(), state))

    def stepping(self: Any, *given: Any) -> Any:
        note(self, "before a step")
        numbers = step(self, *given)
        note(self, "after a step")
        return numbers

    def growing(self: Any, *given: Any) -> None:
        note(self, "before it grows")
        grow(self, *given)
        note(self, "grown")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "step", stepping)
        patch.setattr(backend, "grow", growing)
        sparse, _ = trained(engine, Output(tmp_path / "run"), attack=Attack(steps=2, kind=attack))
    assert sparse.kappa == 1038
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"] - 1: line["moved"] for line in lines if line["moved"]} == MOVED
    before = [entry for entry in seen if entry[0] == "before it grows"]
    after = [entry for entry in seen if entry[0] == "grown"]
    for count, (_, one, state), (_, other, later) in zip(MOVED.values(), before, after, strict=True):
        assert len(np.setdiff1d(one, other)) == count  # all of them went elsewhere
        leaving = np.abs(state["coo.value"][~np.isin(one, other)]).max()
        assert leaving <= np.abs(state["coo.value"][np.isin(one, other)]).min()
        for name in ("dense.value", "dense.momentum", "batchnorm.mean", "batchnorm.variance"):
            assert np.array_equal(state[name], later[name])


def test_both_engines_move_the_same() -> None:
    """They agree on the gradients but for rounding, and so on nearly all positions."""
    indices = {}
    for engine, backend in BACKENDS.items():
        grow = backend.grow
        found: list[np.ndarray[Any, Any]] = []

        def growing(self: Any, *given: Any, grow: Any = grow, found: list[Any] = found) -> None:
            grow(self, *given)
            self.store()
            found.append(self.sparse.state()["coo.index"].copy())

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend, "grow", growing)
            trained(engine, schedule=Schedule(steps=3))
        indices[engine] = found[0]
    common = np.intersect1d(indices["torch"], indices["sparse"])
    assert len(common) >= 0.97 * 1038


@pytest.mark.parametrize("engine", BACKENDS)
@pytest.mark.parametrize("stop", [2, 5])
def test_resumed_is_as_if_never_interrupted(engine: str, stop: int, tmp_path: Path) -> None:
    whole, _ = trained(engine, Output(tmp_path / "whole", save_seconds=0.0))
    cut = Output(tmp_path / "cut", save_seconds=0.0)
    with cut_off(BACKENDS[engine], "step", stop):
        trained(engine, cut)
    resumed, _ = trained(engine, replace(cut, resume=True))
    assert same(whole, resumed)
    with pytest.raises(EdgeBcsError, match=r"begun with growth_share 0\.2, not None"):
        trained(engine, replace(cut, resume=True), growth=None)


def test_it_changes_what_is_learned_and_off_is_off() -> None:
    plain, _ = trained("sparse", growth=None)
    grown, _ = trained("sparse")
    assert not same(plain, grown)
    never, _ = trained("sparse", growth=replace(GROWTH, every=100))
    assert same(plain, never)


def test_what_is_refused() -> None:
    for growth, message in (
        ({"share": 0}, "of the connections a share above 0"),
        ({"share": 1.5}, "share of the connections that move must be a number from 0 to 1"),
        ({"until": 0}, "in a share of the steps above 0"),
        ({"every": 0}, "steps between growths must be a whole number of at least 1"),
        ({"candidates": 0}, "candidates must be a whole number of at least 1"),
    ):
        with pytest.raises(EdgeBcsError, match=message):
            Growth(**growth)
    for method in ({"name": "random"}, {"rewire": "by-layer"}, {"gradual": Gradual("0.9")}):
        with pytest.raises(EdgeBcsError, match="growth by gradient goes with the method bcs"):
            Method(growth=GROWTH, **method)
    with pytest.raises(EdgeBcsError, match="growth by gradient concerns the whole network"):
        trained("torch", train="head", batch_norm="frozen")


def test_the_command(tmp_path: Path) -> None:
    from helpers.commands import run
    from helpers.training_commands import SMALL, write_digits

    write_digits(data := tmp_path / "digits.npz")
    common = ("train", "--model", "resnet18", *SMALL, "--data", data, "--steps", 2, "--batch-size", 8)
    made = run(*common, "--grow", "--grow-until", 0.5, "--engine", "sparse", "-o", tmp_path / "run")
    assert made.exit_code == 0, made.output
    from edge_bcs.checkpoint import read_checkpoint

    plan = json.loads(read_checkpoint(tmp_path / "run" / "last.safetensors").metadata["plan"])
    named = {name: value for name, value in plan.items() if name.startswith("growth_")}
    expected = {"share": 0.3, "every": 100, "until": 0.5, "candidates": 4}
    assert named == {f"growth_{name}": value for name, value in expected.items()}
    for words, message in (
        (("--grow-until", 0.5), "--grow-until says when --grow ends: give it, too"),
        (("--grow", 0.2, "--method", "dense"), "--grow belongs to bcs, not to dense"),
        (("--grow", 0.2, "--rewire", "by-layer"), "growth by gradient goes with the method bcs"),
    ):
        said = run(*common, *words, "-o", tmp_path / "other")
        assert said.exit_code and message in " ".join(said.output.split())
