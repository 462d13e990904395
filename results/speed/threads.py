"""How evenly the parts of each operator would fall on more threads than a machine has.

    EBC_LOG=log EDGE_BCS_LIBRARY=… python results/speed/threads.py vgg16 0.99 paper 32 half attack

Runs passes of a graph on one thread with a library that notes how long each part takes (threads.patch, which
also takes `enough_tasks` from EBC_TASKS), and deals the parts out as `runtime/native/runner/pool.cpp` does: a
share for each thread, what is left of the others' shares afterwards. Prints the sum of the parts' medians,
and by how much so many threads divide it. It knows nothing of caches and memory that threads share, nor of
what starting a job costs.
"""

from __future__ import annotations

import heapq
import os
import statistics
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from edge_bcs.runtime.artifact import Artifact
from edge_bcs.runtime.attack import craft
from edge_bcs.runtime.engines import open_engine

from edge_bcs.bench.step import batch_of, exported

PASSES, PIECES = 9, 16
THREADS = (2, 4, 6, 8)


def makespan(parts: Sequence[float], threads: int) -> float:
    """Until the last of the threads is done."""
    count = len(parts)
    if count == 1:
        return parts[0]
    taken = max(1, count // (PIECES * threads))
    left = [count * thread // threads for thread in range(threads)]
    ends = [count * (thread + 1) // threads for thread in range(threads)]
    free = [(0.0, thread) for thread in range(threads)]
    done = 0.0
    while free:
        now, thread = heapq.heappop(free)
        shares = [(thread + other) % threads for other in range(threads)]
        share = next((share for share in shares if left[share] < ends[share]), None)
        if share is None:
            done = max(done, now)
            continue
        first, left[share] = left[share], min(ends[share], left[share] + taken)
        heapq.heappush(free, (now + sum(parts[first : left[share]]), thread))
    return done


def jobs(log: Path, begin: int) -> list[list[float]]:
    """The parts of each job of a pass, medians over `PASSES`."""
    lines = log.read_bytes()[begin:].decode().splitlines()
    noted = [[float(word) for word in line.split()[1:]] for line in lines]
    length = len(noted) // PASSES
    return [
        [statistics.median(times) for times in zip(*noted[job::length], strict=True)] for job in range(length)
    ]


def main() -> None:
    """Measure and deal out."""
    model, sparsity, densities, images, precision, graph = sys.argv[1:]
    log, batch = Path(os.environ["EBC_LOG"]), int(images)
    pixels, labels = batch_of(batch, 32)
    with exported(model, float(sparsity), densities, 32, batch, lambda _: None, batch, 1) as (folder, _):
        engine = open_engine("native", Artifact.read(folder), None, 1, half=precision == "half")
        with closing(engine):
            engine.load(pixels, labels, 1.0 / batch)
            craft(engine, 0, batch, seed=0, step=0)
            engine.run(graph)
            begin = log.stat().st_size
            for _ in range(PASSES):
                engine.run(graph)
    found = jobs(log, begin)
    total = sum(map(sum, found))
    divided = {threads: total / sum(makespan(parts, threads) for parts in found) for threads in THREADS}
    print(f"{total / 1e6:.2f} ms;", ", ".join(f"{threads}: {by:.2f}" for threads, by in divided.items()))


if __name__ == "__main__":
    main()
