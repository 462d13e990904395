"""Settings of a bench as options of its command line: a dataclass whose fields all have defaults."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

S = TypeVar("S", bound="DataclassInstance")


def add_settings(parser: argparse.ArgumentParser, kind: type[DataclassInstance]) -> None:
    """Add an option for each field."""
    for field in fields(kind):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=type(field.default), default=field.default)


def settings_of(kind: type[S], options: Mapping[str, Any]) -> S:
    """Return what was given."""
    return kind(**{field.name: options[field.name] for field in fields(kind)})
