"""The command line: `edge-bcs export`, `simulate`, `finetune`, `evaluate`, `train`, `inspect`, …

Each command lives in a module of its own that imports what it needs when it runs, so that `edge-bcs
finetune` starts on a board without torch. A request that cannot be met ends with one sentence on standard
error and exit status 1.
"""

from __future__ import annotations

import errno
import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

import edge_bcs
from edge_bcs.cli import streams
from edge_bcs.core.errors import EdgeBcsError, EdgeBcsWarning
from edge_bcs.core.progress import say
from edge_bcs.core.text import shown

_INTERRUPTED = 130  # as shells have it: 128 and the number of SIGINT

# What help calls a value; click's own words for these (INTEGER RANGE) say nothing to a user.
_METAVARS = (
    (click.types.IntParamType, "N"),
    (click.types.FloatParamType, "NUMBER"),
    (click.types.StringParamType, "TEXT"),
)
_COMMANDS = {
    "export": "Compile a sparse network into an artifact, which a board trains (host).",
    "simulate": "Say whether an artifact fits a board.",
    "finetune": "Train an artifact inside a byte budget.",
    "merge": "Make one run of several that learned apart.",
    "predict": "Name what is on photographs.",
    "evaluate": "Measure accuracy, clean and under attack.",
    "train": "Train a sparse network from scratch (host).",
    "zoo": "List the trained networks that come with edge-bcs.",
    "plot": "Draw trainings and evaluations (host).",
    "inspect": "Show what an artifact or a run holds.",
    "targets": "List the boards that are known.",
    "bench": "Time a training step beside dense PyTorch (host).",
    "run-ort-artifact": "Train a dense artifact of ONNX Runtime's tools.",
    "doctor": "Check this machine and say what to fix.",
}


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Show the package's own warnings as sentences on standard error, others as Python does."""
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Any, category: Any, *where: Any) -> None:
            if issubclass(category, EdgeBcsWarning):
                say(str(message))
            else:
                others(message, category, *where)

        warnings.showwarning = show  # type: ignore[assignment]
        yield


class _Commands(click.Group):
    """Imports a command when it is asked for, and turns what is expected to go wrong into one sentence."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"edge_bcs.cli.{name.replace('-', '_')}").command
        for option in command.params:
            if isinstance(option, click.Option) and option.metavar is None:
                option.metavar = next(
                    (word for kind, word in _METAVARS if isinstance(option.type, kind)), None
                )
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def main(self, *arguments: Any, **more: Any) -> Any:
        streams.prepare()
        try:
            return super().main(*arguments, **more)
        except OSError as error:  # of a help text; commands tell theirs
            say(f"Error: the answer cannot be written: {error.strerror or error}.")
            sys.exit(1)

    def invoke(self, context: click.Context) -> Any:
        try:
            with _warnings_in_one_line():
                return super().invoke(context)
        except EdgeBcsError as error:
            sentence = shown(str(error))
            raise click.ClickException(
                sentence if sentence.endswith((".", "!", "?")) else f"{sentence}."
            ) from None
        except KeyboardInterrupt:
            say("Stopped.")
            sys.exit(_INTERRUPTED)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # the reader has seen enough; click ends without a word
            where = "the answer" if error.filename is None else str(error.filename)
            reason = error.strerror or str(error) or type(error).__name__
            raise click.ClickException(f"{shown(where)} cannot be read or written: {reason}.") from None
        except MemoryError:
            raise click.ClickException("this machine has too little memory for that.") from None
        except ModuleNotFoundError as error:
            wanted = (error.name or "").split(".")[0]
            extra = {"torch": "host", "onnx": "host", "PIL": "device"}.get(wanted)
            if wanted in ("", "edge_bcs"):
                raise
            install = f"'edge-bcs[{extra}]'" if extra else wanted
            raise click.ClickException(
                f"this command needs {wanted}, which is not installed: run `pip install {install}`."
            ) from None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(edge_bcs.__version__, prog_name="edge-bcs")
def main() -> None:
    """Train adversarially robust, 99 % sparse networks on low-power boards, inside a byte budget.

    Every command shows examples with --help.

    \b
    On the host:   edge-bcs export --sparsity 0.99 --memory 12MiB -o out/vgg16
                   edge-bcs simulate out/vgg16
    On the board:  edge-bcs finetune out/vgg16 --data photos/ -o run
                   edge-bcs evaluate run --data photos/ --attack pgd
                   edge-bcs predict run photo.jpg
    """
