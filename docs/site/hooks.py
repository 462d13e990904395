"""What the site has beside the files of docs/: README, results, the changelog, and a page of every command.

Links between files of the repository lead to pages where there are such pages; a link to any other file that
exists becomes its text, and one to nothing is left, so that the strict build refuses it.
"""

from __future__ import annotations

import inspect
import os
import posixpath
import re
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "build" / "docs" / "edge_bcs"
ROOMS = ("exporters", "runtime", "targets")
OF_THE_ROOT = {"README.md": "index.md", "CHANGELOG.md": "CHANGELOG.md", "CONTRIBUTING.md": "CONTRIBUTING.md"}
"""File of the repository's root → page."""
# mkdocstrings leaves out a folder that is not there when it starts.
PACKAGE.mkdir(parents=True, exist_ok=True)
_BARS = re.compile(r"`[^`\n]*\\\|[^`\n]*`")
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lay out the package as an installation has it, with the rooms inside."""
    shutil.rmtree(PACKAGE, ignore_errors=True)
    for folder, inside in ((ROOT / "edge_bcs", PACKAGE), *((ROOT / room, PACKAGE / room) for room in ROOMS)):
        for file in folder.rglob("*.py"):
            copy = inside / file.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie elsewhere, and those that are written here."""
    for file, uri in OF_THE_ROOT.items():
        files.append(File.generated(config, uri, content=(ROOT / file).read_text()))
    for path in sorted((ROOT / "results").rglob("*")):
        if path.suffix in (".md", ".png"):
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    files.append(File.generated(config, "cli.md", content=command_line()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make the links of the repository those of the site."""
    uri = page.file.src_uri
    at_root = {page: file for file, page in OF_THE_ROOT.items()}
    here = at_root.get(uri) or (uri if uri.startswith("results/") else f"docs/{uri}")

    def lead(found: re.Match[str]) -> str:
        picture, text, target, anchor = found.groups()
        if ":" in target or target.startswith("/"):
            return found.group(0)
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        there = OF_THE_ROOT.get(path) or path.removeprefix("docs/")
        if files.get_file_from_path(there) is not None:
            way = posixpath.relpath(there, posixpath.dirname(uri) or ".")
            return f"{picture}[{text}]({way}{anchor or ''})"
        return text if (ROOT / path).exists() else found.group(0)

    # A bar in the code of a table needs a backslash elsewhere; here that would be shown.
    bare = _BARS.sub(lambda code: code[0].replace("\\|", "|"), markdown)
    return _LINK.sub(lead, bare)


# The command line


def command_line() -> str:
    """Return a page with every command and option of edge-bcs, as `--help` has them."""
    sys.path.insert(0, str(ROOT))
    os.environ["COLUMNS"] = "100"
    from edge_bcs.cli import main

    parent = click.Context(main, info_name="edge-bcs")
    parts = ["# Command line", _text(main), "`edge-bcs --version` prints the version."]
    for name in main.list_commands(parent):
        command = main.get_command(parent, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=parent)
        usage = " ".join(command.collect_usage_pieces(context))
        parts += [f"## edge-bcs {name}", f"```\nedge-bcs {name} {usage}\n```", _text(command)]
        parts.append(_options(command, context))
    return "\n\n".join(parts) + "\n"


def _text(command: click.Command) -> str:
    """Return a command's help; what click must not wrap becomes a block of code."""
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(command.help or ""))
    return "\n\n".join(
        _unwrapped(one) if one.lstrip().startswith("\b") else _escaped(one.replace("\n", " "))
        for one in paragraphs
    )


def _unwrapped(paragraph: str) -> str:
    lines = [line for line in paragraph.replace("\b", "").splitlines() if line.strip()]
    title = ""
    if lines and lines[0].strip().endswith(":"):
        title, *lines = lines
    code = textwrap.dedent("\n".join(lines))
    return f"{title.strip()}\n\n```\n{code}\n```".strip()


def _options(command: click.Command, context: click.Context) -> str:
    records: list[Any] = [one.get_help_record(context) for one in command.get_params(context)]
    rows = [f"| `{names}` | {_bar(_escaped(text))} |" for names, text in filter(None, records)]
    return "\n".join(["| option | what it does |", "| --- | --- |", *rows])


def _bar(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _escaped(text: str) -> str:
    return re.sub(r"([<>\[\]*_])", r"\\\1", text) if "`" not in text else text
