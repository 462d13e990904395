"""Who may know whom: read from the imports of every file, and held against the table below.

A room is a folder. A file may import from its own room, from the rooms that the table names, and from outside
packages that the room may use. Imports for types alone count, too: a name that only a type checker sees is
still known.
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE, METHOD, DATA = "edge_bcs/core", "edge_bcs/method", "edge_bcs/data"
EVALUATION, TRAINING = "edge_bcs/evaluation", "edge_bcs/training"
FLEET = "edge_bcs/fleet"

MAY_KNOW: dict[str, set[str]] = {
    CORE: set(),
    DATA: {CORE},
    "runtime": {CORE, DATA},
    FLEET: {CORE, DATA, "runtime"},
    "targets": {CORE, DATA, "runtime"},
    METHOD: {CORE},
    "exporters": {CORE, DATA, METHOD, "runtime", "targets"},
    "edge_bcs/models": {CORE},
    "edge_bcs/zoo": {CORE},
    EVALUATION: {CORE, DATA, METHOD},
    TRAINING: {CORE, METHOD, DATA, EVALUATION, "edge_bcs/training/backends"},
    "edge_bcs/comparators": {CORE, METHOD, DATA, EVALUATION, TRAINING},
}
"""Room → the rooms that it may know. The rooms that are missing here look across: they are there for that."""
LOOK_ACROSS = {"edge_bcs", "edge_bcs/bench", "edge_bcs/cli", "edge_bcs/training/backends"}
BOARD = {CORE, DATA, FLEET, "runtime", "targets"}
"""Rooms that run where there is no torch."""
PACKAGE = {"edge_bcs.__version__", "edge_bcs.__file__"}
"""What of the package itself any room may use."""
PUBLIC = {"edge_bcs.checkpoint", "edge_bcs.exportable"}
"""What any room of the host may use: the form of checkpoints, and whether `export` would take a network."""

PACKAGES: dict[str, set[str]] = {
    CORE: {"numpy", "safetensors", "tomli"},
    DATA: {"numpy", "PIL", "sklearn"},
    "runtime": {"numpy", "safetensors", "onnxruntime", "cryptography", "flatbuffers"},
    FLEET: {"numpy", "flwr"},
    "targets": {"numpy", "rich", "tomli", "scipy"},
}
"""Room → packages that it may import; others may import what the host has."""


def room_of(module: str) -> str | None:
    """The room of one of our modules, None for other packages."""
    parts = module.split(".")
    if parts[0] != "edge_bcs":
        return None
    if len(parts) == 1:
        return "edge_bcs"
    if parts[1] in ("exporters", "runtime", "targets"):
        return parts[1]
    if parts[1:3] == ["training", "backends"]:
        return "edge_bcs/training/backends"
    room = f"edge_bcs/{parts[1]}"
    return room if (ROOT / room).is_dir() else "edge_bcs"


def module_of(file: Path) -> str:
    """Name by which a file of the checkout is imported."""
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    parts = parts if parts[0] == "edge_bcs" else ["edge_bcs", *parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path) -> Iterator[str]:
    """Names of modules (and of what is taken from them) that a file imports, anywhere in it."""
    module = module_of(file)
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


FILES = sorted(
    file for room in ("edge_bcs", "exporters", "runtime", "targets") for file in (ROOT / room).rglob("*.py")
)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_knows_only_whom_it_may(file: Path) -> None:
    room = room_of(module_of(file))
    assert room is not None
    if room in LOOK_ACROSS:
        return
    known = {room, *MAY_KNOW[room]}
    for name in imports(file):
        other = room_of(name)
        if other is not None:
            public = name in PACKAGE or (room not in BOARD and name.startswith(tuple(PUBLIC)))
            assert other in known or public, f"{room} may not know {name}"


@pytest.mark.parametrize("room", sorted(PACKAGES))
def test_a_room_needs_no_other_packages(room: str) -> None:
    found = {
        name.split(".")[0] for file in FILES if room_of(module_of(file)) == room for name in imports(file)
    }
    assert found - set(sys.stdlib_module_names) - {"edge_bcs", "__future__"} <= PACKAGES[room]


def test_every_room_is_known_here() -> None:
    rooms = {room_of(module_of(file)) for file in FILES}
    assert rooms == {*MAY_KNOW, *LOOK_ACROSS}


def programs() -> Iterator[tuple[str, str]]:
    """(where, module) of what the programs inside strings import from here."""
    for file in (*FILES, *(ROOT / "tests").rglob("*.py")):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            found = re.match(r"\s*(?:from|import) (edge_bcs(?:\.\w+)+)", line)
            if found:
                yield f"{file.relative_to(ROOT)}:{number}", found[1]


def test_programs_in_strings_import_what_is_there() -> None:
    """A linter sees no imports inside a string, and what runs rarely would fail late."""
    modules = {module_of(file) for file in FILES}
    assert [where for where, module in programs() if module not in modules] == []


def test_no_test_file_needs_another() -> None:
    """What several share lies in tests/helpers and tests/conftest.py; the names of files differ."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    assert len({file.name for file in files}) == len(files) > 80
    for file in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            others = [name for name in names if name.split(".")[-1].startswith("test_")]
            assert not others, f"{file.relative_to(ROOT)} imports {others}"


# Private names

THEIRS = {
    "_asdict": "named tuples: documented, and without a name of another kind",
    "_exit": "os: documented; a forked test must not run what pytest does at the end",
    "_fields": "named tuples: documented",
    "_getframe": "sys: documented; inspect's frames read source files",
    "_replace": "named tuples: documented",
    "_signal": "CPython's own signal module, without the enumerations that a handler must not run into",
    "_call_impl": "torch: what runs a module, whatever its forward was replaced with",
    "_compiled_call_impl": "torch: where torch.compile leaves a module",
    "_forward_hooks": "torch: hooks can be added in public, and not be looked at",
    "_forward_pre_hooks": "torch: hooks can be added in public, and not be looked at",
    "_orig_mod": "torch: what torch.compile wraps, by the name that it documents nowhere else",
    "_python_dispatch": "torch: the base class of a mode that sees every operator",
    "_schema": "torch: names of an operator's arguments",
    "_model_bytes": "onnxruntime: a copy of the graph's file, which would stay for the life of a session",
    "_parameter": "onnxruntime's training build: the memory of a parameter without a copy",
    "_pybind_state": "onnxruntime: arenas, checkpoints and gradient graphs have no other module",
    "_expected_crc": "zipfile: the fuzzer reads members whose checksum it has broken itself",
}
"""Private name of another package → why we use it. A name of ours is never here."""
SETTERS = {"setattr", "getattr", "hasattr", "delattr"}


def is_private(name: str) -> bool:
    return re.fullmatch(r"_[^\W_]\w*", name) is not None


def members(tree: ast.AST) -> set[str]:
    """Names that a file gives to what belongs to its classes: methods, fields, and what `self` is given."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for item in node.body:
                targets = item.targets if isinstance(item, ast.Assign) else [getattr(item, "target", None)]
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
                found |= {item.name} if isinstance(item, ast.FunctionDef) else set()
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node.value):
            found.add(node.attr)
    return found


def is_own(base: ast.expr) -> bool:
    """Whether an expression is the object itself, its class, or itself as one of its base class."""
    if isinstance(base, ast.Call):
        return isinstance(base.func, ast.Name) and base.func.id == "super"
    return isinstance(base, ast.Name) and base.id in ("self", "cls")


def private_uses(tree: ast.AST) -> Iterator[tuple[int, str, bool]]:
    """(line, name, whether it is the object's own) of every private name that is reached for, in programs
    inside strings, too."""
    for node in ast.walk(tree):
        names: list[str] = []
        own = False
        if isinstance(node, ast.Attribute):
            names, own = [node.attr], is_own(node.value)
        elif isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            texts = [item.value for item in node.args if isinstance(item, ast.Constant)]
            if called in SETTERS:
                names = [part for text in texts if isinstance(text, str) for part in text.split(".")]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "import " in node.value:
            try:
                program = ast.parse(textwrap.dedent(node.value))
            except SyntaxError:  # words
                continue
            own_names = members(program)
            for line, name, inner in private_uses(program):
                yield node.lineno + line - 1, name, inner and name in own_names
        for name in names:
            if is_private(name):
                yield getattr(node, "lineno", 0), name, own


def test_nobody_reaches_for_what_is_private_elsewhere() -> None:
    """An object may use its own private names, if its own file defines them: those of a base class in another
    file are not its own. A file may reach into its own classes, through names that no other class has."""
    files = [*FILES, *sorted((ROOT / "tests").rglob("*.py"))]
    trees = {str(file.relative_to(ROOT)): ast.parse(file.read_text()) for file in files}
    defined = {file: members(tree) for file, tree in trees.items()}
    classes = Counter(name for names in defined.values() for name in names)
    reached: list[str] = []
    theirs: set[str] = set()
    for file, tree in trees.items():
        for line, name, own in private_uses(tree):
            if name in defined[file] and (own or classes[name] == 1):
                continue
            if name in THEIRS and not own:
                theirs.add(name)
                continue
            reached.append(f"{file}:{line} {name}")
    assert reached == []
    assert theirs == set(THEIRS), "an exception that nobody needs"


@pytest.mark.parametrize(
    ("program", "found"),
    [
        ("from a import B", ["_b"]),
        ("import a.B", ["_b"]),
        ("def f(x):\n    return x.__dict__, x.B.c", ["_b"]),
        ("monkeypatch.setattr('a.b.B', 1)", ["_b"]),
        ("monkeypatch.setattr(a, 'B', 1)", ["_b"]),
        ("PROGRAM = '''\nimport a\na.B = 1\n'''", ["_b"]),
        ("TEXT = 'an import of B'", []),
        ("class A:\n    def f(self):\n        self.B = super().B()", []),
        ("_, __ = a.b, a._", []),
    ],
)  # fmt: skip
def test_private_names_are_found(program: str, found: list[str]) -> None:
    tree = ast.parse(program.replace("B", "_b"))  # else this file would use such names
    assert [name for _, name, own in private_uses(tree) if not own] == found
