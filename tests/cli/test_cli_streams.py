"""A command's standard streams: closed, full, of another encoding, gone; and Ctrl-C at any moment."""

# mypy: disable-error-code="arg-type, assignment, attr-defined"

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from edge_bcs.__main__ import interrupt
from edge_bcs.cli import main, streams

Make = Callable[..., Path]


def shell(command: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of sh in which "$@" is edge-bcs with these arguments."""
    words = ["sh", "-c", command, "sh", sys.executable, "-m", "edge_bcs", *map(str, arguments)]
    environment = {**os.environ, **environment}
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=60, check=False)


@pytest.mark.parametrize(
    "arguments", [("targets",), ("inspect", "ARTIFACT"), ("inspect", "ARTIFACT", "--json")]
)
def test_a_reader_that_has_seen_enough_is_no_fault(tiny_artifact: Make, arguments: tuple[str, ...]) -> None:
    words = (tiny_artifact() if word == "ARTIFACT" else word for word in arguments)
    result = shell('"$@" | true', *words)  # gone before the first line
    assert (result.stdout, result.stderr) == ("", "")


def test_an_answer_that_cannot_be_written_is_one_sentence(tiny_artifact: Make) -> None:
    result = shell('"$@" >/dev/full', "inspect", tiny_artifact())
    assert result.returncode == 1
    assert result.stderr == "Error: the answer cannot be read or written: No space left on device.\n"


@pytest.mark.parametrize("arguments", [("--help",), ("targets", "--help"), ("--version",)])
def test_a_help_text_that_cannot_be_written_is_one_sentence(arguments: tuple[str, ...]) -> None:
    result = shell('"$@" >/dev/full', *arguments)
    assert result.returncode == 1
    assert result.stderr.startswith("Error: the answer cannot be") and result.stderr.count("\n") == 1


def test_closed_streams(tiny_artifact: Make, tmp_path: Path) -> None:
    """What a command writes is never taken for its answer by who opened the next file."""
    finetune = ("finetune", tiny_artifact(), "--data", "digits", "--steps", 1, "--eval-samples", 0, "--json")
    result = shell('"$@" <&- >&- 2>&-', *finetune, "--batch-size", 4, "-o", tmp_path / "run")
    assert result.returncode == 0
    assert json.loads((tmp_path / "run" / "report.json").read_text())["training"]["step"] == 1
    refused = shell('"$@" 2>&-', "inspect", "nothing")
    assert refused.returncode == 1 and refused.stdout == ""


def test_an_encoding_without_our_letters(tiny_artifact: Make) -> None:
    for charset, expected in (("ascii", "epsilon = 8/255"), ("latin-1", "8×1×3×3"), ("utf-8", "ε = 8/255")):
        result = CliRunner(charset=charset).invoke(main, ["inspect", str(tiny_artifact())])
        assert result.exit_code == 0 and expected in result.stdout
        assert charset != "ascii" or result.stdout_bytes.isascii()
    result = shell('"$@"', "inspect", tiny_artifact(), LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    assert result.returncode == 0 and "connections" in result.stdout


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    """In an answer, from where it may be copied, it is what it is; a message escapes it."""
    assert "caf\udce9 \udc80κ".encode("utf-8", streams.HANDLER) == b"caf\xe9 \x80\xce\xba"
    name = os.fsencode(tmp_path) + b"/caf\xe9"
    words = [sys.executable, "-m", "edge_bcs", "inspect", name]
    done = subprocess.run(words, capture_output=True, timeout=60, check=False)
    assert done.returncode == 1 and done.stderr.startswith(b"Error: ") and b"/caf\\udce9" in done.stderr


# Interrupts


def test_ctrl_c_is_one_word_and_130(monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_bcs.targets import boards

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(boards, "names", interrupted)
    result = CliRunner().invoke(main, ["targets"])
    assert result.exit_code == 130 and result.stderr == "Stopped.\n" and result.stdout == ""


def test_ctrl_c_waits_for_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library in C that is interrupted while it is loaded fails in ways of its own, or forgets it."""
    module = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.2)\nloaded = True\n"
    (tmp_path / "of_c.py").write_text(module)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        loaded = importlib.import_module("of_c")
        with pytest.raises(KeyboardInterrupt):
            time.sleep(20)
        assert loaded.loaded
    finally:
        signal.signal(signal.SIGINT, before)
        sys.modules.pop("of_c", None)


@pytest.mark.slow  # a quick one is above
def test_ctrl_c_while_torch_is_loaded(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    words = [sys.executable, "-m", "edge_bcs", "train", "--data", "digits", "-o", str(tmp_path / "run")]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    time.sleep(0.6)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT) and "Traceback" not in said


# Faults of the system


def test_what_the_system_refuses_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_bcs.targets import boards

    def refused() -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "boards"))

    monkeypatch.setattr(boards, "names", refused)
    result = CliRunner().invoke(main, ["targets"])
    expected = f"Error: {tmp_path}/boards cannot be read or written: Permission denied.\n"
    assert result.exit_code == 1 and result.stderr == expected
