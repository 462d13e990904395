"""The measured half of the simulator: runs an artifact in a process of its own and tells what it took.

`python -m edge_bcs.targets.host_run` reads one JSON request from standard input and writes one JSON
answer. A fresh process, because resident memory is only meaningful where nothing else has run.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from typing import Any

from edge_bcs.runtime.board.process import resident_peak, waited_for_cores


def measure(path: str, memory: int | None, threads: int, seconds: float) -> dict[str, Any]:
    """Train for at least one step on noise and return peaks and times.

    Args:
        path: the artifact. memory: cap on the working set in bytes. threads: of each graph.
        seconds: about how long to train; a step that takes longer is timed on a part of its micro-batches.
    """
    import numpy as np
    from edge_bcs.runtime import Trainer
    from edge_bcs.runtime.budget import isa

    from edge_bcs.core import random

    from .roofline import step_runs

    libraries = resident_peak()
    with Trainer(path, memory=memory, threads=threads) as trainer:
        # Noise teaches nothing: steps of length zero measure the same memory and cannot diverge.
        trainer.learning_rate = trainer.weight_decay = 0.0
        artifact, engine = trainer.artifact, trainer._engine
        peaks = {"lists": engine.budget.peak}
        taken: dict[str, list[float]] = {}
        run = engine.run

        def recorded(graph: str) -> None:
            engine.budget.reset_peak()
            began = time.perf_counter()
            run(graph)
            taken.setdefault(graph, []).append(time.perf_counter() - began)
            peaks[graph] = max(peaks.get(graph, 0), engine.budget.peak)

        engine.run = recorded  # type: ignore[method-assign]

        def batch(count: int) -> tuple[Any, Any]:
            shape = (count, *artifact.input_shape)
            pixels = random.uniform(math.prod(shape), seed=0, step=0, purpose=random.EVALUATION)
            return pixels.reshape(shape), np.arange(count) % artifact.num_classes

        parts = -(-artifact.batch_size // artifact.micro_batch)
        x, y = batch(min(artifact.micro_batch, artifact.batch_size))
        trainer.logits(x)
        began = time.perf_counter()
        trainer.step(x, y)  # not counted: memory is touched and threads are started here
        once = time.perf_counter() - began
        timed = max(1, min(parts, int(seconds / max(once, 1e-6))))
        x, y = batch(min(artifact.batch_size, timed * artifact.micro_batch))
        steps = max(1, min(3, int(seconds / max(once * timed, 1e-6))))
        taken.clear()
        began, waited = time.perf_counter(), waited_for_cores()
        for _ in range(steps):
            metrics = trainer.step(x, y)
        elapsed, waited = time.perf_counter() - began, waited_for_cores() - waited
        runs = {graph: len(each) // steps for graph, each in taken.items()}
        if timed < parts:
            runs |= step_runs(artifact)
        # The median, because other work on the machine takes a core away for a while now and then.
        spent = {graph: runs[graph] * statistics.median(each) for graph, each in taken.items()}
        beside = (elapsed - sum(map(sum, taken.values()))) / steps * parts / timed
        return {
            "peak_bytes": max(peaks.values()),
            "phases": {
                graph: {
                    "peak_bytes": peak,
                    "seconds_per_step": spent.get(graph, 0.0),
                    "runs_per_step": runs.get(graph, 0),
                }
                for graph, peak in peaks.items()
            },
            "seconds_per_step": sum(spent.values()) + beside,
            "cores_share": max(0.0, 1 - waited / elapsed / trainer.threads),
            "timed_micro_batches": timed,
            "micro_batches_per_step": parts,
            "steps": steps,
            "loss": metrics["loss"],
            "threads": trainer.threads,
            "isa": isa(),
            "exact": trainer.memory()["exact"],
            "rss_libraries_bytes": libraries,
            "rss_peak_bytes": resident_peak(),
        }


def main() -> None:
    """Serve one request; an error is an answer too."""
    from edge_bcs.runtime.budget import BudgetExceeded

    from edge_bcs.core.errors import EdgeBcsError

    request = json.loads(sys.stdin.read())
    try:
        answer = measure(**request)
    except BudgetExceeded as error:
        answer = {"refused": str(error), "rss_peak_bytes": resident_peak()}
    except EdgeBcsError as error:
        answer = {"error": str(error)}
    except MemoryError:
        answer = {
            "refused": "the process reached the memory limit of the board",
            "rss_peak_bytes": resident_peak(),
        }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
