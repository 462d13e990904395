"""The progress of a training on a terminal, or in a log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import click

from edge_bcs.cli.common import percent

Show = Callable[[dict[str, Any]], None]


def told_once(say: Callable[[str], None] | None = None) -> Callable[[str], None]:
    """Return a function that says a sentence (default: on standard error) unless it was the last one said."""
    said = ""

    def tell(sentence: str) -> None:
        nonlocal said
        if sentence != said:
            (say or partial(click.echo, err=True))(sentence)
        said = sentence

    return tell


def _described(record: dict[str, Any], clean: bool) -> str:
    from edge_bcs.runtime.units import format_bytes

    if "skipped" in record:
        return f"skipped: {record['skipped']}"
    accuracy = f"  accuracy {percent(record['accuracy'])}" if clean else ""
    robust = f"  robust {percent(record['robust_accuracy'])}" if "robust_accuracy" in record else ""
    return (
        f"loss {record['loss']:.3f}{accuracy}{robust}  {record['milliseconds']:.0f} ms/step  "
        f"peak {format_bytes(record['peak_bytes'])}"
    )


@contextmanager
def progress(clean: bool) -> Iterator[tuple[Show, Callable[[str], None]]]:
    """Yield two functions: one shows a step (a bar on a terminal; elsewhere a line now and then, and for
    every step that was skipped), the other says why the training pauses, once a pause.

    Args:
        clean: whether the clean accuracy is known beside the robust one.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:

        def line(record: dict[str, Any]) -> None:
            done, total = record["done"], record["total"]
            if "skipped" in record or done in (1, total) or done % max(1, total // 10) == 0:
                click.echo(f"step {done}/{total}  {_described(record, clean)}", err=True)

        yield line, told_once()
        return
    columns = (TextColumn("{task.completed}/{task.total}"), BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("starting")

        def update(record: dict[str, Any]) -> None:
            text = _described(record, clean)
            bar.update(task, completed=record["done"], total=record["total"], description=text)

        yield update, told_once(lambda text: bar.update(task, description=text))
