"""The fields of a manifest, each checked when it is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.segments import Segment
from edge_bcs.data.classes import Names, check_names

_LARGEST_NUMBER = 3.4e38  # of float32
_Named = TypeVar("_Named", bound=Segment)


class Fields:
    """Typed access to one JSON object of the manifest; every fault names the field."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise EdgeBcsError(f"the manifest's {where or 'content'} is not an object.")
        self.value, self.where = value, where

    def _fault(self, name: str, expected: str) -> EdgeBcsError:
        field = f"{self.where}.{name}" if self.where else name
        shown = repr(self.value.get(name, "missing"))[:60]
        return EdgeBcsError(f"the manifest's field {field} must be {expected}, not {shown}.")

    def integer(self, name: str, low: int = 0, high: int = 2**31 - 1) -> int:
        """A whole number from ``low`` to ``high``."""
        value = self.value.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._fault(name, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str, low: float = 0.0, high: float = math.inf) -> float:
        """A finite number from ``low`` to ``high``."""
        value = self.value.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._fault(name, "a number")
        if not low <= value <= high or value > _LARGEST_NUMBER:
            raise self._fault(name, f"a finite number from {low:g} to {min(high, _LARGEST_NUMBER):g}")
        return float(value)

    def text(self, name: str, choices: tuple[str, ...] = (), missing: str | None = None) -> str:
        """Text, one of ``choices`` where there are any; ``missing`` stands for an absent field."""
        value = self.value.get(name, missing)
        if not isinstance(value, str) or (choices and value not in choices):
            raise self._fault(name, " or ".join(choices) if choices else "text")
        return value

    def boolean(self, name: str) -> bool:
        """True or false."""
        value = self.value.get(name)
        if not isinstance(value, bool):
            raise self._fault(name, "true or false")
        return value

    def integers(self, name: str, lengths: tuple[int, ...], low: int = 1) -> tuple[int, ...]:
        """Whole numbers from ``low``, as many as one of ``lengths`` says."""
        value = self.value.get(name)
        if not isinstance(value, list) or len(value) not in lengths:
            raise self._fault(name, f"a list of {' or '.join(map(str, lengths))} numbers")
        for item in value:
            if isinstance(item, bool) or not isinstance(item, int) or not low <= item < 2**31:
                raise self._fault(name, f"a list of whole numbers from {low}")
        return tuple(value)

    def each(self, name: str, count: int, one: str = "", low: int = 1) -> tuple[int, ...]:
        """``count`` numbers; where the field is absent, as in files of 0.1, so many times ``one``, or 1."""
        if name in self.value:
            return self.integers(name, (count,), low)
        return (self.integer(one, low, 1 << 10) if one else 1,) * count

    def chosen(self, name: str, of: Sequence[_Named]) -> tuple[_Named, ...]:
        """Those of ``of`` that a list names, which must be in their order."""
        value = self.value.get(name)
        rows = {segment.name: place for place, segment in enumerate(of)}
        places = [rows.get(item, -1) if isinstance(item, str) else -1 for item in value or ()]
        if not isinstance(value, list) or -1 in places or places != sorted(set(places)):
            raise self._fault(name, f"names of the manifest's {name}, in their order")
        return tuple(of[place] for place in places)

    def names(self, name: str, count: int) -> Names | None:
        """``count`` class names; None if the field is absent."""
        if name not in self.value:
            return None
        value = self.value[name]
        if not isinstance(value, list):
            raise self._fault(name, f"a list of {count} names")
        return check_names(value, f"the manifest's {name}", count)

    def object(self, name: str) -> Fields:
        """An object inside."""
        return Fields(self.value.get(name), f"{self.where}.{name}" if self.where else name)

    def optional_object(self, name: str) -> Fields:
        """The same; empty if the field is absent."""
        return self.object(name) if name in self.value else Fields({}, name)

    def objects(self, name: str) -> list[Fields]:
        """A list of objects."""
        value = self.value.get(name)
        if not isinstance(value, list):
            raise self._fault(name, "a list")
        return [Fields(item, f"{name}[{number}]") for number, item in enumerate(value)]
