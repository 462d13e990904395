"""Evaluation: counts by hand on networks whose robustness is known, warnings, resumption."""

# mypy: disable-error-code="name-defined"

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import edge_bcs
from edge_bcs import models
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.data import ArrayDataset
from edge_bcs.evaluation import libraries as external_attacks
from edge_bcs.evaluation.measures import evaluate
from edge_bcs.method import attacks


class Threshold(nn.Module):
    """Class 1 where the mean pixel is above one half: the exact l∞ margin of an image is |mean − ½|."""

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1).mean(1) - 0.5
        return torch.stack([-score, score], 1)


def by_margin(*means: float) -> ArrayDataset:
    images = np.stack([np.full((1, 2, 2), mean, np.float32) for mean in means])
    return ArrayDataset(images, np.array([int(mean > 0.5) for mean in means]))


def test_robust_accuracy_is_the_share_of_margins_beyond_epsilon() -> None:
    data = by_margin(0.3, 0.45, 0.48, 0.52, 0.56, 0.7, 0.9, 0.1)
    for attack, steps in (("fgsm", 50), ("pgd", 1), ("pgd", 20)):
        step_size = 1.0 if steps == 1 else None
        report = evaluate(
            Threshold(),
            data,
            attack=attack,
            epsilon=0.1,
            steps=steps,
            step_size=step_size,
            restarts=2,
            batch_size=3,
        )
        assert report["clean_acc"] == 1.0
        assert report["adv_acc"] == 4 / 8  # 0.45, 0.48, 0.52 and 0.56 are within 0.1 of the threshold
    assert evaluate(Threshold(), data, epsilon=0.03, batch_size=8)["adv_acc"] == 6 / 8


class Diverged(Threshold):
    """Dark images get NaN, whose place in torch's and numpy's argmax is that of the first class."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).where(x.flatten(1).mean(1, keepdim=True) > 0.5, torch.nan)


@pytest.mark.parametrize("attack", ["none", "pgd"])
def test_answers_that_are_not_finite_are_wrong(attack: str) -> None:
    data = by_margin(0.1, 0.2, 0.3, 0.6)  # the labels of the dark ones are 0
    found = evaluate(Diverged(), data, attack=attack, epsilon=0.01, steps=2, restarts=1, batch_size=3)
    assert found["clean_acc"] == 0.25 and found["adv_acc"] in (None, 0.25)
    assert [text for text in found["warnings"] if "answers to 3 of 4 images are not finite" in text]
    assert not any("randomised" in text for text in found["warnings"])


def test_an_image_that_is_wrong_to_begin_with_is_not_robust() -> None:
    data = by_margin(0.1, 0.9, 0.8, 0.2)
    data.labels[:2] = 1 - data.labels[:2]
    report = evaluate(Threshold(), data, epsilon=0.5, batch_size=2)
    assert (report["clean_acc"], report["adv_acc"]) == (0.5, 0.0)
    report = evaluate(Threshold(), data, epsilon=0.01)
    assert (report["clean_acc"], report["adv_acc"]) == (0.5, 0.5)


def test_report_says_how_it_was_measured() -> None:
    report = evaluate(Threshold(), by_margin(0.1, 0.9), steps=50, restarts=10, seed=4)
    assert report.pop("seconds") >= 0
    assert report == {
        "clean_acc": 1.0,
        "adv_acc": 1.0,
        "samples": 2,
        "attack": "pgd",
        "norm": "Linf",
        "eps": 8 / 255,
        "steps": 50,
        "restarts": 10,
        "step_size": 2.5 * (8 / 255) / 50,
        "seed": 4,
        "warnings": [],
    }
    assert json.dumps(report)
    natural = evaluate(Threshold(), by_margin(0.1, 0.9), attack="none")
    assert natural["adv_acc"] is None and "steps" not in natural


def test_samples_and_iterables() -> None:
    data = by_margin(*np.linspace(0.2, 0.45, 10))
    assert evaluate(Threshold(), data, attack="none", samples=7, batch_size=3)["samples"] == 7

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for first in (0, 4, 8):
            yield data.read(np.arange(first, min(first + 4, 10)))

    whole = evaluate(Threshold(), data, epsilon=0.1, batch_size=4)
    streamed = evaluate(Threshold(), batches(), epsilon=0.1)
    assert streamed["samples"] == 10 and streamed["adv_acc"] == whole["adv_acc"]
    assert evaluate(Threshold(), batches(), attack="none", samples=6)["samples"] == 6


def test_a_sample_of_sorted_images_has_all_classes() -> None:
    """Images on disk are sorted by class: the first hundred would be of one class."""
    data = by_margin(*np.linspace(0.1, 0.4, 50), *np.linspace(0.6, 0.9, 50))
    seen = []

    class Watching(Threshold):
        def forward(self, x: Tensor) -> Tensor:
            seen.extend(x.flatten(1).mean(1).tolist())
            return super().forward(x)

    evaluate(Watching(), data, attack="none", samples=20, batch_size=20)
    first = data.read(data.order(0, 0, shuffle=True)[:20])[0]  # what the board takes for its limit
    assert seen[:20] == pytest.approx(first.reshape(20, -1).mean(1).tolist())
    assert 4 < sum(mean > 0.5 for mean in seen[:20]) < 16


def test_model_is_left_as_it_was() -> None:
    sparse = edge_bcs.sparsify(
        nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), 0.5
    )
    sparse.train()
    before = sparse.state()
    evaluate(sparse, by_margin(0.3, 0.6, 0.8), steps=2, restarts=2)
    assert sparse.training and sparse.network[2].training
    assert all(np.array_equal(before[name], buffer) for name, buffer in sparse.state().items())


class Staircase(Threshold):
    """The same answers through a step function: no gradient anywhere."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x * 50).round() / 50)


class Noisy(Threshold):
    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits + 0.1 * torch.randn_like(logits)


@pytest.mark.parametrize(
    ("model", "word"), [(Staircase, "zero for 100%"), (Noisy, "randomised"), (Threshold, None)]
)
def test_warnings(model: Callable[[], nn.Module], word: str | None) -> None:
    warnings = evaluate(model(), by_margin(0.2, 0.8), steps=2, restarts=1)["warnings"]
    assert any(word in warning for warning in warnings) if word else warnings == []


@pytest.mark.parametrize(("model", "beaten"), [(Staircase, True), (Threshold, False)])
def test_square_that_beats_pgd_is_reported(
    model: Callable[[], nn.Module], beaten: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def darken_and_brighten(network: nn.Module, **_: object) -> Callable[[Tensor, Tensor, int], Tensor]:
        return lambda x, labels, _: (x + 0.1 * (1 - 2 * labels.view(-1, 1, 1, 1)))[None]

    monkeypatch.setattr(external_attacks, "square", darken_and_brighten)
    # Every image is within reach; the staircase gives PGD no gradient to find it by.
    data = by_margin(0.44, 0.45, 0.55, 0.56)
    report = evaluate(model(), data, attack="square", epsilon=0.1)
    assert report["adv_acc"] == 0
    found = [text for text in report["warnings"] if text.startswith("Square fools 4 of 4 images where PGD")]
    assert bool(found) == beaten


def test_interrupted_evaluation_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = by_margin(*np.random.default_rng(0).uniform(0.3, 0.7, 40))
    arguments: dict[str, Any] = {
        "epsilon": 0.1,
        "steps": 2,
        "step_size": 0.03,
        "restarts": 2,
        "batch_size": 8,
        "seed": 1,
    }
    whole = evaluate(Threshold(), data, **arguments)
    restarts, calls = attacks.pgd_restarts, []

    def stopping(*args: object, **kwargs: object) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return restarts(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(attacks, "pgd_restarts", stopping)
    kept = tmp_path / "counts.json"
    with pytest.raises(KeyboardInterrupt):
        evaluate(Threshold(), data, resume=kept, **arguments)
    monkeypatch.undo()
    assert json.loads(kept.read_text())["counts"]["batches"] == 3
    monkeypatch.setattr(
        attacks, "pgd_restarts", lambda *args, **kwargs: calls.append(2) or restarts(*args, **kwargs)
    )
    continued = evaluate(Threshold(), data, resume=kept, **arguments)
    assert calls.count(2) == 2  # of five batches, three were done
    assert (continued["adv_acc"], continued["samples"]) == (whole["adv_acc"], 40)
    assert not kept.exists()
    # Counts of other settings are neither continued nor lost.
    others = json.dumps({"asked": {"seed": 2}, "counts": {"batches": 9, "samples": 9, "clean": 0}})
    kept.write_text(others)
    with pytest.raises(EdgeBcsError, match="keeps the counts of another evaluation"):
        evaluate(Threshold(), data, resume=kept, **arguments)
    assert kept.read_text() == others


def test_counts_of_another_network_are_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One --resume file for two checkpoints must not mix them."""

    class Shifted(Threshold):
        def __init__(self, shift: float) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.tensor(shift))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.shift)

    data, kept = by_margin(0.3, 0.4, 0.6, 0.7), tmp_path / "counts.json"
    fgsm = attacks.fgsm

    def stopping(model: nn.Module, x: Tensor, labels: Tensor, *, epsilon: float) -> Tensor:
        if kept.exists():
            raise KeyboardInterrupt
        return fgsm(model, x, labels, epsilon=epsilon)

    arguments: dict[str, Any] = {"attack": "fgsm", "epsilon": 0.01, "batch_size": 2, "resume": kept}
    monkeypatch.setattr(attacks, "fgsm", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate(Shifted(0.0), data, **arguments)
    monkeypatch.undo()
    with pytest.raises(EdgeBcsError, match="keeps the counts of another evaluation"):
        evaluate(Shifted(0.3), data, **arguments)
    assert evaluate(Shifted(0.0), data, **arguments)["samples"] == 4
    # Shifted by 0.3 both images of the first batch are wrong: half, where the kept counts would say all.
    assert evaluate(Shifted(0.3), data, **arguments)["clean_acc"] == 0.5


def test_refusals() -> None:
    with pytest.raises(EdgeBcsError, match="no attack 'deepfool'"):
        evaluate(Threshold(), by_margin(0.1), attack="deepfool")
    with pytest.raises(EdgeBcsError, match="no image to evaluate"):
        evaluate(Threshold(), [])
    with pytest.raises(EdgeBcsError, match="label 7 is out of range: the network has 2 classes"):
        evaluate(Threshold(), [(np.zeros((1, 1, 2, 2), np.float32), np.array([7]))])
    with pytest.raises(EdgeBcsError, match="at least 1 step"):
        evaluate(Threshold(), by_margin(0.1), steps=0)


@pytest.mark.parametrize(
    ("attack", "library"), [("autoattack", "pyautoattack"), ("square", "pyautoattack"), ("bb", "foolbox")]
)
def test_a_missing_library_is_named(attack: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pyautoattack", "pyautoattack.square", "foolbox"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        EdgeBcsError, match=rf"needs {library}; install it with pip install 'edge-bcs\[eval\]'"
    ):
        evaluate(Threshold(), by_margin(0.1, 0.9), attack=attack)


def four_classes() -> nn.Module:
    """A linear network on 2x2 images whose class is the brightest pixel: the margin is half the lead."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(10 * torch.eye(4))
    return model


def by_lead(*leads: float) -> ArrayDataset:
    images = np.full((len(leads), 4), 0.4, np.float32)
    labels = np.arange(len(leads)) % 4
    images[np.arange(len(leads)), labels] += np.array(leads, np.float32)
    return ArrayDataset(images.reshape(-1, 1, 2, 2), labels, tuple("abcd"))


@pytest.mark.parametrize("attack", ["pgd", "autoattack", "square", "bb"])
def test_external_attacks_find_what_is_within_reach(attack: str) -> None:
    """Leads of less than 2·0.1 can be overturned, and no other."""
    for library in {
        "autoattack": ["pyautoattack"],
        "square": ["pyautoattack"],
        "bb": ["foolbox", "numba"],
    }.get(attack, []):
        pytest.importorskip(library)
    data = by_lead(0.05, 0.12, 0.17, 0.25, 0.3, 0.4)
    report = evaluate(
        four_classes(), data, attack=attack, epsilon=0.1, steps=20, restarts=1, queries=300, batch_size=4
    )
    assert (report["clean_acc"], report["adv_acc"]) == (1.0, 0.5)
    assert report["attack"] == attack and report.get("queries") == (300 if attack == "square" else None)


def test_one_run_of_square_is_the_runs_with_every_smaller_budget() -> None:
    library = pytest.importorskip("pyautoattack.square")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    x = torch.rand(60, 3, 8, 8)
    labels = model(x).argmax(1)
    budgets = [1, 5, 20, 60]
    found = external_attacks.square(model, epsilon=0.02, queries=budgets, seed=3)(x, labels, 0)
    fooled = []
    for budget, images in zip(budgets, found, strict=True):
        search = library.SquareAttack(
            model, eps=0.02, n_queries=budget, seed=3, loss="margin", resc_schedule=False
        )
        assert torch.equal(images, search.perturb(x, labels))
        fooled.append(int((model(images).argmax(1) != labels).sum()))
    assert 0 < fooled[0] < fooled[-1] < 60


def test_budgets_of_queries_are_one_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted evaluation keeps the counts of every budget."""
    data = by_margin(0.3, 0.42, 0.44, 0.47, 0.53, 0.58)

    def reach(model: nn.Module, queries: list[int], **_: object) -> Callable[[Tensor, Tensor, int], Tensor]:
        def attack(x: Tensor, labels: Tensor, number: int) -> Tensor:
            if number == stop:
                raise KeyboardInterrupt
            toward = 1 - 2 * labels.view(-1, 1, 1, 1)
            return torch.stack([x + 0.001 * budget * toward for budget in queries])

        return attack

    monkeypatch.setattr(external_attacks, "square", reach)
    arguments: dict[str, Any] = {"attack": "square", "queries": [70, 40, 10], "epsilon": 0.1, "batch_size": 2}
    stop, kept = 2, tmp_path / "counts.json"
    with pytest.raises(KeyboardInterrupt):
        evaluate(Threshold(), data, resume=kept, **arguments)
    assert json.loads(kept.read_text())["counts"]["adversarial"] == [4, 3, 2]
    stop = -1
    report = evaluate(Threshold(), data, resume=kept, **arguments)
    # Margins 0.2, 0.08, 0.06, 0.03, 0.03, 0.08: within reach of 10 none, of 40 two, of 70 three.
    curve = [{"queries": 10, "adv_acc": 1.0}, {"queries": 40, "adv_acc": 4 / 6}]
    assert report["curve"] == [*curve, {"queries": 70, "adv_acc": 3 / 6}]
    assert (report["queries"], report["adv_acc"]) == (70, 3 / 6)


def test_our_attacks_agree_with_foolbox() -> None:
    foolbox = pytest.importorskip("foolbox")
    torch.manual_seed(0)
    model = models.resnet18(width=0.05, input_size=8).eval()
    x, labels = torch.rand(6, 3, 8, 8), torch.arange(6)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
    fgsm = foolbox.attacks.LinfFastGradientAttack(random_start=False)
    pgd = foolbox.attacks.LinfProjectedGradientDescentAttack(abs_stepsize=0.01, steps=7, random_start=False)
    expected, _, _ = fgsm(wrapped, x, labels, epsilons=0.03)
    assert torch.allclose(attacks.fgsm(model, x, labels, epsilon=0.03), expected, atol=1e-6)
    expected, _, _ = pgd(wrapped, x, labels, epsilons=0.03)
    found = attacks.pgd(model, x, labels, epsilon=0.03, step_size=0.01, steps=7)
    assert torch.allclose(found, expected, atol=1e-6)

    # From one random start, too: Foolbox's is replaced by ours.
    noise = attacks.start("uniform", tuple(x.shape), 0.03, seed=1, step=0)

    class FromOurStart(foolbox.attacks.LinfProjectedGradientDescentAttack):  # type: ignore[misc]
        def get_random_start(self, x0: Any, epsilon: float) -> Any:
            return x0 + noise

    begun = FromOurStart(abs_stepsize=0.01, steps=7, random_start=True)
    expected, _, _ = begun(wrapped, x, labels, epsilons=0.03)
    started = attacks.pgd(model, x, labels, epsilon=0.03, step_size=0.01, steps=7, perturbation=noise)
    assert torch.allclose(started, expected, atol=1e-6) and not torch.allclose(started, found, atol=1e-3)
