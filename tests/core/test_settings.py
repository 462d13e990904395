"""What a user sets of a training: ranges, and what follows from what was left out."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

import edge_bcs
from edge_bcs import Attack, EdgeBcsError, Hyper, Schedule
from edge_bcs.core.settings import Coefficients, filled

REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "radius": (lambda: Attack(epsilon=1.5), "epsilon must be a number from 0 to 1, not 1.5"),
    "no radius": (lambda: Attack(epsilon=math.nan), "epsilon must be a number from 0 to 1, not nan"),
    "step": (lambda: Attack(step_size=-0.1), "step_size must be a number from 0 to 1, not -0.1"),
    "text": (lambda: Attack(step_size="2/255"), "step_size must be a number from 0 to 1, not 2/255"),  # type: ignore[arg-type]
    "steps": (lambda: Attack(steps=-1), "attack_steps must be a whole number from 0 to 100000, not -1"),
    "half a step": (lambda: Attack(steps=0.5), "attack_steps must be a whole number"),  # type: ignore[arg-type]
    "rate": (lambda: Hyper(learning_rate=-0.1), "learning_rate must be a number of at least 0, not -0.1"),
    "decay": (lambda: Hyper(weight_decay=math.inf), "weight_decay must be a number of at least 0, not inf"),
    "momentum": (lambda: Hyper(momentum=math.nan), "momentum must be a number of at least 0, not nan"),
    "noise": (lambda: Hyper(noise=True), "noise must be a number of at least 0, not True"),
    "epochs": (lambda: Schedule(epochs=0), "epochs must be a whole number of at least 1, not 0"),
    "length": (lambda: Schedule(steps=0), "steps must be a whole number of at least 1, not 0"),
    "kind": (lambda: Schedule(kind="linear"), "the schedule is steps, cosine or one-cycle, not 'linear'"),
    "way of decay": (lambda: Schedule(decay="grows"), "the decay is falls or stays, not 'grows'"),
    "warm-up": (lambda: Schedule(warmup=1.5), "warmup must be a number from 0 to 1, not 1.5"),
    "all warm-up": (lambda: Schedule(warmup=1), "warmup must be a share below 1"),
    "patience": (lambda: Schedule(patience=0), "patience must be a whole number of at least 1, not 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_out_of_range_is_refused_in_one_sentence(name: str) -> None:
    make, sentence = REFUSED[name]
    with pytest.raises(EdgeBcsError) as error:
        make()
    assert str(error.value).startswith(sentence) and "\n" not in str(error.value)


def test_the_ends_of_the_ranges_are_allowed() -> None:
    Attack(epsilon=0, step_size=1, steps=100_000)
    Hyper(learning_rate=0, weight_decay=0, momentum=0, noise=0)
    Schedule(epochs=1, steps=1, kind="cosine")


@pytest.mark.parametrize(
    ("hyper", "fine_tuning", "batch_norm", "rate", "decay"),
    [
        (Hyper(), False, "batch", 0.1, 5e-4),
        (Hyper(), False, "frozen", 0.1, 5e-4),
        (Hyper(learning_rate=0.05), False, "batch", 0.05, 5e-4),
        (Hyper(), True, "batch", 0.1, 5e-4),
        (Hyper(), True, "frozen", 0.001, 5e-6),
        (Hyper(learning_rate=0.01), True, "frozen", 0.01, 5e-5),
        (Hyper(weight_decay=0), True, "frozen", 0.001, 0),
    ],
)
def test_what_is_left_out_follows_from_the_rest(
    hyper: Hyper, fine_tuning: bool, batch_norm: str, rate: float, decay: float
) -> None:
    found = filled(hyper, fine_tuning=fine_tuning, batch_norm=batch_norm)
    assert found.learning_rate == rate and found.weight_decay == pytest.approx(decay)
    assert (found.momentum, found.noise) == (0.9, 1e-6)


def test_rates_fall_as_the_schedule_says() -> None:
    first = Coefficients(learning_rate=0.1, weight_decay=0.5, momentum=0.9, noise=0.25)
    at = [Schedule().at(first, step, 8) for step in range(8)]
    assert [made.learning_rate for made in at] == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 2)
    assert [made.weight_decay for made in at] == pytest.approx([0.5] * 4 + [0.05] * 2 + [0.005] * 2)
    half = Schedule(kind="cosine").at(first, 2, 4)
    assert half.learning_rate == pytest.approx(0.05) and half.weight_decay == pytest.approx(0.25)
    assert Schedule(kind="cosine", decay="stays").at(first, 2, 4).weight_decay == 0.5
    assert {(made.momentum, made.noise) for made in (*at, half)} == {(0.9, 0.25)}


def test_warm_up_rises_to_the_highest_rate() -> None:
    first = Coefficients(learning_rate=0.1, weight_decay=0.5)
    warm = [Schedule(warmup=0.25).at(first, step, 16) for step in range(16)]
    rates = [0.025, 0.05, 0.075, 0.1, *[0.1] * 4, *[0.01] * 4, *[0.001] * 4]
    assert [made.learning_rate for made in warm] == pytest.approx(rates)
    assert [made.weight_decay for made in warm] == pytest.approx([5 * rate for rate in rates])
    cosine = [Schedule(kind="cosine", warmup=0.2).at(first, step, 10).learning_rate for step in range(10)]
    assert cosine[:3] == pytest.approx([0.05, 0.1, 0.1])
    assert cosine[6] == pytest.approx(0.05) and cosine == sorted(cosine[:2]) + sorted(
        cosine[2:], reverse=True
    )
    assert Schedule(warmup=0).at(first, 0, 16) == Schedule().at(first, 0, 16) == first


@pytest.mark.parametrize(("total", "rise"), [(40, None), (37, 0.25), (2000, 0.3), (10, 0.9)])
def test_one_cycle_is_torchs(total: int, rise: float | None) -> None:
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.1, total_steps=total, pct_start=rise or 0.3, cycle_momentum=False
    )
    schedule = Schedule(kind="one-cycle", warmup=rise)
    for step in range(total):
        assert schedule.rates(0.1, 0.01, step, total)[0] == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step + 1 < total:
            cycle.step()


@pytest.mark.parametrize("kind", ["steps", "cosine", "one-cycle"])
@pytest.mark.parametrize("warmup", [None, 0.0, 0.1, 0.99])
def test_the_shortest_trainings_have_rates_too(kind: str, warmup: float | None) -> None:
    for total in (1, 2, 3):
        for step in range(total):
            rate, decay = Schedule(kind=kind, warmup=warmup).rates(0.1, 0.01, step, total)
            assert 0 <= rate <= 0.1 and decay == pytest.approx(rate / 10)


def test_they_are_public_and_cannot_be_changed() -> None:
    assert edge_bcs.Attack is Attack and {"Attack", "Hyper", "Schedule"} <= set(dir(edge_bcs))
    with pytest.raises(AttributeError):
        Attack().steps = 3  # type: ignore[misc]
