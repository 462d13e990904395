"""Settings of a bench as options of its command line: a dataclass whose fields all have defaults."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import Field, fields
from typing import Any, ClassVar, Protocol, TypeVar


class Dataclass(Protocol):
    """What every dataclass has."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


Kind = TypeVar("Kind", bound=Dataclass)


def add_settings(parser: argparse.ArgumentParser, kind: type[Dataclass]) -> None:
    """Add an option for each field."""
    for field in fields(kind):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=type(field.default), default=field.default)


def settings_of(kind: type[Kind], options: Mapping[str, Any]) -> Kind:
    """Return what was given."""
    return kind(**{field.name: options[field.name] for field in fields(kind)})
