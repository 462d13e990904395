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
    "kind": (lambda: Schedule(kind="linear"), "the schedule is steps or cosine, not 'linear'"),
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
    assert half.learning_rate == pytest.approx(0.05) and half.weight_decay == 0.5
    assert {(made.momentum, made.noise) for made in (*at, half)} == {(0.9, 0.25)}


def test_they_are_public_and_cannot_be_changed() -> None:
    assert edge_bcs.Attack is Attack and {"Attack", "Hyper", "Schedule"} <= set(dir(edge_bcs))
    with pytest.raises(AttributeError):
        Attack().steps = 3  # type: ignore[misc]
