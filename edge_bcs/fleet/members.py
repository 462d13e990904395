"""The runs that are to become one: what each says of itself, and which cannot take part.

A run is read and verified whole, then kept as a few numbers: one state at a time is in memory, however many
runs there are. What is summed up later is read again, and is refused if it is no longer what was verified.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edge_bcs.core.digest import sha256
from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.metadata import images_seen
from edge_bcs.core.tensor_file import TensorFile
from edge_bcs.data.classes import Names, may_become, shown
from edge_bcs.runtime.archive import Archive, Folder
from edge_bcs.runtime.artifact import Artifact, open_files, verify_files
from edge_bcs.runtime.differences import first_difference
from edge_bcs.runtime.manifest import STATE, describe, parse_manifest
from edge_bcs.runtime.state import layout_of, read_slot

Array = np.ndarray[Any, Any]
OnBad = Literal["stop", "skip"]
Check = Callable[[str, Mapping[str, str]], None]
ROUND, BOARD = "fleet.round", "fleet.board"
"""What a state that a board sent says of itself: the number of the round, and the board's name."""
LARGEST_NORM = 100.0
"""Times the median norm of all clients: one beyond that has diverged, or is meant to."""
LARGEST_WEIGHT = 10.0
"""Times the median weight of all clients: no one weighs more."""
_OF_THE_BOARD = ("density", "algorithm")  # of a layer: how it began, and how this board computes it


@dataclass(frozen=True)
class Member:
    """One run that takes part.

    Attributes:
        path: as it was named. files, slot, sha256: where its state lies, and what was verified.
        step, seed: of that state. images: that its training saw; None if it does not say.
        norms: of its weights (connections and other parameters), and of its running statistics (means and
            standard deviations).
        bytes: of its state. round, board: which it was sent in, by whom; 0 and "" if it was not.
        classes: names of its outputs, None while unknown.
    """

    path: str
    files: Folder | Archive
    slot: str
    sha256: str
    sealed: bool
    step: int
    seed: int
    images: int | None
    norms: tuple[float, float]
    bytes: int
    round: int
    board: str
    classes: Names | None


@dataclass(frozen=True)
class LeftOut:
    """A run that does not take part, and a sentence that says why."""

    path: str
    why: str


class Members:
    """The runs of one network that can be merged.

    Args:
        paths: run folders, or artifacts, in any order.
        reference: the artifact whose network they must have; default: the first run, and with "skip" the
            first that can be read.
        weights: of the runs, in their order; default: the images that each has seen.
        on_bad: what a run does that cannot take part: "stop" raises, "skip" leaves it out.
        between: called with the number of runs that are read.
        check: raises EdgeBcsError for a run that cannot take part for what its metadata say.

    Attributes:
        artifact: the reference. accepted: members, in an order that their content decides, not their names.
        weights: of these, no one more than `LARGEST_WEIGHT` times the median. capped: which had more.
        left_out: the others. classes: names of the outputs, None while unknown.
        images: what all of them have seen: the weights, summed; where others were given, what the runs say,
            and None if not all do.

    Raises EdgeBcsError for a run that cannot take part, and in any case if none can.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        reference: Artifact | None = None,
        weights: Sequence[float] | None = None,
        on_bad: OnBad = "stop",
        between: Callable[[int], None] = lambda done: None,
        check: Check = lambda path, metadata: None,
    ) -> None:
        if weights is not None and len(weights) != len(paths):
            raise EdgeBcsError(
                f"there are {len(weights)} weights for {len(paths)} runs: give one for each, or one for all."
            )
        for weight in weights or ():
            if not 0 < weight < float("inf"):
                raise EdgeBcsError(f"the weight of a run must be a positive number, not {weight:g}.")
        self._on_bad = on_bad
        self.left_out: list[LeftOut] = []
        self._reading = _Reading(reference)
        found: list[tuple[Member, float]] = []
        places: dict[str, str] = {}
        for number, path in enumerate(paths):
            between(number)
            place = os.path.realpath(path)
            try:
                if place in places:
                    raise EdgeBcsError(f"{path} is given twice; give each run once.")
                places[place] = str(path)
                member = self._reading.read(str(path), check)
                found.append((member, _weight(member, None if weights is None else weights[number])))
            except EdgeBcsError as error:
                self._leave_out(str(path), error)
        if reference is None and self._reading.artifact is None:
            raise self._nothing()
        assert self._reading.artifact is not None
        self.artifact = self._reading.artifact
        found = self._of_like_norm(self._of_one_round(found))
        if not found:
            raise self._nothing()
        found.sort(key=lambda pair: (pair[0].sha256, pair[1]))
        self.accepted = [member for member, _ in found]
        given = np.array([weight for _, weight in found])
        limit = LARGEST_WEIGHT * float(np.median(given))
        self.capped = given > limit
        self.weights = np.minimum(given, limit)
        self.classes: Names | None = None if reference is None else reference.classes
        for member in self.accepted:  # of which each was found to agree with the others
            if member.classes is not None and may_become(self.classes, member.classes):
                self.classes = member.classes
        told = [member.images for member in self.accepted if member.images is not None]
        self.images: int | None = round(float(self.weights.sum()))
        if weights is not None:
            self.images = sum(told) if len(told) == len(self.accepted) else None

    def _leave_out(self, path: str, error: EdgeBcsError) -> None:
        if self._on_bad == "stop":
            raise error
        self.left_out.append(LeftOut(path, str(error)))

    def _nothing(self) -> EdgeBcsError:
        first = f"; the first, {self.left_out[0].why}" if self.left_out else ""
        return EdgeBcsError(f"none of the runs can take part{first}".rstrip(".") + ".")

    def _of_one_round(self, found: list[tuple[Member, float]]) -> list[tuple[Member, float]]:
        """Those that were sent in the round of most of them, of the last of several, one of each board; and
        those that were not sent at all."""
        rounds = Counter(member.round for member, _ in found if member.round)
        most = max(rounds, key=lambda number: (rounds[number], number), default=0)
        boards: dict[str, str] = {}
        kept = []
        for member, weight in found:
            why = ""
            if member.round not in (0, most):
                why = f"{member.path} was sent in round {member.round}, and others in round {most}."
            elif member.board and member.board in boards:
                why = f"{member.path} is of board {member.board}, and so is {boards[member.board]}."
            if why:
                self._leave_out(member.path, EdgeBcsError(why))
                continue
            boards[member.board] = member.path
            kept.append((member, weight))
        return kept

    def _of_like_norm(self, found: list[tuple[Member, float]]) -> list[tuple[Member, float]]:
        """Those whose norms are no more than `LARGEST_NORM` times the median of all, of an even number the
        lower one: of two runs, one can then be told to be far larger."""
        for number, what in enumerate(("weights", "running statistics")):
            norms = sorted(member.norms[number] for member, _ in found)
            typical = norms[(len(norms) - 1) // 2] if norms else 0.0
            if typical == 0:  # a network without batch norms
                continue
            for pair in list(found):
                norm = pair[0].norms[number]
                if norm > LARGEST_NORM * typical:
                    found.remove(pair)
                    self._leave_out(
                        pair[0].path,
                        EdgeBcsError(
                            f"the {what} of {pair[0].path} have a norm of {norm:.3g}, {norm / typical:.0f} "
                            "times that of the others (their median): it has diverged or was altered, so "
                            "leave it out (--on-bad skip does)."
                        ),
                    )
        return found

    def tensors(self, *names: str) -> Iterator[tuple[tuple[Array, ...], float]]:
        """Yield these tensors of each member, and its weight: one member in memory at a time."""
        for member, weight in zip(self.accepted, self.weights, strict=True):
            with self._reading_again(member), self._opened(member) as stored:
                arrays = tuple(stored.read(name) for name in names)
                for name, array in zip(names, arrays, strict=True):
                    self._check_again(name, array)
            yield arrays, float(weight)

    def parts(self, member: Member, first: int, end: int, *names: str) -> tuple[Array, ...]:
        """Return the elements [first, end) of these tensors of a member."""
        with self._reading_again(member), self._opened(member) as stored:
            return tuple(stored.read_part(name, first, end) for name in names)

    def _opened(self, member: Member) -> TensorFile:
        stored = TensorFile(member.files.open(member.slot))
        if not member.sealed and stored.metadata.get("sha256") != member.sha256:
            stored.__exit__(None, None, None)
            raise ValueError("it is another state")
        return stored

    def _check_again(self, name: str, array: Array) -> None:
        """Raise ValueError for positions with which sums would go astray."""
        if name == "coo.index" and not (
            array[0] >= 0 and array[-1] < self.artifact.size and np.all(array[1:] > array[:-1])
        ):
            raise ValueError("its positions do not ascend")

    @contextlib.contextmanager
    def _reading_again(self, member: Member) -> Iterator[None]:
        """Make one sentence of what shows that a state is no longer what was verified."""
        try:
            yield
        except (OSError, ValueError) as error:
            raise EdgeBcsError(
                f"{member.path} was written to while it was being merged ({error}): wait for its training, "
                "or copy it."
            ) from None


def round_of(metadata: Mapping[str, str]) -> int:
    """Return the number of the round that a state says it belongs to; 0 for none."""
    text = metadata.get(ROUND, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0


def _weight(member: Member, given: float | None) -> float:
    if given is not None:
        return given
    if member.images is None:
        raise EdgeBcsError(
            f"{member.path} does not say how many images its training saw (no training wrote it, or one of "
            "an earlier release): say with --weight how much each run counts."
        )
    if not member.images:
        raise EdgeBcsError(f"{member.path} has seen no image since its training began; leave it out.")
    return float(member.images)


class _Reading:
    """Reads one run after the other, holding each against the first.

    Attributes:
        artifact: whose network all must have; None before the first.
    """

    def __init__(self, reference: Artifact | None) -> None:
        self.artifact, self._classes = reference, None if reference is None else reference.classes
        self._content, self._parsed = b"", reference
        self._into: dict[str, Array] = {}
        self._fixed: str | None = None

    def read(self, path: str, check: Check) -> Member:
        """Return a run as a member; EdgeBcsError if it cannot take part."""
        if not os.path.lexists(path):  # what others say of it is for artifacts, which are exported
            raise EdgeBcsError(f"the run {path} does not exist.")
        files, content = open_files(Path(path))
        if content != self._content or self._parsed is None:
            manifest = parse_manifest(files.path, content)
            parsed = Artifact(**vars(describe(manifest)), path=files.path, files=files)
            self._check_network(parsed, path)
            self._content, self._parsed = content, parsed
        artifact = Artifact(**{**vars(self._parsed), "path": files.path, "files": files})
        if STATE in artifact.manifest["files"]:
            verify_files(files, artifact.manifest, STATE)
        classes = self._classes_with(artifact.classes, path)
        if not self._into or self.artifact is None:
            self._into = {
                name: np.empty(length, kind) for name, (kind, length) in layout_of(artifact).items()
            }
        slot = read_slot(artifact, self._into)
        check(path, slot.metadata)
        fixed = self._digest_of_fixed(artifact)
        if self._fixed not in (None, fixed):
            raise EdgeBcsError(
                f"{path} differs from the other runs in what --train {artifact.trained.part.text} leaves as "
                "it is: they did not begin with the same network."
            )
        self._fixed, self._classes = fixed, classes
        if self.artifact is None:
            self.artifact = artifact
        return Member(
            path=path,
            files=files,
            slot=slot.name,
            sha256=slot.sha256,
            sealed=STATE in artifact.manifest["files"],
            step=int(slot.metadata["step"]),
            seed=int(slot.metadata["seed"]),
            images=images_seen(slot.metadata),
            norms=_norms(self._into),
            bytes=files.size(slot.name) or 0,
            round=round_of(slot.metadata),
            board=slot.metadata.get(BOARD, ""),
            classes=artifact.classes,
        )

    def _check_network(self, found: Artifact, path: str) -> None:
        """Raise EdgeBcsError unless a run has the network of the first one, κ and what is trained included.
        How a board computes it (memory, micro-batches, kernels) and how it is trained may differ."""
        if self.artifact is None:
            return
        ours = _network(self.artifact)
        difference = first_difference(_network(found), ours, list(ours))
        if difference is not None:
            where, one, other = difference
            raise EdgeBcsError(
                f"{path} cannot be merged with {self.artifact.path}, which holds another network: {where} is "
                f"{one} in the former and {other} in the latter."
            )

    def _classes_with(self, found: Names | None, path: str) -> Names | None:
        if found is None or (self._classes is not None and may_become(found, self._classes)):
            return self._classes
        if may_become(self._classes, found):
            return found
        assert self._classes is not None
        raise EdgeBcsError(
            f"{path} cannot be merged with runs that have other classes: it has {shown(found)}; they have "
            f"{shown(self._classes)}."
        )

    def _digest_of_fixed(self, artifact: Artifact) -> str | None:
        """sha256 of the connections and parameters that are not trained; None where all are."""
        trained = artifact.trained
        if trained.part.everything:
            return None
        digest = sha256()
        still = ~trained.connections(self._into["coo.index"])
        digest.update(self._into["coo.index"][still].tobytes())
        digest.update(self._into["coo.value"][still].tobytes())
        digest.update(self._into["dense.value"][~trained.numbers(artifact.dense_size)].tobytes())
        return digest.hexdigest()


def _network(artifact: Artifact) -> dict[str, Any]:
    """What of a manifest runs must have in common."""
    manifest = artifact.manifest
    layers = [
        {name: list(value) if isinstance(value, tuple) else value for name, value in vars(layer).items()}
        for layer in artifact.layers
    ]
    for layer in layers:
        for name in _OF_THE_BOARD:
            del layer[name]
    alike = ("network", "sparsity", "kappa", "size", "dense", "statistics")
    trained = artifact.trained
    return {
        **{name: manifest[name] for name in alike},
        "train": None if trained.part.everything else trained.described(),
        "layers": layers,
    }


def _norms(state: dict[str, Array]) -> tuple[float, float]:
    def squares(*names: str) -> float:
        return sum(float(np.square(state[name], dtype=np.float64).sum()) for name in names)

    spread = float(state["batchnorm.variance"].sum(dtype=np.float64))
    weights = squares("coo.value", "dense.value")
    return float(np.sqrt(weights)), float(np.sqrt(squares("batchnorm.mean") + spread))
