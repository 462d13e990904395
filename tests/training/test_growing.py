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
from edge_bcs import Attack, Compute, Feed, Hyper, Method, Output, Schedule
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

    def growing(self: Any, *given: Any) -> Any:
        note(self, "before it grows")
        moved = grow(self, *given)
        note(self, "grown")
        return moved

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


@pytest.mark.parametrize("engine", BACKENDS)
@pytest.mark.parametrize("share", [0.0, 0.2])
def test_what_carries_nothing_is_recycled(engine: str, share: float, tmp_path: Path) -> None:
    """A unit that nothing leads on from: the connections to it move, and others as `share` says."""
    found: list[tuple[int, np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
    backend, grow = BACKENDS[engine], BACKENDS[engine].grow

    def growing(self: Any, *given: Any) -> Any:
        self.store()
        before = self.sparse.state()["coo.index"].copy()
        moved = grow(self, *given)
        self.store()
        found.append((moved, before, self.sparse.state()["coo.index"].copy()))
        return moved

    sparse = edge_bcs.sparsify(tiny(), 0.8, 5)
    state, (to, on) = sparse.state(), sparse.layers[:2]
    index = state["coo.index"]
    unit = int(np.bincount(index[index < on.offset] // 9).argmax())
    of_unit = np.zeros(sparse.size, bool)
    of_unit[on.offset :].reshape(10, 8, 64)[:, unit] = True
    leads_on = of_unit[index]
    leads_to = index[(index >= to.offset + 9 * unit) & (index < to.offset + 9 * (unit + 1))]
    dormant = np.setdiff1d(np.arange(on.offset, sparse.size)[~of_unit[on.offset :]], index)
    index[leads_on] = dormant[: leads_on.sum()]
    order = np.argsort(index)
    sparse.load_coo(state["coo.value"][order], index[order], np.zeros(sparse.kappa, np.float32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "grow", growing)
        edge_bcs.train(
            sparse, digits(80), method=Method(growth=Growth(share=share, every=1, recycle=True)),
            batch_size=16, schedule=Schedule(steps=2), attack=Attack(steps=2), feed=Feed(validation=0.2),
            hyper=Hyper(learning_rate=1e-6, noise=0),  # so small that none dies and is born to lead on
            compute=Compute(engine, device="cpu"), output=tmp_path / "run", progress=False,
        )  # fmt: skip
    ((moved, before, after),) = found
    assert len(leads_to) and leads_on.sum() and not np.isin(leads_to, after).any()
    assert len(np.setdiff1d(before, after)) == moved >= max(len(leads_to), int(share * 0.75 * sparse.kappa))
    assert len(after) == sparse.kappa
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["moved"] for line in lines] == [0, moved]


def test_both_engines_move_the_same() -> None:
    """They agree on the gradients but for rounding, and so on nearly all positions."""
    indices = {}
    for engine, backend in BACKENDS.items():
        grow = backend.grow
        found: list[np.ndarray[Any, Any]] = []

        def growing(self: Any, *given: Any, grow: Any = grow, found: list[Any] = found) -> Any:
            moved = grow(self, *given)
            self.store()
            found.append(self.sparse.state()["coo.index"].copy())
            return moved

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
        ({"share": 1, "recycle": True}, "of the connections a share above 0"),
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
    made = run(*common, "--recycle", "-o", tmp_path / "recycled")
    assert made.exit_code == 0, made.output
    plan = json.loads(read_checkpoint(tmp_path / "recycled" / "last.safetensors").metadata["plan"])
    assert (plan["growth_share"], plan["growth_recycle"]) == (0, True)
    for words, message in (
        (("--recycle", "--method", "dense"), "--recycle belongs to bcs, not to dense"),
        (("--grow-until", 0.5), "--grow-until says when --grow and --recycle end: give one of them, too"),
        (("--grow", 0.2, "--method", "dense"), "--grow belongs to bcs, not to dense"),
        (("--grow", 0.2, "--rewire", "by-layer"), "growth by gradient goes with the method bcs"),
    ):
        said = run(*common, *words, "-o", tmp_path / "other")
        assert said.exit_code and message in " ".join(said.output.split())
