"""A single-step attack on the host that collapses: the training falls back on PGD, and says so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.training import cut_off, digits, same, tiny

import edge_bcs
from edge_bcs import Attack, Compute, Feed, Output, Schedule
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.method import attacks
from edge_bcs.training.backends import CompiledBackend, TorchBackend

BACKENDS: dict[str, Any] = {"torch": TorchBackend, "sparse": CompiledBackend}
LOOKS = {0: (0.12, 0.1), 3: (0.5, 0.4), 6: (0.9, 0.0)}
"""Shares under the own attack and under PGD, by steps: it collapses after the second epoch."""


def trained(
    engine: str,
    output: Output | None = None,
    *,
    images: int = 80,
    epochs: int = 3,
    kind: str = "n-fgsm",
    validation: float = 0.4,
    **more: Any,
) -> tuple[edge_bcs.SparseModel, dict[str, Any]]:
    sparse = edge_bcs.sparsify(tiny(), 0.8, 5)
    report = edge_bcs.train(
        sparse,
        digits(images),
        batch_size=16,
        schedule=Schedule(epochs=epochs),
        attack=Attack(steps=2, kind=kind),
        feed=Feed(validation=validation),
        compute=Compute(engine, device="cpu"),
        output=output,
        **more,
    )
    return sparse, report


@pytest.fixture(params=["torch", "sparse"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An engine whose looks find `LOOKS`, after each epoch though they are short."""

    backend, done = BACKENDS[request.param], [0]
    load, step = backend.load, backend.step

    def loading(self: Any, number: int) -> None:
        done[0] = number
        load(self, number)

    def stepping(self: Any, batch: Any, hyper: Any, number: int, signals: Any) -> Any:
        done[0] = number + 1
        return step(self, batch, hyper, number, signals)

    def watch(self: Any, data: Any) -> tuple[float, float]:
        assert len(data) == 32  # those held out
        return LOOKS[done[0]]

    monkeypatch.setattr("edge_bcs.core.collapse.APART", 1)
    for name, method in (("load", loading), ("step", stepping), ("watch", watch)):
        monkeypatch.setattr(backend, name, method)
    return str(request.param)


def test_it_falls_back(engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds: list[str] = []
    step = BACKENDS[engine].step

    def noting(self: Any, *given: Any) -> Any:
        kinds.append(self.attack.kind)
        return step(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BACKENDS[engine], "step", noting)
        _, report = trained(engine, Output(tmp_path / "run"))
    assert kinds == ["n-fgsm"] * 6 + ["pgd"] * 3
    assert report["fell_back"] == 6
    lines = [json.loads(line) for line in (tmp_path / "run" / "epochs.jsonl").read_text().splitlines()]
    assert [line.get("watched_pgd_acc") for line in lines] == [0.4, 0.0, None]
    assert [line.get("watched_own_acc") for line in lines] == [0.5, 0.9, None]
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("n-fgsm has collapsed: it leaves 90.0 % of the watched images right, PGD-20 0.0 %") == 1


@pytest.mark.parametrize("stop", [2, 7])
def test_resumed_is_as_if_never_interrupted(
    engine: str, stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, report = trained(engine, Output(tmp_path / "whole", save_seconds=0.0))
    cut = Output(tmp_path / "cut", save_seconds=0.0)
    with cut_off(BACKENDS[engine], "step", stop):
        trained(engine, cut)
    resumed, again = trained(engine, replace(cut, resume=True))
    assert same(whole, resumed)
    assert again["fell_back"] == report["fell_back"] == 6
    with pytest.raises(EdgeBcsError, match="begun with training_attack 'n-fgsm', not 'pgd'"):
        edge_bcs.train(
            edge_bcs.sparsify(tiny(), 0.8, 5),
            digits(80),
            batch_size=16,
            schedule=Schedule(epochs=3),
            attack=Attack(steps=2),
            feed=Feed(validation=0.4),
            compute=Compute(engine, device="cpu"),
            output=replace(cut, resume=True),
        )


def test_after_the_fall_it_is_plain_pgd(engine: str) -> None:
    """From a step on the numbers are those of a training that attacked with PGD there."""
    one, _ = trained(engine)
    first = edge_bcs.sparsify(tiny(), 0.8, 5)
    found: list[edge_bcs.SparseModel] = []
    step = BACKENDS[engine].step

    def by_hand(self: Any, batch: Any, hyper: Any, number: int, signals: Any) -> Any:
        self.attack = Attack(steps=2, kind="n-fgsm" if number < 6 else "pgd")
        return step(self, batch, hyper, number, signals)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BACKENDS[engine], "step", by_hand)
        patch.setattr(BACKENDS[engine], "watch", lambda self, data: (0.5, 0.4))  # which never collapses
        first, report = trained(engine)
        found.append(first)
    assert report["fell_back"] is None
    assert same(one, found[0])


@pytest.mark.parametrize("engine", ["torch", "sparse"], indirect=False)
def test_pgd_from_a_share_of_the_steps_on(engine: str, tmp_path: Path) -> None:
    """Resumed on either side of it, too; the epoch before it is the last one that is looked at."""
    kinds: list[tuple[int, str]] = []
    step = BACKENDS[engine].step

    def noting(self: Any, batch: Any, hyper: Any, number: int, signals: Any) -> Any:
        kinds.append((number, self.attack.kind))
        return step(self, batch, hyper, number, signals)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BACKENDS[engine], "step", noting)
        patch.setattr(BACKENDS[engine], "watch", lambda self, data: (0.5, 0.4))
        patch.setattr("edge_bcs.core.collapse.APART", 1)
        whole, report = trained(engine, Output(tmp_path / "whole", save_seconds=0.0), pgd_from=0.5)
        asked = [(number, "n-fgsm" if number < 5 else "pgd") for number in range(9)]
        assert kinds == asked and report["fell_back"] is None
        lines = [json.loads(line) for line in (tmp_path / "whole" / "epochs.jsonl").read_text().splitlines()]
        assert ["watched_pgd_acc" in line for line in lines] == [True, False, False]
        for stop in (4, 7):
            cut = Output(tmp_path / f"cut{stop}", save_seconds=0.0)
            with cut_off(BACKENDS[engine], "step", stop):
                trained(engine, cut, pgd_from=0.5)
            kinds.clear()
            assert same(trained(engine, replace(cut, resume=True), pgd_from=0.5)[0], whole)
            assert kinds == asked[stop:]
        with pytest.raises(EdgeBcsError, match=r"begun with pgd_from 0\.5, not 0\.6"):
            trained(engine, replace(cut, resume=True), pgd_from=0.6)
    for wrong in ({"pgd_from": 1.5}, {"pgd_from": 0.5, "kind": "pgd"}):
        with pytest.raises(EdgeBcsError):
            trained(engine, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ["torch", "sparse"], indirect=False)
def test_what_is_watched(engine: str) -> None:
    """Without images that are held out it is images of the training; the shares are those of the attacks."""
    seen: list[tuple[int, tuple[float, float]]] = []
    watch = BACKENDS[engine].watch

    def noting(self: Any, data: Any) -> tuple[float, float]:
        own, pgd = found = watch(self, data)
        x, y = data.read(np.arange(len(data)))
        import torch

        model, images, labels = self.sparse, torch.from_numpy(x), torch.from_numpy(y)
        if engine == "torch":  # PGD-20 with the start of the measurement, by the library's own means
            start = attacks.start(
                "uniform", images.shape, 8 / 255, seed=5, step=0, purpose=attacks.random.EVALUATION
            )
            moved = attacks.pgd(
                model,
                images,
                labels,
                epsilon=8 / 255,
                step_size=2.5 / 20 * 8 / 255,
                steps=20,
                perturbation=start,
            )
            with attacks.evaluation_mode(model), torch.no_grad():
                right = (model(images).argmax(1) == labels) & (model(moved).argmax(1) == labels)
            assert pgd == pytest.approx(float(right.double().mean()))
        seen.append((len(data), found))
        assert 0 <= pgd <= own + 0.2 <= 1.2
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BACKENDS[engine], "watch", noting)
        _, report = trained(engine, images=200, epochs=1, kind="fgsm-rs", validation=0, progress=False)
    assert report["fell_back"] is None
    assert [count for count, _ in seen] == [128, 128]  # before the first step, and at the end
