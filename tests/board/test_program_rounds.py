"""edge-bcs-run in a fleet: a board of its own among boards with Python, with the same bits."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.state import read_state, write_run
from helpers import board_program as board
from helpers import commands

from edge_bcs.data import open_data
from edge_bcs.fleet import rounds
from edge_bcs.fleet.merging import merge

Make = Callable[..., Path]
STATE = "state.safetensors"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "SECONDS", 0.01)


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """An .npz of 64 images of 1×8×8 as bytes, which is what edge-bcs-run reads."""
    images, labels = open_data("digits", "train", (1, 8, 8)).read(np.arange(64))
    images = (255 * images).round().astype(np.uint8)
    np.savez(tmp_path / "digits.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    return tmp_path / "digits.npz"


class Board:
    """One board of a fleet, whose command either program may do."""

    def __init__(self, name: str, artifact: Path, data: Path, folder: Path) -> None:
        self.name, self.run, self.share = name, folder / name, folder / "share"
        self.words = ["finetune", artifact, "--data", data, "-o", self.run, "--rounds", self.share]
        self.words += ["--board", name, "--batch-size", 16, "--threads", 1, "--max-writes", "none"]
        self.words += ["--eval-samples", 0, "--json"]

    def python(self, *more: object) -> tuple[int, dict[str, Any], str]:
        """Status, report and what was said."""
        result = commands.run(*self.words, "--engine", "native", *more)
        return result.exit_code, _object(result.stdout), result.stderr

    def program(self, *more: object) -> tuple[int, dict[str, Any], str]:
        """The same of edge-bcs-run."""
        result = board.run(*self.words, *more)
        return result.returncode, _object(result.stdout), result.stderr

    def place(self, number: int, name: str | None = None) -> Path:
        return self.share / f"round-{number:04}" / (name or self.name)

    def metadata(self) -> dict[str, str]:
        return read_state(Artifact.read(self.run))[1]


def _object(text: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(text) if text else {}
    return content


def two(make: Make, data: Path, folder: Path) -> tuple[Board, Board]:
    folder.mkdir()
    artifact = make()
    return Board("a", artifact, data, folder), Board("b", artifact, data, folder)


def exchanged(share: Path) -> dict[str, bytes]:
    """Every state in the folder of a fleet."""
    return {str(file.relative_to(share)): file.read_bytes() for file in share.glob(f"*/*/{STATE}")}


def test_a_fleet_of_both_programs_has_the_bits_of_python(
    tiny_artifact: Make, digits: Path, tmp_path: Path
) -> None:
    """Three rounds; b merges. What the boards have and say is what two with Python have and say."""
    (a, b), (c, d) = (two(tiny_artifact, digits, tmp_path / name) for name in ("python", "mixed"))
    length, all_rounds = ("--steps", 3, "--augment", "shift"), ("--max-rounds", 3, "--wait", 30)
    waiting = subprocess.Popen(
        [str(board.program()), *map(str, (*c.words, *length, *all_rounds))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        status, report, told = d.python("--boards", 2, *length, *all_rounds)
        assert status == 0, told
        output, said = waiting.communicate(timeout=60)
    finally:
        waiting.kill()
        waiting.wait()
    assert waiting.returncode == 0, said
    for number in range(1, 4):
        again = () if number == 1 else ("--resume",)
        assert a.python(*length, *again, "--wait", 0)[0] == 75
        status, _, told = b.python(*length, *again, "--boards", 2)
        assert status == 0, told
    assert exchanged(c.share) == exchanged(a.share) and len(exchanged(c.share)) == 9
    assert board.states(d.run)[STATE] == board.states(b.run)[STATE]
    # Board a of Python has not taken what became of the last round; then it has.
    assert a.python(*length, "--resume", "--max-hours", 1e-9)[0] == 75
    assert c.program(*length, "--resume", "--max-hours", 1e-9)[0] == 75
    assert board.states(c.run)[STATE] == board.states(a.run)[STATE]
    ours, theirs = (board.timeless(one)["rounds"] for one in (json.loads(output), report))
    assert [list(one) for one in ours] == [list(one) for one in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one["sent_bytes"] == other["sent_bytes"] and one["merged"] == other["merged"]
        assert one["training"]["step"] == other["training"]["step"]
    said_rounds = json.loads((c.run / "report.json").read_text())["rounds"]
    assert [one["round"] for one in said_rounds] == [1, 2, 3]


def test_either_program_goes_on_where_the_other_was_cut_off(
    tiny_artifact: Make, digits: Path, tmp_path: Path
) -> None:
    """Between rounds, within one, and while it waited; one board changes hands, the other has Python."""
    (a, b), (c, d) = (two(tiny_artifact, digits, tmp_path / name) for name in ("python", "mixed"))
    length, cut = ("--steps", 5, "--wait", 0), ("--resume", "--max-hours", 1e-9)
    for number in range(1, 4):
        again = () if number == 1 else ("--resume",)
        a.python(*length, *again)
        assert b.python(*length, *again, "--boards", 2)[0] == 0
    turns = [c.program, c.python, c.program]
    for number, (turn, other) in enumerate(zip(turns, [c.python, c.program, c.python], strict=True), 1):
        # Begins the round and is cut off; the other program goes on, and is asked again by the first.
        status, _, told = turn(*length, *cut)
        assert status == 75, told
        assert c.metadata()["fleet.round"] == str(number) and not c.place(number).exists()
        status, report, told = other(*length, "--resume")
        assert status == 75 and report["stopped"] == {"by": "--wait", "step": 5 * number}, told
        status, report, told = turn(*length, "--resume")
        assert status == 75 and report["stopped"] == {"by": "--wait", "step": 5 * number}, told
        assert report["training"]["step"] == 5 * number
        again = () if number == 1 else ("--resume",)
        status, _, told = d.python(*length, *again, "--boards", 2)
        assert status == 0, told
    assert exchanged(c.share) == exchanged(a.share)
    assert board.states(c.run)[STATE] == board.states(a.run)[STATE]
    assert c.metadata() == a.metadata()


def test_what_others_became_in_fewer_steps_is_taken(
    tiny_artifact: Make, digits: Path, tmp_path: Path
) -> None:
    """What a board sent never arrived: it goes on from a lower step than that of its own slot before."""
    (a, b), (c, d) = (two(tiny_artifact, digits, tmp_path / name) for name in ("python", "mixed"))
    for one, program, other in ((a, a.python, b), (c, c.program, d)):
        assert program("--steps", 6, "--wait", 0)[0] == 75
        shutil.rmtree(one.place(1))
        assert other.python("--steps", 2, "--boards", 1)[0] == 0
        status, report, told = program("--steps", 3, "--wait", 0, "--resume")
        assert status == 75 and report["stopped"] == {"by": "--wait", "step": 5}, told
    assert exchanged(c.share) == exchanged(a.share)
    assert board.states(c.run)[STATE] == board.states(a.run)[STATE]


def test_a_kill_anywhere_loses_no_round(tiny_artifact: Make, digits: Path, tmp_path: Path) -> None:
    """SIGKILL whenever a file is about to be renamed into its place, and before the next time."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    (a, b), (c, d) = (two(tiny_artifact, digits, tmp_path / name) for name in ("whole", "killed"))
    length = ("--steps", 2, "--wait", 0)
    for one in (b, d):
        assert one.python(*length, "--boards", 1)[0] == 0  # round 1, in which a and c take no part
    assert a.program(*length)[0] == 75
    words = [str(word) for word in (board.program(), *c.words, *length, "--resume")]
    for count in range(1, 200):
        inject = f"--inject=rename,renameat,renameat2:signal=SIGKILL:when={count}"
        result = subprocess.run(
            ["strace", "-f", "-qqq", "-o", "/dev/null", inject, *words], capture_output=True, text=True
        )
        if result.returncode == 75:
            break
        assert result.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), result.stderr
    else:
        pytest.fail("it never ended")
    assert count > 5
    assert exchanged(c.share) == exchanged(a.share)
    assert board.states(c.run)[STATE] == board.states(a.run)[STATE]
    assert c.metadata() == a.metadata()


def test_a_signal_ends_the_waiting(tiny_artifact: Make, digits: Path, tmp_path: Path) -> None:
    a, _ = two(tiny_artifact, digits, tmp_path / "fleet")
    words = [str(word) for word in (board.program(), *a.words, "--steps", 2, "--wait", 600)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as waiting:
        assert waiting.stderr is not None
        for line in waiting.stderr:
            if "waiting for what they become" in line:
                break
        waiting.send_signal(signal.SIGTERM)
        output, said = waiting.communicate(timeout=60)
    assert waiting.returncode == 143 and "go on with --resume" in said
    assert json.loads(output)["stopped"] == {"by": "SIGTERM", "step": 2}
    assert a.program("--steps", 2, "--wait", 0, "--resume")[1]["training"]["step"] == 2
    status, _, told = a.python("--steps", 2, "--wait", 0, "--resume", "--rounds", "")
    assert status == 1 and "--rounds names no folder." in told


def test_data_that_cannot_be_used_begins_nothing(tiny_artifact: Make, digits: Path, tmp_path: Path) -> None:
    wrong, _ = two(tiny_artifact, tmp_path / "none", tmp_path / "fleet")
    status, _, told = wrong.program("--steps", 1, "--wait", 0)
    assert status == 1 and "none" in told
    assert not wrong.run.exists() and not wrong.share.exists()
    right = Board("a", tiny_artifact(), digits, tmp_path / "fleet")
    assert right.program("--steps", 1, "--wait", 0)[0] == 75


def test_the_hours_are_those_of_all_rounds(tiny_artifact: Make, digits: Path, tmp_path: Path) -> None:
    a, _ = two(tiny_artifact, digits, tmp_path / "fleet")
    length = ("--steps", 2, "--wait", 600, "--max-hours", 3 / 3600)
    for begin in (a.program, a.python):
        shutil.rmtree(a.run, ignore_errors=True)
        shutil.rmtree(a.share, ignore_errors=True)
        status, report, told = begin(*length)
        assert status == 75 and report["stopped"]["by"] == "--max-hours", told
        if report["stopped"]["step"] == 2:  # not cut off before
            assert "Round 1 has not been merged in the hours of --max-hours." in told
    assert a.program("--steps", 2, "--wait", 0, "--resume")[1]["stopped"] == {"by": "--wait", "step": 2}


@pytest.fixture
def fleet(tiny_artifact: Make, digits: Path, tmp_path: Path) -> tuple[Board, Path]:
    """A board that waits for round 1, which nobody has merged, and the folder of that round."""
    a, b = two(tiny_artifact, digits, tmp_path / "fleet")
    assert a.program("--steps", 2, "--wait", 0)[0] == 75
    b.python("--steps", 3, "--wait", 0)
    return a, a.place(1).parent


def again(a: Board) -> str:
    """The sentence with which the board ends that is asked again."""
    before = board.states(a.run)[STATE]
    status, _, told = a.program("--steps", 2, "--wait", 0, "--resume")
    assert status == 1 and board.states(a.run)[STATE] == before
    return told.splitlines()[-1].removeprefix("Error: ")


def test_what_edge_bcs_merge_made_is_taken(fleet: tuple[Board, Path]) -> None:
    a, place = fleet
    merge([place / "a", place / "b"], place / "merged")
    (place / "merged" / "merge.json").write_text("{}")
    status, report, told = a.program("--steps", 2, "--wait", 0, "--resume", "--max-rounds", 2)
    assert status == 75 and "Round 1 was merged" in told
    assert report["stopped"]["step"] == 5 and a.metadata()["fleet.begins"] == "3"


def test_a_merged_run_that_is_on_its_way_is_waited_for(fleet: tuple[Board, Path]) -> None:
    """A board that begins while rsync is at it, of either program."""
    a, place = fleet
    merge([place / "a", place / "b"], place / ".coming")
    (place / "merged").mkdir()
    shutil.copy(place / ".coming" / STATE, place / "merged")
    others = shutil.copytree(a.share.parent, a.share.parent.with_name("others"))
    more = ("--steps", "2", "--resume", "--max-rounds", "2")
    words = [str(word) for word in (board.program(), *a.words, *more, "--wait", 60)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as waiting:
        assert waiting.stderr is not None
        for line in waiting.stderr:
            if "Round 1: runs that are there: 2; waiting" in line:
                break
        shutil.copytree(place / ".coming", place / "merged", dirs_exist_ok=True)
        for line in waiting.stderr:
            if "Round 2: runs that are there: 1; waiting" in line:
                break
        waiting.send_signal(signal.SIGTERM)
        waiting.communicate(timeout=60)
    assert waiting.returncode == 143 and a.metadata()["fleet.begins"] == "3"

    again = Board("a", Path(str(a.words[1])), Path(str(a.words[3])), others)
    place = again.place(1).parent

    def sleep(_: float) -> None:
        shutil.copytree(place / ".coming", place / "merged", dirs_exist_ok=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds.time, "sleep", sleep)
        status, _, told = again.python("--steps", 2, "--resume", "--max-rounds", 1, "--wait", 2)
    assert status == 75 and "Round 1: runs that are there: 2; waiting" in told
    assert again.metadata()["fleet.begins"] == "3"


@pytest.mark.parametrize("program", ["ours", "python"])
def test_a_board_that_is_stopped_before_it_began_leaves_nothing(
    fleet: tuple[Board, Path], digits: Path, program: str
) -> None:
    """It may be started again as it was."""
    a, place = fleet
    merge([place / "a", place / "b"], place / ".coming")
    (place / "merged").mkdir()
    shutil.copy(place / ".coming" / STATE, place / "merged")
    late = Board("late", Path(str(a.words[1])), digits, a.share.parent)
    begin = [str(board.program())] if program == "ours" else [sys.executable, "-m", "edge_bcs"]
    words = [*begin, *map(str, late.words), "--steps", "2", "--wait", "60"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as waiting:
        assert waiting.stderr is not None
        for line in waiting.stderr:
            if "waiting for what they become" in line:
                break
        waiting.send_signal(signal.SIGTERM)
        output, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == 143 and not (late.run / "report.json").exists()
    assert json.loads(output)["stopped"] == {"by": "SIGTERM", "step": 0}
    shutil.copytree(place / ".coming", place / "merged", dirs_exist_ok=True)
    start = late.program if program == "ours" else late.python
    status, _, told = start("--steps", 2, "--wait", 0)
    assert status == 75, told
    assert late.metadata()["fleet.begins"] == "3"


def test_a_merged_run_that_cannot_be_used_is_one_sentence(
    fleet: tuple[Board, Path], tiny_artifact: Make, tmp_path: Path
) -> None:
    a, place = fleet
    merge([place / "a", place / "b"], place / "merged")
    state = place / "merged" / STATE
    content = state.read_bytes()
    state.write_bytes(content[:-100])
    assert f"{place}/merged/ holds no intact state" in again(a)
    changed = bytearray(content)
    changed[-1] ^= 1
    state.write_bytes(changed)
    assert "its checksum does not match" in again(a)
    state.write_bytes(content)
    manifest = json.loads((place / "merged" / "manifest.json").read_text())
    for name, value in (("sparsity", "0.25"), ("network", {**manifest["network"], "name": "another"})):
        changed_manifest = json.dumps({**manifest, name: value})
        (place / "merged" / "manifest.json").write_text(changed_manifest)
        assert f"is of another network than this one: its {name} differs" in again(a)
    (place / "merged" / "manifest.json").unlink()
    assert again(a) == f"{place}/merged/manifest.json is missing; copy or export the artifact again."
    layers = [{**layer, "density": 0.9} for layer in manifest["layers"]]  # how it began is no matter
    described = {**manifest, "layers": layers, "micro_batch": 2}
    (place / "merged" / "manifest.json").write_text(json.dumps(described))
    assert a.program("--steps", 2, "--wait", 0, "--resume")[0] == 75


def test_a_round_that_was_merged_before_is_no_other(fleet: tuple[Board, Path]) -> None:
    a, place = fleet
    merge([place / "a", place / "b"], place / "merged")
    second = place.with_name("round-0002")
    artifact = Artifact.read(place / "merged")
    tensors, metadata = read_state(artifact)
    write_run(second / "merged", artifact, tensors, {**metadata, "fleet.round": "1"})
    assert f"{second}/merged is of round 1, not 2" in again(a)


def test_names_that_a_round_brought_are_taken(fleet: tuple[Board, Path]) -> None:
    a, place = fleet
    merge([place / "a", place / "b"], place / "merged")
    file = place / "merged" / "manifest.json"
    manifest = json.loads(file.read_text())
    names = ["zero", "one", *map(str, range(2, 9)), "nine-é"]
    file.write_text(json.dumps({**manifest, "classes": names}))
    assert a.program("--steps", 2, "--wait", 0, "--resume")[0] == 75
    assert json.loads((a.run / "manifest.json").read_text())["classes"] == names
    assert Artifact.read(a.place(2)).classes == tuple(names)
    merge([a.place(2)] * 2, a.place(2, "merged"), on_bad="skip")
    file = a.place(2, "merged") / "manifest.json"
    file.write_text(json.dumps({**manifest, "classes": [f"{name}x" for name in names]}))
    assert "is of a network with other classes than this one" in again(a)


def test_another_boards_copy_is_kept(fleet: tuple[Board, Path]) -> None:
    a, place = fleet
    theirs = (place / "b" / STATE).read_bytes()
    (place / "a" / STATE).write_bytes(theirs)
    assert f"{place}/a holds another run than this board's: give each board a name of its own" in again(a)
    assert (place / "a" / STATE).read_bytes() == theirs
    (place / "a" / STATE).write_bytes(theirs[:-7])  # torn, so nobody's
    shutil.rmtree(place / "b")
    assert a.program("--steps", 2, "--wait", 0, "--resume")[0] == 75
    sent, metadata = read_state(Artifact.read(place / "a"))
    assert not sent["coo.momentum"].any() and (metadata["fleet.round"], metadata["fleet.board"]) == ("1", "a")
    ours = read_state(Artifact.read(a.run))[0]
    assert np.array_equal(sent["coo.value"], ours["coo.value"]) and ours["coo.momentum"].any()


def test_what_cannot_be_asked(tiny_artifact: Make, digits: Path, tmp_path: Path) -> None:
    plain = ["finetune", tiny_artifact(), "--data", digits, "-o", tmp_path / "run", "--steps", 1]
    share = ["--rounds", tmp_path / "share"]
    for words, message in (
        (["--board", "a"], "--board belongs to --rounds, which is not given"),
        (["--wait", 1], "--wait belongs to --rounds"),
        (["--max-rounds", 1], "--max-rounds belongs to --rounds"),
        (["--rounds", ""], "--rounds names no folder"),
        ([*share, "--board", "a/b"], "'a/b' is no name for a board"),
        ([*share, "--board", "merged"], "'merged' is no name for a board"),
        ([*share, "--boards", 2], "edge-bcs-run has no --boards: it merges nothing; let `edge-bcs merge` do"),
        ([*share, "--robust", "median"], "edge-bcs-run has no --robust: it merges nothing"),
    ):
        assert message in board.refused(*plain, *words)
    assert not (tmp_path / "run").exists() and not (tmp_path / "share").exists()
    board.succeed(*plain, "--eval-samples", 0)
    assert "already holds a run" in board.refused(*plain, *share)
    assert "takes part in no rounds" in board.refused(*plain, *share, "--resume")
