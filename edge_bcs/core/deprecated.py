"""Old spellings of arguments: they go on working, warn, and must not contradict the new ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from edge_bcs.core.errors import EdgeBcsDeprecationWarning, EdgeBcsError

Places = Mapping[str, tuple[str, type, str]]
"""Old keyword → (parameter, public class, its field) that takes its place."""
T = TypeVar("T")


class OldSpellings:
    """What a public function was given by keywords that it no longer has (its ``**old``).

    Made by the function itself, so that the warning shows the line that calls it.

    Args:
        function: its name.
        given: keyword → value.
        places: where each now belongs.

    Raises:
        TypeError: a keyword that it never had.
    """

    def __init__(self, function: str, given: Mapping[str, Any], places: Places) -> None:
        for name in given:
            if name not in places:
                raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
        self._function, self._given, self._places = function, given, places
        if given:
            new = ", ".join(self._new())
            warnings.warn(
                f"{function}({', '.join(f'{name}=…' for name in given)}) is an old spelling that a later "
                f"release refuses; write {function}({new})",
                EdgeBcsDeprecationWarning,
                stacklevel=3,
            )

    def _new(self) -> Iterator[str]:
        parameters: dict[str, list[str]] = {}
        for name in self._given:
            parameter, kind, field = self._places[name]
            words = parameters.setdefault(f"{parameter}=edge_bcs.{kind.__name__}", [])
            words.append(f"{field}=…")
        return (f"{call}({', '.join(words)})" for call, words in parameters.items())

    def into(self, parameter: str, value: T | None, default: T, **short: object) -> T:
        """Return the object of a parameter, with what old keywords say of it.

        Args:
            parameter: its name.
            value: the object that was given, if any.
            default: what stands for None; an instance of the parameter's class.
            short: fields that the function takes by keywords of their own, too; None if not given.

        Raises:
            EdgeBcsError: the object and a keyword contradict each other.
        """
        said = {
            name: (field, self._given[name])
            for name, (owner, _, field) in self._places.items()
            if owner == parameter and name in self._given
        }
        said |= {name: (name, given) for name, given in short.items() if given is not None}
        if value is None:
            fields: dict[str, Any] = dict(said.values())
            return replace(default, **fields) if fields else default  # type: ignore[type-var]
        for name, (field, given) in said.items():
            if not _same(getattr(value, field), given):
                raise EdgeBcsError(
                    f"{self._function} was given {name}= and another in {parameter}=; leave {name}= out"
                )
        return value


def _same(one: object, other: object) -> bool:
    if one is other:
        return True
    simple = (int, float, str, bool, type(None))
    return isinstance(one, simple) and isinstance(other, simple) and one == other
