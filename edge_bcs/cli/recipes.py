"""Recipes of `edge-bcs train`: options that go together, by a name.

What is in "best" gained more than one seed differs from another (results/ablation).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edge_bcs.training.settings import Growth

RECIPES: dict[str, dict[str, Any]] = {"paper": {}, "best": {"grow": Growth.share}}
"""Options by their Python names, and their values."""
PAPER = "paper"


def take(options: dict[str, Any], given: Callable[[str], bool]) -> None:
    """Set what the recipe says of the options that were not given."""
    for name, value in RECIPES[options["recipe"]].items():
        if not given(name):
            options[name] = value
