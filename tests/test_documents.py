"""README and docs/ are true: files that they name exist, and the commands that they show can be given."""

# mypy: disable-error-code="arg-type"

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from edge_bcs.cli import main

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "results").rglob("*.md")],
    key=lambda path: path.relative_to(ROOT).as_posix(),
)
NAMING_FILES = ("README.md", "CONTRIBUTING.md", "docs/extending.md", "docs/architecture.md")
FOLDERS = ("docs", "edge_bcs", "examples", "exporters", "results", "runtime", "targets", "tests")
ELIDED = "…"


def name(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


# Files


def named_files(text: str) -> set[str]:
    """Paths in `code` that begin with a folder of the repository, and where links inside it lead."""
    inline = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+)`", text)
    return {path.rstrip("/") for path in inline}


@pytest.mark.parametrize("document", NAMING_FILES)
def test_files_that_are_named_exist(document: str) -> None:
    named = named_files((ROOT / document).read_text())
    assert not sorted(path for path in named if not (ROOT / path).exists())


def test_the_pages_for_contributors_name_many_files() -> None:
    """What looks for names finds some."""
    for document in ("docs/extending.md", "docs/architecture.md"):
        assert len(named_files((ROOT / document).read_text())) >= 15


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_inside_the_repository_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", document.read_text())
    inside = [link for link in links if not re.match(r"\w+:", link)]
    assert not [link for link in inside if not (document.parent / link).exists()]


@pytest.mark.parametrize(
    "document", [*(ROOT / "docs").glob("*.md"), *(ROOT / "results").rglob("*.md")], ids=name
)
def test_the_site_leads_to_every_page(document: Path) -> None:
    """Its strict build refuses a page that no other leads to; it is not among the default tests."""
    page = name(document).removeprefix("docs/")
    assert re.search(rf"(?m)\s{re.escape(page)}$", (ROOT / "mkdocs.yml").read_text())


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_tests_that_are_named_exist(document: Path) -> None:
    there = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert not set(re.findall(r"\btest_\w+\.py", document.read_text())) - there


# Commands


def spans(text: str) -> Iterator[str]:
    """Lines of code that may hold commands: of blocks, continuations joined, and of `code`, often a part."""
    blocks = re.findall(r"^ *```[^\n]*\n(.*?)^ *```", text, re.M | re.S)
    for block in blocks:
        yield from re.sub(r"\\\n\s*", " ", block).splitlines()
    rest = re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
    yield from (f"{' '.join(code.split())} {ELIDED}" for code in re.findall(r"`([^`]+)`", rest))


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of every `edge-bcs …` in a document."""
    for span in spans(text):
        if not re.search(r"(^|\s)edge-bcs\s", span):
            continue
        lexer = shlex.shlex(span, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word and set(word) <= set("|&;<>"):
                if "edge-bcs" in words:
                    yield words[words.index("edge-bcs") + 1 :]
                words = []
            else:
                words.append(word)


def fault(arguments: list[str]) -> str | None:
    """What click says against a command line; files need not exist, and with an … options may be missing."""
    context = click.Context(main, info_name="edge-bcs")
    whole = ELIDED not in arguments
    command_name, *given = [word for word in arguments if word != ELIDED] or ["--help"]
    if command_name.startswith("-"):
        return None if command_name in ("--help", "-h", "--version") else f"no option {command_name}"
    command = main.get_command(context, command_name)
    if command is None:
        return f"no command {command_name}"
    inner = click.Context(command, info_name=command_name, parent=context)
    try:
        values, rest, _ = command.make_parser(inner).parse_args(list(given))
        if rest:
            return f"{rest} is too much"
        for parameter in command.get_params(inner):
            value = values.get(parameter.name or "")
            if given and value is None and parameter.required and whole:
                return f"{parameter.name} is missing"
            if (
                isinstance(parameter.type, (click.Choice, click.IntRange, click.FloatRange))
                and value is not None
            ):
                numbers = value if isinstance(value, (list, tuple)) else [value]
                for one in numbers:
                    if isinstance(one, str) and not re.fullmatch(r"[A-Z]+", one):
                        parameter.type.convert(one, parameter, inner)
    except click.BadOptionUsage as error:
        return error.format_message() if whole else None
    except click.UsageError as error:
        return error.format_message()
    return None


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_command_lines_can_be_given(document: Path) -> None:
    found = list(commands(document.read_text()))
    wrong = {" ".join(one): why for one in found if (why := fault(one)) is not None}
    assert not wrong


def test_the_commands_are_found() -> None:
    count = sum(len(list(commands(document.read_text()))) for document in DOCUMENTS)
    assert count > 70


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("finetune out --data digits --stepps 3", "No such option"),
        ("finetune out --steps 3", "data_spec is missing"),
        ("finetune out --data digits --steps none", "not a valid integer"),
        ("export --objective tradez", "is not one of"),
        ("inspect out more", "is too much"),
        ("fine-tune out", "no command fine-tune"),
    ],
)
def test_a_wrong_command_line_is_told(line: str, why: str) -> None:
    assert why in (fault(line.split()) or "")


def test_readme_explains_kappa_where_it_first_stands() -> None:
    text = (ROOT / "README.md").read_text()
    first = text.index("κ")
    assert "one number for the whole network" in text[first : first + 200].replace("\n", " ")


def test_the_numbers_of_readme_are_the_recorded_ones() -> None:
    text = (ROOT / "README.md").read_text()
    smallest = json.loads((ROOT / "results/memory/smallest.json").read_text())
    least = next(row for row in smallest if (row["network"], row["objective"]) == ("vgg16", "at"))
    assert f"| {least['bytes'] / 2**20:.2f} MiB |" in text
    rows = json.loads((ROOT / "results/shifted-camera/report.json").read_text())["rows"]
    before, after = rows[0], rows[-1]
    for key in ("accuracy", "robust_accuracy"):
        assert f"{100 * before[key]:.1f} → {100 * after[key]:.1f} %" in text
    speed = (ROOT / "results/speed/README.md").read_text()
    # Of dense PyTorch in float32: its time over ours, with attacks in float32 and in half precision.
    rows = re.findall(r"^\| vgg16, \w+, 0\.99 \|(?:[^|]*\|){3}[^|]*: ([\d.]+)×, ([\d.]+)× \|", speed, re.M)
    (most, most_half), (least, least_half) = rows
    assert (
        f"{least} to {most} times as fast; attacks in half precision: {least_half} to {most_half} |" in text
    )
