"""What a command says while something takes long, on a terminal and elsewhere."""

from __future__ import annotations

import io
import json
import re
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from helpers.artifacts import tiny_network

from edge_bcs.cli import main
from edge_bcs.core import progress
from edge_bcs.core.progress import Progress
from edge_bcs.data import open_data

Make = Callable[..., Path]
FIRST_SECONDS = progress.FIRST_SECONDS  # the tests set it otherwise


class Terminal(io.StringIO):
    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


class Gone(io.StringIO):
    """A pipe that nobody reads any more."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "nothing was said"
        time.sleep(0.001)


def test_a_log_gets_a_line_soon_and_then_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    log, written = io.StringIO(), []
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.05)
    monkeypatch.setattr(progress, "SECONDS", 0.2)
    original = log.write
    monkeypatch.setattr(log, "write", lambda text: (written.append(time.monotonic()), original(text))[1])
    began = time.monotonic()
    with Progress("training", 400, unit="steps") as bar:
        until(lambda: len(written) > 0)  # a first step that does not end is told of, too
        bar.update(17, text="loss 2.301")
        until(lambda: len(written) > 3)
        bar.update(400, text="loss 0.125")
    assert written[0] - began >= 0.05
    assert min(np.diff(written[:-1])) >= 0.19
    lines = log.getvalue().splitlines()
    assert lines[0].startswith("training: 0 of 400 steps, ") and "\r" not in log.getvalue()
    assert lines[2].startswith("training: 17 of 400 steps, loss 2.301, ")
    assert lines[-1].startswith("training: 400 of 400 steps, loss 0.125, ")


def test_the_defaults_are_soon_and_seldom() -> None:
    assert FIRST_SECONDS < 2 and progress.SECONDS == 10


def test_what_is_left_is_told_from_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the pace up to the last image that was done, less what has gone by since."""
    now = 1000.0
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: now))
    bar = Progress("pgd", 100, unit="images", shown=False)
    with bar:
        now += 30
        assert "left" not in bar.describe()
        bar.update(60)
        assert bar.describe() == "pgd: 60 of 100 images, 30 s, about 20 s left"
        now += 12
        assert bar.describe() == "pgd: 60 of 100 images, 42 s, about 8 s left"
        now += 20
        assert bar.describe() == "pgd: 60 of 100 images, 1.03 min"
        bar.begin(60)  # counted anew, as after a resumption
        now += 10
        bar.update(80)
        assert bar.describe().endswith("about 10 s left")


def test_what_is_short_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with Progress("training", 2) as bar:
        bar.update(2)
    assert log.getvalue() == ""


@pytest.mark.parametrize("columns", [30, 100])
def test_a_terminal_has_one_line_that_is_rewritten(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    with Progress("training", 400, unit="steps") as bar:
        bar.update(100, text="loss 2.301")
        until(lambda: "100 of 400" in screen.getvalue())
        progress.say("a sentence that stays")
        until(lambda: "stays\ntraining" in screen.getvalue())
    parts = screen.getvalue().split("\r\x1b[K")
    assert parts[-1] == ""  # nothing of it is left
    assert max(len(part) for part in parts if part.startswith("training")) < columns
    assert "a sentence that stays\n" in "".join(parts)
    with_bar = [part for part in parts if "━━━━━─────────────── 100 of 400 steps" in part]
    assert bool(with_bar) == (columns == 100)
    # What would be cut off first stands last.
    assert all(re.search(r" 100 of 400 steps, \d+ s, loss 2\.301$", part) for part in with_bar)


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.01)
    monkeypatch.setenv("TERM", "dumb")
    with Progress("training", 400):
        until(lambda: screen.getvalue() != "")
    assert "\x1b" not in screen.getvalue() and screen.getvalue().endswith("\n")


def test_nobody_has_to_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.01)
    monkeypatch.setattr(progress, "APART", 0.0)
    for stream in (Gone(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        with Progress("training", 400) as bar:
            progress.say("Saves now and then.")
            if stream is not None:
                until(lambda bar=bar: bar.told != "")  # type: ignore[misc]
        progress.say("Stopped.")


def test_a_task_inside_another_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    for name, seconds in (("FIRST_SECONDS", 0.01), ("SECONDS", 0.01), ("APART", 0.0)):
        monkeypatch.setattr(progress, name, seconds)
    with Progress("compiling"):
        with Progress("measuring", 8, unit="images"):
            until(lambda: "measuring: 0 of 8 images" in log.getvalue())
        with Progress("hidden", shown=False):
            progress.note("comparing it with torch")
            until(lambda: "compiling: comparing it with torch" in log.getvalue())
    assert "hidden" not in log.getvalue()


# Every command that may take long


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every task waits, once it has something to say, until it has been told of."""
    for name, seconds in (("FIRST_SECONDS", 0.001), ("SECONDS", 0.001), ("APART", 0.0)):
        monkeypatch.setattr(progress, name, seconds)
    update = Progress.update

    def slow_update(self: Progress, *arguments: Any, **more: Any) -> None:
        update(self, *arguments, **more)
        if self.is_shown:
            until(lambda: self.told != "" and (more.get("text") or "") in self.told)

    monkeypatch.setattr(Progress, "update", slow_update)


def run(*arguments: object) -> Result:
    """Run with --json: standard output is one object whatever is said beside it."""
    result = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    assert isinstance(json.loads(result.stdout), dict)
    assert "\x1b" not in result.stderr
    return result


@pytest.mark.usefixtures("hasty")
def test_board_commands(tiny_artifact: Make, tmp_path: Path, digits: Path) -> None:
    common = ("finetune", tiny_artifact(), "--data", digits, "-o", tmp_path / "run", "--eval-steps", 1)
    said = run(*common, "--steps", 3).stderr
    assert "measuring: " in said and "of 16 images" in said
    assert "training: " in said and " of 3 steps, loss " in said
    for attack in ("none", "fgsm", "pgd"):
        evaluate = ("evaluate", tmp_path / "run", "--data", digits, "--attack", attack)
        said = run(*evaluate).stderr
        assert f"{'measuring' if attack == 'none' else attack}: " in said and "of 16 images" in said
    assert "simulating: " in run("simulate", tmp_path / "run", "--seconds", 0).stderr


SMALL = ("--width", 0.0625, "--input-size", 8, "--channels", 1, "--sparsity", 0.8)


@pytest.mark.usefixtures("hasty")
def test_host_commands(tmp_path: Path, digits: Path) -> None:
    pytest.importorskip("torch")
    model = ("--model", "resnet18", *SMALL)
    train = ("train", *model, "--data", digits, "--batch-size", 16, "--steps", 2, "--attack-steps", 1)
    assert " of 2 steps, epoch 1, loss " in run(*train, "-o", tmp_path / "run").stderr
    said = run("export", "--checkpoint", tmp_path / "run", "--memory", "2MiB", "-o", tmp_path / "a").stderr
    for stage in ("planning its memory", "comparing it with torch"):
        assert f"compiling: {stage}, " in said
    evaluate = ("evaluate", tmp_path / "run", "--data", digits, "--attack-steps", 1)
    assert "pgd: " in run(*evaluate).stderr


@pytest.mark.usefixtures("hasty")
def test_a_library_that_takes_long_over_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoAttack tells nothing before a batch is done, so the passes of the network are counted."""
    torch = pytest.importorskip("torch")
    from edge_bcs.evaluation.measures import evaluate

    class AutoAttack:
        def __init__(self, model: Any, **_: Any) -> None:
            self.model = model
            self.apgd_targeted = self.fab = types.SimpleNamespace()

        def run_standard_evaluation(self, x: Any, labels: Any, batch_size: int) -> Any:
            with torch.no_grad():
                for _ in range(41):
                    self.model(x)
            return x, labels

    monkeypatch.setitem(sys.modules, "pyautoattack", types.SimpleNamespace(AutoAttack=AutoAttack))
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    data = open_data("digits", "test", (1, 8, 8))
    evaluate(tiny_network(), data, attack="autoattack", samples=16, batch_size=8, progress=True)
    lines = log.getvalue().splitlines()
    assert any(line.startswith("autoattack: 0 of 16 images, passes of the network: ") for line in lines)


@pytest.mark.usefixtures("hasty")
def test_bench_and_doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_bcs import bench

    def compare_step(progress: Callable[[str], None], **_: Any) -> Any:
        progress("warming up")
        return types.SimpleNamespace(as_dict=lambda: {"ratio": 1.0})

    monkeypatch.setattr(bench, "compare_step", compare_step)
    assert "measuring: warming up, " in run("bench").stderr
    assert run("doctor", "-o", tmp_path).stderr.count("Traceback") == 0
