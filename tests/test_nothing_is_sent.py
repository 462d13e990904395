"""No command opens a socket, and ONNX Runtime reports nothing of what it runs."""

from __future__ import annotations

import ast
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WITHOUT_SOCKETS = [sys.executable, str(ROOT / "tests/helpers/without_sockets.py"), sys.executable]
PACKAGE = ("edge_bcs", "exporters", "runtime", "targets")

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs the seccomp filters of Linux")


def confined(home: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code that dies if it opens a socket, at home in the empty folder ``home``.

    Of this process's environment it has nothing: onnxruntime reports nothing where CI or the like is set.
    """
    home.mkdir()
    import edge_bcs

    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "PYTHONPATH": str(Path(edge_bcs.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "ORT_DISABLE_TELEMETRY": "0",  # not even if whoever set up the machine wanted it
    }
    return subprocess.run(
        [*WITHOUT_SOCKETS, "-c", code, *arguments], env=environment, capture_output=True, text=True
    )


def written(home: Path) -> list[str]:
    """Files below the home folder, but for matplotlib's list of fonts."""
    files = (str(file.relative_to(home)) for file in home.rglob("*") if file.is_file())
    return [file for file in files if "matplotlib" not in file]


@linux
@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6", "AF_NETLINK"])
def test_a_socket_ends_the_confined_process(tmp_path: Path, family: str) -> None:
    """In a thread and in C code, too: what the other tests rest on."""
    code = f"import socket; socket.socket(socket.{family}, socket.SOCK_DGRAM)"
    assert confined(tmp_path / "a", code).returncode == -signal.SIGSYS
    if family == "AF_INET":
        inside = (
            "import socket, threading as t; t.Thread(target=socket.getaddrinfo, args=('a.b', 80)).start()"
        )
        assert confined(tmp_path / "b", inside).returncode == -signal.SIGSYS
        assert confined(tmp_path / "c", "import socket; socket.socketpair()").returncode == 0


COMMANDS = """
import sys
from edge_bcs.cli import main

def run(*words):
    print("->", *words, file=sys.stderr)
    try:
        main(list(words), standalone_mode=False)
    except SystemExit as ended:
        assert not ended.code

*tasks, = sys.argv[1:]
network = "--width", "0.05", "--sparsity", "0.9", "--batch-size", "8", "--attack-steps", "1"
digits = "--data", "digits"
few = "--attack-steps", "1", "--limit", "4"
"""
BOARD = """
run("export", *network, "--micro-batch", "4", "-o", "a")
run("inspect", "a")
run("simulate", "a")
run("finetune", "a", *digits, "--steps", "2", "--eval-samples", "4", "--eval-steps", "1", "-o", "run")
run("evaluate", "run", *digits, *few)
run("merge", "run", "a", "--weight", "1", "-o", "merged")
run("doctor")
"""
HOST = """
run("train", *network, *digits, "--steps", "1", "--validation", "0.001", "-o", "trained")
run("evaluate", "trained", *digits, *few)
run("plot", "trained", "-o", "plots")
"""


@linux
@pytest.mark.parametrize("commands", [BOARD, HOST], ids=["board", "host"])
def test_no_command_opens_a_socket(tmp_path: Path, commands: str) -> None:
    for needed in ("torch", "onnx", "matplotlib"):
        pytest.importorskip(needed)
    home = tmp_path / "home"
    done = confined(home, f"import os; os.chdir({str(tmp_path)!r})\n{COMMANDS}{commands}")
    assert done.returncode == 0, done.stderr
    assert written(home) == []


@linux
@pytest.mark.parametrize("attack", ["autoattack", "square", "bb"])
def test_no_attack_of_a_library_opens_a_socket(tmp_path: Path, attack: str) -> None:
    library = "foolbox" if attack == "bb" else "pyautoattack"
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"needs {library}")
    limits = {"square": ', "--queries", "5"', "bb": ', "--attack-steps", "2"'}.get(attack, "")
    commands = f"""
run("export", *network, "--no-validate", "-o", "a")
run("evaluate", "a", *digits, "--limit", "2", "--attack", "{attack}"{limits})
"""
    home = tmp_path / "home"
    done = confined(home, f"import os; os.chdir({str(tmp_path)!r})\n{COMMANDS}{commands}")
    assert done.returncode == 0, done.stderr
    assert written(home) == []


@linux
@pytest.mark.slow
def test_a_process_that_stays_opens_none_either(tmp_path: Path) -> None:
    """Half a minute after its start onnxruntime would ask for the address of its maker's host."""
    code = "import time, edge_bcs.runtime.engine; time.sleep(45)"
    done = confined(tmp_path / "home", code)
    assert done.returncode == 0, done.stderr
    assert written(tmp_path / "home") == []


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, package) of each import, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.lineno, (node.module or "").split(".")[0]


def test_every_script_imports_onnxruntime_after_edge_bcs() -> None:
    """Modules of the package cannot do otherwise, and conftest.py sees to the tests."""
    scripts = 0
    folders = [folder for folder in ROOT.iterdir() if folder.is_dir() and folder.name[0] != "."]
    for folder in folders:
        if folder.name in (*PACKAGE, "build", "out", "dist"):
            continue
        for file in folder.rglob("*.py"):
            if "__main__" not in (text := file.read_text()):
                continue
            lines = sorted(imported(ast.parse(text)))
            ours = next((line for line, name in lines if name == "edge_bcs"), None)
            theirs = next((line for line, name in lines if name == "onnxruntime"), None)
            scripts += theirs is not None
            assert theirs is None or (ours is not None and ours < theirs), file
    assert scripts > 1
