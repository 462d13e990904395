"""What was aimed at, and whether a run of the bench reached it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

from edge_bcs.bench.suite import SECTIONS, median, pass_ratio, stack_seconds

STEP_TARGETS = {
    "vgg16, uniform": 20.0,
    "vgg16, paper": 6.0,
    "resnet18, uniform": 12.0,
    "wrn28_4, uniform": 12.0,
}
STACK_TARGETS = {"0.99": (30.0, 6.0), "0.9": (4.0, 4.0)}
"""Sparsity → times dense PyTorch, times SparseProp."""
HEAVY = 0.1
"""A kernel is heavy that takes at least this fraction of its network's convolutions."""
_FORMS = ("forward", "both_gradients")


class Target(NamedTuple):
    """One row of the table.

    Attributes:
        what, target, measured: in words. met: None where it was not measured.
    """

    what: str
    target: str
    measured: str
    met: bool | None

    def cells(self) -> tuple[str, str, str, str]:
        """The row, with a verdict."""
        return self.what, self.target, self.measured, {None: "–", True: "met", False: "**not met**"}[self.met]


def of(result: dict[str, Any]) -> list[Target]:
    """Every target beside what ``result`` of `suite.run`, complete or not, has of it."""
    found = {section: result.get(section, {}) for section in SECTIONS}
    rows: list[Target] = []
    for name, (dense, other) in _stack_rows():
        rows += _stack(found, name, dense, other)
    for name, least in STEP_TARGETS.items():
        step = found["steps"].get(name)
        rows.append(_times(f"whole AT step, {name}", least, step and step["ratio"]))
    rows += [_strided(found), _rewiring(found), _roof(found), *_scaling(found)]
    return rows


def _stack_rows() -> Iterator[tuple[str, tuple[float, float]]]:
    for sparsity, least in STACK_TARGETS.items():
        for network in ("vgg16", "resnet18"):
            yield f"{network}, {sparsity}", least


def _times(what: str, least: float, ratio: float | None, side: str = "dense PyTorch") -> Target:
    if ratio is None:
        return Target(what, f"≥ {least:g}× {side}", "not measured", None)
    return Target(what, f"≥ {least:g}× {side}", f"{ratio:.1f}×", ratio >= least)


def _stack(found: dict[str, Any], name: str, dense: float, other: float) -> Iterator[Target]:
    """Both ways to look at it: the network's convolutions one at a time, and a pass of the whole network."""
    for side, least, label in (("torch", dense, "dense PyTorch"), ("sparseprop", other, "SparseProp")):
        stack, whole = found["stacks"].get(name), found["passes"].get(name)
        ours, theirs = (stack and stack_seconds(stack["layers"], name) for name in ("edge_bcs", side))
        ratio = theirs / ours if ours and theirs else None
        yield _times(f"conv stack, {name}, layer by layer", least, ratio, label)
        yield _times(f"conv stack, {name}, whole pass", least, whole and pass_ratio(whole, side), label)


def _strided(found: dict[str, Any]) -> Target:
    what, target = "strided and 1×1 layers at ≥ 90 %, forward and backward", "never slower than dense"
    rows = [row for rows in found["strided"].values() for row in rows]
    for stack in found["stacks"].values():
        rows += [row for row in stack["layers"] if row["stride"] > 1 or row["kernel"] == 1]
    if not rows:
        return Target(what, target, "not measured", None)

    def ratio(row: dict[str, Any]) -> float:
        ours, theirs = (sum(median(row, f"{s}.{form}") for form in _FORMS) for s in ("edge_bcs", "torch"))
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


def _roof(found: dict[str, Any]) -> Target:
    what, target = f"each kernel that takes ≥ {100 * HEAVY:g} % of its network", "≥ 50 % of its roofline"
    reached = []
    for stack in found["stacks"].values():
        own = {
            (i, form): row["count"] * median(row, f"edge_bcs.{form}")
            for i, row in enumerate(stack["layers"])
            for form in _FORMS
        }
        total = sum(own.values())
        reached += [
            stack["layers"][i]["edge_bcs"][form]["roof_fraction"]
            for (i, form), seconds in own.items()
            if seconds >= HEAVY * total
        ]
    if not reached:
        return Target(what, target, "not measured", None)
    good = sum(value >= 0.5 for value in reached)
    measured = f"{100 * min(reached):.0f} to {100 * max(reached):.0f} %, {good} of {len(reached)} reach it"
    return Target(what, target, measured, good == len(reached))


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
