"""The command line, in this process."""

from __future__ import annotations

from click.testing import CliRunner, Result

from edge_bcs.cli import main


def run(*arguments: object) -> Result:
    """What `edge-bcs` with these arguments does and prints."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])
