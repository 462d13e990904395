"""The systemd service that goes on with a fine-tuning whenever the board starts."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.data.classes import names_file

_PATHS = ("artifact", "data_spec", "unlabelled", "output", "trust_keys", "rounds")
_GIVEN = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)


def unit(context: click.Context, run: Path) -> str:
    """Return the unit file for the command line of ``context``, which trains into the folder ``run``.

    Raises:
        EdgeBcsError: there is no folder for the run to lie in, so that the service could not start.
    """
    import edge_bcs.targets

    place = run.resolve().parent
    if not place.is_dir():
        raise EdgeBcsError(
            f"the folder {place} does not exist, and the service may write nowhere else: make it, then print "
            "the service."
        )
    template = Path(edge_bcs.targets.__file__).parent / "systemd" / "edge-bcs-finetune.service.in"
    places = [Path(context.params["artifact"]).resolve(), run.resolve().parent]
    if context.params["data_spec"] != "digits":
        places.append(Path(context.params["data_spec"]).resolve())
    if context.params["unlabelled"] is not None:
        places.append(Path(context.params["unlabelled"]).resolve())
    writable = [run.resolve().parent]
    if context.params["rounds"] is not None:
        places.append(Path(context.params["rounds"]).resolve())
        writable.append(places[-1])
    command = [sys.executable, "-m", "edge_bcs.cli", "finetune", *_arguments(context, run)]
    text = template.read_text()
    for name, value in {
        "RUN": str(run.resolve()).replace("%", "%%"),
        "PATHS": " ".join(_quoted(str(place)) for place in places),
        "USER": getpass.getuser(),
        "COMMAND": " ".join(_quoted(word).replace("$", "$$") for word in command),
        "WRITABLE": " ".join(_quoted(str(place)) for place in writable),
    }.items():
        text = text.replace(f"@{name}@", value)
    return text


def _arguments(context: click.Context, run: Path) -> list[str]:
    """The command line again, with absolute paths and --resume."""
    words = [str(Path(context.params["artifact"]).resolve())]
    for parameter in context.command.params:
        name = parameter.name or ""
        given = context.get_parameter_source(name) in _GIVEN
        if not isinstance(parameter, click.Option) or not given:
            continue
        if name in ("output", "resume", "print_service"):
            continue
        value: Any = context.params[name]
        if parameter.is_flag:
            words.append((parameter.opts if value else parameter.secondary_opts)[-1])
        for item in [] if parameter.is_flag else value if parameter.multiple else [value]:
            is_path = name in _PATHS or (name == "class_names" and names_file(item) is not None)
            shown = Path(item).resolve() if is_path and item != "digits" else item
            words += [parameter.opts[-1], str(shown)]
    return [*words, "--output", str(run.resolve()), "--resume"]


def _quoted(word: str) -> str:
    """One word as systemd reads it."""
    word = word.replace("\\", "\\\\").replace("%", "%%").replace('"', '\\"')
    plain = not any(character.isspace() or character in "\"';" for character in word)
    return word if plain else f'"{word}"'
