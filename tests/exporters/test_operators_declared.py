"""The compiler's classes of operators against what the compiled library declares of the same operators."""

from __future__ import annotations

import ctypes

import pytest
from edge_bcs.exporters.operators import OPERATORS
from edge_bcs.exporters.operators.base import Operator, Port
from edge_bcs.runtime.library import library_path


def declared() -> dict[str, str]:
    """Operator → its ports, as the library writes them."""
    library = ctypes.CDLL(str(library_path()))
    library.edge_bcs_operators.restype = ctypes.c_char_p
    lines = library.edge_bcs_operators().decode().splitlines()
    return {name: ports for name, _, ports in (line.partition(" ") for line in lines)}


def written(operator: Operator) -> str:
    """The class's ports in the library's words."""

    def port(port: Port) -> str:
        shares = f"={operator.input(port.shares)}" if port.shares else ""
        mark = "*" if port.variadic else "?" if port.optional else ""
        return f"{port.name}{mark}:{port.dtype}{shares}"

    return " ".join([*map(port, operator.inputs), "->", *map(port, operator.outputs)])


def test_the_library_has_these_operators_and_no_others() -> None:
    assert sorted(declared()) == sorted(OPERATORS)


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_names_types_and_aliases_of_the_ports_agree(name: str) -> None:
    assert written(OPERATORS[name]) == declared()[name]
