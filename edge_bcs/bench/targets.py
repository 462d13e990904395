"""What was aimed at, and whether a run of the bench reached it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

from edge_bcs.bench.suite import SECTIONS, STACK_FORMS, median, stack_least, stack_seconds
from edge_bcs.bench.turns import median_ratio

STEP_TARGETS = {
    "vgg16, uniform": 20.0,
    "vgg16, paper": 6.0,
    "resnet18, uniform": 12.0,
    "wrn28_4, uniform": 12.0,
}
STACK_TARGETS = {"0.99": (30.0, 6.0), "0.9": (4.0, 4.0)}
"""Sparsity → times dense PyTorch, times SparseProp."""
ATTACK_TARGETS = {"0.99": 1.7, "0.9": 1.8}
"""Sparsity → times float32, of an attack in half precision."""
ROBUST_STEP_TARGETS = {
    "vgg16, uniform, 0.99": 24.0,
    "vgg16, paper, 0.99": 7.5,
    "resnet18, uniform, 0.99": 22.0,
    "wrn28_4, uniform, 0.99": 16.0,
    "vgg16, uniform, 0.9": 5.5,
}
"""Network, distribution, sparsity → times dense PyTorch in float32, attacks in half precision."""
LEAST_BESIDE_BFLOAT16 = {"0.99": 4.0, "0.9": 0.0}
"""Sparsity → times dense PyTorch under autocast, however much bfloat16 gains it."""
HEAVY = 0.1
"""A kernel is heavy that takes at least this fraction of its network's convolutions."""


class Target(NamedTuple):
    """One row of the table.

    Attributes:
        what, target, measured: in words. met: None where it was not measured.
        allowed: what the target's figure would be if every operator ran at its roofline, and then if no
            tensor left the caches; "" where that says nothing.
    """

    what: str
    target: str
    measured: str
    met: bool | None
    allowed: str = ""

    def cells(self) -> tuple[str, ...]:
        """The row, with a verdict."""
        verdict = {None: "–", True: "met", False: "**not met**"}[self.met]
        return self.what, self.target, self.measured, self.allowed, verdict


def of(result: dict[str, Any]) -> list[Target]:
    """Every target beside what ``result`` of `suite.run`, complete or not, has of it."""
    found = {section: result.get(section, {}) for section in SECTIONS}
    rows: list[Target] = []
    for name, (dense, other) in _stack_rows():
        rows += _stack(found, name, dense, other)
    for name, least in STEP_TARGETS.items():
        step = found["steps"].get(name)
        what = f"whole AT step, {name}"
        if step is None:
            rows.append(_times(what, least, None))
        else:
            dense_seconds = step["dense_median_seconds"]
            floors = step["least_seconds"], step["least_in_cache_seconds"]
            rows.append(_times(what, least, step["ratio"], allowed=_allowed(dense_seconds, *floors)))
    for name, _ in _stack_rows():
        least = ATTACK_TARGETS[name.rpartition(", ")[2]]
        seconds = found["attacks"].get(name, {}).get("seconds", {})
        what = f"attack pass, {name}, half against f32"
        rows.append(_times(what, least, median_ratio(seconds, "f32", "half"), "float32", digits=2))
    for name, least in ROBUST_STEP_TARGETS.items():
        seconds = found["robust steps"].get(name, {}).get("seconds", {})
        what = f"whole AT step, {name}, attacks in half"
        rows.append(_times(what, least, median_ratio(seconds, "torch", "half")))
        gained = median_ratio(seconds, "torch", "bf16")
        if gained is not None:
            least = round(max(least / gained, LEAST_BESIDE_BFLOAT16[name.rpartition(", ")[2]]), 1)
            rows.append(
                _times(what, least, median_ratio(seconds, "bf16", "half"), "it under bfloat16 autocast")
            )
    rows += [_strided(found), _rewiring(found), *_roof(found), *_scaling(found)]
    return rows


def _stack_rows() -> Iterator[tuple[str, tuple[float, float]]]:
    for sparsity, least in STACK_TARGETS.items():
        for network in ("vgg16", "resnet18"):
            yield f"{network}, {sparsity}", least


def _times(
    what: str,
    least: float,
    times: float | None,
    side: str = "dense PyTorch",
    allowed: str = "",
    digits: int = 1,
) -> Target:
    if times is None:
        return Target(what, f"≥ {least:g}× {side}", "not measured", None)
    return Target(what, f"≥ {least:g}× {side}", f"{times:.{digits}f}×", times >= least, allowed)


def _allowed(theirs: float, least: float, in_cache: float) -> str:
    """Another side's seconds over our least ones, and over those without traffic beyond the caches."""
    return f"{theirs / least:.1f}× ({theirs / in_cache:.1f}×)"


def _stack(found: dict[str, Any], name: str, dense: float, other: float) -> Iterator[Target]:
    """Both ways to look at it: the network's convolutions one at a time, and a pass of the whole network."""
    for side, least, label in (("torch", dense, "dense PyTorch"), ("sparseprop", other, "SparseProp")):
        what, ratio, allowed = f"conv stack, {name}, layer by layer", None, ""
        if (stack := found["stacks"].get(name)) is not None:
            ours, theirs = (stack_seconds(stack["layers"], side) for side in ("edge_bcs", side))
            if ours and theirs:
                floors = (stack_least(stack["layers"], which) for which in ("seconds", "in_cache_seconds"))
                ratio, allowed = theirs / ours, _allowed(theirs, *floors)
        yield _times(what, least, ratio, label, allowed)
        what, ratio, allowed = f"conv stack, {name}, whole pass", None, ""
        if (whole := found["passes"].get(name)) is not None:
            ratio = median_ratio(whole["seconds"], side, "edge_bcs")
            if ratio is not None:
                theirs = statistics.median(whole["seconds"][side])
                allowed = _allowed(theirs, whole["least_seconds"], whole["least_in_cache_seconds"])
        yield _times(what, least, ratio, label, allowed)


def _strided(found: dict[str, Any]) -> Target:
    what, target = "strided and 1×1 layers at ≥ 90 %, forward and backward", "never slower than dense"
    rows = [row for rows in found["strided"].values() for row in rows]
    for stack in found["stacks"].values():
        rows += [row for row in stack["layers"] if row["stride"] > 1 or row["kernel"] == 1]
    if not rows:
        return Target(what, target, "not measured", None)

    def ratio(row: dict[str, Any]) -> float:
        ours, theirs = (
            sum(median(row, f"{s}.{form}") for form in STACK_FORMS) for s in ("edge_bcs", "torch")
        )
        return theirs / ours

    ratios = [ratio(row) for row in rows]
    slower = sum(value < 1 for value in ratios)
    measured = f"{min(ratios):.1f}× to {max(ratios):.1f}×, {slower} of {len(ratios)} slower"
    return Target(what, target, measured, slower == 0)


def _rewiring(found: dict[str, Any]) -> Target:
    what, target = "RewireStep, VGG-16 at 99 %", "≤ 1 % of the step"
    step = found["steps"].get("vgg16, uniform")
    if step is None:
        return Target(what, target, "not measured", None)
    alone, update = step["rewiring_share"], step["optimizer_share"]
    measured = f"{100 * alone:.2f} %; with lists and dense parameters {100 * update:.2f} %"
    return Target(what, target, measured, update <= 0.01)


def _roof(found: dict[str, Any]) -> Iterator[Target]:
    """Twice: by arithmetic and traffic alone, and by the loads that a sparse product needs, too."""
    heavy = []
    for stack in found["stacks"].values():
        own = {
            (i, form): row["count"] * median(row, f"edge_bcs.{form}")
            for i, row in enumerate(stack["layers"])
            for form in STACK_FORMS
        }
        total = sum(own.values())
        heavy += [
            stack["layers"][i]["edge_bcs"][form]
            for (i, form), seconds in own.items()
            if seconds >= HEAVY * total
        ]
    what = f"each kernel that takes ≥ {100 * HEAVY:g} % of its network"
    for key, of_what in (
        ("roof_fraction", "the larger of arithmetic and traffic"),
        ("roofline_fraction", "the largest of arithmetic, loads and traffic"),
    ):
        target = f"≥ 50 % of {of_what}"
        reached = [figures[key] for figures in heavy]
        if not reached:
            yield Target(what, target, "not measured", None)
            continue
        good = sum(value >= 0.5 for value in reached)
        measured = (
            f"{100 * min(reached):.0f} to {100 * max(reached):.0f} %, {good} of {len(reached)} reach it"
        )
        yield Target(what, target, measured, good == len(reached))


def _scaling(found: dict[str, Any]) -> Iterator[Target]:
    for what in ("batch", "kappa", "pixels"):
        name, points = f"time of a step as {what} grows", found["scaling"].get(what)
        if points is None:
            yield Target(name, "linear", "not measured", None)
            continue
        x, y = [point["x"] for point in points], [point["seconds"] for point in points]
        slope, offset = statistics.linear_regression(x, y)
        off = max(abs(seconds / (offset + slope * at) - 1) for at, seconds in zip(x, y, strict=True))
        # A point a tenth off its line is as far as neighbouring runs differ.
        yield Target(name, "linear", f"at most {100 * off:.0f} % off a straight line", off <= 0.1)
