"""What is printed stays readable in 30 columns, and whole in a pipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from edge_bcs.targets.tables import fitting
from rich.console import Console
from rich.table import Table

from edge_bcs.cli import main
from edge_bcs.cli.common import pairs
from edge_bcs.cli.common import table as print_table

Make = Callable[..., Path]


def lines(*arguments: object) -> list[str]:
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


@pytest.mark.parametrize("environment", [{}, {"TERM": "dumb"}, {"NO_COLOR": "1"}])
def test_inspect_in_30_columns(
    tiny_artifact: Make, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    shown = lines("inspect", tiny_artifact())
    assert max(map(len, shown)) <= 30 and "…" not in "".join(shown) and "\x1b" not in "".join(shown)
    place = shown.index("second")
    cells = ("shape    8×8×3×3", "active   288", "density  50.00 %", "stride   2", "kernel   dense")
    assert shown[place + 1 : place + 6] == [f"  {cell}" for cell in cells]


def test_simulate_and_targets_in_30_columns(tiny_artifact: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    for command in (("simulate", tiny_artifact(), "--no-run"), ("targets",), ("targets", "raspberry-pi-4")):
        shown = lines(*command)
        assert "…" not in "".join(shown)
        broken = [line for line in shown if "edge" not in line]  # a command is never broken
        assert [line for line in broken if len(line) > 30 and " " in line.strip()] == []
    assert "  default budget" in "\n".join(lines("targets"))


def test_a_pipe_has_every_column_whole(capsys: pytest.CaptureFixture[str]) -> None:
    name = "encoder.layers.11.attention.output.projection.weight"
    print_table("Layers", ("layer", "shape", "note"), [(name, "1024×1024×3×3", "[bold]" + "x" * 60)])
    title, head, row = capsys.readouterr().out.splitlines()
    assert row.split() == [name, "1024×1024×3×3", "[bold]" + "x" * 60]
    assert title.strip() == "Layers" and head.split() == ["layer", "shape", "note"]


def test_pairs_are_wrapped_between_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = "/mnt/data/runs-of-the-camera/2026-01-01/a"
    monkeypatch.setenv("COLUMNS", "30")
    pairs([("saved", path), ("a long name", "some words that go on"), ("left out", None)])
    out = capsys.readouterr().out
    assert out == f"  saved\n    {path}\n  a long name\n    some words that go on\n"
    monkeypatch.setenv("COLUMNS", "36")
    pairs([("a name", "some words that go on and on")])
    assert capsys.readouterr().out == "  a name  some words that go on and\n          on\n"


def test_a_table_that_fits_stays_one() -> None:
    content = Table("layer", "size", box=None)
    content.add_row("first", "12")
    console = Console(width=40)
    assert fitting(content, 13) is content
    with console.capture() as captured:
        console.print(fitting(content, 12))
    assert captured.get() == "first\n  size  12\n"
