"""Old spellings of arguments: they work, warn where they are written, and do not contradict the new ones."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

from edge_bcs import Attack, EdgeBcsError, Schedule
from edge_bcs.core.deprecated import OldSpellings, Places
from edge_bcs.core.errors import EdgeBcsDeprecationWarning, EdgeBcsWarning

PLACES: Places = {
    "attack_steps": ("attack", Attack, "steps"),
    "epsilon": ("attack", Attack, "epsilon"),
    "steps": ("schedule", Schedule, "steps"),
}


def trained(
    attack: Attack | None = None, schedule: Schedule | None = None, epochs: int | None = None, **old: Any
) -> tuple[Attack, Schedule]:
    spelt = OldSpellings("trained", old, PLACES)
    return spelt.into("attack", attack, Attack()), spelt.into("schedule", schedule, Schedule(), epochs=epochs)


def test_an_old_spelling_works_and_the_warning_names_the_new_one() -> None:
    with pytest.warns(EdgeBcsDeprecationWarning) as told:
        assert trained(attack_steps=3, epsilon=0.1, steps=5) == (
            Attack(steps=3, epsilon=0.1),
            Schedule(steps=5),
        )
    (warning,) = told
    assert str(warning.message).endswith(
        "write trained(attack=edge_bcs.Attack(steps=…, epsilon=…), schedule=edge_bcs.Schedule(steps=…))"
    )
    assert pathlib.Path(warning.filename).name == "test_deprecated.py"
    assert issubclass(warning.category, DeprecationWarning) and issubclass(warning.category, EdgeBcsWarning)


def test_new_spellings_say_nothing() -> None:
    assert trained(Attack(steps=3), epochs=7) == (Attack(steps=3), Schedule(epochs=7))
    assert trained(schedule=Schedule(epochs=7), epochs=7)[1] == Schedule(epochs=7)


@pytest.mark.filterwarnings("ignore::edge_bcs.core.errors.EdgeBcsDeprecationWarning")
def test_both_may_say_the_same_and_nothing_else() -> None:
    assert trained(Attack(steps=3), attack_steps=3)[0] == Attack(steps=3)
    with pytest.raises(EdgeBcsError, match=r"^trained was given attack_steps= and another in attack=; leave"):
        trained(Attack(epsilon=0.1), attack_steps=3)
    with pytest.raises(EdgeBcsError, match=r"given epochs= and another in schedule="):
        trained(schedule=Schedule(steps=3), epochs=7)
    with pytest.raises(EdgeBcsError, match="attack_steps must be a whole number"):
        trained(attack_steps=-3)


def test_a_keyword_that_never_was_is_pythons_error() -> None:
    with pytest.raises(TypeError, match=r"trained\(\) got an unexpected keyword argument 'attak'"):
        trained(attak=3)


def test_the_tests_run_with_this_warning_as_an_error() -> None:
    with pytest.raises(EdgeBcsDeprecationWarning):
        trained(attack_steps=3)
