"""The command line, in this process."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from typing import Any

from click.testing import CliRunner, Result

from edge_bcs.cli import main


class Runner(CliRunner):
    """Whose standard error is written at once, as it is outside: click 8.2.0 reads it without a flush."""

    @contextlib.contextmanager
    def isolation(self, *arguments: Any, **more: Any) -> Iterator[Any]:
        """What click puts in the place of the streams."""
        with super().isolation(*arguments, **more) as streams:
            assert isinstance(sys.stderr, io.TextIOWrapper)
            sys.stderr.reconfigure(write_through=True)
            yield streams


def run(*arguments: object) -> Result:
    """What `edge-bcs` with these arguments does and prints."""
    return Runner().invoke(main, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> dict[str, Any]:
    """Run with --json and return the object that standard output is."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    content: dict[str, Any] = json.loads(result.stdout)
    return content
