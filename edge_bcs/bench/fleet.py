"""`python -m edge_bcs.bench.fleet`: what it takes to merge many runs, and what a tree of mergers changes.

Synthetic runs of ResNet-18, 99 % sparse: the artifact is a real one, the states are drawn. In a fleet that is
*near*, all runs begin with one network and have moved a twentieth of its connections, each to places of its
own, and every weight a little; in one that is *apart*, nothing is in common, which is the worst case of
memory and time. Each merger runs in a process of its own, whose time and highest memory are read. Writes
`fleet.json` and a README to the folder named first. The artifact needs the host's compiler; a run takes
1.5 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.files import write_atomically, write_json
from edge_bcs.core.outputs import check_outputs, json_with
from edge_bcs.core.progress import Progress
from edge_bcs.fleet.wire import coded
from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.state import layout_of, read_state, write_run

Array = np.ndarray[Any, Any]
KINDS = ("near", "apart")
MOVED = 0.05
"""Share of the connections of a near run that lie where only it has them."""
_MERGE = """
import json, sys, time
from edge_bcs.fleet.merging import merge
from edge_bcs.runtime.board.process import resident_peak
runs, output, robust = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3] or None
if isinstance(runs, str):
    runs = json.loads(open(runs).read())
before, began, worked = resident_peak(), time.perf_counter(), time.process_time()
report = merge(runs, output, robust=robust)
print(json.dumps({"seconds": time.perf_counter() - began, "processor_seconds": time.process_time() - worked,
                  "peak_bytes": resident_peak(), "before_bytes": before, "overlap": report["overlap"]}))
"""


@lru_cache(1)
def beginning(kappa: int, size: int) -> tuple[Array, Array]:
    """Positions and values that the runs of a near fleet begin with."""
    rng = np.random.default_rng(0)
    return np.sort(rng.choice(size, kappa, replace=False)), rng.normal(size=kappa)


def drawn(artifact: Artifact, kind: str, seed: int) -> dict[str, Array]:
    """Return the state of one run of a fleet."""
    rng = np.random.default_rng([seed, 1])
    kappa, size = artifact.kappa, artifact.size
    state = {name: np.zeros(length, dtype) for name, (dtype, length) in layout_of(artifact).items()}
    if kind == "apart":
        index = np.sort(rng.choice(size, kappa, replace=False))
        value = rng.normal(size=kappa)
    else:
        index, value = (array.copy() for array in beginning(kappa, size))
        count = round(MOVED * kappa)
        moved = np.argpartition(np.abs(value) + rng.random(kappa), count)[:count]  # the small ones, mostly
        free = rng.choice(size, 2 * count, replace=False)
        free = free[index[np.minimum(np.searchsorted(index, free), kappa - 1)] != free][:count]
        value = value + 0.2 * rng.normal(size=kappa)
        index[moved], value[moved] = free, 0.2 * rng.normal(size=count)
        order = np.argsort(index)
        index, value = index[order], value[order]
    state["coo.index"][...], state["coo.value"][...] = index, value
    state["dense.value"][...] = 1 + 0.1 * rng.normal(size=artifact.dense_size)
    state["batchnorm.mean"][...] = rng.normal(size=artifact.statistics_size)
    state["batchnorm.variance"][...] = rng.random(artifact.statistics_size)
    return state


def write_fleet(folder: Path, artifact: Artifact, kind: str, count: int) -> list[str]:
    """Write so many runs below ``folder`` and return their names."""
    runs = []
    with Progress(f"writing runs ({kind})", count, unit="runs") as bar:
        for number in range(count):
            run = folder / f"{kind}-{number:05}"
            metadata = {"step": "100", "seed": "0", "images": str(1000 + number % 7)}
            write_run(run, artifact, drawn(artifact, kind, number), metadata)
            runs.append(str(run))
            bar.update(number + 1)
    return runs


def _linked(run: Path, like: Path) -> str:
    """Make a run of links to another's files, and return its name."""
    run.mkdir()
    for file in like.iterdir():
        os.link(file, run / file.name)
    return str(run)


def measured(runs: list[str], output: Path, robust: str = "") -> dict[str, Any]:
    """Merge runs in a process of its own and return what that took."""
    names = output.with_suffix(".json")
    write_json(names, runs)
    words = [sys.executable, "-c", _MERGE, json.dumps(str(names)), str(output), robust]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EdgeBcsError(f"a merger failed: {done.stderr.strip().splitlines()[-1]}.")
    result: dict[str, Any] = json.loads(done.stdout)
    return {"runs": len(runs), "robust": robust or None, **result}


def scale(
    folder: Path, fleets: dict[str, list[str]], most: int, repetitions: int
) -> Iterator[dict[str, Any]]:
    """Merge ever more runs of each fleet: 10, 100, … up to ``most``. Beyond the runs that there are, the same
    states come under other names. Of several measurements the fastest counts."""
    for kind, runs in fleets.items():
        known = list(runs)
        counts = [10**power for power in range(1, 9) if 10**power <= most]
        for count in counts:
            while len(known) < count:
                known.append(
                    _linked(folder / f"{kind}-again-{len(known):05}", Path(runs[len(known) % len(runs)]))
                )
            for robust in ("", "median") if count <= len(runs) else ("",):
                output = folder / f"{kind}-{count}-{robust or 'mean'}"
                times = 1 if count > len(runs) else repetitions
                found = [
                    measured(known[:count], output.with_name(f"{output.name}-{n}"), robust)
                    for n in range(times)
                ]
                yield {"kind": kind, **min(found, key=lambda one: float(one["seconds"]))}


def trees(
    folder: Path, fleets: dict[str, list[str]], shapes: list[tuple[int, int]]
) -> Iterator[dict[str, Any]]:
    """Merge groups of runs, then what they became, and compare that with one merger of all."""
    for kind, runs in fleets.items():
        for groups, size in shapes:
            chosen = runs[: groups * size]
            place = folder / f"tree-{kind}-{groups}-{size}"
            place.mkdir()
            measured(chosen, place / "flat")
            parts = [str(place / f"part-{number}") for number in range(groups)]
            for number, part in enumerate(parts):
                measured(chosen[number * size : (number + 1) * size], Path(part))
            measured(parts, place / "tree")
            flat, tree = (read_state(Artifact.read(place / name))[0] for name in ("flat", "tree"))
            yield {"kind": kind, "groups": groups, "size": size, **difference(flat, tree)}


def difference(flat: dict[str, Array], tree: dict[str, Array]) -> dict[str, float]:
    """How far two states of one network lie apart: the share of positions that they have in common, and the
    norm of the difference of all weights, and of those that both have, beside the norm of the former."""
    common, ours, theirs = np.intersect1d(
        flat["coo.index"], tree["coo.index"], assume_unique=True, return_indices=True
    )
    one, other = flat["coo.value"].astype(np.float64), tree["coo.value"].astype(np.float64)
    norm = float(np.linalg.norm(one))
    both = float(np.linalg.norm(one[ours] - other[theirs]))
    alone = float(np.sum(np.delete(one, ours) ** 2) + np.sum(np.delete(other, theirs) ** 2))
    return {
        "positions_in_common": len(common) / len(one),
        "difference": float(np.sqrt(both**2 + alone)) / norm,
        "difference_in_common": both / norm,
    }


def wire(artifact: Artifact, state: dict[str, Array]) -> dict[str, int]:
    """Bytes of what one board tells of a round: plain, and with positions as the distance from the one
    before, seven bits a byte."""
    index, value = state["coo.index"], state["coo.value"]
    gaps = coded(index)
    rest = 4 * (artifact.dense_size + 2 * artifact.statistics_size)
    return {
        "dense": 4 * artifact.size + rest,
        "values": value.nbytes,
        "indices": index.nbytes,
        "indices_delta_coded": len(gaps),
        "indices_zlib": len(zlib.compress(gaps.tobytes(), 6)),
        "other": rest,
        "state_file": state_file(artifact, state),
    }


def state_file(artifact: Artifact, state: dict[str, Array]) -> int:
    """Bytes of a saved state, momentum included."""
    with tempfile.TemporaryDirectory() as folder:
        return write_run(
            Path(folder) / "run", artifact, state, {"step": "100", "seed": "0", "images": "1000"}
        )


def _export(folder: Path) -> Artifact:
    from edge_bcs import Memory, export, models
    from edge_bcs.method import connectivity

    sparse = connectivity.sparsify(models.create("resnet18"), sparsity=0.99, seed=0)
    export(sparse, folder, "at", (3, 32, 32), memory=Memory(micro_batch=8), validate=False)
    return Artifact.read(folder)


def measure(artifact: Artifact, folder: Path, runs: int, most: int, repetitions: int) -> dict[str, Any]:
    """Measure everything with so many runs of each kind, and mergers of up to ``most``."""
    fleets = {kind: write_fleet(folder, artifact, kind, runs) for kind in KINDS}
    side = min(10, max(2, int(runs**0.5)))
    shapes = (
        [(side, side)]
        if runs < 10 * side * side
        else [(side, side), (side, runs // side), (runs // side, side)]
    )
    with Progress("merging"):
        return {
            "network": artifact.network,
            "kappa": artifact.kappa,
            "size": artifact.size,
            "scale": list(scale(folder, fleets, most, repetitions)),
            "trees": list(trees(folder, fleets, shapes)),
            "wire": wire(artifact, read_state(Artifact.read(fleets["near"][0]))[0]),
        }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description="What it takes to merge many runs.")
    parser.add_argument("output", type=Path, help="folder for the figures")
    parser.add_argument("--artifact", type=Path, help="default: ResNet-18, which is exported first")
    parser.add_argument("--runs", type=int, default=1000, help="of each kind")
    parser.add_argument("--most", type=int, default=10_000, help="runs of the largest merger")
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    ours = json_with("scale", "trees", "wire")
    try:
        check_outputs(arguments.output, ("README.md",), "fleet.json", ours, "measurement of this kind")
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            given = arguments.artifact
            artifact = _export(folder / "artifact") if given is None else Artifact.read(given)
            result = measure(artifact, folder, arguments.runs, arguments.most, arguments.repetitions)
    except EdgeBcsError as error:
        sys.exit(f"Error: {error}")
    result = {"date": str(date.today()), "machine": platform.machine(), "numpy": np.__version__, **result}
    write_json(arguments.output / "fleet.json", result, make_folder=True)
    write_atomically(arguments.output / "README.md", readme(result).encode())


_README = """# Merging many runs

`make fleet`, {date}, one process of {machine}, numpy {numpy}.
{network}, {kappa:,} connections of {size:,}. The states are drawn, not learnt. *Near*: all began with one
network, and each has moved a twentieth of its connections to places of its own. *Apart*: they have nothing
in common, the worst case.

## Time and memory

`edge-bcs merge`; the files lie in memory. Aimed at: 1,000 runs in 10 seconds and 400 MB.

| runs | fleet | values | seconds | of the processor | highest memory | positions in any run |
| ---: | --- | --- | ---: | ---: | ---: | ---: |
{scale}
{shared}
Memory hardly grows with the runs, nor beyond this with the network: 4 million positions are summed up at a
time. Mergers of more than {runs:,} runs have the states of these, each under several names.

## What a board sends in a round

| | bytes |
| --- | ---: |
| dense weights and the rest | {wire[dense]:,} |
| values, positions and the rest | {plain:,} |
| the same, positions as distances (7 bits a byte) | {coded:,} |
| the same, compressed (zlib) | {packed:,} |
| the state file of a run, with momentum | {wire[state_file]:,} |

Over Flower positions go as distances, uncompressed; a message adds less than a thousand bytes of its own.
What a server with a round an hour receives, and sends, in a day:

| | a board | 1,000 boards | 10,000 boards |
| --- | ---: | ---: | ---: |
{days}

## A tree of mergers

Merging is not associative: what a group has dropped, the next merger does not see. Groups are merged, then
what they became; this is compared with one merger of all runs.

| fleet | groups | runs each | positions in common | difference, of the weights' norm | where both have them |
| --- | ---: | ---: | ---: | ---: | ---: |
{trees}
"""


_SHARED = """
Other processes had most of this machine meanwhile: a merger waited for them, so what counts is the time of
the processor.
"""


def readme(result: dict[str, Any]) -> str:
    """Return the page of the figures."""
    wire = result["wire"]
    plain = wire["values"] + wire["indices"] + wire["other"]
    as_gaps = plain - wire["indices"] + wire["indices_delta_coded"]
    rows = [
        f"| {one['runs']:,} | {one['kind']} | {one['robust'] or 'mean'} | {one['seconds']:.1f} | "
        f"{one['processor_seconds']:.1f} | {one['peak_bytes'] / 1e6:.0f} MB | {one['overlap']['union']:,} |"
        for one in result["scale"]
    ]
    trees_ = [
        f"| {one['kind']} | {one['groups']} | {one['size']} | {100 * one['positions_in_common']:.1f} % | "
        f"{100 * one['difference']:.1f} % | {100 * one['difference_in_common']:.1f} % |"
        for one in result["trees"]
    ]
    waits = max(one["seconds"] / one["processor_seconds"] for one in result["scale"])
    distinct = max(one["runs"] for one in result["scale"] if one["robust"])
    return _README.format(
        **{name: result[name] for name in ("date", "machine", "numpy", "network", "kappa", "size", "wire")},
        scale="\n".join(rows),
        trees="\n".join(trees_),
        runs=distinct,
        shared=_SHARED if waits > 2 else "",
        plain=plain,
        coded=as_gaps,
        packed=plain - wire["indices"] + wire["indices_zlib"],
        days="\n".join(
            f"| {what} | {24 * size / 1e6:,.1f} MB | {24 * size / 1e6:,.1f} GB | {240 * size / 1e6:,.0f} GB |"
            for what, size in (
                ("positions as distances", as_gaps),
                ("positions as they are", plain),
                ("dense", wire["dense"]),
            )
        ),
    )


if __name__ == "__main__":
    main()
