"""When a single-step attack is looked at, and when it has collapsed, by hand."""

from __future__ import annotations

import pytest

from edge_bcs.core.collapse import Watch


def noted(*looks: tuple[float, float], images: int = 128) -> list[bool]:
    """Whether each look, (own, PGD), finds the training collapsed."""
    watch = Watch()
    return [watch.note(step, *look, images) for step, look in enumerate(looks)]


def test_a_fall_that_the_own_attack_does_not_show() -> None:
    # 128 images of which the best look left 40 % right: 3 · √(0.4 · 0.6 / 128) = 0.13, so half decides.
    assert noted((0.5, 0.4), (0.7, 0.21)) == [False, False]
    assert noted((0.5, 0.4), (0.7, 0.19)) == [False, True]
    assert noted((0.5, 0.4), (0.3, 0.19)) == [False, False]  # the own attack finds them, too: no collapse
    assert noted((0.2, 0.1), (0.5, 0.4), (0.6, 0.15)) == [False, False, True]  # the best, not the first


def test_what_was_never_robust_has_not_collapsed() -> None:
    assert noted((0.9, 0.0), (0.8, 0.01), (0.8, 0.0)) == [False, False, False]


def test_chance_alone_is_no_fall() -> None:
    # 10 % of 128: 3 · √(0.1 · 0.9 / 128) = 0.0795, so what is left must be below 0.0205; half would be 0.05.
    assert noted((0.2, 0.1), (0.2, 0.03)) == [False, False]
    assert noted((0.2, 0.1), (0.2, 0.02)) == [False, True]
    # 60 % of 10: 3 · √(0.6 · 0.4 / 10) = 0.46.
    assert noted((0.7, 0.6), (0.7, 0.2), images=10) == [False, False]
    assert noted((0.7, 0.6), (0.7, 0.1), images=10) == [False, True]


def test_when_it_is_due() -> None:
    watch = Watch()
    assert watch.is_due(0, 32, 128, over=False)  # before the first step
    watch.note(0, 0.1, 0.1, 128)
    assert not watch.is_due(0, 32, 128, over=True)  # that was looked at
    assert not watch.is_due(399, 32, 128, over=False) and watch.is_due(400, 32, 128, over=False)  # 12,800
    assert watch.is_due(45, 32, 128, over=True)
    assert not Watch().is_due(0, 32, 0, over=False)
    fallen = Watch(step=9, best=0.4, fell_back=9)
    assert not fallen.is_due(10_000, 32, 128, over=True)


def test_saved_and_read() -> None:
    for watch in (Watch(), Watch(7, 0.25, None), Watch(9, 0.4, 9)):
        assert Watch.parse(watch.dump()) == watch
    good = Watch(9, 0.4, 9).dump()
    for name, value in (("step", -2), ("step", 1.0), ("best", 1.5), ("fell_back", -1), ("fell_back", True)):
        with pytest.raises((ValueError, TypeError)):
            Watch.parse({**good, name: value})
    with pytest.raises(TypeError):
        Watch.parse({**good, "more": 1})


def test_the_sentence() -> None:
    watch = Watch(390, 0.3, 390)
    assert watch.sentence("n-fgsm", 0.5, 0.0625) == (
        "n-fgsm has collapsed: it leaves 50.0 % of the watched images right, PGD-20 6.2 %; from step 391 on "
        "the training attacks with PGD"
    )
