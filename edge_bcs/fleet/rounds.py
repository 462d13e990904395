"""Rounds of a fleet through a folder: a mounted share, or one that rsync keeps alike.

| in the folder | what |
| --- | --- |
| `round-0001/BOARD` | what a board learned in round 1: a run |
| `round-0001/merged` | what all of them became: a run, with which round 2 begins |

Nobody rules. Whoever finds the runs of all boards there, or has waited long enough, merges them. What comes
of it depends on the runs alone, so it does no harm if two boards do so at once: the first to be done counts.
A board that merges nothing itself takes what it finds, so `edge-bcs merge` may do it elsewhere.

A run says of which round and board it is. One of another round, sent again, or of another board, copied, is
left out, as is any that cannot be merged; the round goes on with the others.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import cause_of, read_small, write_json
from edge_bcs.core.metadata import parse_object
from edge_bcs.fleet.members import BOARD, ROUND, Members, round_of
from edge_bcs.fleet.merging import REPORT, ROBUST, merged_state
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.manifest import STATE
from edge_bcs.runtime.state import is_run_of, layout_of, read_slot, write_run

if TYPE_CHECKING:
    from edge_bcs.runtime.trainer import Trainer

Array = np.ndarray[Any, Any]
BEGINS = "fleet.begins"
"""What the run of a board says beside its round: the step with which that began."""
MERGED = "merged"
_BOARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ROUND = re.compile(r"round-([0-9]{4,9})")
SECONDS = 1.0
"""Between two looks into the folder."""


@dataclass(frozen=True)
class Met:
    """What a round became.

    Attributes:
        state: of the merged run. step, seed: of it. names: of the classes. report: see
            `edge_bcs.fleet.merging.merge`; {} if somebody merged without leaving one.
    """

    state: dict[str, Array]
    step: int
    seed: int
    names: tuple[str, ...] | None
    report: dict[str, Any]


class NotMet(EdgeBcsError):  # noqa: N818 (the round is not over)
    """Nobody has merged the round in the time there was."""


class Rounds:
    """A folder through which boards exchange runs.

    Args:
        folder: it; made if missing. board: this board's name there, of letters, digits, and . _ - between.
        boards: how many take part, so that this one may merge; None: somebody else does.
        robust: as for `edge_bcs.fleet.merging.merge`; the same on all boards.

    Raises EdgeBcsError for a name that is none, and another way of merging.
    """

    def __init__(
        self, folder: str | Path, board: str, boards: int | None = None, robust: str | None = None
    ) -> None:
        if not _BOARD.fullmatch(board) or board == MERGED:
            raise EdgeBcsError(
                f"{board!r} is no name for a board: take letters, digits, and . _ - between them, and not "
                f"{MERGED!r} (--board)."
            )
        if robust not in (None, *ROBUST):
            raise EdgeBcsError(f"robust is 'median' or None, not {robust!r}.")
        self.folder, self.board, self.boards, self.robust = Path(folder), board, boards, robust

    def place(self, number: int) -> Path:
        """The folder of a round, counted from 1."""
        return self.folder / f"round-{number:04}"

    def last_merged(self) -> int:
        """The last round that somebody has merged, whether well or not; 0 before the first."""
        found = [0]
        with contextlib.suppress(FileNotFoundError):
            for place in self.folder.iterdir():
                number = _ROUND.fullmatch(place.name)
                if number and (place / MERGED / STATE).is_file():
                    found.append(int(number[1]))
        return max(found)

    def sent(self, number: int) -> list[Path]:
        """The runs of boards that lie in a round's folder, by name."""
        try:
            places = sorted(self.place(number).iterdir())
        except FileNotFoundError:
            return []
        return [
            place
            for place in places
            if _BOARD.fullmatch(place.name) and place.name != MERGED and (place / STATE).is_file()
        ]

    def send(
        self,
        number: int,
        artifact: Artifact,
        state: Mapping[str, Array],
        metadata: Mapping[str, str],
        classes: tuple[str, ...] | None,
    ) -> int:
        """Put what this board learned in a round into the folder; return the bytes of its state.

        Momentum goes out as zeros: nobody has a use for it, and what compresses does away with it. Raises
        EdgeBcsError if something else lies there under this board's name.
        """
        place = self.place(number) / self.board
        told = {name: metadata[name] for name in ("step", "seed", "images")}
        told |= {ROUND: str(number), BOARD: self.board}
        tensors = {
            name: np.zeros_like(array) if name.endswith(".momentum") else array
            for name, array in state.items()
        }
        if (place / STATE).is_file():
            try:
                there = read_slot(Artifact.read(place)).tensors
            except EdgeBcsError:  # torn
                there = tensors
            if not all(np.array_equal(there[name], array) for name, array in tensors.items()):
                raise EdgeBcsError(
                    f"{place} holds another run than this board's: give each board a name of its own "
                    "(--board), or remove it if it is an old one of this board."
                )
        return write_run(place, artifact, tensors, told, classes)

    def meet(
        self,
        number: int,
        artifact: Artifact,
        wait: float,
        between: Callable[[str], None] = lambda sentence: None,
    ) -> Met:
        """Return what a round became, when somebody has merged it; this board, where it may.

        Args:
            number: of the round. artifact: this board's.
            wait: seconds after which it merges what there is, or gives up where others are to merge.
            between: called once a second with a sentence; what it raises ends this.

        Raises NotMet in the latter case, EdgeBcsError for a merged run that cannot be used, or if no board's
        run can be merged.
        """
        began = time.monotonic()
        while True:
            late = time.monotonic() - began >= wait
            if (self.place(number) / MERGED / STATE).is_file():
                try:
                    return self.merged(number, artifact)
                except EdgeBcsError:
                    if late:  # until then it may be on its way
                        raise
            elif self.boards is not None and (late or len(self.sent(number)) >= self.boards):
                self._merge(number, artifact)
                continue
            elif late:
                raise NotMet(f"round {number} has not been merged in {wait:g} seconds.")
            between(self._waiting(number))
            time.sleep(SECONDS)

    def _waiting(self, number: int) -> str:
        there = len(self.sent(number))
        of = "" if self.boards is None else f" of {self.boards}"
        return f"Round {number}: runs that are there: {there}{of}; waiting for what they become."

    def merged(self, number: int, artifact: Artifact) -> Met:
        """Return what somebody has merged a round to; EdgeBcsError if it cannot be used."""
        path = self.place(number) / MERGED

        def of_round(path: str, metadata: Mapping[str, str]) -> None:
            if round_of(metadata) not in (0, number):
                raise EdgeBcsError(f"{path} is of round {round_of(metadata)}, not {number}.")

        members = Members([path], reference=artifact, weights=[1.0], check=of_round)
        ((arrays, _),) = members.tensors(*layout_of(artifact))
        (member,) = members.accepted
        state = dict(zip(layout_of(artifact), arrays, strict=True))
        return Met(state, member.step, member.seed, members.classes, _report(path / REPORT))

    def _merge(self, number: int, artifact: Artifact) -> None:
        """Merge what is there, unless another board was faster."""

        def belongs(path: str, metadata: Mapping[str, str]) -> None:
            of, board = round_of(metadata), metadata.get(BOARD)
            if of != number:
                told = f"round {of}" if of else "no round"
                raise EdgeBcsError(f"{path} was sent in {told}, and is no run of round {number}.")
            if board != Path(path).name:
                raise EdgeBcsError(f"{path} is a copy of what board {board} sent.")

        members = Members(self.sent(number), reference=artifact, on_bad="skip", check=belongs)
        tensors, metadata, report = merged_state(members, robust=self.robust)
        place = self.place(number) / MERGED
        ours = place.with_name(f".{MERGED}-{self.board}-{os.getpid()}")
        try:
            try:
                write_run(ours, artifact, tensors, {**metadata, ROUND: str(number)}, members.classes)
                write_json(ours / REPORT, {"run": str(place), **report})
                os.rename(ours, place)
            finally:
                shutil.rmtree(ours, ignore_errors=True)
        except OSError as error:
            if not (place / STATE).is_file():
                raise EdgeBcsError(f"{place} cannot be written: {cause_of(error)}.") from None


def _report(file: Path) -> dict[str, Any]:
    """The report of a merger, {} if there is none: it only tells, so what is damaged counts as none."""
    try:
        content = parse_object(read_small(file))
    except (OSError, ValueError):
        return {}
    return content if tells(content) else {}


def tells(report: Any) -> bool:
    """Whether a report of a merger has what is shown of it."""
    try:
        pairwise, runs, left_out = report["overlap"]["pairwise"], report["runs"], report["left_out"]
        return (
            math.isfinite(pairwise)
            and isinstance(runs, list)
            and all(isinstance(one["why"], str) for one in left_out)
        )
    except (KeyError, TypeError):
        return False


def begin(
    folder: Path,
    artifact: Artifact,
    met: Met | None,
    number: int,
    seed: int | None = None,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Let a run of a board begin a round with what the last one became, or with what ``artifact`` holds. What
    it was trained before is over, and what it saw then comes in another order in this round.

    Args:
        folder: the run; made if missing. artifact: this board's. met: the last round; None before the first.
        number: the round. seed: of all randomness; default: that of the state. notes: that are saved with it.
    """
    if met is None:
        slot = read_slot(artifact)
        met = Met(slot.tensors, int(slot.metadata["step"]), int(slot.metadata["seed"]), artifact.classes, {})
    metadata = {"step": str(met.step), "seed": str(met.seed if seed is None else seed), "images": "0"}
    metadata |= {ROUND: str(number), BEGINS: str(met.step), **(notes or {})}
    if is_run_of(folder, artifact):
        with contextlib.suppress(EdgeBcsError):  # none is intact: it began nothing
            saved = read_slot(Artifact.read(folder)).metadata
            metadata |= {name: text for name, text in saved.items() if name == "progress"}
    write_run(folder, artifact, met.state, metadata, met.names)


def open_round(trainer: Trainer) -> Trainer:
    """Return a Trainer that resumes the run of a board, whose next `fit` trains in the round that it is in:
    it goes on with what was begun there, and not with a training of the round before."""
    progress = trainer.metadata().get("progress")
    if progress is not None and parse_object(progress)["first_step"] < int(trainer.notes.get(BEGINS, 0)):
        trainer.begin_anew()
    return trainer
