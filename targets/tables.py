"""Tables that stay whole on any terminal: one that is too wide becomes paragraphs."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_ANY_WIDTH = 1 << 16


def natural_width(table: Table) -> int:
    """Return the columns that ``table`` takes where nothing of it is cut off or broken."""
    console = Console(width=_ANY_WIDTH, markup=False)
    return Measurement.get(console, console.options, table).maximum


def fitting(table: Table, width: int) -> RenderableType:
    """Return ``table`` if ``width`` columns hold it; else a paragraph for each row, headed by its first cell,
    with a line for each other cell."""
    if natural_width(table) <= width:
        return table
    names = [str(column.header) for column in table.columns[1:]]
    longest = max(map(len, names), default=0)
    lines: list[Text] = [] if table.title is None else [Text(str(table.title), style=table.title_style or "")]
    for number, row in enumerate(zip(*(column.cells for column in table.columns), strict=True)):
        style = table.rows[number].style or ""
        lines.append(Text(str(row[0]), style=style))
        lines += [
            Text(f"  {name:<{longest}}  {cell}", style=style)
            for name, cell in zip(names, row[1:], strict=True)
            if str(cell)
        ]
    return Group(*lines)
