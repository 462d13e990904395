"""Rounds through a folder: who merges, what is left out, and how a board goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.state import read_state
from helpers.artifacts import state as hand_made
from helpers.artifacts import write_artifact
from helpers.commands import run

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.fleet import rounds
from edge_bcs.fleet.members import BOARD, ROUND
from edge_bcs.fleet.merging import merge
from edge_bcs.fleet.rounds import NotMet, Rounds, begin

Make = Callable[..., Path]
Array = np.ndarray[Any, Any]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "SECONDS", 0.01)


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return Artifact.read(write_artifact(tmp_path / "artifact"))


def send(
    share: Path, board: str, artifact: Artifact, number: int = 1, shift: float = 0.0
) -> dict[str, Array]:
    """Let a board send the artifact's state, its weights shifted."""
    tensors = hand_made()
    tensors["coo.value"] = tensors["coo.value"] + np.float32(shift)
    metadata = {"step": str(3 + number), "seed": "7", "images": "64", "progress": "{}"}
    Rounds(share, board).send(number, artifact, tensors, metadata, None)
    return tensors


# The folder


def test_the_last_board_merges(artifact: Artifact, tmp_path: Path) -> None:
    states = [send(tmp_path, name, artifact, shift=shift) for name, shift in (("a", 0.5), ("b", 1.5))]
    waited: list[str] = []

    def between(sentence: str) -> None:
        waited.append(sentence)
        send(tmp_path, "c", artifact, shift=4)

    met = Rounds(tmp_path, "a", boards=3).meet(1, artifact, 60, between)
    assert len(waited) == 1 and waited[0].startswith("Round 1: runs that are there: 2 of 3;")
    assert met.state["coo.value"] == pytest.approx(states[0]["coo.value"] + 1.5, rel=1e-5)
    assert not met.state["coo.momentum"].any() and (met.step, met.seed) == (4, 7)
    assert len(met.report["runs"]) == 3
    found = read_state(Artifact.read(tmp_path / "round-0001" / "merged"))[1]
    assert found[ROUND] == "1" and found["images"] == "192"
    assert sorted(path.name for path in (tmp_path / "round-0001").iterdir()) == ["a", "b", "c", "merged"]


def test_what_is_sent_has_no_momentum(artifact: Artifact, tmp_path: Path) -> None:
    send(tmp_path, "a", artifact)
    sent, metadata = read_state(Artifact.read(tmp_path / "round-0001" / "a"))
    assert not sent["coo.momentum"].any() and "progress" not in metadata
    assert (metadata[ROUND], metadata[BOARD]) == ("1", "a")


def test_two_boards_of_one_name_lose_nothing(artifact: Artifact, tmp_path: Path) -> None:
    send(tmp_path, "raspberrypi", artifact)
    sent = tmp_path / "round-0001" / "raspberrypi" / "state.safetensors"
    before = sent.read_bytes()
    send(tmp_path, "raspberrypi", artifact)  # the same again, after a power cut
    with pytest.raises(EdgeBcsError, match=r"holds another run than this board's: .*--board"):
        send(tmp_path, "raspberrypi", artifact, shift=1)
    assert sent.read_bytes() == before
    sent.write_bytes(before[:-5])
    sent.with_name("state.previous.safetensors").unlink()
    send(tmp_path, "raspberrypi", artifact)
    assert sent.read_bytes() == before


def test_those_that_vanish_are_waited_for_and_then_not(artifact: Artifact, tmp_path: Path) -> None:
    send(tmp_path, "a", artifact)
    began = rounds.time.monotonic()
    met = Rounds(tmp_path, "a", boards=3).meet(1, artifact, 0.1)
    assert rounds.time.monotonic() - began >= 0.1 and len(met.report["runs"]) == 1
    with pytest.raises(NotMet, match=r"round 2 has not been merged in 0\.05 seconds"):
        Rounds(tmp_path, "a").meet(2, artifact, 0.05)


def test_somebody_else_may_merge(artifact: Artifact, tmp_path: Path) -> None:
    for name in ("a", "b"):
        send(tmp_path, name, artifact)
    place = tmp_path / "round-0001"

    def between(sentence: str) -> None:
        merge([place / "a", place / "b"], place / "merged")

    assert Rounds(tmp_path, "a").meet(1, artifact, 60, between).step == 4
    for text in ("", "[]", "{}", '{"overlap": {"pairwise": "x"}, "runs": [], "left_out": []}',
                 '{"overlap": {"pairwise": 1}, "runs": [], "left_out": [1]}'):  # fmt: skip
        (place / "merged" / "merge.json").write_text(text)
        assert Rounds(tmp_path, "a").meet(1, artifact, 60).report == {}


def test_the_round_goes_on_without_what_does_not_belong_to_it(artifact: Artifact, tmp_path: Path) -> None:
    for name in ("a", "b"):
        send(tmp_path, name, artifact)
        send(tmp_path, name, artifact, number=2)
    place = tmp_path / "round-0002"
    shutil.copytree(tmp_path / "round-0001" / "a", place / "c")  # sent again, by whoever
    shutil.copytree(place / "b", place / "d")
    shutil.copytree(place / "b", place / "torn")
    (place / "torn" / "state.safetensors").write_bytes(b"torn")
    other = Artifact.read(
        write_artifact(tmp_path / "other", lambda manifest: manifest.update(sparsity="0.9"))
    )
    send(tmp_path, "e", other, number=2)
    met = Rounds(tmp_path, "a", boards=6).meet(2, artifact, 60)
    assert [Path(one["run"]).name for one in met.report["runs"]] == ["a", "b"]
    told = {Path(one["run"]).name: one["why"] for one in met.report["left_out"]}
    assert "was sent in round 1, and is no run of round 2" in told["c"]
    assert "is a copy of what board b sent" in told["d"]
    assert "no intact state" in told["torn"] and "another network" in told["e"]


def test_who_merges_by_hand_is_told_of_what_was_sent_again(artifact: Artifact, tmp_path: Path) -> None:
    for name in ("a", "b"):
        send(tmp_path, name, artifact)
        send(tmp_path, name, artifact, number=2)
    old, new = tmp_path / "round-0001", tmp_path / "round-0002"
    with pytest.raises(EdgeBcsError, match="b was sent in round 1, and others in round 2"):
        merge([old / "b", new / "a"], tmp_path / "m")
    shutil.copytree(new / "b", tmp_path / "copy")
    with pytest.raises(EdgeBcsError, match=r"copy is of board b, and so is \S*round-0002/b"):
        merge([new / "a", new / "b", tmp_path / "copy"], tmp_path / "m")
    report = merge([old / "a", new / "a", new / "b", tmp_path / "copy"], tmp_path / "m", on_bad="skip")
    assert [Path(row["run"]).parent.name for row in report["runs"]] == ["round-0002"] * 2


def test_two_boards_that_merge_at_once(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both come to the same bits, and the first to be done counts."""
    for name in ("a", "b"):
        send(tmp_path, name, artifact, shift=len(name))
    merged_state = rounds.merged_state
    first: list[bytes] = []
    file = tmp_path / "round-0001" / "merged" / "state.safetensors"

    def while_another(*arguments: Any, **more: Any) -> Any:
        if not first:
            first.append(b"")
            Rounds(tmp_path, "b", boards=2).meet(1, artifact, 60)
            first[0] = file.read_bytes()
        return merged_state(*arguments, **more)

    monkeypatch.setattr(rounds, "merged_state", while_another)
    Rounds(tmp_path, "a", boards=2).meet(1, artifact, 60)
    assert file.read_bytes() == first[0]
    assert sorted(path.name for path in (tmp_path / "round-0001").iterdir()) == ["a", "b", "merged"]


def test_a_merged_run_on_its_way_is_waited_for(artifact: Artifact, tmp_path: Path) -> None:
    send(tmp_path, "a", artifact)
    whole = Rounds(tmp_path, "a", boards=1).meet(1, artifact, 60)
    state = tmp_path / "round-0001" / "merged" / "state.safetensors"
    content = state.read_bytes()
    state.write_bytes(content[:-100])
    met = Rounds(tmp_path, "b").meet(1, artifact, 60, lambda sentence: (state.write_bytes(content), None)[1])
    assert np.array_equal(met.state["coo.value"], whole.state["coo.value"])
    state.write_bytes(content[:-100])
    with pytest.raises(EdgeBcsError, match="merged holds no intact state"):
        Rounds(tmp_path, "b").meet(1, artifact, 0)
    shutil.copytree(tmp_path / "round-0001", tmp_path / "round-0002")
    (tmp_path / "round-0002" / "merged" / "state.safetensors").write_bytes(content)
    with pytest.raises(EdgeBcsError, match="merged is of round 1, not 2"):
        Rounds(tmp_path, "b").meet(2, artifact, 0)


def test_nobody_can_be_merged(artifact: Artifact, tmp_path: Path) -> None:
    with pytest.raises(EdgeBcsError, match="none of the runs can take part"):
        Rounds(tmp_path, "a", boards=2).meet(1, artifact, 0)


@pytest.mark.parametrize("name", ["", "merged", ".hidden", "a/b", "..", "a b", "ä", "x" * 65, "-o"])
def test_names_that_no_board_can_have(name: str, tmp_path: Path) -> None:
    with pytest.raises(EdgeBcsError, match="is no name for a board"):
        Rounds(tmp_path, name)


def test_another_way_of_merging_is_none(tmp_path: Path) -> None:
    """Whatever is not None would else be the median."""
    with pytest.raises(EdgeBcsError, match=r"robust is 'median' or None, not 'mean'"):
        Rounds(tmp_path, "a", boards=2, robust="mean")


# The command


class Board:
    """One board of a fleet, as a command line."""

    def __init__(self, name: str, artifact: Path, data: Path, folder: Path) -> None:
        self.name, self.run, self._share = name, folder / name, folder / "share"
        self._words = ["finetune", artifact, "--data", data, "-o", self.run, "--rounds", self._share]
        self._words += ["--board", name, "--batch-size", 16, "--no-augment", "--eval-samples", 0, "--json"]

    def learn(self, *more: object) -> Result:
        return run(*self._words, *more)

    def state(self) -> tuple[dict[str, Array], dict[str, str]]:
        return read_state(Artifact.read(self.run))

    def sent(self, number: int) -> tuple[dict[str, Array], dict[str, str]]:
        return read_state(Artifact.read(self._share / f"round-{number:04}" / self.name))


def test_boards_learn_meet_and_learn_on(tiny_artifact: Make, digits: Path, tmp_path: Path) -> None:
    a, b = (Board(name, tiny_artifact(), digits, tmp_path) for name in "ab")
    alone = a.learn("--steps", 2, "--wait", 0)
    assert alone.exit_code == 75 and "has not been merged" in alone.stderr, alone.output
    assert json.loads(alone.stdout)["stopped"] == {"by": "--wait", "step": 2}
    last = b.learn("--steps", 3, "--boards", 2)
    assert last.exit_code == 0, last.output
    report = json.loads(last.stdout)["rounds"]
    assert [one["round"] for one in report] == [1] and report[0]["training"]["steps"] == 3
    assert [row["images"] for row in report[0]["merged"]["runs"]] == [32, 48]
    merged = read_state(Artifact.read(tmp_path / "share" / "round-0001" / "merged"))[0]
    assert all(np.array_equal(b.state()[0][name], array) for name, array in merged.items())
    assert (b.state()[1]["step"], b.state()[1][ROUND]) == ("3", "2")
    # Board a takes what became of round 1, and learns round 2 in its next epoch.
    again = a.learn("--steps", 2, "--resume", "--wait", 0)
    assert again.exit_code == 75 and "Round 1 was merged" in again.stderr, again.output
    sent = a.sent(2)[1]
    assert (sent["step"], sent["images"], sent[ROUND]) == ("5", "32", "2")
    course = json.loads(a.state()[1]["progress"])
    assert (course["first_step"], course["first_epoch"]) == (3, 1)
    # A board that comes new begins with what there is.
    c = Board("c", tiny_artifact(), digits, tmp_path)
    third = c.learn("--steps", 1, "--boards", 2)
    assert third.exit_code == 0, third.output
    assert c.sent(2)[1]["step"] == "4" and c.state()[1][ROUND] == "3"


def test_a_round_that_was_cut_off_is_the_round_that_was_not(
    tiny_artifact: Make, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = (Board(name, tiny_artifact(), digits, tmp_path) for name in "ab")
    assert a.learn("--steps", 4, "--wait", 0).exit_code == 75
    cut = b.learn("--steps", 4, "--wait", 0, "--max-hours", 1e-9)
    assert cut.exit_code == 75 and not (tmp_path / "share" / "round-0001" / "b").exists(), cut.output
    assert b.learn("--steps", 4, "--wait", 0, "--resume").exit_code == 75
    ours, theirs = a.sent(1)[0], b.sent(1)[0]
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    # Cut off while it waited, it only waits again.
    done = b.learn("--steps", 4, "--boards", 2, "--resume")
    assert done.exit_code == 0 and json.loads(done.stdout)["rounds"][0]["merged"]["overlap"]["pairwise"] == 1


def test_data_that_cannot_be_used_begins_nothing(tiny_artifact: Make, digits: Path, tmp_path: Path) -> None:
    board = Board("a", tiny_artifact(), tmp_path / "none", tmp_path)
    wrong = board.learn("--steps", 1, "--wait", 0)
    assert wrong.exit_code == 1 and "none" in wrong.output, wrong.output
    assert not board.run.exists() and not (tmp_path / "share").exists()
    assert Board("a", tiny_artifact(), digits, tmp_path).learn("--steps", 1, "--boards", 1).exit_code == 0


def test_a_cut_between_two_rounds_loses_no_row(
    tiny_artifact: Make, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = Board("a", tiny_artifact(), digits, tmp_path)
    length = ("--steps", 1, "--boards", 1)
    begun: list[int] = []

    def cut(folder: Path, artifact: Artifact, met: Any, number: int, *seed: Any) -> None:
        if begun:
            raise KeyboardInterrupt
        begun.append(number)
        begin(folder, artifact, met, number, *seed)

    monkeypatch.setattr("edge_bcs.fleet.rounds.begin", cut)
    board.learn(*length)
    assert begun == [1] and board.state()[1][ROUND] == "1"
    monkeypatch.setattr("edge_bcs.fleet.rounds.begin", begin)
    again = board.learn(*length, "--resume")
    assert again.exit_code == 0, again.output
    assert [one["round"] for one in json.loads(again.stdout)["rounds"]] == [1, 2]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--wait", 600), "round 1 has not been merged in the hours of --max-hours"),
        (
            ("--boards", 1, "--max-rounds", 5),
            "round 2 is for another time: the hours of --max-hours are over",
        ),
    ],
)
def test_the_hours_are_those_of_all_rounds(
    tiny_artifact: Make, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: Any, told: str
) -> None:
    """Here they are over as soon as a run was sent."""
    share = tmp_path / "share" / "round-0001" / "a"
    clock = SimpleNamespace(monotonic=lambda: 4000.0 if share.exists() else 0.0)
    monkeypatch.setattr("edge_bcs.cli.rounds.time", clock)
    result = Board("a", tiny_artifact(), digits, tmp_path).learn("--steps", 1, *more, "--max-hours", 1)
    assert result.exit_code == 75 and told in result.stderr.lower(), result.output
    assert json.loads(result.stdout)["stopped"]["by"] == "--max-hours"


def test_what_cannot_be_asked(tiny_artifact: Make, digits: Path, tmp_path: Path) -> None:
    plain = ["finetune", tiny_artifact(), "--data", digits, "-o", tmp_path / "run", "--steps", 1]
    for words, message in (
        (["--boards", 2], "--boards belongs to --rounds"),
        (["--board", "a"], "--board belongs to --rounds"),
        (["--rounds", tmp_path / "share", "--board", "a/b"], "is no name for a board"),
        (["--rounds", tmp_path / "share", "--robust", "median"], "only with --boards"),
    ):
        result = run(*plain, *words)
        assert result.exit_code == 1 and message in result.output
    assert run(*plain, "--no-augment", "--eval-samples", 0).exit_code == 0
    share = ["--rounds", tmp_path / "share"]
    result = run(*plain, *share)
    assert result.exit_code == 1 and "already holds a run" in result.output
    result = run(*plain, *share, "--resume")
    assert result.exit_code == 1 and "takes part in no rounds" in result.output
