"""Runs of one network made one.

| of the merged run | what |
| --- | --- |
| connections | by the rule (`edge_bcs.fleet.rule`): exactly κ, and in the trained layers as many as ever |
| other parameters, running statistics | the weighted average over the runs |
| momentum | 0: the velocities of networks that have moved apart point nowhere |
| step | the largest of the runs: no random number is drawn twice, and none goes back |
| seed | that of the runs; the smallest, where they differ |
| images | what the runs have seen, as far as it counted: their weight in a merger of mergers |
| graphs, settings, memory plan | those of the first run that was given |
| place in a training | none: what trains it begins a new one |

A run that was trained in part has momentum, 0 again, of that part alone; the rest is the same in all runs,
and stays. Every sum is taken in an order that the runs' content decides (their sha256), so their names and
the order in which they are given change no bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import write_json
from edge_bcs.core.locks import FolderLock
from edge_bcs.core.part import merged as touching
from edge_bcs.core.progress import Progress
from edge_bcs.core.segments import Segment
from edge_bcs.fleet.members import Members, OnBad
from edge_bcs.fleet.rule import Group, Kept, as_weights, average, median, merge_connections
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.manifest import MANIFEST
from edge_bcs.runtime.state import layout_of, write_run

Array = np.ndarray[Any, Any]
REPORT = "merge.json"
ROBUST = ("median",)
_AVERAGED = ("dense.value", "batchnorm.mean", "batchnorm.variance")
BLOCK = 64 << 20
"""Bytes of the numbers of all runs that lie side by side while medians are taken."""


def merge(
    runs: Sequence[str | Path],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    robust: str | None = None,
    on_bad: OnBad = "stop",
    progress: bool = False,
) -> dict[str, Any]:
    """Make one run of several, and return a report of it, which is also in `merge.json` of its folder.

    Args:
        runs: at least two run folders of one network, in any order. output: a new folder.
        weights: how much each run counts, in their order; default: the images that its training saw. None
            counts more than ten times the median.
        robust: "median": the positions are those of the rule, and each value is the median over the runs that
            hold it, of the other parameters over all runs. None: the mean.
        on_bad: what a run does that cannot take part (damaged, not finite, of another network, a hundred
            times the norm of the others): "stop" raises, "skip" leaves it out.
        progress: show on standard error how far it is.

    Returns:
        "run"; "kappa", "size"; "runs", each with its "run", "weight", "capped", "images", "step", "kept" (its
        connections that stayed) and "alone" (of these, those that no other run holds); "left_out", each with
        "run" and "why"; "overlap" ("union", "common" and, of κ, the "pairwise" mean share that two runs have
        in common); "robust"; "bytes" of all states that were "read", of a run's positions and values
        ("connections"), and of a "dense" network.

    Raises EdgeBcsError for runs that cannot be merged, a folder that holds anything, and a full disk.
    """
    if len(runs) < 2:
        raise EdgeBcsError("merging takes two runs or more.")
    if robust not in (None, *ROBUST):
        raise EdgeBcsError(f"robust is 'median' or None, not {robust!r}.")
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise EdgeBcsError(f"{folder} is a file; choose a folder for the run.")
    with FolderLock(folder, again=False):
        for name in (MANIFEST, REPORT):
            if (folder / name).exists():
                raise EdgeBcsError(
                    f"{folder} already holds a {name}; choose another folder for the merged run."
                )
        with Progress("reading runs", len(runs), unit="runs", shown=progress) as bar:
            members = Members(runs, weights=weights, on_bad=on_bad, between=bar.update)
        tensors, metadata, report = merged_state(members, robust=robust, progress=progress)
        write_run(folder, members.artifact, tensors, metadata, members.classes)
        report = {"run": str(folder), **report}
        write_json(folder / REPORT, report)
    return report


def merged_state(
    members: Members, *, robust: str | None = None, progress: bool = False
) -> tuple[dict[str, Array], dict[str, str], dict[str, Any]]:
    """Return what members become: (tensors, metadata, report), see `merge`; the report has no "run"."""
    artifact, count = members.artifact, len(members.accepted)
    seed = min(member.seed for member in members.accepted)

    def connections() -> Iterator[tuple[Array, Array, float]]:
        for (index, value), weight in members.tensors("coo.index", "coo.value"):
            yield index, value, weight

    with Progress("merging", shown=progress):
        kept = merge_connections(connections, count, artifact.size, groups_of(artifact), seed)
        value = kept.value
        if robust is None:
            averaged = average(members.tensors(*_AVERAGED))
        else:
            value = as_weights(_median_of_holders(members, kept.index), kept.index, seed)
            averaged = [_median_of_all(members, name) for name in _AVERAGED]
        report = _report(members, kept, robust)
    tensors = {name: np.zeros(length, kind) for name, (kind, length) in layout_of(artifact).items()}
    tensors["coo.index"][...] = kept.index
    tensors["coo.value"][...] = value
    for name, array in zip(_AVERAGED, averaged, strict=True):
        tensors[name][...] = array
    metadata = {
        "step": str(max(member.step for member in members.accepted)),
        "seed": str(seed),
    }
    if members.images is not None:
        metadata["images"] = str(members.images)
    return tensors, metadata, report


def groups_of(artifact: Artifact) -> list[Group]:
    """The parts of a network that each keep their number of connections: what is trained, and the rest."""
    trained = artifact.trained
    if trained.part.everything:
        return [Group([(0, artifact.size)], artifact.kappa)]
    moving = {kernel.name for kernel in trained.kernels}
    still: list[Segment] = [layer for layer in artifact.layers if layer.name not in moving]
    return [
        Group(touching(trained.kernels), trained.kappa),
        Group(touching(still), artifact.kappa - trained.kappa),
    ]


def _median_of_holders(members: Members, index: Array) -> Array:
    """The median f64[κ] of each of the positions ``index`` over the members that hold it."""
    width = max(1, BLOCK // (4 * len(members.accepted)))
    bounds = [*index[::width].tolist(), members.artifact.size]
    places = np.array(
        [
            np.searchsorted(found, np.array(bounds, found.dtype))
            for (found,), _ in members.tensors("coo.index")
        ]
    )
    medians = []
    for block in range(len(bounds) - 1):
        wanted = index[block * width : (block + 1) * width]
        columns = np.full((len(places), len(wanted)), np.nan, np.float32)
        for row, member in enumerate(members.accepted):
            first, last = places[row, block], places[row, block + 1]
            found, value = members.parts(member, first, last, "coo.index", "coo.value")
            wanted = wanted.astype(found.dtype, copy=False)
            where = np.minimum(np.searchsorted(wanted, found), len(wanted) - 1)
            held = wanted[where] == found
            columns[row, where[held]] = value[held]
        medians.append(median(columns))
    return np.concatenate(medians)


def _median_of_all(members: Members, name: str) -> Array:
    """The median f32 of each element of a tensor over all members."""
    length = layout_of(members.artifact)[name][1]
    width = max(1, BLOCK // (4 * len(members.accepted)))
    medians = np.empty(length, np.float32)
    for first in range(0, length, width):
        last = min(first + width, length)
        columns = np.empty((len(members.accepted), last - first), np.float32)
        for row, member in enumerate(members.accepted):
            (columns[row],) = members.parts(member, first, last, name)
        medians[first:last] = median(columns)
    return medians


def _report(members: Members, kept: Kept, robust: str | None) -> dict[str, Any]:
    artifact, count = members.artifact, len(members.accepted)
    stays = np.zeros(artifact.size, np.uint8)  # 1: kept; 2: kept, and only one run holds it
    stays[kept.index] = np.where(kept.holders == 1, 2, 1)
    rows = []
    for member, weight, capped, ((index,), _) in zip(
        members.accepted, members.weights, members.capped, members.tensors("coo.index"), strict=True
    ):
        found = stays[index]
        rows.append(
            {
                "run": member.path,
                "weight": float(weight),
                "capped": bool(capped),
                "images": member.images,
                "step": member.step,
                "kept": int(np.count_nonzero(found)),
                "alone": int(np.count_nonzero(found == 2)),
            }
        )
    pairs = count * (count - 1) // 2
    return {
        "kappa": artifact.kappa,
        "size": artifact.size,
        "robust": robust,
        "runs": sorted(rows, key=lambda row: str(row["run"])),
        "left_out": [{"run": one.path, "why": one.why} for one in members.left_out],
        "overlap": {
            "union": kept.union,
            "common": kept.common,
            "pairwise": kept.shared / (pairs * artifact.kappa) if pairs else 1.0,
        },
        "bytes": {
            "read": sum(member.bytes for member in members.accepted),
            "connections": 8 * artifact.kappa,
            "dense": 4 * artifact.size,
        },
    }
