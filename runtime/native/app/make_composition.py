"""Writes composition_tables.h: what Unicode's composed form (NFC) takes, from Python's own tables.

python runtime/native/app/make_composition.py
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path


def lines(numbers: Iterable[int]) -> str:
    """The numbers, as many on a line as it holds."""
    made, line = [], ""
    for number in numbers:
        if len(line) + len(str(number)) > 108:
            made.append(line)
            line = ""
        line += f"{number},"
    return "\n".join([*made, line])


def main() -> None:
    """Three tables of whole numbers; Hangul is composed by rule."""
    decomposed: list[int] = []
    composed: list[int] = []
    classes: list[int] = []
    for code in range(sys.maxunicode + 1):
        letter = chr(code)
        parts = unicodedata.decomposition(letter)
        if parts and "<" not in parts:
            first, second = ([int(part, 16) for part in parts.split()] + [0])[:2]
            decomposed += [code, first, second]
            if second and unicodedata.normalize("NFC", letter) == letter:
                composed += [code]
        order = unicodedata.combining(letter)
        if order and classes and classes[-1] == order and classes[-2] == code - 1:
            classes[-2] = code
        elif order:
            classes += [code, code, order]
    text = (
        "// Written by make_composition.py, from Unicode "
        + unicodedata.unidata_version
        + ".\n#pragma once\n\n"
    )
    text += "#include <cstdint>\n\nnamespace edge_bcs::app {\n\n// clang-format off\n"
    for what, name, numbers in (
        ("A code point, and the one or two (else 0) that it is decomposed into.", "decomposed", decomposed),
        ("Of them, those that two code points are composed to.", "composed", composed),
        ("First and last of code points that combine, and the class that orders them.", "classes", classes),
    ):
        text += f"// {what}\ninline constexpr std::uint32_t {name}_table[] = {{\n{lines(numbers)}\n}};\n"
    text += "// clang-format on\n\n}  // namespace edge_bcs::app\n"
    Path(__file__).with_name("composition_tables.h").write_text(text)


if __name__ == "__main__":
    main()
